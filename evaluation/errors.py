"""The errors of a network: the images, the classes that it confuses, the accuracy of each class."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from evaluation.drawing import Plot, check_count, new_chart, rgb, with_note
from evaluation.predict import predict
from models.errors import InvalidValue

MAX_TILES = 50


class Misclassified(NamedTuple):
    """A test image that was misclassified.

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
    probs, preds = (logits / temperature).softmax(1), logits.argmax(1)
    found = []
    for i in (preds != labels).nonzero().flatten().tolist():
        image, label = samples[i]
        if int(label) != int(labels[i]):
            raise InvalidValue(
                f"image {i} has the label {label},"
                f" its prediction was made for label {int(labels[i])};"
                " the predictions must be of the same loader"
            )
        found.append(
            Misclassified(image, int(label), int(preds[i]), float(probs[i, preds[i]]), probs[i])
        )
    return found


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
        A series with the names as its index.
    """
    wrong = np.bincount([sample.label for sample in misclassified], minlength=len(classes))
    fractions = 1 - wrong / np.bincount(labels, minlength=len(classes))
    return pd.Series(fractions, index=list(classes), name="accuracy")


def most_confused(
    misclassified: Sequence[Misclassified], classes: Sequence[str], count: int = 5
) -> pd.DataFrame:
    """Count the pairs of classes that are confused most often, in either direction.

    Args:
        misclassified: the errors.
        classes: their names.
        count: rows at most.

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
    return table.head(count)


def most_confident(misclassified: Sequence[Misclassified]) -> list[Misclassified]:
    """Return the same errors, the most confident first."""
    return sorted(misclassified, key=lambda sample: -sample.prob)


# ---- drawing them --------------------------------------------------------------------------------


def caption(sample: Misclassified, classes: Sequence[str]) -> str:
    """Name the true class, the predicted class and its probability, in two lines."""
    return f"true: {classes[sample.label]}\npredicted: {classes[sample.pred]} ({sample.prob:.2f})"


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
    return Plot(images, [caption(sample, classes) for sample in chosen]).grid(
        with_note("Misclassified test images", note)
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


def plot_confusion(
    misclassified: Sequence[Misclassified],
    labels: np.ndarray,
    classes: Sequence[str],
    note: str = "",
) -> Figure:
    """Draw the confusion matrix, coloured by the errors only.

    Args:
        misclassified: all errors on some images.
        labels: int (N,), of all these images.
        classes: their names.
        note: the title.
    """
    counts = confusion_counts(misclassified, labels, len(classes))
    errors = counts - np.diag(np.diag(counts))
    fig, axis = new_chart(7, 6.4)
    axis.imshow(errors, cmap="Oranges", vmax=2 * max(1, errors.max()))  # pale under the numbers
    for row, column in np.ndindex(counts.shape):
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9)
    ticks = range(len(classes))
    axis.set(xticks=ticks, yticks=ticks, yticklabels=classes, title=note)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_xticklabels(classes, rotation=45, ha="right")
    return fig


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
