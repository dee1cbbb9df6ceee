"""Sentences are chosen by the numbers, and hold the numbers."""

import numpy as np
import pandas as pd
import torch

from dataload import CLASSES
from evaluation.errors import Misclassified
from lesson import findings, first_look
from models.registry import build
from tests.conftest import wrong_predictions
from training.recipes import RECIPES, multiply_adds


def csv_of(tmp_path, train, val, gap=0.1, slope=0.05) -> str:
    rows = [
        {
            "epoch": e,
            "train_loss": t,
            "val_loss": v,
            "train_acc": 0.5 + gap + slope * e,
            "val_acc": 0.5 + slope * e,
        }
        for e, (t, v) in enumerate(zip(train, val, strict=True))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    return tmp_path / "metrics.csv"


def test_recipes_are_tabulated_by_their_work():
    rows = [
        {"network": "CustomResNet", "recipe": "custom-10", "epochs": 10, "val_single": 0.94},
        {"network": "FastNet", "recipe": "fastnet-7", "epochs": 7, "val_single": 0.93},
        {"network": "FastNet", "recipe": "fastnet-2", "epochs": 2, "val_single": 0.887},
    ]
    told = findings.budgets([row | {"seconds": 300, "machine": "a CPU", "n": 3} for row in rows])
    *_, first, second, third, _, unit = told.splitlines()
    assert first == "| FastNet | `fastnet-2` | 2 | 0.286 | 88.7 % | 3 |"
    assert second == "| FastNet | `fastnet-7` | 7 | 1 | 93.0 % | 3 |"
    times = 10 * multiply_adds("CustomResNet") / (7 * multiply_adds("FastNet"))
    assert f" {times:.3g} | 94.0 %" in third
    counted = "The compute of `fastnet-7` is 1, all images counted as 32x32 pixels"
    assert unit == f"{counted}; that took 5 min on a CPU."
    assert "Nothing was measured" in findings.budgets([])


def test_the_curves_say_what_was_reached_and_whether_there_is_overfitting(tmp_path):
    told = findings.curves(csv_of(tmp_path, [2, 1.5, 1, 0.9], [2.5, 2, 1.9, 1.8]))
    assert "from 50.0 % after epoch 1 to 65.0 % after epoch" in told
    assert "no overfitting" in told and "10.0 percentage points above" in told


def test_other_curves_get_other_sentences(tmp_path):
    told = findings.curves(csv_of(tmp_path, [2, 1.5, 1], [1.9, 0.9, 1.1], gap=-0.1))
    assert "lowest in epoch 2 and higher at the end" in told and "percentage points" not in told
    falling = csv_of(tmp_path, [2, 1.5], [1.9, 0.9], slope=-0.1)
    assert "goes from 50.0 % after epoch 1 to 40.0 %" in findings.curves(falling)
    only = findings.curves(csv_of(tmp_path, [2], [1.9]))
    assert only == "Validation accuracy is 50.0 % after the only epoch."


def test_the_accuracy_has_an_interval():
    told = findings.test_accuracy(500, 10_000, 0.956)
    # Wilson's interval, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), by hand.
    assert "**95.00 %** of 10,000" in told and "goes from 94.6 % to 95.4 %." in told
    assert "goes from 99.2 % to 100.0 %." in findings.test_accuracy(0, 500, None)
    assert "95.60 %, +0.60 percentage points on the same images" in told
    assert "test-time" not in findings.test_accuracy(500, 10_000, None)


def test_confusions_count_pairs(tiny_splits):
    # Each class is taken for the next one: (1, 2) and (7, 8) are an automobile for a bird, and a
    # horse for a ship; (9, 0) is a truck for an airplane.
    wrong = wrong_predictions(tiny_splits.test.images[:10], tiny_splits.test.labels[:10])
    told = findings.confusions(wrong, CLASSES)
    assert told.count("| 1 |") == 5  # the five first of ten pairs
    assert "every test image" in findings.confusions([], CLASSES)


def test_the_easiest_and_the_hardest_classes_are_all_that_are_so():
    labels = np.repeat([0, 1, 2], 10)  # no image of the fourth class
    wrong = [Misclassified(torch.zeros(3, 32, 32), 2, 0, 0.5, torch.ones(4) / 4)]
    names = ["ant", "bee", "cow", "dog"]
    told = findings.by_class(wrong, labels, names)
    assert told == "Easiest: ant and bee (100.0 % recall). Hardest: cow (90.0 %)."
    assert findings.by_class([], labels, names) == "All classes have the same recall, 100.0 %."


def test_the_first_look_names_what_is_wrong():
    preds = [*range(9), 1]
    told = findings.first_look(preds, [0.9] * 10, CLASSES)
    assert told.startswith("It mistakes the truck for an automobile (90 %).")
    assert findings.first_look(range(10), [0.9] * 10, CLASSES).startswith("All answers are correct")


def test_confidence_follows_the_temperature():
    logits, labels = 9 * torch.eye(4)[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 0])
    # 3 of 4 are correct, all with a confidence of e^1.8 / (e^1.8 + 3) = 66.85 %.
    told = findings.confidence(logits, labels, 5.0)
    assert "the fullest bar holds 100 % of the images, with a gap of 8.2 percentage points." in told
    assert "The other" not in told and "no answer does" in told
    # Three correct ones with nearly 100 %; one of 1 / (1 + e^0) = 50 % between two classes, wrong.
    unsure = torch.cat([99 * torch.eye(4)[:3], torch.tensor([[9.0, 9, -99, -99]])])
    told = findings.confidence(unsure, torch.tensor([0, 1, 2, 3]), 1.0)
    assert "holds 75 % of the images, with a gap of 0.0 percentage points. The other 25 %" in told
    assert "are overconfident, by 50.0 percentage points on average" in told


def areas(centre: float, other: float, random: float = 0.2, half: float = 0.05) -> pd.DataFrame:
    rows = {
        "heatmap": 0,
        "another image's heatmap": other,
        "centre first": centre,
        "random": random,
    }
    table = pd.DataFrame({"difference": rows})
    table["from"], table["to"] = table["difference"] - half, table["difference"] + half
    return table.assign(area=0.4 + table["difference"])


def test_trust_is_what_the_fair_controls_leave():
    good = findings.trust(areas(0.1, 0.1), areas(-0.1, -0.1, -0.2))
    assert (
        "falls sooner, by area, than with another image's heatmap, centre first and random." in good
    )
    assert (
        "rises sooner, by area, than with another image's heatmap, centre first and random." in good
    )
    assert (
        "say something about their own image" in good
        and "50 % when masking, 50 % when showing" in good
    )
    half = findings.trust(areas(0.1, 0.1), areas(0.01, -0.1, -0.2))
    assert "The two measures disagree" in half and "not named was not beaten" in half
    assert "rises sooner, by area, than with another image's heatmap and random." in half
    poor = findings.trust(areas(0.01, 0.1), areas(0.1, 0.1, 0.1))
    assert (
        "it does not rise measurably sooner, by area, than with any control" in poor
        and "no heatmap is shown" in poor
    )


def test_a_loop_that_learns_nothing_is_called_wrong():
    assert "by heart" in findings.overfitting([2.3, 1.0, 0.1], 1.0)
    assert "too little" in findings.overfitting([2.3, 2.2], 0.1)
    assert "too little" in findings.overfitting([2.3, 1.0], 0.63)


def test_every_hyperparameter_has_a_meaning():
    assert set(findings.MEANINGS) == set(vars(next(iter(RECIPES.values()))))
    told = findings.recipe("fastnet-7", RECIPES["fastnet-7"])
    assert all(f"| `{name}` |" in told for name in findings.MEANINGS)


def test_the_table_of_networks_has_their_parameters():
    told = findings.networks()
    assert "| `ResNet18` | 11,173,962 | 555 million | 32, 16, 8, 4 |" in told


def test_the_lessons_are_of_this_run():
    told = findings.lessons("FastNet", 8, 0.9319, 0.49, "cat and dog")
    assert "`FastNet` classifies 93.2 %" in told and "8 epochs" in told
    assert "the temperature 0.49" in told and "confuses cat and dog" in told
    assert "confuses" not in findings.lessons("FastNet", 8, 0.9, 1.5, "")


# ---- the first look ----


def test_the_first_look_reads_a_square_of_each_class(pictures):
    images = first_look.read_pictures(pictures, CLASSES)
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
    assert (images[:, 0, 0] == 255).all()  # transparent corners are white


def test_the_first_look_counts_correct_answers(tiny_splits):
    torch.manual_seed(0)
    fig, preds, probs = first_look.look(
        build("FastNet"), tiny_splits.test.images[:10], CLASSES, 2.0
    )
    found = sum(pred == label for label, pred in enumerate(preds))
    assert len(preds) == len(probs) == 10
    assert f"names {found} of 10 pictures correctly" in fig.get_suptitle() and fig.get_label()
