"""How far a network's confidence can be trusted, and the temperature that corrects it."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from evaluation.drawing import with_note

BINS = 15  # of the calibration error


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the T for which softmax(logits / T) has the smallest cross-entropy.

    Args:
        logits: (N, classes), of images that the network was not trained on.
        labels: (N,).

    Returns:
        T, from 0.05 to 20. Above 1: the network was overconfident.

    Guo et al. 2017, arXiv:1706.04599.
    """

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_t), labels))

    # Of ln T; the cross-entropy has one minimum there.
    return math.exp(
        minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-4}).x
    )


def reliability(
    logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over 15 bins of equal width, by the confidence of an answer.

    Of confidences, of right answers, of images.
    """
    confidence, preds = (logits.double() / temperature).softmax(1).max(1)
    right = (preds == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    empty = torch.zeros(BINS, dtype=torch.double)
    return tuple(
        empty.index_add(0, bins, values) for values in (confidence, right, torch.ones_like(right))
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error (fraction).

    How far confidence and accuracy are apart, in 15 bins of equal width.
    """
    confidence, right, _ = reliability(logits, labels, temperature)
    return float((right - confidence).abs().sum() / len(labels))


def confidence_threshold(logits: Tensor, temperature: float, fraction: float) -> float:
    """The probability below which the surest class of this fraction of the images lies.

    Logits: (N, classes).
    """
    return float((logits.double() / temperature).softmax(1).amax(1).quantile(fraction))


def plot_reliability(logits: Tensor, labels: Tensor, temperature: float, note: str = "") -> Figure:
    """Accuracy against confidence, before and after the temperature; bars on the diagonal would be perfect.

    logits: (N, classes). labels: (N,). The darker a bar, the more images are in it.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 4), sharey=True, layout="constrained")
    for axis, name, value in zip(axes, ("before", "after"), (1.0, temperature), strict=True):
        _, right, count = reliability(logits, labels, value)
        filled = count > 0
        middle = (np.arange(BINS) + 0.5) / BINS
        shade = plt.get_cmap("Blues")(0.3 + 0.7 * (count / count.max()).sqrt().numpy())
        axis.bar(
            middle[filled],
            (right[filled] / count[filled]).numpy(),
            0.9 / BINS,
            color=shade[filled.numpy()],
        )
        axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        error = expected_calibration_error(logits, labels, value)
        axis.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel="confidence",
            title=f"{name}: temperature {value:.2f}, error {error:.2%}",
        )
    axes[0].set_ylabel("accuracy (fraction)")
    fig.suptitle(with_note("How often the network is right when it is so sure", note))
    plt.close(fig)
    return fig
