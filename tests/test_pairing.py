"""What belongs together stays together.

An image and its prediction, a process and its share of the images.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from cifar10.fast_loader import FastLoader
from dataload import (
    CLASSES,
    AlbumentationImageDataset,
    Augmentation,
    CIFAR10DataModule,
    FastDataModule,
    Images,
)
from evaluation.errors import get_misclassified_data
from evaluation.predict import predict
from lesson import explorers


class Brightest(torch.nn.Module):
    """Says the class whose number is that of the image's brightest colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(images.mean((2, 3)), (0, 7), value=-9.0)


@pytest.fixture
def dataset(tiny_splits) -> AlbumentationImageDataset:
    return AlbumentationImageDataset(list(zip(*tiny_splits.test, strict=True)), train=False)


# ---- an image and its prediction ----


class Backwards(BatchSampler):
    """Batches of a sampler that is sequential, the last first."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class Stream(IterableDataset):
    """Images that have no numbers."""

    def __iter__(self):
        return iter([(torch.zeros(3, 32, 32), 0)])


OUT_OF_ORDER: dict[str, Callable] = {
    "RandomSampler": lambda d: DataLoader(d, 8, shuffle=True),
    "SubsetRandomSampler": lambda d: DataLoader(
        d, 8, sampler=torch.utils.data.SubsetRandomSampler(range(len(d)))
    ),
    "DistributedSampler": lambda d: DataLoader(
        d, 8, sampler=torch.utils.data.DistributedSampler(d, 2, 0, shuffle=False)
    ),
    "Backwards": lambda d: DataLoader(
        d, batch_sampler=Backwards(SequentialSampler(d), 8, drop_last=False)
    ),
    "batches": lambda d: DataLoader(d, batch_sampler=[[1, 0], list(range(2, len(d)))]),
    "every second": lambda d: DataLoader(d, batch_sampler=[list(range(0, len(d), 2))]),
    "Stream": lambda _: DataLoader(Stream(), 8),
    "FastLoader": lambda d: FastLoader(
        Images(*(np.stack(parts) for parts in zip(*d.image_list, strict=True))),
        Augmentation(padding=0, cutout=0),
        batch_size=8,
        seed=0,
    ),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_a_loader_that_is_not_sequential_is_refused(dataset, name):
    loader = OUT_OF_ORDER[name](dataset)
    with pytest.raises(ValueError, match="expected a loader that gives .* in order.*shuffle=False"):
        get_misclassified_data(Brightest(), "cpu", loader)
    some = torch.zeros(len(dataset), 10), torch.ones(len(dataset), dtype=torch.long)
    with pytest.raises(ValueError, match="expected a loader that gives .* in order"):
        get_misclassified_data(Brightest(), "cpu", loader, predictions=some)


@pytest.mark.numeric
def test_what_the_refusal_advises_works_and_each_error_has_its_own_image(dataset, tiny_splits):
    data = CIFAR10DataModule(
        batch_size=8, num_workers=0, splits=tiny_splits._replace(val=tiny_splits.test)
    )
    advised = DataLoader(dataset, 8, shuffle=False)
    for loader in (advised, data.test_dataloader(), data.val_dataloader()):
        found = get_misclassified_data(Brightest(), "cpu", loader)
        assert len(found) > 10
        for error in found:
            assert (
                int(error.image.mean((1, 2)).argmax()) == error.pred
            )  # that is what the network says of it
            assert any(
                torch.equal(error.image, image) and error.label == label for image, label in dataset
            )


@pytest.mark.parametrize("count", [0, 39, 41])
def test_predictions_of_another_number_of_images_are_refused(dataset, count):
    some = torch.zeros(count, 10), torch.ones(count, dtype=torch.long)
    with pytest.raises(ValueError, match=f"expected predictions of 40 images, got {count}"):
        get_misclassified_data(Brightest(), "cpu", DataLoader(dataset, 8), predictions=some)


def test_a_loader_that_drops_its_last_batch_is_refused(dataset):
    with pytest.raises(ValueError, match="expected predictions of 40 images, got 32"):
        get_misclassified_data(Brightest(), "cpu", DataLoader(dataset, 16, drop_last=True))


def test_predictions_of_another_order_are_refused_by_their_labels(dataset):
    logits, labels = predict(Brightest(), "cpu", DataLoader(dataset, 8))
    turned = logits.flip(0), labels.flip(0)
    with pytest.raises(
        ValueError, match=r"image \d+ has the label \d, its prediction was made for label \d"
    ):
        get_misclassified_data(Brightest(), "cpu", DataLoader(dataset, 8), predictions=turned)


@pytest.mark.parametrize("shape", [(39, 10), (41, 10), (40, 9), (40,)])
def test_the_explorer_refuses_logits_of_other_images(tiny_splits, shape):
    with pytest.raises(ValueError, match=r"expected logits of shape \(40, 10\), got \("):
        explorers.ErrorExplorer(Brightest(), tiny_splits.test, torch.zeros(shape), CLASSES)


# ---- a process and its share ----


def as_process(rank: int, processes: int, device: str = "cpu") -> SimpleNamespace:
    """What the data module asks Lightning's Trainer."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(
        current_epoch=0, global_rank=rank, world_size=processes, strategy=strategy
    )


def labels_of_an_epoch(data: CIFAR10DataModule) -> list[int]:
    return torch.cat([labels for _, labels in data.train_dataloader()]).tolist()


def test_after_a_range_test_alone_two_processes_share_the_images(tiny_splits):
    """Each image carries its number as its label; the range test has run in a process alone."""
    numbered = Images(tiny_splits.train.images, np.arange(64))
    data = FastDataModule(batch_size=16, splits=tiny_splits._replace(train=numbered))
    data.trainer = as_process(0, 1)
    assert sorted(labels_of_an_epoch(data)) == list(range(64))
    parts = []
    for rank in range(2):
        data.trainer = as_process(rank, 2)
        parts.append(labels_of_an_epoch(data))
    assert len(parts[0]) == len(parts[1]) == 32
    assert sorted(parts[0] + parts[1]) == list(range(64))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("batch_size", 8),
        ("seed", 7),
        ("augmentation", Augmentation(padding=0)),
        ("augmentation", Augmentation(cutout=0)),
    ],
)
def test_the_resident_loader_follows_what_it_was_made_of(tiny_splits, attribute, value):
    data = FastDataModule(batch_size=16, splits=tiny_splits)
    before = data.train_dataloader()
    assert data.train_dataloader() is before  # nothing is copied again while nothing changes
    setattr(data, attribute, value)
    fresh = FastDataModule(
        batch_size=data.batch_size,
        seed=data.seed,
        splits=data.splits,
        augmentation=data.augmentation,
    )
    ours, wanted = ([i for i, _ in d.train_dataloader()] for d in (data, fresh))
    assert len(ours) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_the_resident_loader_moves_to_the_device_that_trains(tiny_splits):
    data = FastDataModule(batch_size=16, splits=tiny_splits)
    assert data.train_dataloader().labels.device.type == "cpu"
    data.trainer = as_process(0, 1, "meta")
    assert data.train_dataloader().labels.device.type == "meta"
