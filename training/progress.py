"""What a training run shows while it runs: an estimate, a line per epoch, the time left, curves."""

import contextlib
import time
from typing import cast

import pandas as pd
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from training.budget import SLOW_RUN_MINUTES, smaller_budget
from training.classifier import LitClassifier, datamodule_of
from training.console import TransientLine, display_placeholder, format_duration
from training.history import epoch_line, epoch_means, write_epoch
from training.workload import Workload

LINE_SECONDS = 2  # between two updates of the line that shows the time left


class LiveCurves:
    """Loss and accuracy in a notebook, drawn again after each epoch in the same place.

    Outside a notebook nothing is drawn.

    Attributes:
        table: the rows of the epochs so far, at first those before an interruption.
    """

    def __init__(self, earlier: pd.DataFrame):
        self.table, self.handle = earlier, display_placeholder()

    def add(self, metrics: dict[str, float]) -> None:
        """Draw one more epoch.

        Args:
            metrics: epoch, train_loss, train_acc, and val_loss, val_acc if they are there.
        """
        self.table = pd.concat([self.table, pd.DataFrame([metrics])])
        if self.handle:
            self.handle.update(self.figure())

    def figure(self) -> Figure:
        """Draw the epochs so far: the loss on the left, the accuracy on the right."""
        epochs = epoch_means(self.table)
        fig = Figure(figsize=(8, 2.6), layout="constrained")
        for axis, name in zip(fig.subplots(1, 2), ("loss", "acc"), strict=True):
            for column, label in ((f"train_{name}", "train"), (f"val_{name}", "val")):
                if column in epochs:
                    axis.plot(epochs["epoch"] + 1, epochs[column], "o-", markersize=3, label=label)
            axis.set(xlabel="epoch", ylabel="accuracy" if name == "acc" else "loss")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        return fig

    def close(self) -> None:
        """Remove the figure: the notebook draws the curves of the finished run."""
        if self.handle:
            self.handle.update({"text/plain": ""}, raw=True)


class Progress(Callback):
    """The callback that shows and logs the progress of a run.

    It prints an estimate after a few steps and a line per epoch, shows the time left in between,
    and writes each epoch into the log. Where several processes train, the first one does so.

    The estimate covers training and validation. It is corrected, in a line of its own, where it
    turns out to be more than 15 % off, for checkpoints and logs take time as well.
    """

    def __init__(self, earlier: pd.DataFrame):
        self.earlier = earlier  # the rows of the epochs before an interruption
        self.first_epoch = 0  # of this process
        self.train_start = self.epoch_start = 0.0
        self.line_shown = float("-inf")
        self.estimated = 0.0  # seconds from the start to the end; 0: there is no estimate yet
        # The first batches are slower, because memory and kernels are being prepared. The pace is
        # measured from this time on, when this much work was done.
        self.warm, self.warm_time, self.warm_work = False, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock, and make room for the line and the curves."""
        if trainer.is_global_zero:
            self.line, self.curves = TransientLine(), LiveCurves(self.earlier)
        self.first_epoch, self.warm = trainer.current_epoch, False
        self.train_start = self.epoch_start = time.perf_counter()

    def workload(self, trainer: pl.Trainer, module: LitClassifier) -> Workload:
        """Compute the work of the whole run."""
        recipe, steps = module.recipe, trainer.num_training_batches
        data = datamodule_of(trainer)
        validation = len(data.splits.val.labels) / data.batch_size
        return Workload(recipe.epochs, steps, recipe.low_res * recipe.epochs * steps, validation)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: LitClassifier, outputs, batch, index: int
    ) -> None:
        """Print the estimate after the first batches, and show the time left every two seconds."""
        if not trainer.is_global_zero:
            return
        warms_up = index == 2 and not self.warm
        early = index < 12 and trainer.current_epoch == self.first_epoch
        recent = time.perf_counter() - self.line_shown < LINE_SECONDS
        if not warms_up and (early or recent):
            return
        if module.device.type != "cpu":
            torch.accelerator.synchronize()  # a GPU is asked for a batch long before it has done it
        now, done = time.perf_counter(), (trainer.current_epoch, index + 1)
        if warms_up:
            work = self.workload(trainer, module).before(*done)
            self.warm, self.warm_time, self.warm_work = True, now, work
        elif self.warm:
            self.line_shown = now
            left = self.seconds_left(trainer, module, *done)
            if not self.estimated:
                self.print_estimate(trainer, module, now - self.train_start + left)
            percent = 100 * (index + 1) // trainer.num_training_batches
            self.line.show(
                f"epoch {trainer.current_epoch + 1}/{module.recipe.epochs}: {percent} %,"
                f" {format_duration(left)} left"
            )

    def seconds_left(
        self, trainer: pl.Trainer, module: LitClassifier, epoch: int, batch: int = 0
    ) -> float:
        """Predict the seconds until the end, at the average pace since the first batches.

        Args:
            trainer: the one that trains.
            module: the one that is trained.
            epoch: the current one, counted from 0.
            batch: the next one of it, counted from 0.
        """
        work = self.workload(trainer, module)
        seconds = time.perf_counter() - self.warm_time
        return seconds / (work.before(epoch, batch) - self.warm_work) * work.left(epoch, batch)

    def print_estimate(self, trainer: pl.Trainer, module: LitClassifier, seconds: float) -> None:
        """Print what the whole run takes, and, where that is long, what would take less."""
        epochs = module.recipe.epochs - self.first_epoch
        plural = "s" * (epochs > 1)
        # format_duration would round 100 to 600 s to minutes, which is too coarse here.
        duration = format_duration(seconds) if seconds > 600 else f"{seconds:.0f} s"
        print(f"{'now ' if self.estimated else ''}about {duration} for {epochs} epoch{plural}")
        if not self.estimated and seconds > 60 * SLOW_RUN_MINUTES and self.first_epoch == 0:
            # Advice never ends a run, whatever network or file it is given.
            with contextlib.suppress(Exception):
                work = self.workload(trainer, module)
                affordable = work.before(epochs) / work.batches * 60 * SLOW_RUN_MINUTES / seconds
                print(smaller_budget(module.recipe.network, affordable))
        self.estimated = seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, module: LitClassifier) -> None:
        """Log and print the epoch, and correct the estimate where it is off."""
        now = time.perf_counter()
        # An epoch begins where the one before ended.
        seconds, self.epoch_start = now - self.epoch_start, now
        if not trainer.is_global_zero:
            return
        epoch, epochs = trainer.current_epoch, module.recipe.epochs
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= {"epoch": epoch, "step": trainer.global_step - 1, "seconds": seconds}
        write_epoch(cast(CSVLogger, trainer.logger), metrics, module.rates, self.curves.table)
        self.line.show("")
        print(epoch_line(metrics, epochs))
        self.curves.add(metrics)
        if self.estimated and epoch + 1 < epochs:
            whole = now - self.train_start + self.seconds_left(trainer, module, epoch + 1)
            if abs(whole - self.estimated) > 0.15 * self.estimated:
                self.print_estimate(trainer, module, whole)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove the curves."""
        if trainer.is_global_zero:
            self.curves.close()
