"""What a trained network answers, how good that is, and how sure it should be."""

import math
import time

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from progress import TransientLine, clock

BINS = 15  # of the calibration error


def six_views(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, classes), averaged over an image as it is and shifted by a pixel to two corners, each also mirrored.

    The unshifted pair counts half, the shifted pairs a quarter each (arXiv:2404.00498). images: (N, 3, H, W).
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    logits = 0
    for weight, view in ((2, images), (1, padded[..., :height, :width]), (1, padded[..., 2:, 2:])):
        logits = logits + weight * (model(view) + model(view.flip(3)))
    return logits / 8


@torch.no_grad()
def predict(
    model: nn.Module, device: str | torch.device, loader: DataLoader, tta: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of all images of a loader, in its order, on the CPU, in fp32.

    tta: average over six views of each image. The network is moved to the device and keeps its mode. Shows how far
    it is.
    """
    training, line, start = model.training, TransientLine(), time.perf_counter()
    model.eval().to(device)
    batches = []
    for index, (images, labels) in enumerate(loader, 1):
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        logits = six_views(model, images) if tta else model(images)
        batches.append((logits.float().cpu(), labels))
        left = (time.perf_counter() - start) * (len(loader) - index) / index
        line.show(f"batch {index} of {len(loader)}, {clock(left)} left" if index < len(loader) else "")
    model.train(training)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction (0..1) of the images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())


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
    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-4}).x)


def reliability(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over 15 bins of equal width, by the confidence of an answer: of confidences, of right answers, of images."""
    confidence, preds = (logits.double() / temperature).softmax(1).max(1)
    right = (preds == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    empty = torch.zeros(BINS, dtype=torch.double)
    return tuple(empty.index_add(0, bins, values) for values in (confidence, right, torch.ones_like(right)))


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error (fraction): how far confidence and accuracy are apart, in 15 bins of equal width."""
    confidence, right, _ = reliability(logits, labels, temperature)
    return float((right - confidence).abs().sum() / len(labels))


def doubt_threshold(logits: Tensor, temperature: float, fraction: float) -> float:
    """The probability below which the surest class of this fraction of the images lies. logits: (N, classes)."""
    return float((logits.double() / temperature).softmax(1).amax(1).quantile(fraction))
