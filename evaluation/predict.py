"""What a trained network answers, and how often that is correct."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.console import TransientLine, format_duration


def tta_logits(model: nn.Module, images: Tensor) -> Tensor:
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
        logits = tta_logits(model, images) if tta else model(images)
        batches.append((logits.float().cpu(), labels))
        left = (time.perf_counter() - start) * (len(loader) - index) / index
        line.show(
            f"batch {index} of {len(loader)}, {format_duration(left)} left"
            if index < len(loader)
            else ""
        )
    model.train(training)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction (0..1) of the images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())
