"""Misclassified images beside their Grad-CAM heatmaps."""

import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import check_count, rgb, with_note
from evaluation.errors import Misclassified, caption
from models import explain
from models.errors import InvalidValue


def display_gradcam_output(
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
    """The first samples, each beside its Grad-CAM overlay.

    data: of get_misclassified_data. inv_normalize: normalised (3, H, W) -> [0, 1]. target_layers:
    modules of model; with several, their maps are averaged. targets: the class to explain for each
    sample; None: the predicted one. transparency: of the heat map, 1 - opacity: 0 shows the map
    alone, 1 the photograph alone.
    """
    check_count(number_of_samples, len(data))
    chosen = data[:number_of_samples]
    if targets is not None and len(targets) < len(chosen):
        raise InvalidValue(
            f"expected a target for each of {len(chosen)} samples, got {len(targets)}"
        )
    if not target_layers:
        raise InvalidValue("expected at least one target layer, got none")
    explained = (
        [sample.pred for sample in chosen] if targets is None else list(targets[: len(chosen)])
    )
    batch = torch.stack([sample.image for sample in chosen])
    cams = np.mean(
        [explain.gradcam(model, layer, batch, explained) for layer in target_layers], axis=0
    )
    pairs, columns = math.ceil(len(chosen) / 5), min(5, len(chosen))
    fig, axes = plt.subplots(
        2 * pairs,
        columns,
        figsize=(2.1 * columns, 4.6 * pairs),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (sample, cam) in enumerate(zip(chosen, cams, strict=True)):
        above, below = axes[2 * (i // 5), i % 5], axes[2 * (i // 5) + 1, i % 5]
        image = rgb(sample.image, inv_normalize)
        above.imshow(image, interpolation="nearest")
        above.set_title(caption(sample, classes), fontsize=9)
        below.imshow(explain.overlay(image, cam, 1 - transparency), interpolation="nearest")
        below.set_title(f"for {classes[explained[i]]}", fontsize=9)
    fig.suptitle(
        with_note("Grad-CAM: red marks what spoke for the class named above each map", note)
    )
    plt.close(fig)
    return fig
