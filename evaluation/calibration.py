"""How far a network's confidence can be trusted, and the temperature that corrects it."""

import math
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from evaluation.drawing import new_figure, with_note

BINS = 15  # of equal width, for the expected calibration error


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature T for which softmax(logits / T) has the smallest cross-entropy.

    Args:
        logits: (N, num_classes), of images that the network was not trained on.
        labels: (N,).

    Returns:
        T, from 0.05 to 20. Above 1, the network was overconfident.

    Guo et al. 2017, arXiv:1706.04599.
    """

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_t), labels))

    # Searched over ln T, where the cross-entropy has a single minimum.
    return math.exp(
        minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-4}).x
    )


class ReliabilityBins(NamedTuple):
    """Sums over the predictions of each of 15 bins of confidence, all (15,).

    Attributes:
        confidence: sum of the confidences.
        correct: number of correct predictions.
        total: number of predictions.
    """

    confidence: Tensor
    correct: Tensor
    total: Tensor


def reliability_bins(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> ReliabilityBins:
    """Sort predictions by their confidence into 15 bins of equal width.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        temperature: divides the logits.
    """
    confidence, preds = (logits.double() / temperature).softmax(1).max(1)
    correct = (preds == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    empty = torch.zeros(BINS, dtype=torch.double)
    return ReliabilityBins(
        empty.index_add(0, bins, confidence),
        empty.index_add(0, bins, correct),
        empty.index_add(0, bins, torch.ones_like(correct)),
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Compute the expected calibration error (ECE).

    It is the mean gap between confidence and accuracy in 15 bins of equal width, each bin weighted
    by its number of images.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        temperature: divides the logits.

    Returns:
        The error as a fraction, 0..1.
    """
    bins = reliability_bins(logits, labels, temperature)
    return float((bins.correct - bins.confidence).abs().sum() / len(labels))


def confidence_threshold(logits: Tensor, temperature: float, fraction: float) -> float:
    """Find the confidence that a fraction of the predictions does not reach.

    Args:
        logits: (N, num_classes).
        temperature: divides the logits.
        fraction: 0..1.

    Returns:
        A probability: the quantile of the confidences at that fraction.
    """
    return float((logits.double() / temperature).softmax(1).amax(1).quantile(fraction))


def plot_reliability(logits: Tensor, labels: Tensor, temperature: float, note: str = "") -> Figure:
    """Draw the reliability diagram before and after the temperature.

    Bars on the diagonal would be perfect; the darker a bar, the more images are in its bin.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        temperature: divides the logits of the second diagram.
        note: a line under the title.
    """
    fig = new_figure(8.5, 4)
    axes = fig.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axis, name, value in zip(axes, ("before", "after"), (1.0, temperature), strict=True):
        draw_bins(axis, reliability_bins(logits, labels, value))
        error = expected_calibration_error(logits, labels, value)
        axis.set_title(f"{name}: temperature {value:.2f}, ECE {error:.2%}")
    axes[0].set_ylabel("accuracy (fraction)")
    fig.suptitle(with_note("Reliability diagram: accuracy at each confidence", note))
    return fig


def draw_bins(axis: Axes, bins: ReliabilityBins) -> None:
    """Draw the accuracy of each bin that is not empty, and the diagonal."""
    correct, total = bins.correct.numpy(), bins.total.numpy()
    filled = total > 0
    middle = (np.arange(BINS) + 0.5) / BINS
    shade = matplotlib.colormaps["Blues"](0.3 + 0.7 * np.sqrt(total / total.max()))
    axis.bar(middle[filled], correct[filled] / total[filled], 0.9 / BINS, color=shade[filled])
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
