"""The built-in sample: a small stand-in for CIFAR-10, drawn from one picture per class.

It needs no internet connection.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from cifar10.images import CLASSES, IMAGE_SIZE, Images
from models.errors import InvalidValue

BOX = Image.Resampling.BOX


def read_picture(folder: Path, name: str) -> Image.Image:
    """Read the picture of a class as RGBA (64, 64), twice the size of an image.

    Raises:
        InvalidValue: if it is missing or is not an image.
    """
    path = folder / f"{name}.png"
    try:
        with Image.open(path) as picture:
            return picture.convert("RGBA").resize((2 * IMAGE_SIZE, 2 * IMAGE_SIZE), BOX)
    except (OSError, SyntaxError) as error:
        raise InvalidValue(f"expected a picture of the class {name} in {path}: {error}") from error


def background(rng: np.random.Generator) -> Image.Image:
    """Draw a soft pattern of a few colours, RGB (32, 32)."""
    colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def draw(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture on a background at a random size, position and brightness, perhaps mirrored.

    Args:
        picture: RGBA.
        rng: of all that is random.

    Returns:
        Uint8 (32, 32, 3), RGB.
    """
    side = int(rng.integers(20, 37))
    picture = picture.resize((side, side), BOX)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = background(rng)
    low, high = sorted((0, IMAGE_SIZE - side))  # negative when the picture is larger than the image
    x, y = rng.integers(low, high + 1, 2)
    canvas.paste(picture, (int(x), int(y)), picture)
    return np.asarray(ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.6, 1.3)))


def sample_cifar10(pictures: str | Path, seed: int = 42) -> tuple[Images, Images]:
    """Draw 2,000 training and 500 test images, equally many of each class, in random order.

    They stand in for `read_cifar10` where there is no internet connection.

    Args:
        pictures: the folder of the pictures, <class>.png for each class.
        seed: the same seed draws the same images.

    Raises:
        InvalidValue: if a picture is missing or is not an image.
    """
    sources = [read_picture(Path(pictures), name) for name in CLASSES]
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.arange(count) % len(CLASSES)) for count in (2000, 500)]
    train, test = (
        Images(np.stack([draw(sources[label], rng) for label in labels]), labels)
        for labels in parts
    )
    return train, test
