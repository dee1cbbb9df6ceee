"""The curves of a training run: loss, accuracy, learning rate."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evaluation.drawing import new_chart
from training.history import read_table
from training.recipes import Recipe
from training.schedule import one_cycle_factor


def plot_metrics(metrics_csv: str | Path, note: str = "") -> tuple[Figure, Figure]:
    """Draw loss and accuracy against the epoch, training against validation.

    Args:
        metrics_csv: the table of a run, with the columns epoch, train_loss, val_loss, train_acc
            and val_acc; accuracies are fractions.
        note: the title of both figures.

    Returns:
        The figure of the loss and the figure of the accuracy.
    """
    # Lightning writes training and validation into separate rows; an epoch's mean joins them.
    rows = read_table(metrics_csv)
    means = pd.DataFrame(rows.groupby("epoch").mean())
    table = means.loc[means["train_loss"].notna() & means["val_loss"].notna()]
    return (
        plot_metric(table, "loss", "loss (cross-entropy)", note),
        plot_metric(table, "acc", "accuracy (fraction)", note),
    )


def plot_metric(table: pd.DataFrame, name: str, label: str, note: str) -> Figure:
    """Draw one metric of training and validation against the epoch, counted from 1.

    Args:
        table: the index is the epoch, the columns are train_<name> and val_<name>.
        name: of the metric.
        label: of the vertical axis.
        note: the title.
    """
    fig, axis = new_chart(6.5, 4)
    for stage, style in (("train", "o-"), ("val", "s-")):
        axis.plot(table.index + 1, table[f"{stage}_{name}"], style, markersize=4, label=stage)
    axis.set(xlabel="epoch", ylabel=label, title=note)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return fig


def plot_schedule(
    metrics_csv: str | Path, recipe: Recipe, note: str = ""
) -> tuple[Figure | None, float, float]:
    """Draw the logged learning rate of every step: Muon's where it is used, otherwise SGD's.

    Args:
        metrics_csv: the table of a run, with the column lr_step.
        recipe: of that run.
        note: the title.

    Returns:
        The figure, the largest rate in the log, and the largest rate that the recipe asks for in
        that many steps, which is slightly below its peak; None, NaN and NaN where the log holds no
        rates.
    """
    table, peak = read_table(metrics_csv), recipe.muon_lr or recipe.max_lr
    if "lr_step" not in table:
        return None, float("nan"), float("nan")
    rates = table["lr_step"].dropna().to_numpy()
    fig, axis = new_chart(6.5, 2.6)
    axis.plot(np.arange(1, len(rates) + 1) * recipe.epochs / len(rates), rates)
    optimizer = "Muon" if recipe.muon_lr else "SGD"
    axis.set(xlabel="epoch", ylabel=f"learning rate ({optimizer})", title=note)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    wanted = peak * max(
        one_cycle_factor((step + 0.5) / len(rates), recipe.warmup) for step in range(len(rates))
    )
    return fig, float(rates.max()), wanted


def plot_range_test(table: pd.DataFrame, note: str = "") -> Figure:
    """Draw the loss of a learning-rate range test against the rate.

    Args:
        table: of `training.range_test.range_test`, with the columns factor (learning rate divided
            by the recipe's peak) and loss.
        note: the title.
    """
    factor, loss = table["factor"], table["loss"]
    fig, axis = new_chart(6.5, 3.4)
    axis.semilogx(factor, loss, ".", alpha=0.4, label="of each step")
    axis.semilogx(factor, loss.ewm(span=5).mean(), "-", label="smoothed")
    axis.axvline(1, linestyle="--", color="grey", label="the recipe's peak")
    axis.set(xlabel="learning rate / the recipe's peak", ylabel="training loss", title=note)
    axis.grid(alpha=0.3)
    axis.legend()
    return fig
