"""The analyses count rightly, disturb as much as they say, and draw what the network gave them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from dataload import CLASSES, CIFAR10DataModule, Images, denormalize, normalize
from evaluation import calibration, curves, errors, features, robustness
from evaluation.calibration import reliability
from evaluation.errors import Misclassified
from evaluation.predict import accuracy
from models.registry import build
from tests.conftest import wrong_predictions
from training.recipes import Recipe
from training.runs import train


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A smooth picture: what noise and blur do to it can be computed."""
    rows, columns = np.mgrid[0:1:32j, 0:1:32j]
    return np.uint8(
        np.stack([60 + 120 * rows, 60 + 120 * columns, np.full((32, 32), 120)], axis=-1)
    )


# ---- errors and confidence ----


def error(label: int, pred: int, prob: float = 0.5) -> Misclassified:
    return Misclassified(torch.zeros(3, 32, 32), label, pred, prob, torch.zeros(10))


def test_confused_pairs_are_counted_in_both_directions():
    wrong = [error(3, 5), error(5, 3), error(5, 3), error(0, 8), error(1, 9)]
    table = errors.most_confused(wrong, CLASSES, count=2)
    assert table.pair.tolist() == [
        "cat and dog",
        "airplane and ship",
    ] and table.images.tolist() == [3, 1]


def test_the_surest_errors_come_first():
    probs = [
        sample.prob for sample in errors.most_confident([error(0, 1, p) for p in (0.3, 0.9, 0.5)])
    ]
    assert probs == [0.9, 0.5, 0.3]


@pytest.mark.numeric
def test_the_bins_of_four_answers_by_hand():
    """Confidences 0.9, 0.9 (one right) and 0.65, 0.65 (both right).

    Bins 14 and 10 of 15, counted from 1.
    """
    confidence = torch.tensor([0.9, 0.9, 0.65, 0.65])
    sums = reliability(
        torch.stack([confidence, 1 - confidence], 1).log(), torch.tensor([0, 1, 0, 0])
    )
    filled = {
        bin + 1: tuple(float(values[bin]) for values in sums) for bin in range(15) if sums[2][bin]
    }
    assert list(filled) == [10, 14]
    assert filled[10] == pytest.approx((1.3, 2, 2)) and filled[14] == pytest.approx((1.8, 1, 2))


@pytest.mark.numeric
def test_bars_of_the_reliability_diagram_are_the_accuracies_of_the_bins():
    confidence = torch.tensor([0.9, 0.9, 0.65, 0.65])
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    before, after = calibration.plot_reliability(logits, torch.tensor([0, 1, 0, 0]), 0.5).axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in before.patches}
    assert bars == pytest.approx({round(9.5 / 15, 3): 1, round(13.5 / 15, 3): 0.5})
    assert "37.50%" in before.get_title() and "temperature 0.50" in after.get_title()


# ---- disturbances ----


@pytest.mark.numeric
@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_a_stronger_corruption_changes_more_and_the_same_each_time(name):
    images = (
        np.random.default_rng(0)
        .integers(40, 216, (4, 8, 8, 3), dtype=np.uint8)
        .repeat(4, 1)
        .repeat(4, 2)
    )
    changes = [
        np.abs(robustness.corrupt(images, name, s).astype(float) - images).mean()
        for s in (0, 1, 2, 3)
    ]
    assert changes[0] == 0 and changes == sorted(changes) and changes[1] > 1
    assert np.array_equal(robustness.corrupt(images, name, 2), robustness.corrupt(images, name, 2))


@pytest.mark.numeric
def test_noise_has_the_deviation_that_is_said():
    grey = np.full((20, 32, 32, 3), 128, np.uint8)
    for strength, deviation in enumerate(robustness.STRENGTHS["noise"], 1):
        got = (robustness.corrupt(grey, "noise", strength).astype(float) - 128).std() / 255
        assert got == pytest.approx(deviation, rel=0.05)


@pytest.mark.numeric
def test_dark_multiplies_and_so_does_not_clip(image):
    for strength, part in enumerate(robustness.STRENGTHS["dark"], 1):
        got = robustness.corrupt(image[None], "dark", strength)[0].astype(float)
        assert np.abs(got - (1 - part) * image).max() <= 1 and got.min() > 0


@pytest.mark.numeric
def test_contrast_blends_towards_the_mean_of_the_image(image):
    for strength, part in enumerate(robustness.STRENGTHS["contrast"], 1):
        got = robustness.corrupt(image[None], "contrast", strength)[0].astype(float)
        mean = image.mean((0, 1))
        assert np.abs(got - (mean + (1 - part) * (image - mean))).max() <= 0.5001
        assert got.mean() == pytest.approx(image.mean(), abs=0.5)  # as bright as before
        assert got.std((0, 1)) == pytest.approx((1 - part) * image.std((0, 1)), abs=0.5)


@pytest.mark.numeric
def test_contrast_by_hand():
    """Half black, half (200, 100, 40).

    The mean is (100, 50, 20). At 0.6 less contrast, 40 % of the distance stays.
    """
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, 16:] = (200, 100, 40)
    assert robustness.STRENGTHS["contrast"] == (0.4, 0.6, 0.8)
    got = robustness.corrupt(image, "contrast", 2)
    assert (got[:, :16] == (60, 30, 12)).all() and (got[:, 16:] == (140, 70, 28)).all()
    assert got.dtype == np.uint8 and got.shape == image.shape


@pytest.mark.numeric
def test_dark_by_hand():
    assert robustness.STRENGTHS["dark"] == (0.4, 0.6, 0.8)
    got = robustness.corrupt(np.full((1, 32, 32, 3), (200, 100, 40), np.uint8), "dark", 2)
    assert (got == (80, 40, 16)).all()


@pytest.mark.parametrize(("name", "strength"), [("fog", 1), ("noise", 4), ("noise", -1)])
def test_an_unknown_corruption_is_refused(image, name, strength):
    with pytest.raises(ValueError, match="expected one of noise, blur"):
        robustness.corrupt(image[None], name, strength)


class Brightness(torch.nn.Module):
    """Says class 1 if an image is brighter than the mean colour, else class 0."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


@pytest.mark.numeric
def test_robustness_is_the_accuracy_on_spoiled_images():
    bright = np.full((8, 32, 32, 3), 180, np.uint8)
    table = robustness.corrupted_accuracy(Brightness(), "cpu", Images(bright, np.ones(8, np.int64)))
    assert table.shape == (4, 5) and (table.loc[0] == 1).all()
    assert table["dark"].tolist() == [1, 0, 0, 0]  # 0.6 * 180 = 108 is below the mean of 120
    assert table["blur"].tolist() == table["contrast"].tolist() == [1, 1, 1, 1]


def test_the_curves_of_robustness_hold_the_table_below_the_images_from_clean_to_worst(image):
    table = pd.DataFrame(
        {name: [0.9, 0.8, 0.7, 0.1 * i] for i, name in enumerate(robustness.CORRUPTIONS)}
    )
    *panels, axis = robustness.plot_robustness(table, image).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [
        table[name].tolist() for name in table
    ]
    shown = np.stack([panel.images[0].get_array() for panel in panels]).reshape(
        4, len(table.columns), 32, 32, 3
    )
    assert (shown[0] == image).all() and [panel.get_ylabel() for panel in panels[::5]][0] == "clean"
    for column, name in enumerate(table):
        assert np.array_equal(shown[3, column], robustness.corrupt(image[None], name, 3)[0])


# ---- inside the network ----


@pytest.mark.parametrize(
    ("arch", "filters"), [("ResNet18", 64), ("CustomResNet", 64), ("FastNet", 24)]
)
def test_every_filter_of_the_first_layer_is_drawn(arch, filters):
    fig = features.plot_filters(build(arch))
    assert sum(bool(axis.images) for axis in fig.axes) == filters


@pytest.mark.parametrize("arch", ["ResNet18", "CustomResNet", "FastNet"])
def test_stage_outputs_have_the_size_that_each_stage_names_and_no_hook_stays(arch):
    model = build(arch).train()
    outputs = features.stage_outputs(model, torch.randn(3, 32, 32))
    assert [(name, maps.shape[1]) for name, maps in outputs.items()] == [
        (s.name, s.size) for s in model.stages()
    ]
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.numeric
def test_the_channels_that_are_drawn_are_the_strongest(tiny_splits):
    model, image = build("CustomResNet").eval(), normalize(tiny_splits.test.images[:1])[0]
    fig = features.plot_stages(model, image, denormalize, channels=4)
    strengths = features.stage_outputs(model, image)["resblock4"].abs().mean((1, 2)).numpy()
    titles = [int(axis.get_title()) for axis in fig.axes[-4:]]
    assert len(set(titles)) == 4 and strengths[titles] == pytest.approx(
        np.sort(strengths)[:-5:-1], rel=1e-4
    )


# ---- learning rate ----


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
    data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits, fast=True)
    run = train(recipe, data, tmp_path, precision="32-true")
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


def test_accuracy_of_no_error_is_one(tiny_splits):
    assert len(errors.most_confused(wrong_predictions(*tiny_splits.test), CLASSES)) == 5
    assert errors.most_confused([], CLASSES).empty and accuracy(torch.eye(3), torch.arange(3)) == 1
