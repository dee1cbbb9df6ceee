"""What a training run shows while it runs: an estimate, a line per epoch, the time left, curves."""

import contextlib
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback

from training.console import TransientLine, format_duration, placeholder
from training.history import epoch_line, write_epoch
from training.recipes import SLOW_RUN_MINUTES, smaller_budget

LOW_RES_SAVINGS = 1 - (24 / 32) ** 2  # the part of the work that is saved at low resolution
FORWARD = (
    1 / 3
)  # the part of a training step that validation does as well: the backward pass costs twice as much


@dataclass(frozen=True)
class Workload:
    """The work of a run, in batches of training at full resolution.

    epochs: of the run. batches: of an epoch. low: of the run's batches, those at low resolution,
    which come first. validation: the batches of an epoch's validation, which are as large.
    """

    epochs: int
    batches: int
    low: float
    validation: float

    def before(self, epoch: int, batch: int = 0) -> float:
        """What is done when a batch of an epoch begins, both counted from 0."""
        batches = epoch * self.batches + batch
        return (
            batches - LOW_RES_SAVINGS * min(batches, self.low) + epoch * FORWARD * self.validation
        )

    def left(self, epoch: int, batch: int = 0) -> float:
        """What is still to be done then."""
        return self.before(self.epochs) - self.before(epoch, batch)


class LiveCurves:
    """In a notebook: loss and accuracy, drawn again after each epoch in the same place.

    Elsewhere: nothing.

    earlier: the table of the epochs before, of a run that is continued.
    """

    def __init__(self, earlier: pd.DataFrame):
        self.table, self.handle = earlier, placeholder()

    def add(self, row: dict[str, float]) -> None:
        """Draw one more epoch: of its row, epoch, train_loss, train_acc, and val_loss, val_acc if they are there."""
        self.table = pd.concat([self.table, pd.DataFrame([row])])
        if self.handle:
            self.handle.update(self.figure())

    def figure(self) -> Figure:
        epochs = self.table.groupby("epoch").mean()
        fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
        for axis, name in zip(axes, ("loss", "acc"), strict=True):
            for stage in ("train", "val"):
                if f"{stage}_{name}" in epochs:
                    axis.plot(
                        epochs.index + 1, epochs[f"{stage}_{name}"], "o-", markersize=3, label=stage
                    )
            axis.set(xlabel="epoch", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        plt.close(fig)
        return fig

    def close(self) -> None:
        """Remove the figure: the notebook draws the curves of the finished run."""
        if self.handle:
            self.handle.update({"text/plain": ""}, raw=True)


class Progress(Callback):
    """Prints an estimate after a few steps and a line per epoch, shows the time left in between, and writes each epoch
    into the log. Where several processes train, the first does.

    The estimate holds all that there is between the start and the end: validation, checkpoints, logs. It is corrected,
    in a line of its own, where it turns out to be more than 15 % off.

    earlier: the table of the epochs before, of a run that is continued.
    """

    def __init__(self, earlier: pd.DataFrame):
        self.earlier = earlier
        self.started = 0.0
        self.shown = float("-inf")
        self.said = 0.0  # the estimate, in seconds from the start to the end

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.line, self.curves = TransientLine(), LiveCurves(self.earlier)
        self.first_epoch, self.warm = trainer.current_epoch, None
        self.begin = self.started = time.perf_counter()

    def workload(self, trainer: pl.Trainer, module: pl.LightningModule) -> Workload:
        steps = trainer.num_training_batches
        low = module.recipe.low_res * trainer.max_epochs * steps
        data = trainer.datamodule
        images = len(data.splits.val.labels) if data else 0
        return Workload(trainer.max_epochs, steps, low, images / data.batch_size if images else 0.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, index: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        warm = (
            index == 2 and not self.warm
        )  # the first batches are slower: memory and kernels are being prepared
        early = index < 12 and trainer.current_epoch == self.first_epoch
        if not warm and (early or time.perf_counter() - self.shown < 2):
            return
        if module.device.type != "cpu":
            torch.accelerator.synchronize()  # a GPU is asked to do a batch long before it has done it
        now, done = time.perf_counter(), (trainer.current_epoch, index + 1)
        if warm:
            self.warm = now, self.workload(trainer, module).before(*done)
        elif self.warm:
            self.shown = now
            left = self.left(trainer, module, *done)
            if not self.said:
                self.estimate(trainer, module, now - self.begin + left)
            share = 100 * (index + 1) // trainer.num_training_batches
            self.line.show(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {share} %, {format_duration(left)} left"
            )

    def left(
        self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, batch: int = 0
    ) -> float:
        """Seconds until the end, if the work goes on as fast as since the first batches, all breaks included."""
        work, (since, done) = self.workload(trainer, module), self.warm
        unit = (time.perf_counter() - since) / (work.before(epoch, batch) - done)
        return unit * work.left(epoch, batch)

    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, seconds: float) -> None:
        """Print what the whole run takes, and what would take less where that is long."""
        epochs = trainer.max_epochs - self.first_epoch
        duration = (
            format_duration(seconds) if seconds > 600 else f"{seconds:.0f} s"
        )  # 100 s are not yet 2 min
        print(f"{'now ' if self.said else ''}about {duration} for {epochs} epochs")
        if not self.said and seconds > 60 * SLOW_RUN_MINUTES and self.first_epoch == 0:
            with contextlib.suppress(
                Exception
            ):  # advice never ends a run, whatever network or file it is given
                work = self.workload(trainer, module)
                affordable = work.before(epochs) / work.batches * 60 * SLOW_RUN_MINUTES / seconds
                print(smaller_budget(module.recipe.network, affordable))
        self.said = seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        now = time.perf_counter()
        spent, self.started = now - self.started, now  # an epoch begins where the one before ended
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = metrics | {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step - 1,
            "seconds": spent,
        }
        write_epoch(trainer.logger, row, module.rates, self.curves.table)
        self.line.show("")
        print(epoch_line(pd.Series(row), trainer.max_epochs))
        self.curves.add(row)
        if self.said and trainer.current_epoch + 1 < trainer.max_epochs:
            whole = now - self.begin + self.left(trainer, module, trainer.current_epoch + 1)
            if abs(whole - self.said) > 0.15 * self.said:
                self.estimate(trainer, module, whole)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.curves.close()
