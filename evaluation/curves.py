"""The curves of a training run: loss, accuracy, learning rate."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from training.classifier import one_cycle_factor
from training.history import read_table
from training.recipes import Recipe


def plot_metrics(metrics_csv: str | Path, note: str = "") -> tuple[Figure, Figure]:
    """Loss and accuracy against the epoch, training against validation, as two figures.

    metrics_csv: the table of a run, columns epoch, train_loss, val_loss, train_acc, val_acc
    (fractions).
    """
    # Lightning writes training and validation in rows of their own; the mean of an epoch joins
    # them.
    table = (
        read_table(metrics_csv).groupby("epoch").mean().dropna(subset=["train_loss", "val_loss"])
    )
    figures = []
    for name, label in (("loss", "loss (cross-entropy)"), ("acc", "accuracy (fraction)")):
        fig, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
        for stage, style in (("train", "o-"), ("val", "s-")):
            axis.plot(table.index + 1, table[f"{stage}_{name}"], style, markersize=4, label=stage)
        axis.set(xlabel="epoch", ylabel=label, title=note)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
        plt.close(fig)
        figures.append(fig)
    return figures[0], figures[1]


def plot_schedule(
    metrics_csv: str | Path, recipe: Recipe, note: str = ""
) -> tuple[Figure | None, float, float]:
    """The learning rate of every step, from the log; of SGD or, if it is used, of Muon.

    metrics_csv: the table of a run, column lr_step. Returns the figure, the largest rate in the
    log, and the largest that the recipe asks for in so many steps, a little below its peak; None
    and NaN where the log holds no rates.
    """
    table, peak = read_table(metrics_csv), recipe.muon_lr or recipe.max_lr
    if "lr_step" not in table:
        return None, float("nan"), float("nan")
    rates = table["lr_step"].dropna().to_numpy()
    fig, axis = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    axis.plot(np.arange(1, len(rates) + 1) * recipe.epochs / len(rates), rates)
    axis.set(
        xlabel="epoch", ylabel=f"learning rate ({'Muon' if recipe.muon_lr else 'SGD'})", title=note
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    plt.close(fig)
    wanted = peak * max(
        one_cycle_factor((step + 0.5) / len(rates), recipe.warmup) for step in range(len(rates))
    )
    return fig, float(rates.max()), wanted


def plot_range_test(table: pd.DataFrame, note: str = "") -> Figure:
    """The loss of `training.range_test` against the learning rate, as a multiple of the recipe's peak."""
    fig, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    axis.semilogx(table.factor, table.loss, ".", alpha=0.4, label="of each step")
    axis.semilogx(table.factor, table.loss.ewm(span=5).mean(), "-", label="smoothed")
    axis.axvline(1, linestyle="--", color="grey", label="the recipe's peak")
    axis.set(xlabel="learning rate / the recipe's peak", ylabel="training loss", title=note)
    axis.grid(alpha=0.3)
    axis.legend()
    plt.close(fig)
    return fig
