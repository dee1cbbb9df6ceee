"""The accuracy of a network on corrupted images."""

import functools
import io
from collections.abc import Callable, Sequence
from itertools import cycle

import albumentations as A
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dataload import Images, make_loader
from evaluation.drawing import (
    COLOURS,
    TEXT,
    WIDTH,
    headline,
    hide_frame,
    label_ends,
    new_figure,
    percent,
    percent_axis,
    show_image,
    style_chart,
    styled,
)
from evaluation.predict import accuracy, predict
from models.errors import InvalidValue


def lower_contrast(image: np.ndarray, strength: float, **_: object) -> np.ndarray:
    """Blend an image with its own mean colour, which keeps its brightness.

    Args:
        image: uint8 (H, W, 3).
        strength: the weight of the mean colour, 0..1.

    Returns:
        uint8 (H, W, 3).

    As in CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261).
    """
    mean = image.mean((0, 1))
    return np.round(mean + (1 - strength) * (image - mean)).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int, **_: object) -> np.ndarray:
    """Compress an image as a JPEG and read it again: uint8 (H, W, 3), as is what it returns.

    Not by Albumentations: its version 2.0.8 exchanges red and blue while it compresses.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# Each takes a strength; where Albumentations expects a range, both of its ends are that strength.
CORRUPTIONS: dict[str, Callable[[float], A.BasicTransform]] = {
    "noise": lambda s: A.GaussNoise(std_range=(s, s), p=1),
    "blur": lambda s: A.GaussianBlur(blur_limit=0, sigma_limit=(s, s), p=1),
    "JPEG": lambda s: A.Lambda(image=functools.partial(jpeg, quality=round(s))),
    # What Albumentations calls contrast multiplies each value: that is less light.
    "dark": lambda s: A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=(-s, -s), p=1),
    "contrast": lambda s: A.Lambda(image=functools.partial(lower_contrast, strength=s)),
}

STRENGTHS = {
    "noise": (0.04, 0.08, 0.16),  # standard deviation, of values in 0..1
    "blur": (0.6, 1.0, 1.6),  # standard deviation, pixels
    "JPEG": (50, 25, 10),  # quality
    "dark": (0.4, 0.6, 0.8),  # the fraction of the light that is removed
    "contrast": (0.4, 0.6, 0.8),  # the fraction of the distance to the mean colour that is removed
}


def corrupt(images: np.ndarray, name: str, strength: int) -> np.ndarray:
    """Corrupt images, always in the same way.

    Args:
        images: (N, 32, 32, 3), uint8.
        name: a key of CORRUPTIONS.
        strength: 1 to 3; 0 leaves the images unchanged.

    Returns:
        uint8 (N, 32, 32, 3).

    Raises:
        ValueError: if there is no such corruption or strength.
    """
    if name not in CORRUPTIONS or strength not in (0, 1, 2, 3):
        names = ", ".join(CORRUPTIONS)
        raise InvalidValue(
            f"expected one of {names} and a strength of 0 to 3, got {name!r}, {strength}"
        )
    if strength == 0:
        return images
    corruption = CORRUPTIONS[name](STRENGTHS[name][strength - 1])
    transform = A.Compose([corruption], seed=0, strict=True)
    return np.stack([transform(image=image)["image"] for image in images])


def corrupted_accuracy(model: nn.Module, device: str, part: Images) -> pd.DataFrame:
    """Measure the accuracy (fraction) on images in every corruption and strength.

    Args:
        model: the network.
        device: where to compute.
        part: the images and their labels.

    Returns:
        A row for each strength, 0 (clean) to 3, and a column for each corruption.
    """

    def score(name: str, strength: int) -> float:
        corrupted = Images(corrupt(part.images, name, strength), part.labels)
        return accuracy(*predict(model, device, make_loader(corrupted, 250, 0, train=False)))

    clean = score("noise", 0)
    columns = {
        name: [clean, *(score(name, strength) for strength in (1, 2, 3))] for name in CORRUPTIONS
    }
    return pd.DataFrame(columns).rename_axis("strength")


def corrupted_predictions(
    model: nn.Module, device: str, image: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Predict the class of one image in every corruption and strength.

    Args:
        model: the network.
        device: where to compute.
        image: uint8 (32, 32, 3).
        classes: their names.

    Returns:
        Names of classes; a row for each strength, 0 (clean) to 3, a column for each corruption.
    """
    names, strengths = list(CORRUPTIONS), range(4)
    variants = np.concatenate([corrupt(image[None], name, s) for s in strengths for name in names])
    part = Images(variants, np.zeros(len(variants), np.int64))
    logits, _ = predict(model, device, make_loader(part, len(variants), 0, train=False))
    said = [classes[i] for i in logits.argmax(1).tolist()]
    rows = [said[len(names) * s : len(names) * (s + 1)] for s in strengths]
    return pd.DataFrame(rows, columns=names).rename_axis("strength")


def robustness_title(table: pd.DataFrame) -> str:
    """Say what the greatest strengths of the corruptions leave of the accuracy.

    Strengths of different corruptions cannot be compared, so it names the range.

    Args:
        table: of `corrupted_accuracy`.
    """
    clean, left = float(table.iloc[0, 0]), table.iloc[-1].sort_values()
    if left.min() >= clean:
        return f"No corruption lowers the accuracy of {percent(clean)}"
    named = [{"dark": "darkness"}.get(str(name), str(name)) for name in left.index]
    return (
        f"At full strength, accuracy is {percent(left.iloc[0])} ({named[0]}) to"
        f" {percent(left.iloc[-1])} ({named[-1]}), without corruption {percent(clean)};"
        " guessing: 10 %"
    )


@styled
def plot_robustness(
    table: pd.DataFrame,
    image: np.ndarray,
    predictions: pd.DataFrame,
    note: str = "",
) -> Figure:
    """Draw the accuracies, and above them an example of each corruption and strength.

    Args:
        table: of `corrupted_accuracy`.
        image: the example, uint8 (32, 32, 3).
        predictions: of `corrupted_predictions` for that image; written under each example.
        note: a line under the title.
    """
    fig = new_figure(WIDTH, 12.4)
    above, below = fig.subfigures(2, 1, squeeze=False, height_ratios=(2.4, 1))[:, 0]
    axes = above.subplots(4, len(table.columns), squeeze=False)
    draw_examples(axes, list(table), image, predictions)
    draw_accuracies(below.subplots(), table)
    shows = "One image in every corruption and strength, above lines of the accuracy"
    headline(fig, robustness_title(table), shows, note)
    return fig


def draw_examples(
    axes: np.ndarray, names: list[str], image: np.ndarray, predictions: pd.DataFrame
) -> None:
    """Draw an image with each corruption (column) in each strength (row).

    A prediction that differs from that of the clean image is orange.
    """
    for column, name in enumerate(names):
        for strength, axis in enumerate(axes[:, column]):
            show_image(axis, corrupt(image[None], name, strength)[0])
            hide_frame(axis)
            said = str(predictions[name].iloc[strength])
            same = said == predictions[name].iloc[0]
            axis.set_xlabel(said, color="black" if same else COLOURS[1], fontsize=TEXT)
        axes[0, column].set_title(name, fontweight="bold")
    labels = ("clean", *(f"strength {i}" for i in (1, 2, 3)))
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)


def draw_accuracies(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the accuracy against the strength, a line for each corruption."""
    strengths, ends = table.index.to_numpy(), []
    for name, colour in zip(table, cycle(COLOURS), strict=False):
        axis.plot(strengths, table[name], "o-", markersize=4, label=name, color=colour)
        last = float(table[name].iloc[-1])
        ends.append((last, f"{name} {percent(last)}", colour))
    style_chart(axis)
    axis.set(xlabel="strength (0: clean)", ylabel="accuracy", xticks=strengths, ylim=(0, 1))
    axis.margins(x=0.02)
    percent_axis(axis)
    label_ends(axis, ends)
