"""The errors of a network: the images, the classes that it confuses, the accuracy of each class."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from evaluation.drawing import (
    GREY,
    TEXT,
    WIDTH,
    Plot,
    check_count,
    format_confidence,
    headline,
    new_chart,
    percent,
    rgb,
    styled,
)
from evaluation.predict import predict
from models.errors import InvalidValue

MAX_TILES = 50
VEHICLES = ("airplane", "ship", "automobile", "truck")
ANIMALS = ("bird", "frog", "deer", "horse", "cat", "dog")


class Misclassified(NamedTuple):
    """A test image and its prediction: one that was misclassified, where nothing else is said.

    Attributes:
        image: normalised (3, 32, 32).
        label: the true class.
        pred: the predicted class.
        prob: the probability of the predicted class.
        probs: the probabilities of all classes, (num_classes,).
    """

    image: Tensor
    label: int
    pred: int
    prob: float
    probs: Tensor


# ---- finding them --------------------------------------------------------------------------------


def check_sequential(loader: DataLoader) -> None:
    """Raise ValueError unless a loader gives the images of its dataset in their order."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list):  # of indices, as CIFAR10DataModule makes them
        if sum(batches, []) == list(range(len(samples_of(loader)))):
            return
        got = "batches of other numbers"
    elif type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler:
        return
    else:
        ordered = batches.sampler if type(batches) is BatchSampler else batches or loader
        got = f"one ordered by {type(ordered).__name__}"
    raise InvalidValue(
        f"expected a loader that gives all images in order, got {got};"
        " make it with shuffle=False and no sampler"
    )


def samples_of(loader: DataLoader) -> Sequence[tuple[Tensor, int]]:
    """Return the dataset of a loader: normalised images (3, 32, 32) with their labels."""
    return cast(Sequence[tuple[Tensor, int]], loader.dataset)  # torch's Dataset has no length


def get_misclassified_data(
    model: nn.Module,
    device: str | torch.device,
    test_loader: DataLoader,
    temperature: float = 1.0,
    predictions: tuple[Tensor, Tensor] | None = None,
) -> list[Misclassified]:
    """Collect all misclassified images, in the loader's order.

    Args:
        model: the network.
        device: where to compute.
        test_loader: gives each image once, in order: not shuffled.
        temperature: divides the logits before the softmax.
        predictions: logits and labels of these images, if `predict` has returned them before.

    Raises:
        ValueError: if the loader or the predictions have another order or length.
    """
    check_sequential(test_loader)
    samples = samples_of(test_loader)
    logits, labels = predictions or predict(model, device, test_loader)
    if not len(logits) == len(labels) == len(samples):
        raise InvalidValue(
            f"expected predictions of {len(samples)} images,"
            f" got {len(logits)} and {len(labels)} labels"
        )
    wrong = (logits.argmax(1) != labels).nonzero().flatten().tolist()
    return [predicted_sample(samples, logits, labels, i, temperature) for i in wrong]


def predicted_sample(
    samples: Sequence[tuple[Tensor, int]],
    logits: Tensor,
    labels: Tensor,
    index: int,
    temperature: float = 1.0,
) -> Misclassified:
    """Put an image and its prediction together.

    Args:
        samples: of the loader.
        logits: (N, num_classes).
        labels: (N,), for which the predictions were made.
        index: of the image.
        temperature: divides the logits before the softmax.

    Raises:
        ValueError: if the image has another label than its prediction, if a logit is no finite
            number, and if the temperature is not above 0.
    """
    image, label = samples[index]
    if int(label) != int(labels[index]):
        raise InvalidValue(
            f"image {index} has the label {label},"
            f" its prediction was made for label {int(labels[index])};"
            " the predictions must be of the same loader"
        )
    if not (0 < temperature < math.inf and logits[index].isfinite().all()):
        got = f"{logits[index].tolist()} for image {index} and {temperature}"
        raise InvalidValue(f"expected finite logits and a finite temperature above 0, got {got}")
    probs = (logits[index] / temperature).softmax(0)
    pred = int(logits[index].argmax())
    return Misclassified(image, int(label), pred, float(probs[pred]), probs)


def get_correct_data(
    test_loader: DataLoader,
    predictions: tuple[Tensor, Tensor],
    count: int = 5,
    temperature: float = 1.0,
) -> list[Misclassified]:
    """Collect the first image of each class that was classified correctly, `count` at most.

    Args:
        test_loader: gives each image once, in order: not shuffled.
        predictions: logits and labels of these images.
        count: images at most.
        temperature: divides the logits before the softmax.
    """
    check_sequential(test_loader)
    samples, (logits, labels) = samples_of(test_loader), predictions
    firsts: dict[int, int] = {}
    for i in (logits.argmax(1) == labels).nonzero().flatten().tolist():
        firsts.setdefault(int(labels[i]), i)
    chosen = sorted(firsts.values())[:count]
    return [predicted_sample(samples, logits, labels, i, temperature) for i in chosen]


# ---- counting and sorting them -------------------------------------------------------------------


def class_accuracy(
    misclassified: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str]
) -> pd.Series:
    """Compute the accuracy (fraction) of each class.

    Args:
        misclassified: all errors on some images.
        labels: int (N,), of all these images.
        classes: their names.

    Returns:
        A series with the names as its index; NaN for a class without images.
    """
    wrong = np.bincount([sample.label for sample in misclassified], minlength=len(classes))
    counts = np.bincount(labels, minlength=len(classes))
    fractions = 1 - wrong / np.where(counts, counts, np.nan)
    return pd.Series(fractions, index=list(classes), name="accuracy")


def most_confused(misclassified: Sequence[Misclassified], classes: Sequence[str]) -> pd.DataFrame:
    """Count the five pairs of classes that are confused most often, in either direction.

    Args:
        misclassified: the errors.
        classes: their names.

    Returns:
        The columns pair and images, the most frequent pair first.
    """
    pairs = [
        " and ".join(sorted((classes[sample.label], classes[sample.pred])))
        for sample in misclassified
    ]
    counts = pd.Series(pairs, dtype=str).value_counts(sort=False)
    table = counts.rename_axis("pair").reset_index(name="images")
    table = table.sort_values(["images", "pair"], ascending=[False, True], ignore_index=True)
    return table.head(5)


def most_confident(misclassified: Sequence[Misclassified]) -> list[Misclassified]:
    """Return the same errors, the most confident first."""
    return sorted(misclassified, key=lambda sample: -sample.prob)


def choose_errors(misclassified: Sequence[Misclassified], count: int = 10) -> list[Misclassified]:
    """Choose errors to show: half of them the most confident ones, then the first of the others."""
    confident = most_confident(misclassified)[: (count + 1) // 2]
    shown = {id(sample) for sample in confident}
    others = [sample for sample in misclassified if id(sample) not in shown]
    return [*confident, *others[: count - len(confident)]]


# ---- drawing them --------------------------------------------------------------------------------


def caption(sample: Misclassified, classes: Sequence[str]) -> str:
    """Name the true class, the predicted class and its probability, in three lines."""
    true, pred = classes[sample.label], classes[sample.pred]
    return f"true: {true}\npredicted: {pred}\n({format_confidence(sample.prob)})"


def errors_title(chosen: Sequence[Misclassified]) -> str:
    """Say how confident the network was of the errors that are shown."""
    low, high = (format_confidence(f(sample.prob for sample in chosen)) for f in (min, max))
    if len(chosen) == 1:
        return f"A misclassified test image, predicted with {low} confidence"
    if low == high:
        return f"{len(chosen)} misclassified test images, all predicted with {low} confidence"
    return f"{len(chosen)} misclassified test images, predicted with {low} to {high} confidence"


def plot_misclassified(
    data: Sequence[Misclassified],
    classes: Sequence[str],
    inv_normalize: Callable[[Tensor], Tensor],
    number_of_samples: int = 10,
    note: str = "",
) -> Figure:
    """Draw the first samples with their true class, predicted class and probability.

    Args:
        data: the errors.
        classes: their names.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        number_of_samples: 1 to 20.
        note: a line under the title.

    Raises:
        ValueError: if there are not that many samples.
    """
    check_count(number_of_samples, len(data))
    chosen = data[:number_of_samples]
    images = [rgb(sample.image, inv_normalize) for sample in chosen]
    columns = 4 if len(chosen) == 12 else 5  # rows of equal length
    return Plot(images, [caption(sample, classes) for sample in chosen], columns).grid(
        errors_title(chosen), note
    )


def confusion_counts(
    misclassified: Sequence[Misclassified], labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Count the images of each true class (row) that were predicted as each class (column).

    Args:
        misclassified: all errors on some images.
        labels: int (N,), of all these images.
        num_classes: number of rows and columns.

    Returns:
        int (num_classes, num_classes).
    """
    counts = np.diag(np.bincount(labels, minlength=num_classes))
    for sample in misclassified:
        counts[sample.label, sample.label] -= 1
        counts[sample.label, sample.pred] += 1
    return counts


def plural(name: str) -> str:
    """Return the plural of a class's name."""
    return name if name == "deer" else f"{name}s"


def count_crossed(misclassified: Sequence[Misclassified], classes: Sequence[str]) -> int:
    """Count the errors that confuse an animal with a vehicle."""
    kinds = [[classes[i] in VEHICLES for i in (s.label, s.pred)] for s in misclassified]
    return sum(true != pred for true, pred in kinds)


def confusion_title(
    misclassified: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str]
) -> str:
    """Say which classes are confused most, and how many errors confuse animals with vehicles."""
    if not misclassified:
        return f"No errors: all {len(labels):,} test images are classified correctly"
    table, total = most_confused(misclassified, classes), len(misclassified)
    first, second = (plural(name) for name in str(table["pair"][0]).split(" and "))
    counts = table["images"].tolist()
    most = "are confused most" if counts.count(counts[0]) == 1 else "are among the most confused"
    title = f"{first.capitalize()} and {second} {most}: {counts[0]}"
    title += f" of {total:,} error{'s' * (total != 1)}"
    if {*classes} != {*VEHICLES, *ANIMALS}:
        return title
    crossed = count_crossed(misclassified, classes)
    return f"{title}. {percent(crossed / total, 0)} of the errors confuse an animal with a vehicle"


def grouped(classes: Sequence[str]) -> tuple[list[int], int]:
    """Order classes so that vehicles come first, then animals.

    Args:
        classes: their names.

    Returns:
        Their indices in that order, and how many of them are vehicles; other classes than those of
        CIFAR-10 stay in their order.
    """
    if {*classes} != {*VEHICLES, *ANIMALS}:
        return list(range(len(classes))), 0
    return [list(classes).index(name) for name in (*VEHICLES, *ANIMALS)], len(VEHICLES)


@styled
def plot_confusion(
    misclassified: Sequence[Misclassified],
    labels: np.ndarray,
    classes: Sequence[str],
    note: str = "",
) -> Figure:
    """Draw the confusion matrix, coloured by the errors only, and the recall of each class.

    Vehicles and animals stand together.

    Args:
        misclassified: all errors on some images.
        labels: int (N,), of all these images.
        classes: their names.
        note: a line under the title.
    """
    order, vehicles = grouped(classes)
    counts = confusion_counts(misclassified, labels, len(classes))[np.ix_(order, order)]
    names = [classes[i] for i in order]
    errors = counts - np.diag(np.diag(counts))
    fig, axis = new_chart(WIDTH, 8.8)
    axis.imshow(errors, cmap="Oranges", vmax=2 * max(1, errors.max()))  # pale under the numbers
    for row, column in np.ndindex(counts.shape):
        axis.text(column, row, str(counts[row, column]), ha="center", va="center")
    ticks = range(len(classes))
    axis.set(xticks=ticks, yticks=ticks, xlabel="predicted class", ylabel="true class")
    axis.set_xticklabels(names, rotation=45, ha="right", fontsize=TEXT)
    axis.set_yticklabels(names, fontsize=TEXT)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    if vehicles:
        mark_groups(axis, vehicles, len(classes))
    draw_recall(axis, counts)
    shows = "Confusion matrix with the recall of each class"
    headline(fig, confusion_title(misclassified, labels, classes), shows, note)
    return fig


def mark_groups(axis: Axes, vehicles: int, total: int) -> None:
    """Separate vehicles from animals by lines, and name the two groups above the matrix."""
    axis.plot([-0.5, total - 0.5], [vehicles - 0.5] * 2, color=GREY)
    axis.plot([vehicles - 0.5] * 2, [-0.5, total - 0.5], color=GREY)
    for middle, name in ((vehicles / 2, "vehicles"), ((vehicles + total) / 2, "animals")):
        axis.annotate(name, (middle - 0.5, -0.6), ha="center", color=GREY, annotation_clip=False)


def draw_recall(axis: Axes, counts: np.ndarray) -> None:
    """Write the fraction of each true class that is predicted correctly, in a column beside it."""
    totals, place = counts.sum(1), len(counts) + 0.2
    for row, total in enumerate(totals):
        text = percent(counts[row, row] / total) if total else "none"
        axis.annotate(text, (place, row), ha="center", va="center", annotation_clip=False)
    axis.annotate("recall", (place, -0.6), ha="center", color=GREY, annotation_clip=False)
    axis.set_xlim(-0.5, place + 0.5)


def draw_tiles(
    data: Sequence[Misclassified], inv_normalize: Callable[[Tensor], Tensor]
) -> Image.Image:
    """Draw at most 50 misclassified images in rows of ten, each pixel enlarged three times.

    Args:
        data: the errors, of which the first 50 are drawn.
        inv_normalize: normalised (3, H, W) -> [0, 1].
    """
    pixels = [255 * rgb(sample.image, inv_normalize) for sample in data[:MAX_TILES]]
    tiles = [np.round(image).astype(np.uint8) for image in pixels]
    side = 3 * (len(tiles[0]) if tiles else 1)
    picture = Image.new("RGB", (10 * side, max(1, math.ceil(len(tiles) / 10)) * side), "white")
    for i, tile in enumerate(tiles):
        enlarged = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
        picture.paste(enlarged, (i % 10 * side, i // 10 * side))
    return picture
