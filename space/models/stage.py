"""What all networks share: their base class, the stages it names, and the check of their input."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from models.errors import InvalidValue


class Stage(NamedTuple):
    """A place in a network whose output Grad-CAM can explain.

    Attributes:
        name: unique within its network.
        module: the module whose output, a feature map (N, C, size, size), is explained.
        size: height and width of that feature map for an image of 32x32 pixels.
    """

    name: str
    module: nn.Module
    size: int


class Network(nn.Module):
    """A classifier of images that names its stages for Grad-CAM.

    It maps normalised images (N, 3, 32, 32) to logits (N, num_classes).
    """

    source_file: Path | None = None  # of its class, where a bundle brought it along

    def stages(self) -> list[Stage]:
        """List the stages, finest first; the last one is the default for Grad-CAM."""
        raise NotImplementedError


def check_images(images: Tensor, training: bool) -> None:
    """Check the shape of a batch.

    Args:
        images: a batch of images.
        training: allow (N, 3, 24, 24) beside (N, 3, 32, 32), for a start at low resolution.

    Raises:
        ValueError: for any other shape, with that shape.
    """
    sides = ((32, 32), (24, 24)) if training else ((32, 32),)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] not in sides:
        raise InvalidValue(f"expected images of shape (N, 3, 32, 32), got {tuple(images.shape)}")
