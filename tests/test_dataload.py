"""Images arrive whole, split, augmented only where they should be, and differently each time."""

from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import dataload
from dataload import (
    CLASSES,
    AlbumentationImageDataset,
    Augmentation,
    CIFAR10DataModule,
    Draw,
    FastDataModule,
    Images,
    Splits,
    augmentation_transforms,
    denormalize,
    loader,
    make_loader,
    normalize,
    sample_cifar10,
    split,
)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def numbered(count: int) -> Images:
    """Images that carry their own number in their first two pixels."""
    images = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    return Images(images, np.arange(count) % 10)


def numbers(part: Images) -> set[int]:
    return {256 * int(image[0, 0, 0]) + int(image[0, 0, 1]) for image in part.images}


# ---- split ----


def test_the_three_parts_are_disjoint_and_complete():
    splits = split(numbered(1000), numbered(100), seed=1, source="test")
    assert (
        len(splits.train.labels) == 900
        and len(splits.val.labels) == 100
        and len(splits.test.labels) == 100
    )
    assert numbers(splits.train).isdisjoint(numbers(splits.val))
    assert numbers(splits.train) | numbers(splits.val) == set(range(1000))


def test_images_keep_their_labels_when_they_are_split():
    for part in split(numbered(1000), numbered(10), seed=1, source="test")[:2]:
        assert [
            (256 * int(i[0, 0, 0]) + int(i[0, 0, 1])) % 10 for i in part.images
        ] == part.labels.tolist()


def test_the_seed_decides_the_split():
    first, same, other = (split(numbered(1000), numbered(10), seed, "test") for seed in (1, 1, 2))
    assert np.array_equal(first.val.images, same.val.images)
    assert numbers(first.val) != numbers(other.val)


# ---- transforms ----


def test_augmentation_runs_in_the_order_of_the_recipe():
    names = ["PadIfNeeded", "RandomCrop", "HorizontalFlip", "CoarseDropout"]
    assert [type(step).__name__ for step in augmentation_transforms()] == names
    without_cutout = augmentation_transforms(Augmentation(cutout=0))
    assert [type(step).__name__ for step in without_cutout] == names[:3]


def test_an_argument_that_albumentations_does_not_know_is_an_error(image):
    assert AlbumentationImageDataset([(image, 3)]).transform.strict
    with pytest.raises(UserWarning, match="not valid"):
        A.CoarseDropout(max_holes=1)


def test_the_crop_moves_the_image_by_up_to_four_pixels():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[16, 16] = 255
    pad_and_crop = A.Compose(augmentation_transforms()[:2], seed=0)
    shifts = {
        tuple(np.argwhere(pad_and_crop(image=image)["image"][..., 0])[0] - 16) for _ in range(2000)
    }
    assert shifts == {(down, right) for down in range(-4, 5) for right in range(-4, 5)}


def test_half_of_the_images_are_mirrored(image):
    flip = A.Compose([augmentation_transforms()[2]], seed=0)
    mirrored = [np.array_equal(flip(image=image)["image"], image[:, ::-1]) for _ in range(1000)]
    assert 440 < sum(mirrored) < 560  # 500 +- 3.8 standard deviations of 15.8


def test_half_of_the_images_lose_one_square_of_the_mean_colour():
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    mean_colour = (125, 123, 114)  # 255 times the mean, rounded
    cutout, lost = A.Compose([augmentation_transforms()[3]], seed=0), []
    for _ in range(1000):
        image = cutout(image=white)["image"]
        painted = (image != 255).any(axis=-1)
        lost.append(int(painted.sum()))
        if painted.any():
            assert (image[painted] == mean_colour).all()
            rows, columns = np.nonzero(painted)
            assert np.ptp(rows) == np.ptp(columns) == 7
    assert set(lost) == {0, 64} and 440 < lost.count(64) < 560
    normalised = normalize(np.full((1, 32, 32, 3), mean_colour, dtype=np.uint8))
    assert normalised.abs().max() < 0.01  # the colour of the square says nothing to the network


@pytest.mark.numeric
def test_normalising_can_be_undone(image):
    tensor = normalize(image[None])[0]
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
    by_hand = (image / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    assert np.abs(tensor.numpy() - by_hand.transpose(2, 0, 1)).max() < 1e-5
    assert np.abs(denormalize(tensor).permute(1, 2, 0).numpy() * 255 - image).max() < 1e-3


# ---- dataset and loaders ----


@pytest.mark.parametrize(
    ("bad", "label", "message"),
    [
        (np.zeros((32, 32), np.uint8), 0, r"got uint8 \(32, 32\)"),
        (np.zeros((32, 32, 4), np.uint8), 0, r"got uint8 \(32, 32, 4\)"),
        (np.zeros((32, 32, 3), np.float32), 0, "got float32"),
        ("cat.png", 0, "got str"),
        (np.zeros((32, 32, 3), np.uint8), 10, "got 10"),
        (np.zeros((32, 32, 3), np.uint8), -1, "got -1"),
        (np.zeros((32, 32, 3), np.uint8), 3.7, "label from 0 to 9, got 3.7"),
        (np.zeros((32, 32, 3), np.uint8), "3", "label from 0 to 9, got '3'"),
    ],
)
def test_what_is_no_image_or_no_label_is_refused(image, bad, label, message):
    with pytest.raises(ValueError, match=message):
        AlbumentationImageDataset([(image, 3), (bad, label)])
    with pytest.raises(ValueError, match=message):
        Draw.plotings([image, bad], [3, label])


@pytest.mark.parametrize(
    ("padding", "cutout"), [(-1, 0), (32, 0), (0, -1), (0, 33), (1.5, 0), (0, 2.5)]
)
def test_what_an_image_has_no_room_for_is_refused(padding, cutout):
    with pytest.raises(ValueError, match=f"got {padding} and {cutout}"):
        Augmentation(padding, cutout)


@pytest.mark.parametrize("fraction", [0, -1, 1.1, float("nan")])
def test_a_fraction_of_the_sample_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, got {fraction}"):
        dataload.sample_splits("space/examples", 1, fraction)


def test_images_of_floats_are_refused_instead_of_becoming_nearly_black(image):
    with pytest.raises(ValueError, match=r"expected uint8 images, got float64 \(1, 32, 32, 3\)"):
        normalize(image[None] / 255)


def test_a_zip_is_a_list_of_pairs_and_what_are_no_pairs_is_refused(image):
    assert len(AlbumentationImageDataset(zip([image] * 3, [1, 2, 3], strict=True))) == 3
    with pytest.raises(ValueError, match="expected a pair of image and label, got ndarray"):
        AlbumentationImageDataset(image[None])


def test_a_batch_size_below_one_is_refused(tiny_splits):
    with pytest.raises(ValueError, match="positive integer"):
        make_loader(tiny_splits.train, 0, 0, train=True)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        CIFAR10DataModule(batch_size=0, splits=tiny_splits).train_dataloader()


def all_images(batches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def test_a_module_without_images_says_how_to_load_them():
    data = CIFAR10DataModule()
    with pytest.raises(ValueError, match=r"not loaded yet; call setup\(\) first"):
        data.train_dataloader()


@pytest.mark.numeric
def test_the_seed_of_the_module_decides_the_split_of_cifar10(monkeypatch):
    monkeypatch.setattr(dataload, "prepare_cifar10", lambda folder: folder)
    monkeypatch.setattr(dataload, "read_cifar10", lambda _: (numbered(500), numbered(10)))
    data = CIFAR10DataModule("nowhere", seed=7)
    data.prepare_data()
    data.setup()
    wanted = split(numbered(500), numbered(10), 7, "CIFAR-10")
    assert np.array_equal(data.splits.val.images, wanted.val.images)


def test_validation_and_test_images_are_never_augmented(tiny_splits):
    data = CIFAR10DataModule(batch_size=16, num_workers=0, splits=tiny_splits)
    for batches, part in (
        (data.val_dataloader(), tiny_splits.val),
        (data.test_dataloader(), tiny_splits.test),
    ):
        assert torch.allclose(all_images(batches), normalize(part.images), atol=1e-5)


@pytest.mark.numeric
def test_a_dataset_gives_single_images_and_batches_alike(tiny_splits):
    dataset = AlbumentationImageDataset(list(zip(*tiny_splits.test, strict=True)), train=False)
    two, part = dataset.__getitems__([5, 2]), Subset(dataset, [5, 2])
    assert [label for _, label in two] == tiny_splits.test.labels[[5, 2]].tolist()
    assert torch.allclose(dataset[2][0], two[1][0], atol=1e-5) and dataset[2][1] == two[1][1]
    for whole in (DataLoader(part, 2), DataLoader(Subset(part, [0, 1]), 2)):  # torch's own
        ((images, labels),) = whole
        assert images.shape == (2, 3, 32, 32) and labels.tolist() == [two[0][1], two[1][1]]
        assert torch.equal(images, torch.stack([two[0][0], two[1][0]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_differs_between_images_workers_and_epochs_and_repeats_with_the_seed(
    image, workers
):
    same = Images(
        np.stack([image] * 16), np.zeros(16, dtype=int)
    )  # one image: only augmentation can differ

    def epoch(seed):
        return all_images(make_loader(same, 4, workers, train=True, seed=seed))

    first = epoch(1)
    assert (
        len({tensor.numpy().tobytes() for tensor in first}) >= 14
    )  # two of 16 may happen to be alike
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))


def test_augmentation_differs_between_workers_and_epochs_of_any_loader(image):
    dataset = AlbumentationImageDataset([(image, 0)] * 16)
    for part in (dataset, Subset(dataset, range(16))):
        batches = DataLoader(part, 4, num_workers=2)
        first, second = all_images(batches), all_images(batches)
        assert len({tensor.numpy().tobytes() for tensor in first}) >= 14
        assert not torch.equal(first, second)


def test_an_epoch_s_order_follows_from_the_seed_and_the_epoch(tiny_splits):
    class Trainer:
        current_epoch, global_rank, world_size = 0, 0, 1

    def epoch(seed, number):
        data = CIFAR10DataModule(batch_size=16, num_workers=0, seed=seed, splits=tiny_splits)
        data.trainer = Trainer()
        data.trainer.current_epoch = number
        return all_images(data.train_dataloader())

    assert torch.equal(epoch(1, 3), epoch(1, 3))
    data = CIFAR10DataModule(batch_size=16, num_workers=0, seed=1, splits=tiny_splits)
    batches = data.train_dataloader()
    assert torch.equal(
        all_images(batches), all_images(batches)
    )  # however often Lightning begins it
    assert not torch.equal(epoch(1, 3), epoch(1, 4))
    assert not torch.equal(epoch(1, 3), epoch(2, 2))  # the sum of both does not decide


def test_loader_gives_the_training_and_the_test_batches(monkeypatch):
    monkeypatch.setattr(dataload, "prepare_cifar10", lambda folder: folder)
    monkeypatch.setattr(dataload, "read_cifar10", lambda folder: (numbered(500), numbered(100)))
    train_loader, test_loader = loader("nowhere", batch_size=50, num_workers=0)
    images, labels = next(iter(train_loader))
    assert (
        images.shape == (50, 3, 32, 32) and labels.shape == (50,) and images.dtype == torch.float32
    )
    assert not torch.equal(
        all_images(train_loader), all_images(train_loader)
    )  # the next epoch is another
    assert len(train_loader.dataset) == 450 and len(test_loader.dataset) == 100
    assert torch.equal(all_images(test_loader), normalize(numbered(100).images))  # as they are


# ---- fast loader ----


def drawn(images: np.ndarray, epoch: int = 0, fast: bool = True, **augmentation) -> np.ndarray:
    """One epoch of these images as the fast loader, or Albumentations, gives them.

    Normalised (N, 32, 32, 3).
    """
    part = Images(images.repeat(2, axis=0)[::2], np.arange(len(images)) % 10)  # not contiguous
    data = (FastDataModule if fast else CIFAR10DataModule)(
        batch_size=100,
        num_workers=0,
        seed=7,
        splits=Splits(part, part, part, "numbers", 7),
        augmentation=Augmentation(**augmentation),
    )
    place = {"global_rank": 0, "world_size": 1, "strategy": SimpleNamespace(root_device="cpu")}
    data.trainer = SimpleNamespace(current_epoch=epoch, **place)
    return all_images(data.train_dataloader()).permute(0, 2, 3, 1).numpy()


@pytest.mark.numeric
def test_both_loaders_shift_mirror_and_cut_alike():
    """One image, thousands of times.

    The mean and deviation of each pixel are those of the same random process.
    """
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    fast, slow = (drawn(np.stack([image] * 6000), fast=fast) for fast in (True, False))
    assert np.abs(fast.mean(0) - slow.mean(0)).max() < 5.5 * (2 / 6000) ** 0.5 * slow.std(0).max()
    assert np.abs(fast.std(0) - slow.std(0)).mean() < 0.02 * slow.std(0).mean()
    # Cut out: the mean colour, which is 0 but for rounding. An 8x8 square in half of the images is
    # 3.1 % of the pixels.
    masked = [(np.abs(images).max(-1) < 0.01).mean() for images in (fast, slow)]
    assert masked == pytest.approx([0.5 * 64 / 1024] * 2, rel=0.06)


@pytest.mark.numeric
def test_the_fast_loader_shifts_by_every_number_of_pixels_and_reflects_at_the_edge():
    ramp = np.zeros((2000, 32, 32, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = (
        np.arange(32)[:, None],
        np.arange(32),
    )  # each pixel carries its row and column
    images = drawn(ramp, padding=2, cutout=0)
    pixels = np.round(255 * (images * dataload.CIFAR10_STD + dataload.CIFAR10_MEAN)).astype(int)
    seen = set()
    padded = np.pad(ramp[0], ((2, 2), (2, 2), (0, 0)), "reflect")
    crops = {}
    for y, x in np.ndindex(5, 5):
        crop = padded[y : y + 32, x : x + 32, :2].astype(int)
        crops |= {
            crop.tobytes(): (y, x, False),
            np.ascontiguousarray(crop[:, ::-1]).tobytes(): (y, x, True),
        }
    for picture in pixels:
        seen.add(
            crops[np.ascontiguousarray(picture[..., :2]).tobytes()]
        )  # KeyError: no crop of the padded image
    assert len(seen) == 50


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mirror", [True, False])
def test_each_image_is_mirrored_in_every_other_epoch(fast, mirror):
    count = 200
    marked = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    marked[:, :, :16, 0] = 255  # the left half is red
    marked[..., 1] = np.arange(count)[:, None, None]  # the number of the image
    sides = []
    for epoch in (0, 1, 2):
        images = drawn(marked, epoch, fast, cutout=0, mirror=mirror)
        pixels = np.round(255 * (images * dataload.CIFAR10_STD + dataload.CIFAR10_MEAN))
        by_number = {int(image[0, 0, 1]): image[16, 4, 0] > 128 for image in pixels}
        sides.append([by_number[number] for number in range(count)])
    if not mirror:
        assert sides == [[True] * count] * 3
        return
    assert sides[0] == sides[2] and sides[1] == [not side for side in sides[0]]
    assert 65 < sum(sides[0]) < 135  # half of 200, +- 5 standard deviations of 7


def test_the_fast_loader_s_epoch_follows_from_its_seed_and_number(tiny_splits):
    images = tiny_splits.train.images
    assert np.array_equal(drawn(images, epoch=3), drawn(images, epoch=3))
    assert not np.array_equal(drawn(images, epoch=3), drawn(images, epoch=5))
    data = FastDataModule(batch_size=24, splits=tiny_splits)
    batches = list(data.train_dataloader())
    place = {"global_rank": 0, "world_size": 1, "strategy": SimpleNamespace(root_device="cpu")}
    data.trainer = SimpleNamespace(current_epoch=3, **place)
    assert (
        data.train_dataloader().epoch == 3 and data.train_dataloader() is data.resident
    )  # nothing is copied again
    assert len(data.resident) == len(batches) == 3 and len(batches[-1][1]) == 64 - 48
    counts = np.bincount(torch.cat([labels for _, labels in batches])).tolist()
    assert counts == [7] * 4 + [6] * 6


# ---- sample ----


def test_the_sample_has_as_many_images_of_each_class_and_repeats_with_its_seed(pictures):
    (images, labels), (test_images, test_labels) = sample_cifar10(pictures, seed=1)
    assert (
        images.shape == (2000, 32, 32, 3)
        and test_images.shape == (500, 32, 32, 3)
        and images.dtype == np.uint8
    )
    assert (
        np.bincount(labels).tolist() == [200] * 10
        and np.bincount(test_labels).tolist() == [50] * 10
    )
    assert np.array_equal(sample_cifar10(pictures, seed=1)[0][0], images)
    assert not np.array_equal(sample_cifar10(pictures, seed=2)[0][0], images)
    assert len({image.tobytes() for image in images}) == 2000


def test_a_missing_picture_is_named(pictures, tmp_path):
    for name in CLASSES[:-1]:
        (tmp_path / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    with pytest.raises(ValueError, match=r"class truck in .*truck\.png"):
        sample_cifar10(tmp_path)
    (tmp_path / "truck.png").write_text("no picture")
    with pytest.raises(ValueError, match="class truck"):
        sample_cifar10(tmp_path)


# ---- Draw ----


def test_plotings_shows_each_image_above_its_augmentations(tiny_splits):
    figure = Draw.plotings(
        tiny_splits.train.images[:3], tiny_splits.train.labels[:3], draws=4, note="a note"
    )
    assert len(figure.axes) == 15 and "a note" in figure.get_suptitle()
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert np.array_equal(shown[0], tiny_splits.train.images[0])
    column = [shown[row * 3].tobytes() for row in range(5)]
    assert len(set(column)) >= 4
    assert [axis.get_title() for axis in figure.axes[:3]] == list(CLASSES[:3])
    title = " ".join(figure.get_suptitle().split())
    assert "up to 4 pixels" in title and "8x8 square in half" in title
    plain = Draw.plotings(tiny_splits.test.images[:3], cutout=0)  # the seeds' call
    assert "masks" not in plain.get_suptitle() and len(plain.axes) == 15
    assert not any(axis.get_title() for axis in plain.axes)


@pytest.mark.parametrize("count", [0, 21])
def test_plotings_refuses_what_it_has_no_room_for(tiny_splits, count):
    with pytest.raises(ValueError, match=f"got {count}"):
        Draw.plotings(tiny_splits.train.images[:count], tiny_splits.train.labels[:count])
    with pytest.raises(ValueError, match="at least one augmentation of each image, got 0"):
        Draw.plotings(tiny_splits.train.images[:2], tiny_splits.train.labels[:2], draws=0)
