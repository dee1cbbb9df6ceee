"""The fast loader: all images stay on the device and are augmented there, a batch at a time.

It shifts, mirrors and masks as CIFAR10DataModule's loader does, in a few tensor operations. A
network so small, or a GPU so fast, would otherwise wait for Albumentations, which takes one image
at a time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar10.images import CIFAR10_MEAN, CIFAR10_STD, CUTOUT_FILL, Augmentation, Images
from models.errors import InvalidValue


class Process(NamedTuple):
    """The place of a process among those that train together.

    Attributes:
        rank: its number, from 0.
        world_size: the number of processes.
    """

    rank: int = 0
    world_size: int = 1


ALONE = Process()


def check_batches(count: int, batch_size: int, world_size: int) -> None:
    """Check that every process gets an image of every batch.

    Args:
        count: the number of images.
        batch_size: of all processes together.
        world_size: the number of processes.

    Raises:
        InvalidValue: if the batch size is below 1 or a batch has fewer images than there are
            processes.
    """
    if batch_size < 1:
        raise InvalidValue(f"expected a batch size of at least 1, got {batch_size}")
    smallest = min(batch_size, count % batch_size or batch_size)
    if count and smallest < world_size:
        raise InvalidValue(
            f"batches of {batch_size} of {count} images: one has fewer images than there are"
            f" processes, {world_size}; choose another BATCH_SIZE"
        )


def alternately_mirrored(
    count: int, epoch: int, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Tensor:
    """Choose which images to mirror: half of them, and in the next epoch the others.

    So two epochs show both versions of every image, which teaches more than chance does.

    Args:
        count: the number of images.
        epoch: from 0.
        generator: draws the first half; the same in every epoch.
        device: of the generator.

    Returns:
        Bool (count,), on the device.

    Jordan 2024, arXiv:2404.00498.
    """
    first = torch.rand(count, generator=generator, device=device) < 0.5
    return first ^ (epoch % 2 == 1)


class FastLoader:
    """Normalised, augmented batches: images (B, 3, S, S) in channels_last, and labels (B,).

    The order follows from the seed, the epoch and the kind of device; the augmentation also from
    the batch size and the rank. Each image is mirrored in every other epoch, and half of the images
    in each epoch (arXiv:2404.00498).

    Args:
        part: the images, of any side S, and their labels.
        augmentation: how far to shift, and how large a square to mask.
        batch_size: of all processes together.
        seed: of the order and the augmentation.
        process: which part of every batch to load.
        device: where the images stay and are augmented.

    Raises:
        InvalidValue: if a batch has fewer images than there are processes.

    Attributes:
        epoch: the number of the epoch that the next iteration gives; the caller sets it.
    """

    def __init__(
        self,
        part: Images,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        process: Process = ALONE,
        device: str | torch.device = "cpu",
    ):
        check_batches(len(part.labels), batch_size, process.world_size)
        self.side = part.images.shape[1]
        self.pixels = torch.from_numpy(part.images).to(device).reshape(-1, 3)
        self.labels = torch.from_numpy(part.labels).long().to(device)
        self.mean, self.std = self.pixel_row(CIFAR10_MEAN), self.pixel_row(CIFAR10_STD)
        self.fill = ((self.pixel_row(CUTOUT_FILL) - self.mean) / self.std)[:3]
        self.augmentation, self.batch_size, self.seed = augmentation, batch_size, seed
        self.process, self.epoch = process, 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def pixel_row(self, colour: Sequence[float]) -> Tensor:
        """Return a row of pixels of one colour, in 0..255, (S * 3,).

        Operations are slow on tensors whose last dimension is three wide, and fast on whole rows.
        """
        return 255 * torch.tensor(colour, device=self.labels.device).repeat(self.side)

    def generator(self, *numbers: int) -> torch.Generator:
        """Return a random number generator on the device that follows from these numbers alone."""
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        return torch.Generator(self.labels.device).manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self.labels.device, len(self.labels)
        rank, world_size = self.process
        mirrored = alternately_mirrored(count, self.epoch, self.generator(self.seed), device)
        mirrored &= self.augmentation.mirror
        generator = self.generator(self.seed, self.epoch)
        batches = torch.randperm(count, generator=generator, device=device).split(self.batch_size)
        if rank:  # the order is the same in all processes, the augmentation is not
            generator = self.generator(self.seed, self.epoch, rank)
        for batch in batches:
            chosen = batch[rank::world_size]
            yield self.augment(chosen, mirrored[chosen], generator), self.labels[chosen]

    def reflect(self, index: Tensor) -> Tensor:
        """Reflect the row or column indices beyond an edge at the edge: -1 -> 1, 32 -> 30."""
        last = self.side - 1
        return last - (last - index.abs()).abs()

    def augment(self, chosen: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
        """Shift, mirror, normalise and mask images.

        Args:
            chosen: the indices of the images, (B,).
            mirrored: which of them to mirror, bool (B,).
            generator: of the shifts and the squares.

        Returns:
            Normalised images (B, 3, S, S) in channels_last.
        """
        images = self.shift_and_mirror(chosen, mirrored, generator)
        images = ((images - self.mean) / self.std).view(len(chosen), self.side, self.side, 3)
        if self.augmentation.cutout:
            hole = self.cutout_mask(len(chosen), generator)
            images = torch.where(hole[..., None], self.fill, images)
        return images.permute(0, 3, 1, 2)  # NCHW by shape, channels_last in memory

    def shift_and_mirror(
        self, chosen: Tensor, mirrored: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Gather shifted and mirrored images, uint8 (B, S, S * 3); arguments as of `augment`."""
        device, padding = self.labels.device, self.augmentation.padding
        side = torch.arange(self.side, device=device)
        size = (2, len(chosen), 1)
        shift = torch.randint(-padding, padding + 1, size, generator=generator, device=device)
        columns = torch.where(mirrored[:, None], side.flip(0), side)
        rows, columns = self.reflect(side + shift[0]), self.reflect(columns + shift[1])  # (B, S)
        numbers = chosen[:, None, None] * self.side + rows[:, :, None]
        numbers = numbers * self.side + columns[:, None, :]  # (B, S, S), indices of pixels
        return self.pixels.index_select(0, numbers.flatten()).view(len(chosen), self.side, -1)

    def cutout_mask(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw one square in each of about half of `count` images, bool (count, S, S)."""
        device, cutout = self.labels.device, self.augmentation.cutout
        side = torch.arange(self.side, device=device)
        size = (2, count, 1)
        corner = torch.randint(0, self.side - cutout + 1, size, generator=generator, device=device)
        inside = (corner <= side) & (side < corner + cutout)  # (2, count, S): rows, columns
        cut = torch.rand((count, 1, 1), generator=generator, device=device) < 0.5
        return inside[0, :, :, None] & inside[1, :, None, :] & cut
