"""How well a network copes with corrupted images."""

import functools
from collections.abc import Callable

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from dataload import Images, make_loader
from evaluation.drawing import with_note
from evaluation.predict import accuracy, predict
from models.errors import InvalidValue


def lower_contrast(image: np.ndarray, part: float, **_: object) -> np.ndarray:
    """Blend an image (H, W, 3), uint8, with its own mean colour: `part`, 0..1, of the mean.

    As in CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261): the image stays as bright.
    """
    mean = image.mean((0, 1))
    return np.uint8(np.round(mean + (1 - part) * (image - mean)))


# Five ways to corrupt a picture, each in three strengths. A range of one value is that value.
CORRUPTIONS: dict[str, Callable[[float], A.BasicTransform]] = {
    "noise": lambda s: A.GaussNoise(std_range=(s, s), p=1),
    "blur": lambda s: A.GaussianBlur(blur_limit=0, sigma_limit=(s, s), p=1),
    "JPEG": lambda s: A.ImageCompression(quality_range=(round(s), round(s)), p=1),
    # What albumentations calls contrast multiplies each value: that is less light.
    "dark": lambda s: A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=(-s, -s), p=1),
    "contrast": lambda s: A.Lambda(image=functools.partial(lower_contrast, part=s)),
}

STRENGTHS = {
    "noise": (0.04, 0.08, 0.16),  # standard deviation, of values in 0..1
    "blur": (0.6, 1.0, 1.6),  # standard deviation, pixels
    "JPEG": (50, 25, 10),  # quality
    "dark": (0.4, 0.6, 0.8),  # how much of the light is taken away
    "contrast": (0.4, 0.6, 0.8),  # how much of the distance to the mean colour is taken away
}


def corrupt(images: np.ndarray, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """Corrupt images, always in the same way.

    Args:
        images: (N, 32, 32, 3), uint8.
        name: a key of CORRUPTIONS.
        strength: 1 to 3; 0 leaves the images alone.

    Raises:
        ValueError: there is no such corruption or strength.
    """
    if name not in CORRUPTIONS or strength not in (0, 1, 2, 3):
        names = ", ".join(CORRUPTIONS)
        raise InvalidValue(
            f"expected one of {names} and a strength of 0 to 3, got {name!r}, {strength}"
        )
    if strength == 0:
        return images
    transform = A.Compose(
        [CORRUPTIONS[name](STRENGTHS[name][strength - 1])], seed=seed, strict=True
    )
    return np.stack([transform(image=image)["image"] for image in images])


def corrupted_accuracy(model: nn.Module, device: str, part: Images) -> pd.DataFrame:
    """Accuracy (fraction) on these images.

    A row for each strength, 0 to 3, a column for each corruption.
    """

    def score(name: str, strength: int) -> float:
        corrupted = Images(corrupt(part.images, name, strength), part.labels)
        return accuracy(*predict(model, device, make_loader(corrupted, 250, 0, train=False)))

    clean = score("noise", 0)
    columns = {
        name: [clean, *(score(name, strength) for strength in (1, 2, 3))] for name in CORRUPTIONS
    }
    return pd.DataFrame(columns).rename_axis("strength")


def plot_robustness(table: pd.DataFrame, image: np.ndarray, note: str = "") -> Figure:
    """Draw the table of `robustness`, above it an image, uint8 (32, 32, 3), in all strengths."""
    fig = plt.figure(figsize=(8.5, 8.2), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = above.subplots(4, len(table.columns))
    for column, name in enumerate(table.columns):
        for strength, axis in enumerate(axes[:, column]):
            axis.imshow(corrupt(image[None], name, strength)[0], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(name, fontsize=9)
    for axis, label in zip(
        axes[:, 0], ("clean", "strength 1", "strength 2", "strength 3"), strict=True
    ):
        axis.set_ylabel(label)
    axis = below.subplots()
    for name, values in table.items():
        axis.plot(table.index, values, "o-", markersize=4, label=name)
    axis.set(
        xlabel="strength (0: clean)", ylabel="accuracy (fraction)", xticks=table.index, ylim=(0, 1)
    )
    axis.grid(alpha=0.3)
    axis.legend(ncols=len(table.columns), fontsize=8)
    fig.suptitle(with_note("Accuracy on corrupted test images", note))
    plt.close(fig)
    return fig
