"""The benchmarks measure what they say, and report what was measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import accuracy, leaderboard, reference, report, scaling, speed, trust
from models.fastnet import FastNet
from models.registry import build
from training import optimizer
from training.classifier import LitClassifier
from training.options import RunOptions
from training.recipes import RECIPES
from training.runs import build_datamodule, make_classifier
from training.switches import data_folder


@pytest.fixture
def row() -> dict:
    return {
        "network": "FastNet",
        "recipe": "fastnet-7",
        "without": None,
        "epochs": 7,
        "train_images": 50_000,
        "n": 2,
        "single": 0.93214,
        "tta": 0.94,
        "ece": 0.0085,
        "seconds": 301,
        "machine": "a machine",
        "seeds": [0, 1],
    }


@pytest.mark.numeric
def test_the_training_compute_of_fastnet_is_nine_tenths_of_the_published_petaflops(
    row, monkeypatch
):
    monkeypatch.setitem(
        report.RECIPES, "fastnet-7", report.RECIPES["fastnet-7"].__class__("FastNet", 8)
    )
    row["epochs"] = 8
    # of 50,000 images, all at full resolution: 0.283 with the outputs that no pooling reads
    assert report.petaflop(row) == pytest.approx(0.252, abs=0.001)
    monkeypatch.setitem(
        report.RECIPES,
        "fastnet-7",
        report.RECIPES["fastnet-7"].__class__("FastNet", 8, low_res=1.0),
    )
    assert report.petaflop(row) == pytest.approx(0.252 * 9 / 16, abs=0.001)


def test_the_table_shows_percent_of_the_fractions_and_the_number_of_runs(row):
    header, _, line, *_ = report.table([row]).splitlines()
    assert header == (
        "| network | parameters | epochs | training images | PFLOP"
        " | accuracy | accuracy with TTA | ECE | runs |"
    )
    assert line == "| FastNet | 1,972,792 | 7 | 50,000 | 0.18 | 93.21 % | 94.00 % | 0.85 % | 2 |"
    *_, line, _, _ = report.table([row | {"single_std": 0.00168}]).splitlines()
    assert "| 93.21 % ± 0.17 | 94.00 % |" in line


def test_a_row_of_an_earlier_recipe_says_so(row):
    earlier = row | {"earlier_recipe": True}
    assert "| FastNet (earlier recipe) |" in report.table([earlier])
    assert "(earlier recipe)" not in report.table([row])


def test_times_of_different_machines_do_not_stand_in_one_table(row):
    """An 'AMD EPYC' may be any of several CPUs.

    47 minutes for 10 epochs on one, 58 for 24 on another.
    """
    rows = [row | {"seconds": 2828}, row | {"seconds": 3483, "epochs": 24, "machine": "another"}]
    text = report.table(rows + report.unmeasured(rows))
    assert not re.search(r"\bmin\b|\d s\b|\d h\b|machine", text)


def test_a_recipe_without_a_run_is_listed_as_not_measured(row, monkeypatch):
    monkeypatch.setattr(
        report, "RECIPES", {name: RECIPES[name] for name in ("fastnet-7", "fastnet-2")}
    )
    (missing,) = report.unmeasured([row])
    line = report.table([row, missing]).splitlines()[2]  # the cheaper one comes first
    assert line == "| FastNet | 1,972,792 | 2 | 50,000 | 0.05 | not measured |  |  |  |"


def test_the_speed_is_that_of_the_slowest_and_the_fastest_step():
    steps = {"FastNet": {"fast": 0.97, "albumentations": 0.992}, "ResNet18": {"fast": 0.958}}
    found = {"step_ratio": steps, "time_to_94_ratio": 0.538, "time_to_94": {"recipe": "one"}}
    text = report.speed(found)
    assert "at 0.96 to 0.99 times the speed" in text and "`one` takes 0.54: one" in text
    found |= {"time_to_94_ratio_fp32": 0.7, "time_to_94_fp32": {"recipe": "other"}}
    assert "schedule in a plain loop, `one` takes 0.54, `other` in fp32 0.70" in (
        report.speed(found)
    )


def test_the_ablations_are_listed_with_the_largest_loss_first(row, tmp_path):
    def measured(val_single: float, without: str | None) -> dict:
        runs = [{"val_single": val_single + change} for change in (-0.001, 0.001)]
        return row | {
            "train_images": 45_000,
            "val_single": val_single,
            "runs": runs,
            "without": without,
        }

    rows = [measured(0.93, "nothing"), measured(0.925, "dirac"), measured(0.91, "muon")]
    rows.append(measured(0.99, None) | {"trick": "none of the table's business"})
    rows.append(measured(0.98, None) | {"curve": "neither is this"})
    (tmp_path / "ablations.json").write_text(json.dumps(rows))
    _, first, second, third = report.ablation_table("fastnet-7", tmp_path).splitlines()
    assert (
        "93.00 ± 0.14 %" in first and "n=2" in first
    )  # of 92.9 and 93.1: the square root of 2 x 0.1^2 / (2 - 1)
    assert (
        "Muon" in second
        and "91.00 ± 0.14 % (-2.00)" in second
        and "identity" in third
        and "(-0.50)" in third
    )
    assert set(report.ABLATIONS) == set(accuracy.WITHOUT)


def test_ablations_are_compared_with_the_same_recipe_only(row, tmp_path):
    row |= {"train_images": 45_000, "val_single": 0.9, "n": 1, "runs": [{"val_single": 0.9}]}
    now, before = {"batch_size": 500}, {"batch_size": 2000}
    rows = [row | {"without": "muon", "full_recipe": now}]
    (tmp_path / "ablations.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="benchmarks.accuracy fastnet-7 --without nothing"):
        report.ablation_table("fastnet-7", tmp_path)
    rows += [row | {"without": "nothing", "full_recipe": now}]
    rows += [row | {"without": "dirac", "full_recipe": before}]
    (tmp_path / "ablations.json").write_text(json.dumps(rows))
    _, full, *ablations = report.ablation_table("fastnet-7", tmp_path).splitlines()
    assert "90.00 %   " in full and "n=1" in full
    assert len(ablations) == 1 and "Muon" in ablations[0] and "(+0.00)" in ablations[0]


def test_a_trick_is_compared_with_what_it_was_added_to_seed_by_seed():
    """By hand: gains of 0.1 and 0.5 points, mean 0.3, standard error 0.4 / sqrt(2) / sqrt(2)."""

    def trick(name: str, to: str | None, seconds: float, kept: bool, **values: float) -> dict:
        runs = [
            {"seed": int(seed[1:]), "val_single": value, "val_tta": value, "cpu_seconds": seconds}
            for seed, value in values.items()
        ]
        return {"trick": name, "to": to, "kept": kept, "runs": runs}

    rows = [
        {"recipe": "fastnet-4", "without": "muon"},
        trick("all", None, 100, True, s0=0.9, s1=0.92, s2=0.5),
        trick("less", "all", 80, True, s1=0.925, s0=0.901, s7=0.1),
        trick("once", "less", 88, False, s1=0.92),
    ]
    assert report.tricks_table(rows).splitlines()[2:] == [
        "| less | all | +0.30 ± 0.20 | +0.30 ± 0.20 | 0.80 | 2 | kept |",
        "| once | less | -0.50 | -0.50 | 1.10 | 1 | dropped |",
    ]


def test_the_curve_names_each_training_s_time_and_accuracy_the_shortest_first():
    """By hand: half the seconds of a recipe of 0.6 is 0.3; 0.925 and 0.935 are 0.0071 apart."""

    def row(name: str, seconds: float, *values: float) -> dict:
        runs = [{"val_single": v, "val_tta": v + 0.01, "cpu_seconds": seconds} for v in values]
        return {"curve": name, "runs": runs}

    others = [{"recipe": "fastnet-7", "without": "muon"}, {"trick": "?", "runs": []}]
    rows = [row("fastnet-7", 100, 0.925, 0.935), row("4 epochs", 50, 0.91), *others]
    assert report.curve_table(rows, 0.6).splitlines()[2:] == [
        "| 4 epochs | 0.30 | 91.00 % (n = 1) | 92.00 % (n = 1) |",
        "| fastnet-7 | 0.60 | 93.00 % ± 0.71 (n = 2) | 94.00 % ± 0.71 (n = 2) |",
    ]


def test_the_plot_puts_each_run_at_its_compute_and_accuracy(row):
    (axis,) = report.plot([row]).axes
    *_, joined, lower = axis.lines
    assert joined.get_xdata() == pytest.approx([report.petaflop(row)] * 2)
    assert joined.get_ydata() == pytest.approx([0.93214, 0.94])
    assert lower.get_ydata() == pytest.approx([0.93214])
    fill = {line.get_label(): line.get_markerfacecolor() for line in axis.lines}
    assert fill["ours, no TTA"] == lower.get_markerfacecolor() == "white" != fill["ours, TTA"]
    named = [text.get_text() for text in axis.texts]
    assert axis.get_xscale() == "log" and len(named) == len(report.PUBLISHED) + 1
    assert len(axis.lines[0].get_xdata()) == len(report.PUBLISHED)
    assert named[-1].endswith(f"(n = {row['n']})")


def test_the_plot_s_title_compares_the_best_run_with_the_cheapest(row):
    alone = report.compute_title([row])
    assert alone == "With TTA, FastNet reaches 94.0 % with 0.18 PFLOP; no run of ours is better"
    longer = row | {"network": "CustomResNet", "recipe": "custom-24", "epochs": 24, "tta": 0.956}
    times = report.petaflop(longer) / report.petaflop(row)
    assert f"CustomResNet needs {times:.0f} times as much for 95.6 %" in report.compute_title(
        [longer, row]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["custom-10", "--without", "muon"], "--without is for FastNet's recipes, got custom-10"),
        (["fastnet-4", "--all-images", "--without", "muon"], "--all-images leaves none"),
        (["custom-10", "--all-images", "--images", "100"], "--all-images leaves none"),
        (["custom-10", "--all-images", "--change"], "--all-images leaves none"),
    ],
)
def test_a_trial_that_cannot_be_judged_is_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("sys.argv", ["accuracy", *arguments])
    with pytest.raises(SystemExit, match="2"):
        accuracy.parse_arguments()
    assert words in capsys.readouterr().err


def test_processes_on_cores_are_not_measured_on_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling"])
    monkeypatch.setattr(scaling, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(scaling, "measure_layout", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="processes on CPU cores, got cuda"):
        scaling.main()


def test_both_loops_of_the_step_ratio_see_the_same_images(monkeypatch, tiny_splits):
    """On a GPU, where whole batches of 512 pass at once: 97 of them, no micro-batches of 128."""
    seen = []
    monkeypatch.setattr(speed, "DEVICE", "cuda")
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "bare_seconds", lambda _, count: seen.append(count) or 1.0)
    monkeypatch.setattr(speed, "first_images", lambda _, count: seen.append(count))
    monkeypatch.setattr(speed, "our_seconds", lambda *_: 1.0)
    speed.step_ratios(RECIPES["custom-10"], tiny_splits, 50_000)
    assert seen == [97 * 512] * 2


def test_the_formula_splits_all_but_the_optimiser_and_adds_the_all_reduce():
    one = {"step": 10.0, "optimiser": 2.0}
    assert scaling.predicted_step(one, 0.5, 2) == pytest.approx(8 / 2 + 2 + 0.5)
    assert scaling.predicted_step(one, 0.0, 1) == 10


def test_the_tables_of_scaling_hold_steps_the_formula_and_the_gradients():
    layouts = {
        "one core": {"step": 10.0, "optimiser": 2.0},
        "two cores": {"step": 6.0},
        "two processes": {"step": 6.25, "all_reduce": 0.5, "megabytes": 8.0},
    }
    rates = {"Albumentations": 4000.4, "the fast loader": 20_000}
    found = {
        "networks": {"FastNet": layouts},
        "batch_sizes": {"FastNet": 2000},
        "images_per_second": rates,
        "val_acc": {"one": 0.87, "two": 0.861},
    }
    text = scaling.tables(found | {"machine": "a machine"})
    assert "| FastNet, 2,000 | 10.00 s | 6.00 s | 6.25 s | 6.50 s | +4 % |" in text
    assert (
        "| FastNet | 8.0 MB | 500 ms | 11 ms | 2000 ms |" in text
    )  # 2 * 7 / 8 * 8 MB at 1,250 MB/s
    assert "4,000 with Albumentations, 20,000 with the fast loader. Measured on a machine" in text
    assert "87.00 % in one, 86.10 % in two" in text


def test_what_was_measured_replaces_what_stood_between_the_marks_only(tmp_path):
    begin, end = report.MARKS
    (tmp_path / "page.md").write_text(f"before\n{begin}old\n{end}after\n")
    report.write_between_marks(tmp_path / "page.md", "new \\1\n")
    assert (tmp_path / "page.md").read_text() == f"before\n{begin}new \\1\n{end}after\n"


def test_a_page_without_the_marks_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks .* once in .*page.md, got 0"):
        report.write_between_marks(tmp_path / "page.md", "new")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({}, "data"), ({"DATA_DIR": ""}, "data"), ({"DATA_DIR": "~/cifar"}, Path.home() / "cifar")]
    + [({"DATA_DIR": "one", "ERA_DATA_DIR": "two"}, "two")],
)
@pytest.mark.usefixtures("plain_environment")
def test_benchmarks_read_the_images_where_the_notebook_does(monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_folder() == Path(folder)


def test_a_row_replaces_the_earlier_measurement_of_the_same_only(tmp_path, row):
    path = tmp_path / "results/accuracy.json"
    accuracy.store(path, row)
    accuracy.store(path, row | {"train_images": 45_000})
    accuracy.store(path, row | {"single": 0.5})
    assert [(r["train_images"], r["single"]) for r in json.loads(path.read_text())] == [
        (45_000, 0.93214),
        (50_000, 0.5),
    ]


def test_a_measurement_stores_the_means_of_its_runs_and_what_none_could_measure(
    tmp_path, tiny_splits, monkeypatch
):
    runs = iter(
        [{"single": 0.9, "ece": None, "seconds": 10}, {"single": 0.8, "ece": None, "seconds": 20}]
    )
    monkeypatch.setattr(accuracy, "measure", lambda *_: next(runs))
    monkeypatch.setattr(accuracy, "load_splits", lambda _: tiny_splits)
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["accuracy", "custom-24", "--all-images", "--seeds", "3", "4"])
    accuracy.main()
    (row,) = json.loads((tmp_path / "accuracy.json").read_text())
    assert row["single"] == pytest.approx(0.85) and row["seconds"] == 15 and row["ece"] is None
    assert (
        row["recipe"] == "custom-24"
        and row["train_images"] == 96
        and row["n"] == 2
        and row["seeds"] == [3, 4]
    )


@pytest.mark.parametrize(
    "trial", [["--change"], ["--change", "epochs=3"], ["--images", "9"], ["--without", "nothing"]]
)
def test_a_trial_uses_no_test_images(tmp_path, tiny_splits, monkeypatch, trial):
    names = []
    monkeypatch.setattr(accuracy, "measure", lambda name, *_: names.append(name) or {"seconds": 1})
    monkeypatch.setattr(accuracy, "load_splits", lambda _: tiny_splits)
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["accuracy", "fastnet-4", *trial])
    accuracy.main()
    assert names == [""] and not (tmp_path / "accuracy.json").exists()


@pytest.mark.numeric
def test_validation_and_test_are_measured_in_the_same_precision(tiny_splits, monkeypatch):
    """In fp32, as the Space computes."""
    recipe, seen = RECIPES["fastnet-2"], []

    class Noting(nn.Module):
        def forward(self, images):
            dtype = nn.functional.conv2d(
                images, torch.ones(10, 3, 32, 32)
            ).dtype  # half under autocast
            seen.append((len(images), dtype, torch.is_autocast_enabled("cpu")))
            return nn.functional.pad(images.mean((2, 3)), (0, 7))

    run = SimpleNamespace(model=Noting(), metadata={"seconds": 1.0})
    monkeypatch.setattr(accuracy, "train", lambda *_, **__: run)
    found = accuracy.measure("fastnet-2", recipe, tiny_splits, "nowhere", RunOptions(), fast=True)
    assert set(found) == {"seconds", "val_single", "val_tta", "temperature", "single", "tta", "ece"}
    assert {count for count, *_ in seen} == {32, 40}  # validation and test images
    assert {(dtype, autocast) for _, dtype, autocast in seen} == {(torch.float32, False)}


def test_all_images_gives_the_validation_images_back(tiny_splits):
    whole = accuracy.all_images(tiny_splits)
    assert (
        len(whole.train.labels) == 96
        and len(whole.val.labels) == 0
        and whole.test is tiny_splits.test
    )
    assert np.array_equal(whole.train.images[64:], tiny_splits.val.images)


@pytest.mark.numeric
@pytest.mark.parametrize("name", [name for name in accuracy.WITHOUT if name != "nothing"])
def test_what_is_left_out_is_left_out_of_a_training_run(name, tiny_splits, monkeypatch):
    """In what training itself calls, whatever names it calls it by."""
    ablation, full = accuracy.WITHOUT[name], RECIPES["fastnet-7"]
    changes = ablation.changes(full)
    assert changes or ablation.patch
    assert all(getattr(full, key) != value for key, value in changes.items())
    if ablation.patch:
        monkeypatch.setattr(*ablation.patch)
    recipe = replace(full, **changes)
    data = build_datamodule(recipe, tiny_splits, 0, fast=True)
    classifier = make_classifier(LitClassifier, recipe, data, seed=0)
    trainer = SimpleNamespace(estimated_stepping_batches=8, precision="32-true")
    monkeypatch.setattr(LitClassifier, "trainer", trainer)
    groups = classifier.configure_optimizers()["optimizer"].param_groups
    model = classifier.model
    torch.manual_seed(0)
    random_stem = nn.Conv2d(3, 24, 2).weight  # what make_classifier draws first
    x = torch.rand(1, 24, 5, 5)
    left_out = {
        "whitening": torch.equal(model.stem.weight, random_stem),
        "dirac": not torch.allclose(model.group1[0](x)[:, :24], x[..., :4, :4], atol=1e-5),
        "fast_biases": groups[1]["initial_lr"] < 2,
        "muon": not any(group["muon"] for group in groups),
        "low_res": recipe.low_res == 0,
    }
    assert [key for key, is_out in left_out.items() if is_out] == [name]


@pytest.mark.numeric
def test_the_reference_mirrors_in_turn_and_shifts_by_up_to_two_pixels():
    torch.manual_seed(0)
    images = torch.arange(32.0).expand(300, 3, 32, 32).contiguous()  # each pixel carries its column
    flip = torch.arange(300) % 2 == 0
    for epoch in (0, 1):
        found = reference.augmented_epoch(images, epoch, flip)
        falling = found[:, 0, 16, 10] > found[:, 0, 16, 20]
        assert torch.equal(falling, flip ^ (epoch == 1))
        straight = found[~falling][:, 0, 16, 16]
        assert set((straight - 16).tolist()) == {-2, -1, 0, 1, 2}


@pytest.mark.numeric
def test_the_reference_trains_the_same_network_by_the_published_schedule(monkeypatch):
    monkeypatch.setattr(reference, "BATCH_SIZE", 16)
    images = torch.rand(64, 3, 32, 32)
    plain = reference.Reference(images, torch.arange(64) % 10, 0, "32-true")
    assert type(plain.net) is FastNet and plain.steps == 4
    assert plain.optimizer.dtype == torch.float32 and not plain.bf16
    assert all(m.momentum == 0.4 for m in plain.net.modules() if isinstance(m, nn.BatchNorm2d))
    fast = plain.optimizer.param_groups[1]["params"]
    assert {id(p) for p in fast} == {
        id(p) for n, p in plain.net.named_parameters() if n.endswith("bias") and n != "stem.bias"
    }
    for _ in range(reference.EPOCHS):
        plain.epoch()
    rates = [group["lr"] / group["peak"] for group in plain.optimizer.param_groups]
    assert rates == pytest.approx(
        [1 / 32, 1 / 32, 1 / 32, 0]
    )  # of the last step; the stem's bias learns for 3 epochs
    assert set(plain.accuracies(images, torch.arange(64) % 10)) == {"single", "tta"}


@pytest.mark.numeric
def test_the_reference_computes_what_fastnet_does_with_whole_convolutions():
    torch.manual_seed(0)
    ours = FastNet().eval()
    torch.manual_seed(0)
    theirs, images = reference.published_network().eval(), torch.rand(2, 3, 32, 32)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    sizes = [net.group2[0](torch.rand(1, 64, 15, 15)).shape[-1] for net in (ours, theirs)]
    assert sizes == [14, 15]


@pytest.mark.parametrize(("precision", "name"), [("32-true", "_fp32"), ("bf16-mixed", "")])
def test_both_sides_of_the_time_to_94_compute_in_the_same_precision(
    precision, name, tiny_splits, monkeypatch, capsys
):
    asked = []

    class Published:
        def __init__(self, images, precision):
            asked.append(precision)

        def ask(self, command):
            return {"seconds": 10.0} if command == "epoch" else {"single": 0.9, "tta": 0.91}

    def trained(recipe, data, root, options):
        asked.append(options.precision)
        return SimpleNamespace(model=None, metadata={"seconds": 40.0})

    monkeypatch.setattr(speed, "ReferenceProcess", Published)
    monkeypatch.setattr(speed, "train", trained)
    monkeypatch.setattr(speed, "predict", lambda *_: (torch.eye(10), torch.arange(10)))
    found = speed.measure_to94(tiny_splits, 64, precision, "fastnet-2")
    assert asked == [precision, precision]
    assert found[f"time_to_94_ratio{name}"] == 0.5  # of 8 epochs of 10 s
    assert set(found) == {f"time_to_94_ratio{name}", f"time_to_94{name}"}
    said = capsys.readouterr().out
    assert f"fastnet-2: 0.500 of the published schedule's time in {precision}" in said
    assert found[f"time_to_94{name}"]["recipe"] == "fastnet-2"


def test_the_time_to_94_is_not_compared_across_devices(tiny_splits, monkeypatch):
    monkeypatch.setattr(speed, "DEVICE", "cuda")
    monkeypatch.setattr(speed, "ReferenceProcess", lambda *_: pytest.fail("it was started"))
    with pytest.raises(ValueError, match="runs on a CPU only, FastNet here on cuda"):
        speed.measure_to94(tiny_splits, 64, "16-mixed", "fastnet-2")


def test_the_parts_of_speed_json_are_kept_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(speed, "hardware", lambda: "a machine")
    speed.keep({"time_to_94_ratio": 0.5}, "to94", 0)
    speed.keep({"time_to_94_ratio_fp32": 0.7}, "to94_fp32", 0)
    speed.keep({"time_to_94_ratio_fp32": 0.1}, "to94_fp32", 100)  # a trial
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (found["time_to_94_ratio"], found["time_to_94_ratio_fp32"]) == (0.5, 0.7)
    assert found["machine"] == {"to94": "a machine", "to94_fp32": "a machine"}


def test_the_bare_loop_takes_as_many_steps_as_ours(monkeypatch):
    calls = {"step": 0, "forward": 0}
    monkeypatch.setattr(speed, "choose_precision", lambda: "32-true")  # not measured anew
    monkeypatch.setattr(
        optimizer.MuonWithSGD, "step", lambda self: calls.update(step=calls["step"] + 1)
    )
    network = build("FastNet")
    recipe = RECIPES["fastnet-7"].__class__(
        "FastNet", batch_size=8, micro_batch=4, muon_lr=0.1, bias_lr=0.1
    )
    monkeypatch.setattr(type(network), "forward", counted(type(network).forward, calls))
    assert speed.bare_seconds(recipe, 32) > 0
    assert calls == {"step": 1 + 4, "forward": 2 + 8}  # one batch to warm up


def counted(function, calls):
    def wrapper(*args):
        calls["forward"] += 1
        return function(*args)

    return wrapper


# ---- leaderboard ----


STEP = {"recipe": "fastnet-7", "time": 0.538, "precision": "bf16-mixed", "machine": "a CPU"}
STEP |= {"changed": "all", "tta": 0.9411, "tta_std": 0.00129, "n": 3}
STEP |= {"date": "2026-11-21", "commit": "344ba5d"}


def test_the_page_of_the_results_is_that_of_the_files():
    files = (
        json.loads((report.RESULTS / f"{name}.json").read_text())
        for name in ("accuracy", "leaderboard", "ablations", "space")
    )
    page = (report.PROJECT / "docs/results.md").read_text(encoding="utf-8")
    assert report.MARKS[0] + report.results_block(*files) + report.MARKS[1] in page


def test_the_app_under_load_is_described_with_its_medians_and_failures():
    times = {"1": {"p50": 40.6}, "5": {"p50": 99}, "20": {"p50": 441.2}}
    found = {"explain_ms": times, "machine": "a CPU", "requests": 500, "failed": 1, "wrong": 2}
    text = report.app_under_load(found)
    assert "takes 41 ms (median), with 20 visitors at once 441 ms, on a CPU" in text
    assert "Of 500 mixed requests" in text and "1 failed, and 2 had another answer" in text


def test_the_leaderboard_begins_with_the_plain_schedule_and_ends_with_what_was_measured():
    first, *_, last = json.loads(leaderboard.FILE.read_text())
    assert first["time"] == 1 and last["recipe"] in RECIPES
    measured = leaderboard.measured_row(last["changed"], last["recipe"], last["precision"])
    assert {**last, **measured} == last


def test_a_row_of_the_leaderboard_shows_mean_deviation_and_number():
    keys = ("time", "precision", "machine", "changed", "date", "commit")
    unmeasured = {key: STEP[key] for key in keys}
    _, _, first, second = leaderboard.table([STEP, unmeasured]).splitlines()
    assert "| 0 | 0.54 | bf16-mixed | a CPU | 94.11 % ± 0.13 (n = 3) | all |" in first
    assert "| 1 | 0.54 | bf16-mixed | a CPU | not measured | all |" in second
    assert second.endswith("| 2026-11-21 | `344ba5d` |")


@pytest.mark.parametrize(("tta", "verdict"), [(0.942, "agrees with"), (0.93, "is 8.6 standard")])
def test_a_training_is_compared_with_the_row_of_its_recipe(tta, verdict):
    text = leaderboard.compare(STEP, "fastnet-7", 0.5, "32-true", tta)
    assert f"which {verdict}" in text and "fastnet-7: 0.500 of the published" in text
    other = leaderboard.compare(STEP, "fastnet-4", 0.3, "32-true", tta)
    assert "fastnet-4: 0.300" in other and "(leaderboard, fastnet-7: 0.538" in other
    assert "which" not in other


def test_a_row_is_made_of_what_was_measured_only(tmp_path, row):
    runs = [{"tta": 0.939}, {"tta": 0.941}]
    (tmp_path / "accuracy.json").write_text(json.dumps([row | {"runs": runs}]))
    speeds = {"time_to_94_ratio_fp32": 0.7, "time_to_94_fp32": {"recipe": "fastnet-7"}}
    speeds["machine"] = {"to94_fp32": "a CPU", "to94": "another"}
    (tmp_path / "speed.json").write_text(json.dumps(speeds))
    made = leaderboard.measured_row("less work", "fastnet-7", "32-true", tmp_path)
    assert (made["time"], made["precision"], made["n"]) == (0.7, "32-true", 2)
    assert made["machine"] == "a CPU"
    assert made["tta_std"] == pytest.approx(0.001 * 2**0.5)
    for recipe, precision in (("fastnet-4", "32-true"), ("fastnet-7", "bf16-mixed")):
        told = f"measured time in {precision} by `benchmarks.speed to94` of {recipe}"
        with pytest.raises(ValueError, match=told):
            leaderboard.measured_row("", recipe, precision, tmp_path)
    both = speeds | {"time_to_94_ratio": 0.6, "time_to_94": {"recipe": "fastnet-7"}}
    (tmp_path / "speed.json").write_text(json.dumps(both))
    for precision, ratio in {"bf16-mixed": 0.6, "32-true": 0.7}.items():
        assert leaderboard.measured_row("", "fastnet-7", precision, tmp_path)["time"] == ratio
    (tmp_path / "accuracy.json").write_text("[]")
    with pytest.raises(ValueError, match="measured accuracy on 50,000 images of fastnet-7"):
        leaderboard.measured_row("", "fastnet-7", "32-true", tmp_path)


@pytest.mark.numeric
def test_what_trust_measures_comes_back_from_its_file(tiny_splits, tmp_path):
    found = trust.measure(build("FastNet"), tiny_splits.test, heatmaps=3, corrupted=10)
    (tmp_path / "trust.json").write_text(json.dumps(found | {"images": 3}))
    stored = trust.read(tmp_path / "trust.json")
    assert stored["cascade"].correlation.shape == (6, 3) and stored["images"] == 3
    for name, index in (("deletion", "masked"), ("insertion", "shown")):
        assert stored[name].index.names == [index, "image"] and len(stored[name]) == 17 * 3
    for name in ("robustness", "predictions"):
        assert stored[name].to_dict("list") == found[name] and len(stored[name]) == 4
