"""Test images above their Grad-CAM heatmaps for two classes."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import (
    WIDTH,
    check_count,
    format_confidence,
    headline,
    new_image_grid,
    rgb,
    show_image,
    styled,
)
from evaluation.errors import Misclassified, caption
from evaluation.heatmaps import draw_colour_bar, rank_correlation
from models import explain
from models.errors import InvalidValue

COLUMNS = 5


@styled
def display_gradcam_output(  # noqa: PLR0913
    data: Sequence[Misclassified],
    classes: Sequence[str],
    inv_normalize: Callable[[Tensor], Tensor],
    model: nn.Module,
    target_layers: Sequence[nn.Module],
    targets: Sequence[int] | None = None,
    number_of_samples: int = 10,
    transparency: float = 0.60,
    note: str = "",
) -> Figure:
    """Draw the first samples, each above two Grad-CAM heatmaps that are blended over the image.

    The first heatmap is for the predicted class or the given one. The second is for the true class,
    or, where that was predicted, for the second most probable class; where that is the given one,
    for the predicted class.

    Args:
        data: of `get_misclassified_data`, of `get_correct_data`, or of both.
        classes: the names of the classes.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        model: the network.
        target_layers: modules of the network; the heatmaps of several are averaged.
        targets: the class of the first heatmap of each sample; None: the predicted class.
        number_of_samples: 1 to 20.
        transparency: of the heatmap, 1 - opacity: 0 shows the heatmap alone, 1 the image alone.
        note: a line under the title.

    Raises:
        ValueError: if there are too few samples, targets, classes or layers, and for a transparency
            that is not from 0 to 1.
    """
    check_count(number_of_samples, len(data))
    if isinstance(target_layers, nn.Module):  # a Sequential would be taken for its children
        got = type(target_layers).__name__
        raise InvalidValue(f"expected a list of target layers, got a module, {got}")
    if not target_layers:
        raise InvalidValue("expected at least one target layer, got none")
    if not 0 <= transparency <= 1:
        raise InvalidValue(f"expected a transparency from 0 to 1, got {transparency}")
    chosen = data[:number_of_samples]
    if len(classes) < len(chosen[0].probs):
        wanted = len(chosen[0].probs)
        raise InvalidValue(f"expected the names of {wanted} classes, got {len(classes)}")
    first = explained_classes(chosen, targets)
    explained = [first, [other_class(*pair) for pair in zip(chosen, first, strict=True)]]
    batch = torch.stack([sample.image for sample in chosen])
    cams = [
        np.mean([explain.gradcam(model, layer, batch, wanted) for layer in target_layers], axis=0)
        for wanted in explained
    ]
    rows, columns = math.ceil(len(chosen) / COLUMNS), min(COLUMNS, len(chosen))
    width = max(6.5, WIDTH / COLUMNS * columns)
    fig, axes = new_image_grid(3 * rows, columns, width, 6.3 * rows + 0.9)
    for i, sample in enumerate(chosen):
        row, column = 3 * (i // COLUMNS), i % COLUMNS
        image = rgb(sample.image, inv_normalize)
        show_image(axes[row, column], image, sample_caption(sample, classes))
        for below in (0, 1):
            blended = explain.overlay(image, cams[below][i], 1 - transparency)
            name = classes[explained[below][i]]
            show_image(axes[row + 1 + below, column], blended, f"evidence for {name}")
    draw_colour_bar(fig, axes)
    shows = "Test images above their Grad-CAM heatmaps for two classes"
    headline(fig, gradcam_title(chosen, *cams, given=targets is not None), shows, note)
    return fig


def sample_caption(sample: Misclassified, classes: Sequence[str]) -> str:
    """Name the true class, and the predicted class with its probability, in two or three lines."""
    if sample.label == sample.pred:
        return f"{classes[sample.label]}, correctly\npredicted ({format_confidence(sample.prob)})"
    return caption(sample, classes)


def gradcam_title(
    samples: Sequence[Misclassified], first: np.ndarray, other: np.ndarray, given: bool = False
) -> str:
    """Say how alike the heatmaps of the misclassified samples for their two classes are.

    Args:
        samples: those that are shown; where all were predicted correctly, the title is of them.
        first: heatmaps (N, H, W) for the predicted class, or the given one.
        other: heatmaps (N, H, W) for the other class.
        given: whether the first class is not the predicted one.
    """
    errors = np.array([sample.label != sample.pred for sample in samples])
    used = errors if errors.any() else ~errors
    alike = float(rank_correlation(first[used], other[used]).mean())
    pair = "the predicted and the true class" if errors.any() else "the two most probable classes"
    if given:
        pair = "the two classes"
    return f"Heatmaps for {pair}: mean rank correlation {alike:.2f} (n = {used.sum()})"


def other_class(sample: Misclassified, first: int) -> int:
    """Return the class to compare the first with.

    It is the true class of an error, or the runner-up of a correct prediction; where that is the
    first, it is the predicted class.
    """
    is_error = sample.label != sample.pred
    other = sample.label if is_error else int(sample.probs.topk(2).indices[1])
    return sample.pred if other == first else other


def explained_classes(samples: Sequence[Misclassified], targets: Sequence[int] | None) -> list[int]:
    """Return the class to explain for each sample: its target, or the predicted class."""
    if targets is None:
        return [sample.pred for sample in samples]
    if len(targets) < len(samples):
        raise InvalidValue(
            f"expected a target for each of {len(samples)} samples, got {len(targets)}"
        )
    return list(targets[: len(samples)])
