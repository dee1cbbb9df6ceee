"""A network's predictions, and how often they are correct."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.errors import InvalidValue
from models.stage import eval_mode
from training.console import TransientLine, format_duration


def tta_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Compute logits with test-time augmentation (TTA).

    They are averaged over six versions of each image: unshifted, and shifted by one pixel towards
    two opposite corners, each of them also mirrored. The unshifted pair weighs one half, each
    shifted pair one quarter.

    Args:
        model: the network.
        images: normalised (N, 3, H, W).

    Returns:
        Logits (N, num_classes).

    Jordan 2024, arXiv:2404.00498.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    views = (images, padded[..., :height, :width], padded[..., 2:, 2:])
    unshifted, up_left, down_right = (model(view) + model(view.flip(3)) for view in views)
    return (2 * unshifted + up_left + down_right) / 8


@torch.no_grad()
def predict(
    model: nn.Module, device: str | torch.device, loader: DataLoader, tta: bool = False
) -> tuple[Tensor, Tensor]:
    """Predict all images of a loader, and show the progress.

    Args:
        model: the network; it is moved to the device and keeps its mode.
        device: where to compute.
        loader: gives batches (B, 3, H, W), (B,).
        tta: use test-time augmentation.

    Returns:
        Logits (N, num_classes) and labels (N,) in the loader's order, on the CPU, in fp32.

    Raises:
        InvalidValue: if the loader gives no images.
    """
    line, start, batches = TransientLine(), time.perf_counter(), []
    model.to(device)
    # Newer GPUs would round what convolutions multiply to TF32; the app computes in fp32.
    with eval_mode(model), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for index, (images, labels) in enumerate(loader, 1):
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            logits = tta_logits(model, images) if tta else model(images)
            batches.append((logits.float().cpu(), labels.cpu()))
            left = (time.perf_counter() - start) * (len(loader) - index) / index
            progress = f"batch {index} of {len(loader)}, {format_duration(left)} left"
            line.show(progress if index < len(loader) else "")
    if not batches:
        raise InvalidValue("expected a loader with images, got an empty one")
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the fraction (0..1) of images whose largest logit is that of their label.

    Args:
        logits: (N, num_classes).
        labels: (N,).
    """
    return float((logits.argmax(1) == labels).double().mean())
