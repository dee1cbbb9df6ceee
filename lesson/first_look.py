"""The first thing a reader sees: a trained network on ten pictures, and where it looked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from dataload import IMAGE_SIZE, normalize
from evaluation.drawing import (
    WIDTH,
    format_confidence,
    headline,
    new_image_grid,
    show_image,
    styled,
)
from models import explain
from models.stage import Network


def square(picture: Image.Image) -> np.ndarray:
    """Return the square in a picture's middle as a network sees it: uint8 RGB (32, 32, 3).

    What is transparent is white.
    """
    if picture.mode.startswith("I"):  # grey in 16 bits, of which `convert` would make white
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture).convert("RGB")
    return np.array(ImageOps.fit(opaque, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def read_pictures(folder: str | Path, classes: Sequence[str]) -> np.ndarray:
    """Read a picture of each class, <class>.png, as the square of pixels that a network sees.

    Args:
        folder: of the pictures.
        classes: their names.

    Returns:
        uint8 RGB (num_classes, 32, 32, 3); what is transparent is white.
    """
    images = []
    for name in classes:
        with Image.open(Path(folder) / f"{name}.png") as file:
            images.append(square(file))
    return np.stack(images)


@styled
def look(
    model: Network, images: np.ndarray, classes: Sequence[str], temperature: float | None = None
) -> tuple[Figure, list[int], list[float]]:
    """Draw pictures above the heatmaps for the classes that a network predicts.

    Args:
        model: the network.
        images: uint8 RGB (N, 32, 32, 3), one of each class.
        classes: their names.
        temperature: divides the logits, if the network has one.

    Returns:
        The figure, the predicted classes, and their probabilities.
    """
    batch = normalize(images)
    targets = [[explain.top_logit(0)] for _ in images]
    logits, cams = explain.classify_and_explain(model, model.stages()[-1].module, batch, targets)
    probs, found = (logits / (temperature or 1)).softmax(1).max(1)
    preds = found.tolist()
    half = (len(images) + 1) // 2
    fig, axes = new_image_grid(4, half, WIDTH, 9.2)
    for i, (image, (cam,)) in enumerate(zip(images, cams, strict=True)):
        row, column = 2 * (i // half), i % half
        said = f"{classes[preds[i]]} {format_confidence(float(probs[i]))}"
        show_image(axes[row, column], image, said)
        show_image(axes[row + 1, column], explain.overlay(image / 255, cam, 0.5))
    correct = sum(pred == label for label, pred in enumerate(preds))
    title = f"The network names {correct} of {len(images)} pictures correctly"
    title += "; below each, in bright colours, the evidence for its answer"
    headline(fig, title, "Ten pictures with the network's answers and their heatmaps")
    return fig, preds, probs.tolist()
