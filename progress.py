"""How far something long is: words about time, a line that replaces itself, and what a training run says."""

import contextlib
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cells import kernel_shell
from models.lit import RECIPES
from models.registry import NETWORKS

SMALLER = 1 - (24 / 32) ** 2  # the part of the work that is saved at low resolution
FORWARD = 1 / 3  # the part of a training step that validation does as well: the backward pass costs twice as much
LONG = 20  # minutes of training after which a smaller budget is offered
MEASURED = Path(__file__).resolve().parent / "benchmarks/results/accuracy.json"


def clock(seconds: float) -> str:
    """Seconds in words: '42 s', '17 min', '2 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def placeholder():
    """A place in the notebook's output whose content can be replaced, empty at first; None outside a notebook."""
    if not kernel_shell():
        return None
    from IPython.display import display

    return display({"text/plain": ""}, raw=True, display_id=True)


class TransientLine:
    """A line that replaces itself, in a notebook or a terminal, and leaves nothing behind.

    Plain tqdm on standard output: the widget of tqdm.auto stays in a stored notebook as an empty output.
    """

    def __init__(self):
        shown = kernel_shell() or sys.stdout.isatty()
        self.bar = tqdm(bar_format="{desc}", leave=False, file=sys.stdout, disable=not shown)

    def show(self, text: str) -> None:
        """Replace the line; the empty text removes it."""
        if text:
            self.bar.set_description_str(text)
        else:
            self.bar.clear()


def epoch_line(row: pd.Series, epochs: int) -> str:
    """One epoch of read_metrics' table as a line."""
    validated = "val_loss" in row and row.val_loss == row.val_loss  # not NaN
    return (
        f"epoch {int(row.epoch) + 1:3d}/{epochs} | train loss {row.train_loss:.3f} acc {row.train_acc:.4f}"
        + (f" | val loss {row.val_loss:.3f} acc {row.val_acc:.4f}" if validated else "") + f" | {clock(row.seconds)}"
    )  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The work of a run, in batches of training at full resolution.

    epochs: of the run. batches: of an epoch. low: of the run's batches, those at low resolution, which come first.
    validation: the batches of an epoch's validation, which are as large.
    """

    epochs: int
    batches: int
    low: float
    validation: float

    def before(self, epoch: int, batch: int = 0) -> float:
        """What is done when a batch of an epoch begins, both counted from 0."""
        batches = epoch * self.batches + batch
        return batches - SMALLER * min(batches, self.low) + epoch * FORWARD * self.validation

    def left(self, epoch: int, batch: int = 0) -> float:
        """What is still to be done then."""
        return self.before(self.epochs) - self.before(epoch, batch)


@functools.cache
def multiply_adds(network: str) -> int:
    """Millions of multiply-adds with which a network of models.NETWORKS classifies an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        NETWORKS[network]().eval()(torch.zeros(1, 3, 32, 32))
    return round(counter.get_total_flops() / 2e6)


def measured_runs(path: Path) -> list[dict]:
    """The rows of a file of benchmarks/accuracy.py that were validated and can be repeated; none of a damaged one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = [row for row in rows if row["recipe"] in RECIPES and row["network"] in NETWORKS]
        return [row for row in known if row.get("val_single")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def smaller_budget(network: str, epochs: float, measured: Path = MEASURED) -> str:
    """What to train instead if there is time for so many epochs of a network: the best measured in such a time.

    measured: a file that benchmarks/accuracy.py wrote; its times are of another machine, so multiply-adds are compared.
    The best is that with the highest validation accuracy: the test images choose nothing.
    """
    affordable = epochs * multiply_adds(network) if network in NETWORKS else 0
    fitting = [row for row in measured_runs(measured) if row["epochs"] * multiply_adds(row["network"]) <= affordable]
    advice = f"This machine needs more than {LONG} minutes for it. "
    if not fitting:
        return advice + f"EPOCHS = {max(1, int(epochs))} would take {'less' if epochs >= 1 else 'more'}."
    best = max(fitting, key=lambda row: row["val_single"])
    return advice + (
        f'ARCH = "{best["network"]}", RECIPE = "{best["recipe"]}" would take less, for a validation accuracy of about'
        f" {best['val_single']:.1%} (measured, {best['train_images']:,} images)."
    )


class LiveCurves:
    """In a notebook: loss and accuracy, drawn again after each epoch in the same place. Elsewhere: nothing.

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
                    axis.plot(epochs.index + 1, epochs[f"{stage}_{name}"], "o-", markersize=3, label=stage)
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

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, index: int) -> None:
        if not trainer.is_global_zero:
            return
        warm = index == 2 and not self.warm  # the first batches are slower: memory and kernels are being prepared
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
            self.line.show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {share} %, {clock(left)} left")

    def left(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, batch: int = 0) -> float:
        """Seconds until the end, if the work goes on as fast as since the first batches, all breaks included."""
        work, (since, done) = self.workload(trainer, module), self.warm
        unit = (time.perf_counter() - since) / (work.before(epoch, batch) - done)
        return unit * work.left(epoch, batch)

    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, seconds: float) -> None:
        """Print what the whole run takes, and what would take less where that is long."""
        epochs = trainer.max_epochs - self.first_epoch
        in_words = clock(seconds) if seconds > 600 else f"{seconds:.0f} s"  # 100 s are not yet 2 min
        print(f"{'now ' if self.said else ''}about {in_words} for {epochs} epochs")
        if not self.said and seconds > 60 * LONG and self.first_epoch == 0:
            with contextlib.suppress(Exception):  # advice never ends a run, whatever network or file it is given
                work = self.workload(trainer, module)
                affordable = work.before(epochs) / work.batches * 60 * LONG / seconds
                print(smaller_budget(module.recipe.network, affordable))
        self.said = seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        now = time.perf_counter()
        spent, self.started = now - self.started, now  # an epoch begins where the one before ended
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = metrics | {"epoch": trainer.current_epoch, "step": trainer.global_step - 1, "seconds": spent}
        self.write(trainer.logger, row, module.rates)
        self.line.show("")
        print(epoch_line(pd.Series(row), trainer.max_epochs))
        self.curves.add(row)
        if self.said and trainer.current_epoch + 1 < trainer.max_epochs:
            whole = now - self.begin + self.left(trainer, module, trainer.current_epoch + 1)
            if abs(whole - self.said) > 0.15 * self.said:
                self.estimate(trainer, module, whole)

    def write(self, logger: CSVLogger, row: dict[str, float], rates: dict[int, float]) -> None:
        """Log an epoch before its checkpoint is written: who continues from it finds the epochs before in the log."""
        folder = Path(logger.log_dir)
        if not folder.is_dir():
            print(f"{logger.save_dir} was removed, or its disk is gone; it is made again, with all that is still known")
            folder.mkdir(parents=True)
            for _, known in self.curves.table.dropna(subset="train_loss").iterrows():
                logger.log_metrics(known.dropna().to_dict(), int(known.step))
        for step, rate in rates.items():
            logger.log_metrics({"epoch": row["epoch"], "lr_step": rate}, step)
        logger.log_metrics(row, row["step"])
        logger.save()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.curves.close()
