"""The fast loader: all images stay on the device and are augmented there, a batch at a time.

The same transforms in meaning as dataload.augmentation, in a few tensor operations; for a network
so small, or a GPU so fast, that Albumentations, which takes one image at a time, would keep it
waiting.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models.errors import InvalidValue


class FastLoader:
    """Batches as LitClassifier wants them: normalised (B, 3, S, S) in channels_last, and labels (B,).

    images: uint8 (N, S, S, 3). labels: (N,). mean, std: per channel, of values in 0..1. padding: pixels by which an
    image is shifted at most, the gap filled by reflection. cutout: side of the square that half of the images
    lose; 0: none. rank, processes: the number of this process and how many there are; each has its share of every
    batch. Order and augmentation follow from (seed, epoch, rank) alone. Each image is mirrored in every other epoch
    (arXiv:2404.00498), so half of the images are in each epoch.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        epoch: int,
        padding: int,
        cutout: int,
        device: str | torch.device,
        rank: int = 0,
        processes: int = 1,
    ):
        smallest = min(batch_size, len(labels) % batch_size or batch_size)
        if smallest < processes:
            raise InvalidValue(
                f"batches of {batch_size} of {len(labels)} images: one has fewer images than there are processes,"
                f" {processes}; choose another BATCH_SIZE"
            )
        self.side = images.shape[1]
        self.pixels = torch.from_numpy(images).to(device).view(-1, 3)
        self.labels = torch.from_numpy(labels).long().to(device)
        # One value for each number in a row of pixels: wide operations are quick, those three wide
        # are not.
        self.mean, self.std = (
            255 * torch.tensor(values, device=device).repeat(self.side) for values in (mean, std)
        )
        self.batch_size, self.seed, self.epoch = batch_size, seed, epoch
        self.padding, self.cutout, self.rank, self.processes = padding, cutout, rank, processes

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def generator(self, *numbers: int) -> torch.Generator:
        """A source of random numbers on the device that follows from these numbers alone."""
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        return torch.Generator(self.labels.device).manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self.labels.device, len(self.labels)
        mirrored = torch.rand(count, generator=self.generator(self.seed), device=device) < 0.5
        mirrored ^= self.epoch % 2 == 1
        generator = self.generator(self.seed, self.epoch)
        batches = torch.randperm(count, generator=generator, device=device).split(self.batch_size)
        if self.rank:  # the order is the same in all processes, the augmentation is not
            generator = self.generator(self.seed, self.epoch, self.rank)
        for batch in batches:
            chosen = batch[self.rank :: self.processes]
            yield self.augment(chosen, mirrored[chosen], generator), self.labels[chosen]

    def reflect(self, index: Tensor) -> Tensor:
        """Row or column numbers beyond the edge, as if a mirror stood on it: -1 -> 1, 32 -> 30."""
        last = self.side - 1
        return last - (last - index.abs()).abs()

    def augment(self, chosen: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
        """The images of these numbers (B,), shifted, mirrored where so said, cut out, normalised."""
        device, count, side = (
            self.labels.device,
            len(chosen),
            torch.arange(self.side, device=self.labels.device),
        )
        shift = torch.randint(
            -self.padding, self.padding + 1, (2, count, 1), generator=generator, device=device
        )
        columns = torch.where(mirrored[:, None], side.flip(0), side)
        rows, columns = (
            self.reflect(side + shift[0]),
            self.reflect(columns + shift[1]),
        )  # (B, S) each
        numbers = (chosen[:, None, None] * self.side + rows[:, :, None]) * self.side + columns[
            :, None, :
        ]
        images = self.pixels.index_select(0, numbers.flatten()).view(
            count, self.side, -1
        )  # (B, S, S * 3)
        images = ((images - self.mean) / self.std).view(count, self.side, self.side, 3)
        if self.cutout:
            corner = torch.randint(
                0, self.side - self.cutout + 1, (2, count, 1), generator=generator, device=device
            )
            inside = (corner <= side) & (side < corner + self.cutout)  # (2, B, S): rows, columns
            cut = torch.rand((count, 1, 1), generator=generator, device=device) < 0.5
            hole = inside[0, :, :, None] & inside[1, :, None, :] & cut
            images = images.masked_fill(hole[..., None], 0)  # 0 is the mean colour
        return images.permute(0, 3, 1, 2)  # NCHW by shape, channels_last in memory
