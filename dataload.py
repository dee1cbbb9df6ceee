"""CIFAR-10 from the disk to the network: files, arrays, AlbumentationImageDataset, loaders.

Images are uint8 RGB (N, 32, 32, 3) until the dataset makes them normalised float tensors
(3, 32, 32).
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# Without it, importing Albumentations asks a server for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as training/__init__.py explains

import albumentations as A
import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cifar10.download import DataUnavailable, prepare_cifar10, read_cifar10
from cifar10.fast_loader import FastLoader, Process, alternately_mirrored, check_batches
from cifar10.images import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CLASSES,
    CUTOUT_FILL,
    DEFAULT_AUGMENTATION,
    IMAGE_SIZE,
    Augmentation,
    Images,
)
from cifar10.sample import sample_cifar10
from models.errors import InvalidValue

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CLASSES",
    "IMAGE_SIZE",
    "AlbumentationImageDataset",
    "Augmentation",
    "CIFAR10DataModule",
    "DataUnavailable",
    "Draw",
    "FastDataModule",
    "Images",
    "Splits",
    "denormalize",
    "load_splits",
    "loader",
    "normalize",
    "prepare_cifar10",
    "read_cifar10",
    "sample_cifar10",
    "sample_splits",
]

TEXT = 11  # points, of a figure: 12 pixels where it is shown 840 pixels wide
VAL_FRACTION = 0.1  # 5,000 of the 50,000 training images
EVAL_BATCH_SIZE = 250  # at least: without gradients, larger batches fit in memory


class Splits(NamedTuple):
    """Three disjoint sets of images.

    Attributes:
        train: the images to learn from.
        val: the images to choose by.
        test: the images of the final test.
        source: 'CIFAR-10', or a text that says that they are other images.
        seed: of the split into train and val.
    """

    train: Images
    val: Images
    test: Images
    source: str
    seed: int = 42


# ---- split ---------------------------------------------------------------------------------------


def split(train: Images, test: Images, seed: int, source: str) -> Splits:
    """Split a tenth of the training images off for validation, chosen by the seed."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).numpy()
    cut = len(order) - round(VAL_FRACTION * len(order))
    train, val = (
        Images(train.images[part], train.labels[part]) for part in (order[:cut], order[cut:])
    )
    return Splits(train, val, test, source, seed)


def load_splits(data_dir: str | Path = "data", seed: int = 42) -> Splits:
    """Load CIFAR-10 as 45,000 / 5,000 / 10,000 images.

    Args:
        data_dir: where the files are; they are downloaded into it if they are missing.
        seed: of the split into training and validation images.

    Raises:
        DataUnavailable: if the files are missing and cannot be downloaded.
        InvalidValue: if a file is damaged.
    """
    train, test = read_cifar10(prepare_cifar10(data_dir))
    return split(train, test, seed, "CIFAR-10")


def sample_splits(pictures: str | Path, seed: int = 42, fraction: float = 1.0) -> Splits:
    """Draw the built-in sample as 1,800 / 200 / 500 images, for a first run without internet.

    Args:
        pictures: as of `sample_cifar10`.
        seed: of the drawing and the split.
        fraction: of the images that are kept, for tests, above 0 and at most 1.

    Raises:
        InvalidValue: for a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise InvalidValue(f"expected a fraction above 0 and at most 1, got {fraction}")
    train, test = (
        part.first(round(fraction * len(part.labels))) for part in sample_cifar10(pictures, seed)
    )
    return split(train, test, seed, "built-in sample, not CIFAR-10")


# ---- transforms and dataset ----------------------------------------------------------------------


def cutout_transform(side: int) -> A.CoarseDropout:
    """Return the transform that masks a square of `side` pixels in half of the images.

    It works on uint8 images, so it comes before `normalize`.
    """
    return A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=(side, side),
        hole_width_range=(side, side),
        fill=tuple(round(255 * value) for value in CUTOUT_FILL),
        p=0.5,
    )


def shift_transforms(pixels: int) -> list[A.BasicTransform]:
    """Return the transforms that shift an image by a few pixels; reflection fills the gap."""
    padded = IMAGE_SIZE + 2 * pixels
    return [
        A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(IMAGE_SIZE, IMAGE_SIZE),
    ]


def augmentation_transforms(
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> list[A.BasicTransform]:
    """Return the transforms of training: shift by padding and cropping, mirror, cutout."""
    mirror = [A.HorizontalFlip(p=0.5)] if augmentation.mirror else []
    cutout = [cutout_transform(augmentation.cutout)] if augmentation.cutout else []
    return [*shift_transforms(augmentation.padding), *mirror, *cutout]


def normalize(images: np.ndarray) -> Tensor:
    """Scale images to mean 0 and standard deviation 1 per channel over the training set.

    Args:
        images: uint8 (N, 32, 32, 3), RGB.

    Returns:
        Float (N, 3, 32, 32) in channels_last.

    Raises:
        InvalidValue: for images of another type: floats from 0 to 1 would all become nearly black.
    """
    if images.dtype != np.uint8:
        raise InvalidValue(f"expected uint8 images, got {images.dtype} {images.shape}")
    mean, std = (255 * torch.tensor(values) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return ((torch.from_numpy(images) - mean) / std).permute(0, 3, 1, 2)


def denormalize(images: Tensor) -> Tensor:
    """Undo `normalize`: float (..., 3, H, W) to RGB in [0, 1] of the same shape."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (CIFAR10_MEAN, CIFAR10_STD)
    )
    return (images * std + mean).clamp(0, 1)


def check_image(index: int, image: np.ndarray, label: int) -> None:
    """Raise InvalidValue if an image is not uint8 (32, 32, 3) or its label not one of ten."""
    shape = getattr(image, "shape", "")
    if shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        got = f"{getattr(image, 'dtype', type(image).__name__)} {shape}"
        raise InvalidValue(f"image {index}: expected a uint8 array (32, 32, 3), got {got}")
    if not isinstance(label, (int, np.integer)) or not 0 <= label < len(CLASSES):
        raise InvalidValue(
            f"image {index}: expected a label from 0 to {len(CLASSES) - 1}, got {label!r:.60}"
        )


class AlbumentationImageDataset(Dataset):
    """Normalised images with labels, augmented for training: (float tensor (3, 32, 32), int).

    Args:
        image_list: pairs of a uint8 RGB array (32, 32, 3) and a label 0..9.
        train: whether to augment the images.
        augmentation: how strongly, if so.

    Raises:
        InvalidValue: for an image of another shape or type and for a label out of range.
    """

    def __init__(
        self,
        image_list: Sequence[tuple[np.ndarray, int]],
        train: bool = True,
        augmentation: Augmentation = DEFAULT_AUGMENTATION,
    ):
        # What can be iterated only once, such as a zip, has no length.
        self.image_list = image_list if hasattr(image_list, "__len__") else list(image_list)
        for index, pair in enumerate(self.image_list):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                got = type(pair).__name__
                raise InvalidValue(f"image {index}: expected a pair of image and label, got {got}")
            check_image(index, *pair)
        transforms = augmentation_transforms(augmentation) if train else []
        # Without strict, Albumentations 2 ignores arguments that it does not know.
        self.transform = A.Compose(list(transforms), strict=True)
        self.worker_seed: int | None = None  # of the loader's process that has this copy

    def __len__(self) -> int:
        return len(self.image_list)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several images with their labels; a DataLoader asks for those of a batch.

        Normalising them at once takes a third of the time of one image after the other.
        """
        self.follow_worker()
        images, labels = zip(*(self.image_list[index] for index in indices), strict=True)
        images = np.stack([self.transform(image=image)["image"] for image in images])
        return list(zip(normalize(images), map(int, labels), strict=True))

    def follow_worker(self) -> None:
        """Seed the augmentation as torch has seeded the worker that loads, anew in each epoch.

        Albumentations 2.0.8 would draw the same random numbers in all workers and epochs.
        """
        worker = get_worker_info()  # None where there are no workers
        if worker is not None and worker.seed != self.worker_seed:
            self.worker_seed = worker.seed
            self.transform.set_random_seed(worker.seed % 2**32)


# ---- loaders -------------------------------------------------------------------------------------


class EpochLoader(DataLoader):
    """A loader that gives the same batches each time it is iterated.

    Lightning begins an epoch once or several times, depending on whether the run was interrupted.
    """

    dataset: AlbumentationImageDataset
    generator: torch.Generator

    def __iter__(self):
        self.generator.manual_seed(self.generator.initial_seed())
        self.dataset.transform.set_random_seed(self.generator.initial_seed())
        return super().__iter__()


def shard_batches(
    count: int, batch_size: int, seed: int | None = None, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Divide the indices of images into batches and take one process's part of each.

    All processes together load the batches that one would load: each image once, in the same order.

    Args:
        count: the number of images.
        batch_size: of all processes together.
        seed: shuffles the images; None: their order is kept.
        rank: the number of the process, from 0.
        world_size: the number of processes.

    Raises:
        InvalidValue: if a batch has fewer images than there are processes.
    """
    check_batches(count, batch_size, world_size)
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    batches = order.split(batch_size) if count else ()
    return [batch[rank::world_size].tolist() for batch in batches]


def make_loader(
    part: Images,
    batches: int | list[list[int]],
    num_workers: int,
    train: bool,
    seed: int = 0,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> DataLoader:
    """Make a loader of batches (B, 3, 32, 32), (B,).

    Args:
        part: the images and labels.
        batches: the batch size, or the indices of the images of each batch. Such fixed batches are
            the same each time the loader is iterated, their augmentation too.
        num_workers: the number of processes that load.
        train: whether to augment and, where `batches` is a size, shuffle the images.
        seed: of the order and the augmentation; the latter also follows from num_workers and, with
            workers, from the batch size.
        augmentation: how strongly to augment.
    """
    dataset = AlbumentationImageDataset(
        list(zip(part.images, part.labels, strict=True)), train, augmentation
    )
    dataset.transform.set_random_seed(seed)  # for num_workers=0, where no worker is seeded
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "generator": torch.Generator().manual_seed(seed),
        "pin_memory": torch.cuda.is_available(),
    }
    if isinstance(batches, list):
        return EpochLoader(dataset, batch_sampler=batches, **options)
    return DataLoader(dataset, batches, shuffle=train, **options)


class CIFAR10DataModule(pl.LightningDataModule):
    """The three loaders as Lightning wants them.

    The order of an epoch follows from (seed, epoch), its augmentation from these, num_workers and
    the batch size, so a run that was interrupted continues with the same batches (with
    reload_dataloaders_every_n_epochs=1). Where several processes train, each loads its part of
    every batch (with use_distributed_sampler=False).

    Args:
        data_dir: where CIFAR-10 is, or is downloaded to; only used if there are no splits.
        batch_size: of all processes together.
        num_workers: the number of processes that load.
        seed: of order and augmentation, and of the split of CIFAR-10.
        splits: the images, or None to take CIFAR-10 from data_dir.
        augmentation: how strongly to augment the training images.
    """

    loader_name = "albumentations"  # the library that augments, as a run's identity has it

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 42,
        splits: Splits | None = None,
        augmentation: Augmentation = DEFAULT_AUGMENTATION,
    ):
        super().__init__()
        self.data_dir, self.batch_size, self.num_workers = data_dir, batch_size, num_workers
        self.seed, self.augmentation, self._splits = seed, augmentation, splits

    @property
    def splits(self) -> Splits:
        """The images.

        Raises:
            InvalidValue: if none were given and `setup` has not loaded CIFAR-10 yet.
        """
        if self._splits is None:
            raise InvalidValue("the images are not loaded yet; call setup() first")
        return self._splits

    def prepare_data(self) -> None:
        """Download CIFAR-10 if no images were given and its files are missing."""
        if self._splits is None:
            prepare_cifar10(self.data_dir)

    def setup(self, stage: str | None = None) -> None:
        """Load CIFAR-10 if no images were given."""
        if self._splits is None:
            self._splits = load_splits(self.data_dir, self.seed)

    def process(self) -> Process:
        """Return the number of this process, from 0, and how many there are."""
        if not self.trainer:
            return Process()
        return Process(self.trainer.global_rank, self.trainer.world_size)

    def current_epoch(self) -> int:
        """Return the number of the epoch that is trained, from 0."""
        return self.trainer.current_epoch if self.trainer else 0

    def epoch_seed(self) -> int:
        """Return the seed of what the current epoch draws."""
        # One number from the pair: a sum would make (1, 3) and (2, 2) the same epoch.
        return int(np.random.SeedSequence((self.seed, self.current_epoch())).generate_state(1)[0])

    def train_dataloader(self) -> DataLoader | FastLoader:
        """Return the loader of the current epoch, shuffled and augmented."""
        process = self.process()
        seed = self.epoch_seed()
        train = self.mirrored_images()
        batches = shard_batches(len(train.labels), self.batch_size, seed, *process)
        # The order is the same in all processes, the augmentation is not.
        own_seed = seed + process.rank
        augmentation = replace(self.augmentation, mirror=False)
        return make_loader(train, batches, self.num_workers, True, own_seed, augmentation)

    def mirrored_images(self) -> Images:
        """Return the training images of the current epoch: each is mirrored in every other one."""
        train, generator = self.splits.train, torch.Generator().manual_seed(self.seed)
        mirrored = alternately_mirrored(len(train.labels), self.current_epoch(), generator)
        chosen = (mirrored & self.augmentation.mirror).numpy()[:, None, None, None]
        return train._replace(images=np.where(chosen, train.images[:, :, ::-1], train.images))

    def step_images(self, index: int, accumulation_steps: int) -> int:
        """Count the images, of all processes, of the optimizer step to which a batch belongs.

        The last step of an epoch may have fewer images than the others.

        Args:
            index: the number of the batch in its epoch.
            accumulation_steps: the number of batches of a step.
        """
        whole = accumulation_steps * self.batch_size
        first = index // accumulation_steps * whole
        return min(whole, len(self.splits.train.labels) - first)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this process's part of the validation images, in their order."""
        val, batch_size = self.splits.val, max(self.batch_size, EVAL_BATCH_SIZE)
        batches = shard_batches(len(val.labels), batch_size, None, *self.process())
        return make_loader(val, batches, self.num_workers, False)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of all test images, in their order."""
        batch_size = max(self.batch_size, EVAL_BATCH_SIZE)
        return make_loader(self.splits.test, batch_size, self.num_workers, False)


class FastDataModule(CIFAR10DataModule):
    """A CIFAR10DataModule whose training images FastLoader augments, in batches on the device.

    The loader is kept from epoch to epoch, and so are its images on the device.
    """

    loader_name = "fast"
    resident: FastLoader | None = None
    resident_settings: tuple = ()  # that it was made with

    def train_dataloader(self) -> FastLoader:
        """Return the resident loader, made anew if the settings are others.

        The number of processes, for example, may change after a range test.
        """
        device = torch.device(self.trainer.strategy.root_device if self.trainer else "cpu")
        process = self.process()
        settings = self.augmentation, self.batch_size, self.seed, process, device
        if self.resident is None or settings != self.resident_settings:
            self.resident = FastLoader(self.splits.train, *settings)
            self.resident_settings = settings
        self.resident.epoch = self.current_epoch()
        return self.resident


def loader(
    data_dir: str | Path = "data", batch_size: int = 128, num_workers: int = 2, seed: int = 42
) -> tuple[DataLoader, DataLoader]:
    """Return CIFAR-10's loaders: training (45,000 images, augmented) and test (10,000, not).

    Args:
        data_dir: where the files are; they are downloaded into it if they are missing.
        batch_size: images in a batch.
        num_workers: the number of processes that load.
        seed: of the split, the order and the augmentation.
    """
    splits = load_splits(data_dir, seed)
    train_loader = make_loader(splits.train, batch_size, num_workers, True, seed)
    return train_loader, make_loader(splits.test, batch_size, num_workers, False)


# ---- pictures ------------------------------------------------------------------------------------


class Draw:
    """Drawing of training images, before and after augmentation."""

    @staticmethod
    def plotings(  # noqa: PLR0913
        images: np.ndarray,
        labels: Sequence[int] | None = None,
        draws: int = 4,
        seed: int = 42,
        note: str = "",
        padding: int = 4,
        cutout: int = 8,
    ) -> Figure:
        """Show each image in a column, below it `draws` augmentations of it.

        Args:
            images: uint8 (N, 32, 32, 3), 1 to 20 of them.
            labels: (N,), 0..9; None: not shown.
            draws: the number of augmentations of each image.
            seed: of the augmentation.
            note: a line under the title.
            padding: as of Augmentation.
            cutout: as of Augmentation.

        Raises:
            InvalidValue: for another number of images or labels, and for what is none.
        """
        square = f", and masks a {cutout}x{cutout} square in half of them" if cutout else ""
        title = f"Augmentation shifts by up to {padding} pixels, mirrors half of the images{square}"
        transforms = augmentation_transforms(Augmentation(padding, cutout))
        title += f"\n{note}" if note else ""
        return Draw.draws(images, labels, transforms, draws, seed, title)

    @staticmethod
    def draws(
        images: np.ndarray,
        labels: Sequence[int] | None,
        transforms: Sequence[A.BasicTransform],
        draws: int,
        seed: int,
        title: str,
    ) -> Figure:
        """Show images as `plotings` does, with any transforms and a title that names them."""
        given = [0] * len(images) if labels is None else labels
        if not 1 <= len(images) <= 20 or len(given) != len(images):
            raise InvalidValue(
                f"expected 1 to 20 images and a label for each, got {len(images)} and {len(given)}"
            )
        if draws < 1:
            raise InvalidValue(f"expected at least one augmentation of each image, got {draws}")
        for index, (image, label) in enumerate(zip(images, given, strict=True)):
            check_image(index, image, label)
        augment = A.Compose(list(transforms), seed=seed, strict=True)
        augmented = [[augment(image=image)["image"] for image in images] for _ in range(draws)]
        width = max(6.5, min(10.5, 1.1 * len(images)))  # inches
        tile = width / len(images)
        layout = ConstrainedLayoutEngine(h_pad=0.08)
        fig = Figure(figsize=(width, tile * (1 + draws) + 0.8), layout=layout)
        # The originals stand apart, in a part of their own.
        above, below = fig.subfigures(
            2, 1, squeeze=False, height_ratios=(tile + 0.25, tile * draws)
        )[:, 0]
        above.set_facecolor("0.92")
        rows = [above.subplots(1, len(images), squeeze=False)[0]]
        rows += list(below.subplots(draws, len(images), squeeze=False))
        for row, pictures in zip(rows, [images, *augmented], strict=True):
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        rows[0][0].set_ylabel("original", fontsize=TEXT)
        rows[1][0].set_ylabel("augmented", fontsize=TEXT)  # also keeps the columns below each other
        for axis, label in zip(rows[0], labels if labels is not None else (), strict=False):
            axis.set_title(CLASSES[label], fontsize=TEXT)
        lines = [textwrap.fill(line, round(8 * width)) for line in title.splitlines()]
        fig.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=TEXT + 3, fontweight="bold")
        fig.set_label(f"Images, below each some augmentations. {title}")
        return fig
