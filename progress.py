"""How far something long is: words about time, a line that replaces itself, and what a training run says."""

import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytorch_lightning as pl
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from cells import kernel_shell

SMALLER = 1 - (24 / 32) ** 2  # the part of the work that is saved at low resolution
LONG = 20  # minutes of training after which a smaller budget is offered
MULTIPLY_ADDS = {"ResNet18": 555, "CustomResNet": 379, "FastNet": 118}  # millions per image
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
    """A line that replaces itself: in a notebook by a display that ends empty, in a terminal by a carriage return."""

    def __init__(self):
        self.handle = placeholder()

    def show(self, text: str) -> None:
        """Replace the line; the empty text removes it."""
        if self.handle:
            self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty():
            print(f"\r{text:100s}", end="" if text else "\r", file=sys.stderr, flush=True)


def epoch_line(row: pd.Series, epochs: int) -> str:
    """One epoch of read_metrics' table as a line."""
    validated = "val_loss" in row and row.val_loss == row.val_loss  # not NaN
    return (
        f"epoch {int(row.epoch) + 1:3d}/{epochs} | train loss {row.train_loss:.3f} acc {row.train_acc:.4f}"
        + (f" | val loss {row.val_loss:.3f} acc {row.val_acc:.4f}" if validated else "") + f" | {clock(row.seconds)}"
    )  # fmt: skip


def work(first: int, last: int, low: float) -> float:
    """The work of the batches from first to last, in batches at full resolution; those before `low` are smaller."""
    return last - first - SMALLER * max(0, min(last, low) - first)


def smaller_budget(network: str, epochs: float, measured: Path = MEASURED) -> str:
    """What to train instead if there is time for so many epochs of a network: the best measured in such a time.

    measured: a file that benchmarks/accuracy.py wrote; its times are of another machine, so multiply-adds are compared.
    """
    rows = json.loads(measured.read_text()) if measured.exists() else []
    affordable = epochs * MULTIPLY_ADDS[network]
    fitting = [row for row in rows if row["epochs"] * MULTIPLY_ADDS[row["network"]] <= affordable]
    advice = f"This machine needs more than {LONG} minutes for it. "
    if not fitting:
        return advice + f"EPOCHS = {max(1, int(epochs))} would take {'less' if epochs >= 1 else 'more'}."
    best = max(fitting, key=lambda row: row["single"])
    return advice + (
        f'ARCH = "{best["network"]}", RECIPE = "{best["recipe"]}" would take less, for an accuracy of about'
        f" {best['single']:.1%} (measured, {best['train_images']:,} images)."
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

    earlier: the table of the epochs before, of a run that is continued.
    """

    def __init__(self, earlier: pd.DataFrame):
        self.earlier = earlier
        self.started = 0.0
        self.shown = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.line, self.curves = TransientLine(), LiveCurves(self.earlier)
        self.first_epoch = trainer.current_epoch
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, index: int) -> None:
        now, steps = time.perf_counter(), trainer.num_training_batches
        if index == 2:  # the first batches are slower: memory and kernels are being prepared
            self.warm = now
        if index < 12 or now - self.shown < 2 or not trainer.is_global_zero:
            return
        self.shown = now
        first, low = trainer.current_epoch * steps, module.recipe.low_res * trainer.max_epochs * steps
        unit = (now - self.warm) / work(first + 2, first + index, low)
        left = unit * work(first + index, trainer.max_epochs * steps, low)
        if index == 12 and trainer.current_epoch == self.first_epoch:
            print(f"about {clock(left)} for {trainer.max_epochs - self.first_epoch} epochs")
            if left > 60 * LONG and self.first_epoch == 0:
                print(smaller_budget(module.recipe.network, 60 * LONG / (unit * steps)))
        self.line.show(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {100 * index // steps} %, {clock(left)} left"
        )

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
