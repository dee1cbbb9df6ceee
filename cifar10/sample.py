"""The built-in sample: a small stand-in for CIFAR-10, drawn from one picture per class.

No network needed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from models.errors import InvalidValue

SIDE = 32
BOX = Image.Resampling.BOX


def read_picture(folder: Path, name: str) -> Image.Image:
    """The picture of a class as RGBA, at twice the side it is drawn with.

    ValueError if it is not there or no image.
    """
    path = folder / f"{name}.png"
    try:
        with Image.open(path) as picture:
            return picture.convert("RGBA").resize((2 * SIDE, 2 * SIDE), BOX)
    except (OSError, SyntaxError) as error:
        raise InvalidValue(f"expected a picture of the class {name} in {path}: {error}") from error


def background(rng: np.random.Generator) -> Image.Image:
    """A soft pattern of a few colours, RGB 32x32."""
    colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The picture at a random size, place and brightness, mirrored or not, on a background.

    Uint8 (32, 32, 3).
    """
    side = int(rng.integers(20, 37))
    picture = picture.resize((side, side), BOX)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = background(rng)
    low, high = sorted((0, SIDE - side))  # negative when the picture is larger than the canvas
    canvas.paste(picture, tuple(int(at) for at in rng.integers(low, high + 1, 2)), picture)
    return np.asarray(ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.6, 1.3)))


def draw_sample(
    pictures: str | Path, classes: Sequence[str], seed: int, train: int = 2000, test: int = 500
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Draw the sample: (train images, labels), (test images, labels), as many of each class, in random order.

    pictures: a folder with <class>.png for each class. Images are uint8 RGB (N, 32, 32, 3), labels int64 (N,).
    The same seed draws the same images. Raises ValueError if a picture is missing or is no image.
    """
    sources = [read_picture(Path(pictures), name) for name in classes]
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [rng.permutation(np.arange(count) % len(classes)) for count in (train, test)]
    )
    images = np.stack([draw(sources[label], rng) for label in labels])
    return (images[:train], labels[:train]), (images[train:], labels[train:])
