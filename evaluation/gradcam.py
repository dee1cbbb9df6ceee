"""Misclassified images beside their Grad-CAM heatmaps."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import check_count, new_image_grid, rgb, show_image, with_note
from evaluation.errors import Misclassified, caption
from models import explain
from models.errors import InvalidValue

COLUMNS = 5


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
    """Draw the first samples, each above its Grad-CAM heatmap blended over the image.

    Args:
        data: of `get_misclassified_data`.
        classes: the names of the classes.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        model: the network.
        target_layers: modules of the network; the heatmaps of several are averaged.
        targets: the class to explain for each sample; None: the predicted class.
        number_of_samples: 1 to 20.
        transparency: of the heatmap, 1 - opacity: 0 shows the heatmap alone, 1 the image alone.
        note: a line under the title.

    Raises:
        ValueError: if there are too few samples, targets or layers.
    """
    check_count(number_of_samples, len(data))
    if not target_layers:
        raise InvalidValue("expected at least one target layer, got none")
    chosen = data[:number_of_samples]
    explained = explained_classes(chosen, targets)
    batch = torch.stack([sample.image for sample in chosen])
    cams = np.mean(
        [explain.gradcam(model, layer, batch, explained) for layer in target_layers], axis=0
    )
    rows, columns = math.ceil(len(chosen) / COLUMNS), min(COLUMNS, len(chosen))
    fig, axes = new_image_grid(2 * rows, columns, 2.1 * columns, 4.6 * rows)
    for i, (sample, cam) in enumerate(zip(chosen, cams, strict=True)):
        row, column = 2 * (i // COLUMNS), i % COLUMNS
        image = rgb(sample.image, inv_normalize)
        blended = explain.overlay(image, cam, 1 - transparency)
        show_image(axes[row, column], image, caption(sample, classes))
        show_image(axes[row + 1, column], blended, f"for {classes[explained[i]]}")
    title = "Grad-CAM: red marks the evidence for the class named above each heatmap"
    fig.suptitle(with_note(title, note))
    return fig


def explained_classes(samples: Sequence[Misclassified], targets: Sequence[int] | None) -> list[int]:
    """Return the class to explain for each sample: its target, or the predicted class."""
    if targets is None:
        return [sample.pred for sample in samples]
    if len(targets) < len(samples):
        raise InvalidValue(
            f"expected a target for each of {len(samples)} samples, got {len(targets)}"
        )
    return list(targets[: len(samples)])
