"""CIFAR-10's images: their classes, size and colours, and how strongly training augments them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.errors import InvalidValue

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32  # pixels
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images / 255, per channel
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CUTOUT_FILL = CIFAR10_MEAN  # RGB in [0, 1]: the mean colour becomes 0 once normalised


class Images(NamedTuple):
    """Images with their labels.

    Attributes:
        images: uint8 (N, 32, 32, 3), RGB.
        labels: int64 (N,), 0..9.
    """

    images: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> "Images":
        """Return the first images and their labels."""
        return Images(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Augmentation:
    """The strengths of the augmentation of training images.

    Attributes:
        padding: pixels by which an image is shifted at most, 0 to 31; reflection fills the gap.
        cutout: side in pixels of the square that is masked in half of the images, at most 32; 0:
            none.
        mirror: whether half of the images are mirrored.
    """

    padding: int = 4
    cutout: int = 8
    mirror: bool = True

    def __post_init__(self) -> None:
        """Raise InvalidValue for what an image has no room for."""
        # A reflection needs one pixel more than it adds. A fraction is in no range.
        if self.padding not in range(IMAGE_SIZE) or self.cutout not in range(IMAGE_SIZE + 1):
            raise InvalidValue(
                f"expected a padding from 0 to {IMAGE_SIZE - 1} and a cutout from 0 to"
                f" {IMAGE_SIZE}, whole numbers, got {self.padding!r} and {self.cutout!r}"
            )


DEFAULT_AUGMENTATION = Augmentation()
