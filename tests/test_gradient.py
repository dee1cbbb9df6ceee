"""The gradient of a step is the mean over its images, in any number of parts and processes."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision

from cifar10.fast_loader import FastLoader, Process
from dataload import Augmentation, FastDataModule, Images, Splits
from training.classifier import LitClassifier

BATCH = 16  # of the recipe; 39 images make two whole steps and a short one of 7


@pytest.fixture(scope="module")
def splits() -> Splits:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (39, 32, 32, 3), dtype=np.uint8)
    part = Images(images, rng.integers(0, 10, 39))
    return Splits(part, Images(images[:0], part.labels[:0]), part, "noise")


def classifier() -> LitClassifier:
    """A network without randomness whose BatchNorm sees no batch.

    Then only the sum over images is left.
    """
    torch.manual_seed(0)
    made = LitClassifier(network="FastNet", batch_size=BATCH, label_smoothing=0.1, cutout=0)
    made.on_train_epoch_start = lambda: made.model.eval()
    return made


NO_SHIFT = Augmentation(padding=0, cutout=0)


def loaders(splits: Splits, batch_size: int) -> FastDataModule:
    """Make loaders that only mirror, by image and epoch, so every process sees the same pixels."""
    return FastDataModule(
        batch_size=batch_size, num_workers=0, seed=1, splits=splits, augmentation=NO_SHIFT
    )


def flat_gradient(net: torch.nn.Module) -> torch.Tensor:
    """The gradients of all weights that are trained, one behind the other."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])


def recorded_gradients(
    splits: Splits, micro_batch: int, processes: int, file: Path
) -> torch.Tensor:
    """Train an epoch in such parts, with every gradient taken away before it moves a weight.

    (steps, parameters).
    """
    lit, gradients = classifier(), []

    def record(optimizer: torch.optim.Optimizer) -> None:
        gradients.append(flat_gradient(lit.model))
        optimizer.zero_grad()
        torch.save(torch.stack(gradients), file.with_suffix(f".{lit.global_rank}"))

    lit.on_before_optimizer_step = record
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=processes,
        logger=False,
        enable_checkpointing=False,
        strategy="ddp_notebook" if processes > 1 else "auto",
        accumulate_grad_batches=BATCH // micro_batch,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(lit, datamodule=loaders(splits, micro_batch))
    return torch.load(file.with_suffix(".0"), weights_only=True)


@pytest.fixture(scope="module")
def by_hand(splits) -> torch.Tensor:
    """The same without Lightning: the mean loss of each whole batch, differentiated."""
    net, gradients = classifier().model.eval(), []
    for images, labels in loaders(splits, BATCH).train_dataloader():
        net.zero_grad()
        F.cross_entropy(net(images), labels, label_smoothing=0.1).backward()
        gradients.append(flat_gradient(net))
    return torch.stack(gradients)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("micro_batch", "processes"), [(16, 1), (8, 1), (4, 1), (16, 2), (4, 2), (8, 2)]
)
def test_parts_processes_and_a_short_last_batch_give_the_gradient_of_the_whole_batch(
    splits, by_hand, tmp_path, micro_batch, processes
):
    got = recorded_gradients(splits, micro_batch, processes, tmp_path / "gradients")
    assert got.shape == by_hand.shape and len(by_hand) == 3
    largest = by_hand.abs().amax(1, keepdim=True)
    assert float(((got - by_hand) / largest).abs().max()) < 1e-5


def test_a_last_batch_with_fewer_images_than_processes_is_refused_by_the_fast_loader(splits):
    with pytest.raises(
        ValueError,
        match="batches of 2 of 39 images: one has fewer images than there are processes, 2",
    ):
        FastLoader(splits.train, NO_SHIFT, batch_size=2, seed=0, process=Process(0, 2))


def test_an_epoch_s_steps_hold_every_image_once(splits):
    for batch, steps, sizes in (
        (16, 1, [16, 16, 7]),
        (4, 4, [16] * 8 + [7] * 2),
        (5, 2, [10] * 6 + [9] * 2),
    ):
        data = loaders(splits, batch)
        assert [
            data.step_images(index, steps) for index in range(len(data.train_dataloader()))
        ] == sizes


# ---- fp16 ----------------------------------------------------------------------------------------


class Half(NamedTuple):
    """What a run in fp16 did, step by step.

    Attributes:
        gradients: (steps, parameters), as the optimiser gets them.
        rates: the learning rate of each step.
        moved: whether each step moved a weight.
        scales: of the loss, after each step.
    """

    gradients: torch.Tensor
    rates: list[float]
    moved: list[bool]
    scales: list[float]


def half_run(splits: Splits, overflow: int = -1, moves: bool = True) -> Half:
    """Train an epoch of three steps in fp16 with Lightning's GradScaler, on the CPU.

    Args:
        splits: the images.
        overflow: the step one of whose gradients is made infinite, from 0; -1: none.
        moves: whether the optimiser may move the weights; else every step is of the first ones.
    """
    lit = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = Half(torch.empty(0), [], [], [])
    gradients = []

    def overflows(*_: object) -> None:
        if len(gradients) == overflow:
            lit.model.head.weight.grad[0, 0] = float("inf")

    def before(optimizer: torch.optim.Optimizer) -> None:
        gradients.append(flat_gradient(lit.model))
        found.rates.append(optimizer.param_groups[0]["lr"])
        lit.before = lit.model.head.weight.detach().clone()
        if not moves:
            optimizer.zero_grad()

    def after(*_: object) -> None:
        found.moved.append(not torch.equal(lit.before, lit.model.head.weight))
        found.scales.append(scaler.get_scale())

    lit.on_after_backward, lit.on_before_optimizer_step = overflows, before
    lit.on_train_batch_end = after
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(lit, datamodule=loaders(splits, BATCH))
    return found._replace(gradients=torch.stack(gradients))


@pytest.mark.numeric
def test_the_optimiser_is_given_unscaled_gradients_of_the_fp16_network(splits, by_hand):
    got = half_run(splits, moves=False).gradients
    assert got.shape == by_hand.shape
    largest = by_hand.abs().amax(1, keepdim=True)
    assert float(((got - by_hand) / largest).abs().max()) < 0.02  # fp16 keeps 11 bits


@pytest.fixture(scope="module")
def whole(splits) -> Half:
    """A run in fp16 without an overflow."""
    return half_run(splits)


@pytest.mark.parametrize("overflow", [0, 1])
def test_a_step_whose_fp16_gradients_overflow_moves_neither_weights_nor_the_schedule(
    splits, whole, overflow
):
    skipped = half_run(splits, overflow)
    assert whole.moved == [True] * 3 and whole.scales == [2.0**10] * 3
    assert skipped.moved == [step != overflow for step in range(3)]
    assert skipped.scales == [2.0**10 if step < overflow else 2.0**9 for step in range(3)]
    # The step after the skipped one has its rate, and the last rate is never reached.
    rates = whole.rates[:2]
    assert skipped.rates == [*rates[: overflow + 1], *rates[overflow:]]
