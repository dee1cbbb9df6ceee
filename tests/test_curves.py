"""The curves hold the numbers that were logged."""

import math

import pandas as pd
import pytest

from dataload import FastDataModule
from evaluation import curves
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
    table.drop(columns="lr_step").to_csv(tmp_path / "metrics.csv", index=False)
    assert curves.plot_schedule(tmp_path / "metrics.csv", recipe)[0] is None


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


def test_the_range_test_s_figure_marks_the_recipe_s_peak():
    table = pd.DataFrame({"factor": [0.01, 0.1, 1.0, 10.0], "loss": [2.3, 2.2, 1.9, 3.0]})
    points, _, peak = curves.plot_range_test(table).axes[0].lines
    assert points.get_ydata().tolist() == table.loss.tolist() and list(peak.get_xdata()) == [1, 1]
