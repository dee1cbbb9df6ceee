"""What every network shares: the stages that it names for Grad-CAM, and the check of its input."""

from typing import NamedTuple

from torch import Tensor, nn

from models.errors import InvalidValue


class Stage(NamedTuple):
    """A place where Grad-CAM can look.

    Its name, the module whose output it reads, the side of that map.
    """

    name: str
    module: nn.Module
    size: int


def check_images(images: Tensor, training: bool) -> None:
    """Raise ValueError unless images has the shape (N, 3, 32, 32), or (N, 3, 24, 24) in training, for a quick start."""
    sides = ((32, 32), (24, 24)) if training else ((32, 32),)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] not in sides:
        raise InvalidValue(f"expected images of shape (N, 3, 32, 32), got {tuple(images.shape)}")
