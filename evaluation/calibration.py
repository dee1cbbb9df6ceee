"""How far a network's confidence can be trusted, and the temperature that corrects it."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from evaluation.drawing import (
    COLOURS,
    GREY,
    WIDTH,
    headline,
    new_figure,
    percent,
    percent_axis,
    style_chart,
    styled,
)

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
    confidences, hits = (
        torch.bincount(bins, weights, minlength=BINS) for weights in (confidence, correct)
    )
    return ReliabilityBins(confidences, hits, torch.bincount(bins, minlength=BINS))


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


def reliability_title(logits: Tensor, labels: Tensor, temperature: float) -> str:
    """Say how far confidence and accuracy are apart, before and after the temperature.

    Arguments are those of `plot_reliability`.
    """
    bins = reliability_bins(logits, labels)
    gap = float((bins.confidence - bins.correct).sum() / len(labels))
    before, after = (expected_calibration_error(logits, labels, t) for t in (1.0, temperature))
    kind = "overconfident" if gap > 0 else "underconfident"
    verb = "lowers" if after < before else "does not lower"
    return (
        f"The network is {kind} by {100 * abs(gap):.1f} percentage points on average;"
        f" a temperature of {temperature:.2f} {verb} the ECE: {percent(before, 2)} before,"
        f" {percent(after, 2)} after"
    )


@styled
def plot_reliability(logits: Tensor, labels: Tensor, temperature: float, note: str = "") -> Figure:
    """Draw the reliability diagram before and after the temperature, above a histogram.

    The bars on the diagonal would be perfect; the orange part is the gap to the mean confidence.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        temperature: divides the logits of the second diagram.
        note: a line under the title.
    """
    fig = new_figure(WIDTH, 6.4)
    axes = fig.subplots(2, 2, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1.2))
    for column, name, value in zip(axes.T, ("before", "after"), (1.0, temperature), strict=True):
        bins = reliability_bins(logits, labels, value)
        draw_bins(column[0], bins)
        draw_confidences(column[1], bins)
        error = expected_calibration_error(logits, labels, value)
        column[0].set_title(f"{name}: temperature {value:.2f}, ECE {percent(error, 2)}")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("images")
    shows = "Reliability diagrams before and after the temperature, with histograms of confidence"
    headline(fig, reliability_title(logits, labels, temperature), shows, note)
    return fig


def draw_bins(axis: Axes, bins: ReliabilityBins) -> None:
    """Draw the accuracy of each bin that is not empty, its gap to the confidence, the diagonal."""
    confidence, correct, total = (values.numpy() for values in bins)
    filled = total > 0
    middle = ((np.arange(BINS) + 0.5) / BINS)[filled]
    accuracy, confidence = correct[filled] / total[filled], confidence[filled] / total[filled]
    axis.bar(middle, accuracy, 0.9 / BINS, color=COLOURS[0], label="accuracy")
    gaps = axis.bar(middle, confidence - accuracy, 0.5 / BINS, accuracy, color=COLOURS[1])
    gaps.set_label("gap to the mean confidence")
    axis.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="accuracy = confidence")
    style_chart(axis)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    percent_axis(axis)
    axis.legend(loc="upper left")


def draw_confidences(axis: Axes, bins: ReliabilityBins) -> None:
    """Draw how many images are in each bin, on a logarithmic scale."""
    middle = (np.arange(BINS) + 0.5) / BINS
    axis.bar(middle, bins.total.numpy(), 0.9 / BINS, color="0.6")
    style_chart(axis)
    axis.set(xlabel="confidence", yscale="symlog", xlim=(0, 1), ylim=(0, None))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    percent_axis(axis, "x")
