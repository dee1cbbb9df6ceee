"""Draws what the app shows: enlarged images, heatmaps over them, and their colours."""

import os

import numpy as np
from PIL import Image

from checks import check_number
from models.explain import colorize, overlay

# An image uint8 RGB (32, 32, 3), a heatmap (32, 32) in [0, 1] to draw over it or None, a caption.
Panel = tuple[np.ndarray, np.ndarray | None, str]


def draw(image: np.ndarray, cam: np.ndarray | None = None, opacity: float = 0) -> Image.Image:
    """Draw a panel of 256x256.

    Args:
        image: uint8 RGB (32, 32, 3), enlarged so that its pixels are visible.
        cam: a heatmap (32, 32) in [0, 1] to draw over it, or None.
        opacity: of the heatmap, in [0, 1].
    """
    pixels = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST))
    if cam is not None:
        cam = np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR))
        blended = overlay(pixels / 255, np.clip(cam, 0, 1), opacity)
        pixels = np.round(255 * blended).astype(np.uint8)
    picture = Image.fromarray(pixels)
    # Gradio rewrites the file of an equal picture while others may read it.
    picture.info["id"] = os.urandom(8).hex()
    return picture


def blend(panels: list[Panel], opacity: float) -> list[tuple[Image.Image, str]]:
    """Return the pictures of a gallery with their captions, each heatmap over its image."""
    check_number(opacity, 0, 1, "Opacity")
    return [(draw(image, cam, opacity), caption) for image, cam, caption in panels]


def colour_bar() -> str:
    """Return the colours of the heatmaps as HTML."""
    colours = np.round(255 * colorize(np.linspace(0, 1, 17)[None])[0]).astype(int)
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)
    name = "The colours of the heatmaps: black, purple, red, orange, pale yellow"
    style = f"background: linear-gradient(90deg, {stops})"
    bar = f'<div role="img" aria-label="{name}" style="{style}"></div>'
    return f'<div class="colour-bar">least evidence {bar} most evidence</div>'
