"""The curves hold the numbers that were logged."""

import math

import numpy as np
import pandas as pd
import pytest

from dataload import FastDataModule
from evaluation import curves
from lesson import findings
from training.options import RunOptions
from training.recipes import Recipe
from training.runs import train


@pytest.mark.numeric
def test_the_schedule_is_the_one_that_was_logged_and_tells_its_peak(tmp_path):
    recipe = Recipe("ResNet18", epochs=2, max_lr=0.5, warmup=0.5)
    rates = [
        0.0625,
        0.1875,
        0.3125,
        0.4375,
        0.4375,
        0.3125,
        0.1875,
        0.0625,
    ]  # a triangle in the middle of 8 steps
    table = pd.DataFrame({"epoch": [0] * 4 + [1] * 4 + [1], "lr_step": [*rates, math.nan]})
    table.to_csv(tmp_path / "metrics.csv", index=False)
    fig, largest, wanted = curves.plot_schedule(tmp_path / "metrics.csv", recipe)
    assert fig.axes[0].lines[0].get_ydata().tolist() == rates and largest == wanted == 0.4375
    table.assign(lr_step=table.lr_step.clip(upper=0.3)).to_csv(
        tmp_path / "metrics.csv", index=False
    )
    assert curves.plot_schedule(tmp_path / "metrics.csv", recipe)[1:] == (0.3, 0.4375)


LOGGED = {  # recipe: the rate that is logged and drawn, Muon's if it is used, otherwise that of SGD
    "Muon and fast biases": ({"muon_lr": 0.24, "bias_lr": 10.0}, 0.24),
    "Muon": ({"muon_lr": 0.24}, 0.24),
    "SGD and fast biases": ({"bias_lr": 10.0}, 0.02),
    "SGD": ({}, 0.02),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", LOGGED)
def test_the_rate_that_is_logged_is_the_one_that_is_named(tiny_splits, tmp_path, name):
    changes, peak = LOGGED[name]
    recipe = Recipe("FastNet", epochs=2, batch_size=32, max_lr=0.02, warmup=0.5, **changes)
    data = FastDataModule(batch_size=32, num_workers=0, splits=tiny_splits)
    run = train(recipe, data, tmp_path, RunOptions(precision="32-true"))
    fig, largest, wanted = curves.plot_schedule(run.metrics_csv, recipe)
    assert largest == pytest.approx(wanted) and wanted == pytest.approx(
        0.75 * peak
    )  # 1.5 of 2 steps to the peak
    assert fig.axes[0].get_ylabel() == f"learning rate ({'Muon' if 'Muon' in name else 'SGD'})"
    table = pd.read_csv(run.metrics_csv)
    assert table.lr.dropna().iloc[0] == pytest.approx(0.75 * peak)  # of an epoch's last step


def test_a_run_without_validation_images_has_no_such_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,train_acc\n0,1.5,0.4\n")
    with pytest.raises(ValueError, match="expected a run with validation images, got one without"):
        curves.plot_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "epoch,train_loss,val_loss,train_acc,val_acc\n",
            "a whole epoch or more, got none",
        ),
        ("epoch,train_loss,val_loss,val_acc\n0,1.5,1.4,0.4\n", "the column train_acc, found none"),
    ],
)
def test_a_table_without_an_epoch_or_a_column_is_refused(tmp_path, rows, words):
    (tmp_path / "metrics.csv").write_text(rows)
    with pytest.raises(ValueError, match=words):
        curves.plot_metrics(tmp_path / "metrics.csv")


def range_table(lowest: float) -> pd.DataFrame:
    """A range test of 31 steps whose loss is lowest, and flat, around a factor."""
    factor = np.logspace(-2, 1, 31)
    return pd.DataFrame({"factor": factor, "loss": 1.5 + np.log10(factor / lowest) ** 2 / 4})


def test_the_range_test_s_figure_marks_the_minimum_and_the_peak_in_absolute_rates():
    table, recipe = range_table(0.1), Recipe("ResNet18", max_lr=0.05)
    (axis,) = (fig := curves.plot_range_test(table, recipe, "a note")).axes
    points, smooth, peak, lowest = axis.lines
    assert points.get_xdata() == pytest.approx(0.05 * table.factor)
    assert points.get_ydata().tolist() == table.loss.tolist()
    assert list(peak.get_xdata()) == [0.05, 0.05] and fig.get_suptitle().endswith("a note")
    assert lowest.get_ydata()[0] == min(smooth.get_ydata())
    assert axis.get_xlabel() == "learning rate (SGD)"
    diverged = pd.DataFrame({"factor": [0.01, 0.1, 1, 10], "loss": [2.3, 1.9, 1.8, 900.0]})
    (axis,) = curves.plot_range_test(diverged, recipe).axes
    assert axis.get_ylim()[1] < 3  # what diverges is cut off


@pytest.mark.parametrize(
    ("best", "peak", "says"),
    [
        (0.02, 0.1, "0.1, which a training reaches after a longer"),
        (0.2, 0.1, "0.2; the recipe's peak is 0.1"),
        (0.1, 0.1, "is 0.1"),
    ],
)
def test_the_range_test_s_title_says_where_the_peak_lies(best, peak, says):
    title = curves.range_test_title(best, peak, 0.1)
    assert "warm-up" not in curves.range_test_title(best, peak, 0)
    assert title.startswith(f"The smoothed loss is lowest at a learning rate of {best}")
    assert says in title and ("longer warm-up" in title) == (peak > best)


def epochs(train: list[float], val: list[float]) -> pd.DataFrame:
    accs = {"train_acc": [0.5] * len(train), "val_acc": [0.25] * len(val)}
    return pd.DataFrame({"train_loss": train, "val_loss": val, **accs})


@pytest.mark.parametrize(
    ("val", "says"),
    [
        ([2.0, 2.0, 2.0], "stays above training loss"),
        ([0.1, 0.1, 0.1], "stays below training loss"),
        ([2.0, 0.1, 2.0], "above training loss in 2 of 3 epochs"),
    ],
)
def test_the_title_says_which_loss_is_higher(val, says):
    assert says in curves.which_is_higher(epochs([1.0, 0.9, 0.8], val))


def test_the_title_says_what_the_change_of_resolution_did():
    table = epochs([2.0, 1.5, 1.0, 0.75], [3.0] * 4)
    recipe = Recipe("ResNet18", epochs=4, low_res=0.5)
    title = curves.training_title(table, recipe)
    assert "falls from 1.50 to 1.00 where 24 pixels become 32, after 2 epochs" in title
    rising = epochs([2.0, 1.0, 1.5, 0.75], [3.0] * 4)
    assert "rises from 1.00 to 1.50" in curves.training_title(rising, recipe)
    between = Recipe("ResNet18", epochs=4, low_res=0.4)  # within the second epoch, counted from 0
    assert "falls from 2.00 to 1.00" in curves.training_title(table, between)
    assert "pixels" not in curves.training_title(table, Recipe("ResNet18", epochs=4))
    early = Recipe("ResNet18", epochs=4, low_res=0.1)  # no epoch is all at 24 pixels
    assert "grow from 24 to 32 pixels after 0.4" in curves.training_title(table, early)


def test_one_figure_shows_loss_accuracy_and_rate_and_marks_the_resolution(tmp_path):
    table = epochs([2.0, 1.5, 1.0, 0.75], [3.0] * 4).assign(epoch=range(4))
    table.to_csv(tmp_path / "a.csv", index=False)
    recipe = Recipe("ResNet18", epochs=4, low_res=0.5, max_lr=0.1)
    *_, planned = curves.plot_training(tmp_path / "a.csv", recipe).axes  # no rates were logged
    assert planned.get_ylabel() == "learning rate\n(planned, SGD)"
    assert max(planned.lines[0].get_ydata()) == pytest.approx(0.1, rel=0.01)
    rates = pd.DataFrame({"epoch": [0, 1, 2, 3], "lr_step": [0.05, 0.1, 0.05, 0.01]})
    pd.concat([table, rates]).to_csv(tmp_path / "b.csv", index=False)
    loss, acc, rate = curves.plot_training(tmp_path / "b.csv", recipe).axes
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.5, 1.0, 0.75]
    assert acc.lines[1].get_ydata().tolist() == [0.25] * 4
    assert rate.lines[0].get_ydata().tolist() == [0.05, 0.1, 0.05, 0.01]
    assert all(list(axis.lines[-1].get_xdata()) == [2, 2] for axis in (loss, acc, rate))
    assert {"training 0.750", "24 pixels", "32 pixels"} <= {t.get_text() for t in loss.texts}
    assert "validation 25.0 %" in {text.get_text() for text in acc.texts}
    pd.concat([table[2:], rates[2:]]).to_csv(tmp_path / "d.csv", index=False)  # a log was lost
    loss, acc, rate = curves.plot_training(tmp_path / "d.csv", recipe).axes
    assert [list(axis.lines[0].get_xdata()) for axis in (loss, acc, rate)] == [
        [3, 4],
        [3, 4],
        [2.5, 3.5],
    ]
    assert "32 pixels" in {text.get_text() for text in loss.texts}
    fig, largest, wanted = curves.plot_schedule(tmp_path / "d.csv", recipe)
    assert largest == 0.05 and wanted == pytest.approx(0.1 * 1.5 / 4 / 0.8)  # warmup .2
    assert "after 4 epochs" in curves.ending(curves.read_epochs(tmp_path / "d.csv"), "acc")
    assert "after epoch 3 to" in findings.curves(tmp_path / "d.csv")
    part = rates[2:].assign(lr_step=[0.046875, 0.015625])  # what the recipe plans there
    pd.concat([table[3:], part]).to_csv(tmp_path / "e.csv", index=False)
    title = curves.plot_schedule(tmp_path / "e.csv", recipe)[0].get_suptitle().replace("\n", " ")
    assert title == "In the logged epochs, the learning rate follows the recipe, up to 0.0469"
    assert "after epoch 4." in findings.curves(tmp_path / "e.csv")
    with pytest.raises(ValueError, match="expected learning rates in lr_step, found none in"):
        curves.plot_schedule(tmp_path / "a.csv", recipe)
    half = pd.concat([table[:2], rates[:2]])  # interrupted after two of four epochs
    half.to_csv(tmp_path / "c.csv", index=False)
    for figure in (curves.plot_training, lambda *run: curves.plot_schedule(*run)[0]):
        *_, rate = figure(tmp_path / "c.csv", recipe).axes
        assert rate.lines[0].get_xdata().tolist() == [0.5, 1.5]


def test_the_schedule_s_title_says_whether_the_peak_was_reached():
    recipe = Recipe("ResNet18", max_lr=0.5, warmup=0.25)
    assert "peaks at 0.49 after 25 % of the steps" in curves.schedule_title(0.49, 0.49, recipe)
    assert "reaches 0.3; the recipe asks for 0.49" in curves.schedule_title(0.3, 0.49, recipe)
