"""What a network gets wrong.

The images, the classes that it confuses, the accuracy of each class.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from evaluation.drawing import Plot, check_count, rgb, with_note
from evaluation.predict import predict
from models.errors import InvalidValue


class Misclassified(NamedTuple):
    """A wrong prediction. image.

    Normalised (3, 32, 32). prob: softmax of the predicted class. probs: of all (10,).
    """

    image: Tensor
    label: int
    pred: int
    prob: float
    probs: Tensor


def class_accuracy(
    misclassified: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str]
) -> pd.Series:
    """Accuracy (fraction) per class name.

    Labels: int (N,), of all images, of which some were misclassified.
    """
    wrong = np.bincount([sample.label for sample in misclassified], minlength=len(classes))
    return pd.Series(
        1 - wrong / np.bincount(labels, minlength=len(classes)), index=classes, name="accuracy"
    )


def check_sequential(loader: DataLoader) -> None:
    """Raise ValueError unless a loader gives the images of its dataset in their order."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list):  # the numbers themselves: of CIFAR10DataModule
        if sum(batches, []) == list(range(len(loader.dataset))):
            return
        got = "batches of other numbers"
    elif type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler:
        return
    else:
        ordered = batches.sampler if type(batches) is BatchSampler else batches or loader
        got = f"one ordered by {type(ordered).__name__}"
    raise InvalidValue(
        f"expected a loader that gives all images in order, got {got}; make it with shuffle=False and no sampler"
    )


def get_misclassified_data(
    model: nn.Module,
    device: str | torch.device,
    test_loader: DataLoader,
    temperature: float = 1.0,
    predictions: tuple[Tensor, Tensor] | None = None,
) -> list[Misclassified]:
    """All wrong predictions, in the loader's order.

    temperature: divides the logits before the softmax.

    test_loader: gives each image once, in order: not shuffled. predictions: logits and labels of
    these images, if `predict` gave them before. Raises ValueError if the loader or the predictions
    have another order or length.
    """
    check_sequential(test_loader)
    dataset = test_loader.dataset
    logits, labels = predictions or predict(model, device, test_loader)
    if not len(logits) == len(labels) == len(dataset):
        raise InvalidValue(
            f"expected predictions of {len(dataset)} images, got {len(logits)} and {len(labels)} labels"
        )
    probs, preds = (logits / temperature).softmax(1), logits.argmax(1)
    found = []
    for i in (preds != labels).nonzero().flatten().tolist():
        image, label = dataset[i]
        if int(label) != int(labels[i]):
            raise InvalidValue(
                f"image {i} has the label {label}, its prediction was made for label {int(labels[i])};"
                " the predictions must be of the same loader"
            )
        found.append(
            Misclassified(image, int(label), int(preds[i]), float(probs[i, preds[i]]), probs[i])
        )
    return found


def most_confused(
    misclassified: Sequence[Misclassified], classes: Sequence[str], count: int = 5
) -> pd.DataFrame:
    """The pairs of classes that are taken for each other most often, in either direction.

    Columns pair, images.
    """
    pairs = [
        " and ".join(sorted((classes[sample.label], classes[sample.pred])))
        for sample in misclassified
    ]
    counts = pd.Series(pairs, dtype=str).value_counts(sort=False)
    table = counts.rename_axis("pair").reset_index(name="images")
    return table.sort_values(["images", "pair"], ascending=[False, True], ignore_index=True).head(
        count
    )


def most_confident(misclassified: Sequence[Misclassified]) -> list[Misclassified]:
    """The same errors, the surest first."""
    return sorted(misclassified, key=lambda sample: -sample.prob)


def caption(sample: Misclassified, classes: Sequence[str]) -> str:
    return f"true: {classes[sample.label]}\npredicted: {classes[sample.pred]} ({sample.prob:.2f})"


def plot_misclassified(
    data: Sequence[Misclassified],
    classes: Sequence[str],
    inv_normalize: Callable[[Tensor], Tensor],
    number_of_samples: int = 10,
    note: str = "",
) -> Figure:
    """The first samples with their true class, predicted class and probability.

    Note: a line under the title.
    """
    check_count(number_of_samples, len(data))
    chosen = data[:number_of_samples]
    images = [rgb(sample.image, inv_normalize) for sample in chosen]
    return Plot(images, [caption(sample, classes) for sample in chosen]).grid(
        with_note("Misclassified test images", note)
    )


def plot_confusion(
    misclassified: Sequence[Misclassified],
    labels: np.ndarray,
    classes: Sequence[str],
    note: str = "",
) -> Figure:
    """How often each true class (row) was taken for each class (column).

    Labels: int (N,), of all images.
    """
    counts = np.diag(np.bincount(labels, minlength=len(classes)))
    for sample in misclassified:
        counts[sample.label, sample.label] -= 1
        counts[sample.label, sample.pred] += 1
    fig, axis = plt.subplots(figsize=(7, 6.4), layout="constrained")
    errors = counts - np.diag(np.diag(counts))
    axis.imshow(
        errors, cmap="Oranges", vmax=2 * max(1, errors.max())
    )  # colours for the errors only, pale under text
    for row, column in np.ndindex(counts.shape):
        axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=9)
    ticks = range(len(classes))
    axis.set(
        xticks=ticks,
        yticks=ticks,
        yticklabels=classes,
        xlabel="predicted class",
        ylabel="true class",
        title=note,
    )
    axis.set_xticklabels(classes, rotation=45, ha="right")
    plt.close(fig)
    return fig
