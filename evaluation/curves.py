"""The curves of a training run: loss, accuracy, learning rate."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.drawing import (
    COLOURS,
    GREY,
    TEXT,
    WIDTH,
    headline,
    label_ends,
    new_chart,
    new_figure,
    percent,
    percent_axis,
    style_chart,
    styled,
)
from models.errors import InvalidValue
from training.history import epoch_means, read_table
from training.recipes import Recipe
from training.schedule import one_cycle_factor

PARTS = {"train": "training", "val": "validation"}
METRICS = [f"{part}_{name}" for part in PARTS for name in ("loss", "acc")]  # columns of the table

# ---- loss and accuracy ---------------------------------------------------------------------------


def read_epochs(metrics_csv: str | Path) -> pd.DataFrame:
    """Read the epochs of a run that have been trained and validated.

    Args:
        metrics_csv: the table of a run, with the columns epoch, train_loss, val_loss, train_acc
            and val_acc; accuracies are fractions.

    Returns:
        A row for each epoch; the index is the epoch, counted from 0.

    Raises:
        InvalidValue: if the run had no validation images, if a column is missing, and if no epoch
            is complete.
    """
    means = epoch_means(read_table(metrics_csv)).set_index("epoch")
    if "val_loss" not in means:
        raise InvalidValue(
            f"expected a run with validation images, got one without in {metrics_csv}"
        )
    missing = [name for name in METRICS if name not in means]
    if missing:
        raise InvalidValue(f"expected the column {missing[0]}, found none in {metrics_csv}")
    complete = pd.DataFrame(means.loc[means["train_loss"].notna() & means["val_loss"].notna()])
    if complete.empty:
        raise InvalidValue(f"expected a whole epoch or more, got none in {metrics_csv}")
    return complete


def epochs_until_the_end(table: pd.DataFrame) -> int:
    """Return how many epochs were trained, though a table of `read_epochs` may lack some."""
    return int(table.index[-1]) + 1


def ending(table: pd.DataFrame, name: str) -> str:
    """Say how a metric of training and validation ends: 'loss' or 'acc'."""
    train, val = (float(table[f"{part}_{name}"].iloc[-1]) for part in PARTS)
    epochs = epochs_until_the_end(table)
    after = f"after {epochs} epoch{'s' * (epochs != 1)}"
    if name == "acc":
        return f"Validation accuracy is {percent(val)} {after}, training accuracy {percent(train)}"
    return f"Validation loss is {val:.3f} {after}, training loss {train:.3f}"


def which_is_higher(table: pd.DataFrame) -> str:
    """Say in how many epochs the validation loss is above the training loss."""
    higher = int(np.sum(table["val_loss"].to_numpy() > table["train_loss"].to_numpy()))
    count = len(table)
    if higher in (0, count):
        return f"Validation loss stays {'above' if higher else 'below'} training loss"
    return f"Validation loss is above training loss in {higher} of {count} epochs"


def change_of_resolution(recipe: Recipe, epochs: int) -> float | None:
    """Return after how many epochs 24x24 pixels become 32x32, or None if that is never seen."""
    changed = recipe.low_res * recipe.epochs
    return changed if 0 < changed < epochs else None


def what_the_change_did(table: pd.DataFrame, changed: float) -> str:
    """Say how the training loss changes where images become larger.

    The last epoch that is all at 24x24 pixels is compared with the first that is all at 32x32.

    Args:
        table: of `read_epochs`.
        changed: after how many epochs the images become larger.
    """
    before, after = int(np.floor(changed)) - 1, int(np.ceil(changed))
    place = f"after {changed:.3g} epoch{'s' * (changed != 1)}"
    if not {before, after} <= {*table.index}:
        return f"images grow from 24 to 32 pixels {place}"
    low, high = (float(table["train_loss"].loc[i]) for i in (before, after))
    verb = "falls" if high < low else "rises"
    return f"training loss {verb} from {low:.2f} to {high:.2f} where 24 pixels become 32, {place}"


def training_title(table: pd.DataFrame, recipe: Recipe) -> str:
    """Say what the loss of a run did."""
    changed = change_of_resolution(recipe, epochs_until_the_end(table))
    more = f"; {what_the_change_did(table, changed)}" if changed else ""
    return which_is_higher(table) + more


@styled
def plot_metrics(metrics_csv: str | Path, note: str = "") -> tuple[Figure, Figure]:
    """Draw loss and accuracy against the epoch, training against validation.

    Args:
        metrics_csv: the table of a run, as of `read_epochs`.
        note: a line under the titles.

    Returns:
        The figure of the loss and the figure of the accuracy.
    """
    table = read_epochs(metrics_csv)
    figures = []
    for name in ("loss", "acc"):
        fig, axis = new_chart(WIDTH, 4.6)
        draw_metric(axis, table, name)
        axis.set_xlabel("epoch")
        what = "accuracy" if name == "acc" else "loss"
        shows = f"Line chart of training and validation {what} against the epoch"
        headline(fig, ending(table, name), shows, note)
        figures.append(fig)
    return figures[0], figures[1]


def draw_metric(axis: Axes, table: pd.DataFrame, name: str) -> None:
    """Draw a metric of training and validation against the epoch, counted from 1.

    Args:
        axis: where to draw.
        table: of `read_epochs`.
        name: 'loss' or 'acc'.
    """
    ends = []
    for (part, label), colour in zip(PARTS.items(), COLOURS, strict=False):
        values = table[f"{part}_{name}"]
        axis.plot(table.index + 1, values, "o-", markersize=4, label=part, color=colour)
        last = float(values.iloc[-1])
        ends.append((last, f"{label} {percent(last) if name == 'acc' else f'{last:.3f}'}", colour))
    axis.set_ylabel("accuracy" if name == "acc" else "loss (cross-entropy)")
    axis.margins(x=0.02)
    axis.locator_params(axis="x", integer=True)
    if name == "acc":
        percent_axis(axis)
    label_ends(axis, ends)


@styled
def plot_training(metrics_csv: str | Path, recipe: Recipe, note: str = "") -> Figure:
    """Draw loss, accuracy and learning rate of a run below each other, over the same epochs.

    Args:
        metrics_csv: the table of a run, as of `read_epochs`; where it has no column lr_step, the
            learning rate is drawn as the recipe plans it.
        recipe: of that run.
        note: a line under the title.
    """
    table, rates = read_epochs(metrics_csv), logged_rates(metrics_csv)
    fig = new_figure(WIDTH, 8.05)
    axes = fig.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    for axis, name in zip(axes, ("loss", "acc"), strict=False):
        draw_metric(axis, table, name)
    if len(rates):
        draw_rates(axes[2], rates, recipe)
    else:
        draw_rates(axes[2], planned_rates(recipe, np.linspace(0, recipe.epochs, 1000)), recipe)
        axes[2].set_ylabel(rate_label(recipe).replace(" (", "\n(planned, "))
    for axis in axes:
        style_chart(axis)
    changed = change_of_resolution(recipe, epochs_until_the_end(table))
    if changed:
        mark_resolution(axes, changed)
    axes[-1].set_xlabel("epoch")
    shows = "Line charts of loss, accuracy and learning rate against the epoch"
    headline(fig, training_title(table, recipe), shows, note)
    return fig


def mark_resolution(axes: np.ndarray, changed: float) -> None:
    """Mark in each panel where the images become larger; an epoch's point stands at its end."""
    for axis in axes:
        axis.axvline(changed, linestyle=":", color=GREY)
    where = axes[0].get_xaxis_transform()
    for text, side, shift in (("24 pixels", "right", -6), ("32 pixels", "left", 6)):
        axes[0].annotate(
            text,
            (changed, 0.97),
            (shift, 0),
            xycoords=where,
            textcoords="offset points",
            ha=side,
            va="top",
            color=GREY,
            fontsize=TEXT,
        )


# ---- learning rate -------------------------------------------------------------------------------


def logged_rates(metrics_csv: str | Path) -> pd.Series:
    """Return the learning rate of every step that a run has logged; empty if it has logged none.

    The index is the time in epochs, in the middle of the step.
    """
    steps = read_table(metrics_csv).reindex(columns=["epoch", "lr_step"]).dropna()
    epochs = steps.groupby("epoch")["epoch"]
    middles = (epochs.cumcount() + 0.5) / epochs.transform("size")
    return pd.Series(steps["lr_step"].to_numpy(), steps["epoch"] + middles)


def planned_rates(recipe: Recipe, times: np.ndarray) -> pd.Series:
    """Return the learning rate, Muon's where it is used, that a recipe plans at times in epochs."""
    factors = [one_cycle_factor(time / recipe.epochs, recipe.warmup) for time in times]
    return pd.Series(recipe.peak_lr * np.array(factors), times)


def rate_label(recipe: Recipe) -> str:
    """Name the learning rate that is logged: Muon's where it is used, otherwise SGD's."""
    return f"learning rate ({'Muon' if recipe.muon_lr else 'SGD'})"


def draw_rates(axis: Axes, rates: pd.Series, recipe: Recipe) -> None:
    """Draw learning rates against the time in epochs, which is their index."""
    axis.plot(rates.index, rates.to_numpy(), color=COLOURS[2])
    axis.set_ylim(bottom=0)
    axis.set_ylabel(rate_label(recipe).replace(" (", "\n("))


def schedule_title(largest: float, wanted: float, recipe: Recipe, has_peak: bool = True) -> str:
    """Say whether the logged learning rate reached what the recipe asks for.

    Args:
        largest: the largest rate in the log.
        wanted: the largest rate that the recipe asks for in these steps.
        recipe: of that run.
        has_peak: whether the recipe's peak lies in these steps.
    """
    if not has_peak and np.isclose(largest, wanted, rtol=1e-6):
        return f"In the logged epochs, the learning rate follows the recipe, up to {largest:.3g}"
    where = f"{percent(recipe.warmup, 0)} of the steps" if recipe.warmup else "the first step"
    if np.isclose(largest, wanted, rtol=1e-6):
        return f"The learning rate peaks at {largest:.3g} after {where}, as the recipe asks"
    return f"The learning rate reaches {largest:.3g}; the recipe asks for {wanted:.3g}"


@styled
def plot_schedule(
    metrics_csv: str | Path, recipe: Recipe, note: str = ""
) -> tuple[Figure, float, float]:
    """Draw the logged learning rate of every step: Muon's where it is used, otherwise SGD's.

    Args:
        metrics_csv: the table of a run, with the column lr_step.
        recipe: of that run.
        note: a line under the title.

    Returns:
        The figure, the largest rate in the log, and the largest rate that the recipe asks for in
        these steps, which is slightly below its peak.

    Raises:
        InvalidValue: if no rate was logged.
    """
    rates = logged_rates(metrics_csv)
    if rates.empty:
        raise InvalidValue(f"expected learning rates in lr_step, found none in {metrics_csv}")
    times = rates.index.to_numpy()
    largest, wanted = float(rates.max()), float(planned_rates(recipe, times).max())
    fig, axis = new_chart(WIDTH, 3.4)
    draw_rates(axis, rates, recipe)
    axis.set(xlabel="epoch", ylabel=rate_label(recipe))
    axis.locator_params(axis="x", integer=True)
    has_peak = np.floor(times.min()) <= recipe.warmup * recipe.epochs <= np.ceil(times.max())
    title = schedule_title(largest, wanted, recipe, bool(has_peak))
    headline(fig, title, "Line chart of the learning rate against the epoch", note)
    return fig, largest, wanted


def range_test_title(best: float, peak: float, warmup: float) -> str:
    """Say where the loss of a range test is lowest, and why a peak can lie right of it.

    Args:
        best: the learning rate with the smallest smoothed loss.
        peak: the recipe's peak.
        warmup: the fraction of the recipe's steps before the peak.
    """
    found = (
        f"The smoothed loss is lowest at a learning rate of {best:.2g}; the recipe's peak is"
        f" {peak:.2g}"
    )
    if peak > 1.05 * best and warmup > 0:
        return f"{found}, which a training reaches after a longer warm-up"
    return found


@styled
def plot_range_test(table: pd.DataFrame, recipe: Recipe, note: str = "") -> Figure:
    """Draw the loss of a learning-rate range test against the rate, and mark its minimum.

    Losses far above the first one are cut off.

    Args:
        table: of `training.range_test.range_test`, with the columns factor (learning rate divided
            by the recipe's peak) and loss.
        recipe: that was tested.
        note: a line under the title.
    """
    peak = recipe.peak_lr
    rates, loss = peak * table["factor"].to_numpy(), table["loss"].to_numpy()
    smooth = table["loss"].ewm(span=5).mean().to_numpy()
    best = int(smooth.argmin())
    fig, axis = new_chart(WIDTH, 4.4)
    axis.semilogx(rates, loss, ".", alpha=0.4, label="of each step")
    axis.semilogx(rates, smooth, "-", color=COLOURS[0], label="smoothed")
    axis.axvline(peak, linestyle="--", color=GREY, label="the recipe's peak")
    axis.plot(rates[best], smooth[best], "v", markersize=10, color=COLOURS[1])
    axis.lines[-1].set_label("lowest smoothed loss")
    low, first = float(loss.min()), float(loss[0])
    axis.set_ylim(low - 0.1 * (first - low) - 0.02, first + 0.4 * (first - low) + 0.02)
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.set(xlabel=rate_label(recipe), ylabel="training loss")
    axis.legend(loc="lower left")
    title = range_test_title(float(rates[best]), peak, recipe.warmup)
    headline(fig, title, "Training loss against the learning rate", note)
    return fig
