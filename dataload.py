"""CIFAR-10 on its way from the disk to the network: files -> arrays -> AlbumentationImageDataset -> loaders.

Images are uint8 RGB (N, 32, 32, 3) until the transform makes them normalised float tensors (3, 32, 32).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # or importing it asks a server for its newest version

import albumentations as A
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cifar10.download import DataUnavailable, prepare_cifar10, read_cifar10
from cifar10.fast_loader import FastLoader
from cifar10.sample import draw_sample
from models.errors import InvalidValue

__all__ = [
    "CIFAR10DataModule",
    "CLASSES",
    "AlbumentationImageDataset",
    "DataUnavailable",
    "Draw",
    "denormalize",
    "loader",
    "load_splits",
    "prepare_cifar10",
    "read_cifar10",
    "sample_cifar10",
    "sample_splits",
]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images / 255, per channel
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
MEAN_COLOUR = tuple(round(255 * mean) for mean in CIFAR10_MEAN)  # what becomes 0 once normalised
VAL_FRACTION = 0.1  # 5,000 of the 50,000 training images


class Images(NamedTuple):
    """images: uint8 (N, 32, 32, 3), RGB. labels: int64 (N,), 0..9."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The three disjoint parts, what they are ('CIFAR-10', or what says that they are not), and the split's seed."""

    train: Images
    val: Images
    test: Images
    source: str
    seed: int = 42


# ---- split ---------------------------------------------------------------------------------------


def split(train: Images, test: Images, seed: int, source: str) -> Splits:
    """Cut a tenth of the training images off for validation, chosen by the seed."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).numpy()
    cut = len(order) - round(VAL_FRACTION * len(order))
    first, last = (
        Images(train.images[part], train.labels[part]) for part in (order[:cut], order[cut:])
    )
    return Splits(first, last, test, source, seed)


def load_splits(data_dir: str | Path = "data", seed: int = 42) -> Splits:
    """CIFAR-10 as 45,000 / 5,000 / 10,000 images, downloaded into data_dir first if it is not there."""
    train, test = read_cifar10(prepare_cifar10(data_dir))
    return split(Images(*train), Images(*test), seed, "CIFAR-10")


def sample_cifar10(
    pictures: str | Path, seed: int = 42
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Stand-in for read_cifar10 that needs no network.

    2,000 and 500 images drawn from the ten bundled pictures.
    """
    return draw_sample(pictures, CLASSES, seed)


def sample_splits(pictures: str | Path, seed: int = 42) -> Splits:
    """The built-in sample as 1,800 / 200 / 500 images.

    For tests and for a first run without a network.
    """
    train, test = sample_cifar10(pictures, seed)
    return split(Images(*train), Images(*test), seed, "built-in sample, not CIFAR-10")


# ---- transforms and dataset ----------------------------------------------------------------------


def augmentation(padding: int = 4, cutout: int = 8) -> list[A.BasicTransform]:
    """What training does to an image.

    Shift by up to `padding` pixels, mirror, cut out a square (side 0: none).
    """
    padded, hole = IMAGE_SIZE + 2 * padding, (cutout, cutout)
    return [
        A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(IMAGE_SIZE, IMAGE_SIZE),
        A.HorizontalFlip(p=0.5),
        A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=hole,
            hole_width_range=hole,
            fill=MEAN_COLOUR,
            p=0.5,
        ),  # before Normalize: fill is in 0..255
    ][: 4 if cutout else 3]


def normalize(images: np.ndarray) -> Tensor:
    """uint8 (N, 32, 32, 3) -> float (N, 3, 32, 32) in channels_last.

    Mean 0 and deviation 1 over the training set.
    """
    mean, std = (255 * torch.tensor(values) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return ((torch.from_numpy(images) - mean) / std).permute(0, 3, 1, 2)


def denormalize(images: Tensor) -> Tensor:
    """Undo Normalize: (..., 3, H, W) -> RGB in [0, 1], same shape."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (CIFAR10_MEAN, CIFAR10_STD)
    )
    return (images * std + mean).clamp(0, 1)


class AlbumentationImageDataset(Dataset):
    """Images with labels, augmented and normalised when asked for: (float tensor (3, 32, 32), int).

    image_list: sequence of (uint8 RGB array (32, 32, 3), label 0..9). train: augment, as
    `augmentation` says. Raises ValueError for an image of another shape or type and for a label out
    of range.
    """

    def __init__(
        self,
        image_list: Sequence[tuple[np.ndarray, int]],
        train: bool = True,
        padding: int = 4,
        cutout: int = 8,
    ):
        for index, (image, label) in enumerate(image_list):
            if (
                getattr(image, "shape", None) != (IMAGE_SIZE, IMAGE_SIZE, 3)
                or image.dtype != np.uint8
            ):
                got = (
                    f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
                )
                raise InvalidValue(f"image {index}: expected a uint8 array (32, 32, 3), got {got}")
            if not 0 <= label < len(CLASSES):
                raise InvalidValue(
                    f"image {index}: expected a label from 0 to {len(CLASSES) - 1}, got {label}"
                )
        self.image_list = image_list
        # strict: albumentations 2 ignores arguments it does not know otherwise
        self.transform = A.Compose(augmentation(padding, cutout) if train else [], strict=True)

    def __len__(self) -> int:
        return len(self.image_list)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, (B, 3, 32, 32) and (B,).

        To normalise it in one go takes a third of the time.
        """
        images, labels = zip(*(self.image_list[index] for index in indices), strict=True)
        images = np.stack([self.transform(image=image)["image"] for image in images])
        return normalize(images), torch.tensor(labels, dtype=torch.long)


# ---- loaders -------------------------------------------------------------------------------------


def seed_worker(_worker_id: int) -> None:
    """Give each worker its own augmentations.

    Albumentations 2.0.8 would give all workers and epochs the same.
    """
    info = get_worker_info()
    info.dataset.transform.set_random_seed(info.seed % 2**32)


class EpochLoader(DataLoader):
    """A loader that gives the same batches each time it is iterated: Lightning begins an epoch once or several times,
    depending on whether the run was interrupted before.
    """

    def __iter__(self):
        self.generator.manual_seed(self.generator.initial_seed())
        self.dataset.transform.set_random_seed(self.generator.initial_seed())
        return super().__iter__()


def shard_batches(
    count: int, batch_size: int, seed: int | None = None, rank: int = 0, processes: int = 1
) -> list[list[int]]:
    """The numbers of `count` images in batches, shuffled if there is a seed, and of each batch every process's part.

    All processes together load the batches that one would load: each image once, in the same order. ValueError if
    there are too few images in a batch for all of them.
    """
    if batch_size < 1:
        raise InvalidValue(f"expected a batch size of at least 1, got {batch_size}")
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    batches = order.split(batch_size) if count else ()
    if any(len(batch) < processes for batch in batches):
        raise InvalidValue(
            f"batches of {batch_size} of {count} images: one has fewer images than there are processes, {processes};"
            " choose another BATCH_SIZE"
        )
    return [batch[rank::processes].tolist() for batch in batches]


def identity_collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the dataset gives is a batch already.

    A loader would otherwise put it together from single images.
    """
    return batch


def make_loader(
    part: Images,
    batches: int | list[list[int]],
    num_workers: int,
    train: bool,
    seed: int = 0,
    kind: type[DataLoader] = DataLoader,
    padding: int = 4,
    cutout: int = 8,
) -> DataLoader:
    """Batches (B, 3, 32, 32), (B,).

    Order and augmentation of a training loader depend on the seed alone.

    batches: how many images each has, or the numbers of its images.
    """
    how = (
        {"batch_sampler": batches}
        if isinstance(batches, list)
        else {"batch_size": batches, "shuffle": train}
    )
    dataset = AlbumentationImageDataset(
        list(zip(part.images, part.labels, strict=True)), train, padding, cutout
    )
    dataset.transform.set_random_seed(seed)  # for num_workers=0, where no worker is seeded
    return kind(
        dataset,
        **how,
        num_workers=num_workers,
        worker_init_fn=seed_worker,
        collate_fn=identity_collate,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
    )


class CIFAR10DataModule(pl.LightningDataModule):
    """The three loaders as Lightning wants them.

    Each epoch's order and augmentation follow from (seed, epoch), so a run that was interrupted
    goes on exactly as it would have (with reload_dataloaders_every_n_epochs=1). Where several
    processes train, each loads its share of every batch (with use_distributed_sampler=False).

    batch_size: of all processes together. splits: the images, or None to take CIFAR-10 from
    data_dir. padding, cutout: of the augmentation. fast: let FastLoader augment the training
    images, in batches on the device, instead of Albumentations.
    """

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 42,
        splits: Splits | None = None,
        padding: int = 4,
        cutout: int = 8,
        fast: bool = False,
    ):
        super().__init__()
        self.data_dir, self.batch_size, self.num_workers = data_dir, batch_size, num_workers
        self.seed, self.splits, self.padding, self.cutout, self.fast = (
            seed,
            splits,
            padding,
            cutout,
            fast,
        )
        self.resident: FastLoader | None = None  # its images stay on the device from epoch to epoch
        self.resident_of: tuple = (None, None)  # the splits and the settings that it was made of

    def prepare_data(self) -> None:
        if self.splits is None:
            prepare_cifar10(self.data_dir)

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            self.splits = load_splits(self.data_dir, self.seed)

    def rank_and_world_size(self) -> tuple[int, int]:
        """The number of this process, from 0, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader | FastLoader:
        epoch, rank_and_world_size = (
            self.trainer.current_epoch if self.trainer else 0,
            self.rank_and_world_size(),
        )
        if self.fast:
            device = self.trainer.strategy.root_device if self.trainer else "cpu"
            settings = (
                self.batch_size,
                self.seed,
                0,
                self.padding,
                self.cutout,
                torch.device(device),
                *rank_and_world_size,
            )
            splits, made_with = self.resident_of
            if (
                splits is not self.splits or made_with != settings
            ):  # processes may have joined after the range test
                self.resident = FastLoader(*self.splits.train, CIFAR10_MEAN, CIFAR10_STD, *settings)
                self.resident_of = self.splits, settings
            self.resident.epoch = epoch
            return self.resident
        seed = int(
            np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        )  # one number from the pair
        batches = shard_batches(
            len(self.splits.train.labels), self.batch_size, seed, *rank_and_world_size
        )
        own_seed = (
            seed + rank_and_world_size[0]
        )  # the order is the same in all processes, the augmentation is not
        return make_loader(
            self.splits.train,
            batches,
            self.num_workers,
            True,
            own_seed,
            EpochLoader,
            self.padding,
            self.cutout,
        )

    def step_images(self, index: int, accumulation_steps: int) -> int:
        """How many images, of all processes, the optimizer's step sees to which the batch of this index belongs.

        The last step of an epoch may see fewer than the others.
        """
        whole = accumulation_steps * self.batch_size
        first = index // accumulation_steps * whole
        return min(whole, len(self.splits.train.labels) - first)

    def val_dataloader(self) -> DataLoader:
        batches = shard_batches(
            len(self.splits.val.labels),
            max(self.batch_size, 250),
            None,
            *self.rank_and_world_size(),
        )
        return make_loader(self.splits.val, batches, self.num_workers, False)

    def test_dataloader(self) -> DataLoader:
        return make_loader(self.splits.test, max(self.batch_size, 250), self.num_workers, False)


def loader(
    data_dir: str | Path = "data", batch_size: int = 128, num_workers: int = 2, seed: int = 42
) -> tuple[DataLoader, DataLoader]:
    """The training loader (45,000 images, augmented) and the test loader (10,000, plain) of CIFAR-10."""
    splits = load_splits(data_dir, seed)
    train_loader = make_loader(splits.train, batch_size, num_workers, True, seed)
    return train_loader, make_loader(splits.test, batch_size, num_workers, False)


# ---- pictures ------------------------------------------------------------------------------------


class Draw:
    """Drawing of training images, before and after augmentation."""

    @staticmethod
    def plotings(
        images: np.ndarray,
        labels: Sequence[int],
        draws: int = 4,
        seed: int = 42,
        note: str = "",
        padding: int = 4,
        cutout: int = 8,
    ) -> Figure:
        """Show each image (a column), below it `draws` augmentations of it.

        images: uint8 (N, 32, 32, 3), 1 to 20 of them. labels: (N,), 0..9. note: a line under the
        title. padding, cutout: as in `augmentation`.
        """
        title = "Training images: shifted, mirrored" + (", one square cut out" if cutout else "")
        return Draw.draws(images, labels, augmentation(padding, cutout), draws, seed, title, note)

    @staticmethod
    def draws(
        images: np.ndarray,
        labels: Sequence[int],
        transforms: Sequence[A.BasicTransform],
        draws: int,
        seed: int,
        title: str,
        note: str = "",
    ) -> Figure:
        """The same with transforms of your own and a title that names them."""
        if not 1 <= len(images) <= 20 or len(labels) != len(images):
            raise InvalidValue(
                f"expected 1 to 20 images and a label for each, got {len(images)} and {len(labels)}"
            )
        augment = A.Compose(transforms, seed=seed, strict=True)
        rows = [
            images,
            *([augment(image=image)["image"] for image in images] for _ in range(draws)),
        ]
        fig, axes = plt.subplots(
            len(rows),
            len(images),
            figsize=(1.1 * len(images), 1.2 * len(rows)),
            squeeze=False,
            layout="constrained",
        )
        for row, (name, pictures) in enumerate(
            zip(["original", *["augmented"] * draws], rows, strict=True)
        ):
            for axis, picture in zip(axes[row], pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            axes[row, 0].set_ylabel(name)
        for axis, label in zip(axes[0], labels, strict=True):
            axis.set_title(CLASSES[label], fontsize=9)
        fig.suptitle(title + (f"\n{note}" if note else ""))
        plt.close(fig)
        return fig
