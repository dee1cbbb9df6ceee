"""What all networks share: base class, stages, the check of their input, and eval mode."""

import contextlib
from collections.abc import Iterator
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

    Its `forward` maps normalised images (N, 3, 32, 32), in training mode also (N, 3, 24, 24), to
    logits (N, num_classes), and raises ValueError for images of another shape.
    """

    source_file: Path | None = None  # of its class, where a bundle brought it along

    def stages(self) -> list[Stage]:
        """List the stages, finest first; the last one is the default for Grad-CAM."""
        raise NotImplementedError

    def whitening_layer(self) -> nn.Conv2d | None:
        """Return the convolution whose filters training first computes from the images, if any."""
        return None


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
        wanted = " or ".join(f"(N, 3, {height}, {width})" for height, width in sides)
        raise InvalidValue(f"expected images of shape {wanted}, got {tuple(images.shape)}")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode within the block, then each module back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
