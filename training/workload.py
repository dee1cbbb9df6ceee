"""The work of a run, in batches, and how long a batch takes on this machine."""

import functools
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.registry import build
from training.optimizer import make_optimizer
from training.recipes import LOW_RESOLUTION, Recipe

LOW_RES_SAVINGS = 1 - (LOW_RESOLUTION / 32) ** 2  # of the work of a batch at low resolution
FORWARD = 1 / 3  # of the work of a training step: the backward pass costs twice the forward pass
TRAIN_IMAGES, VAL_IMAGES = 45_000, 5_000  # of CIFAR-10's split
TIMED = 3  # micro-batches, behind one that warms up


@dataclass(frozen=True)
class Workload:
    """The work of a run, in batches of training at full resolution.

    Attributes:
        epochs: of the run.
        batches: of an epoch.
        low: how many of the run's batches are at low resolution; these come first.
        validation: batches of an epoch's validation, as large as those of training.
    """

    epochs: int
    batches: float
    low: float
    validation: float

    def before(self, epoch: int, batch: int = 0) -> float:
        """Return the work that is done when a batch of an epoch begins, both counted from 0."""
        batches = epoch * self.batches + batch
        return (
            batches - LOW_RES_SAVINGS * min(batches, self.low) + epoch * FORWARD * self.validation
        )

    def left(self, epoch: int, batch: int = 0) -> float:
        """Return the work that is left when a batch of an epoch begins, both counted from 0."""
        return self.before(self.epochs) - self.before(epoch, batch)


@functools.cache
def seconds_per_batch(recipe: Recipe, precision: str) -> float:
    """Measure how long this CPU takes for a step of the optimiser on random images of 32x32 pixels.

    A few micro-batches are computed, some seconds' worth, and once in a process.

    Args:
        recipe: its network, batch and micro-batch count.
        precision: Lightning's name.
    """
    bf16, size = precision == "bf16-mixed", recipe.micro_batch or recipe.batch_size
    seconds = []
    with torch.random.fork_rng(devices=[]):  # what is drawn later does not depend on this
        net = build(recipe.network)
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = torch.randn(size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (size,))
    optimizer = make_optimizer(net, recipe, bf16)
    for _ in range(1 + TIMED):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    optimizer.step()
    step = time.perf_counter() - start
    return recipe.batch_size / size * statistics.median(seconds[1:]) + step


def batches_of_work(recipe: Recipe) -> float:
    """Return the work of training by a recipe on CIFAR-10's 45,000 images, validation included."""
    batches = TRAIN_IMAGES / recipe.batch_size
    low = recipe.low_res * recipe.epochs * batches
    validation = VAL_IMAGES / recipe.batch_size
    return Workload(recipe.epochs, batches, low, validation).before(recipe.epochs)
