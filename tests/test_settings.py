"""Switches are read, overridden and checked, and the sample never overwrites the results."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import registry
from models.errors import ProjectError
from training import budget, hardware, recipes, runs, settings, workload
from training.recipes import RECIPES, Recipe
from training.settings import PROJECT, SWITCHES, output_folder, resolve
from training.workload import batches_of_work

pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture(autouse=True)
def pace(monkeypatch) -> dict[str, float]:
    """A CPU of known speed: network -> seconds of a batch. It needs 10 minutes for fastnet-7."""
    known = {"FastNet": 600 / batches_of_work(RECIPES["fastnet-7"])}
    monkeypatch.setattr(budget, "seconds_per_batch", lambda recipe, _: known[recipe.network])
    return known


@pytest.mark.parametrize(("gpu", "arch"), [(True, "ResNet18"), (False, "FastNet")])
def test_auto_is_the_large_network_on_a_gpu_only(monkeypatch, gpu, arch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert resolve(SWITCHES).recipe.network == arch


@pytest.mark.parametrize(
    "switch", [{}, {"ARCH": "FastNet"}, {"RECIPE": "custom-10"}, {"EPOCHS": 3}]
)
def test_where_a_network_is_stored_its_recipe_is_shown_whatever_else_is_asked_for(pace, switch):
    pace.clear()  # nothing is timed
    stored = json.loads((PROJECT / "results.json").read_text())
    s = resolve(SWITCHES | {"TRAIN": "stored"} | switch)
    found = (s.recipe.network, s.recipe_name, s.recipe.epochs)
    assert found == (stored["arch"], stored["recipe"], stored["epochs"])


def test_a_stored_network_s_recipe_has_the_batch_size_that_it_was_trained_with(monkeypatch):
    training = {"recipe": "resnet18-20", "epochs": 20, "batch_size": 1000}
    meta = {"architecture": "ResNet18", "training": training}
    monkeypatch.setattr(settings, "read_bundle", lambda _: (meta, {}))
    assert resolve(SWITCHES | {"TRAIN": "stored"}).recipe.batch_size == 1000


def test_a_precision_that_is_not_there_is_refused_before_anything_is_timed(pace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pace.clear()
    with pytest.raises(ValueError, match="has .32-true, bf16-mixed., got '16-mixed'"):
        resolve(SWITCHES | {"PRECISION": "16-mixed"})


@pytest.mark.parametrize("name", ["custom-10", "resnet18-20"])
def test_a_recipe_that_is_named_brings_its_network_with_auto(name):
    s = resolve(SWITCHES | {"RECIPE": name})
    assert (s.recipe_name, s.recipe.network) == (name, RECIPES[name].network)


def test_0_stands_for_the_recipe_s_own_value():
    assert resolve(SWITCHES | {"ARCH": "ResNet18"}).recipe.epochs == RECIPES["resnet18-20"].epochs
    chosen = resolve(SWITCHES | {"ARCH": "ResNet18", "EPOCHS": 3, "BATCH_SIZE": 64}).recipe
    assert (chosen.epochs, chosen.batch_size) == (3, 64)


def test_the_environment_overrides_the_cell_in_the_cell_s_type(monkeypatch):
    for name, text in (
        ("SEED", "7"),
        ("ARCH", "ResNet18"),
        ("OPACITY", "0.25"),
        ("FRESH", "true"),
        ("LAUNCH", "0"),
    ):
        monkeypatch.setenv(f"ERA_{name}", text)
    s = resolve(SWITCHES | {"LAUNCH": True})
    assert (s.seed, s.recipe.network, s.opacity, s.options.fresh, s.launch) == (
        7,
        "ResNet18",
        0.25,
        True,
        False,
    )


def test_data_dir_may_be_set_without_the_prefix(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    assert resolve(SWITCHES).data_dir == Path("elsewhere")
    monkeypatch.setenv("ERA_DATA_DIR", "here")
    assert resolve(SWITCHES).data_dir == Path("here")


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("ARCH", "VGG", "ARCH: expected one of .*got 'VGG'"),
        ("TRAIN", "no", "TRAIN"),
        ("RECIPE", "secret", "RECIPE"),
        ("EPOCHS", -1, "EPOCHS: .*got -1"),
        ("BATCH_SIZE", -5, "BATCH_SIZE"),
        ("NUM_SAMPLES", 0, "NUM_SAMPLES: expected a whole number from 1 to 20, got 0"),
        ("NUM_SAMPLES", 21, "NUM_SAMPLES"),
        ("OPACITY", 1.5, "OPACITY"),
        ("DEVICES", "0", "DEVICES: expected 'auto' or a number from '1' to '1000', got '0'"),
        ("DEVICES", "all", "DEVICES: .*got 'all'"),
        ("NUM_NODES", 0, "NUM_NODES: expected a whole number from 1 to 1000, got 0"),
        ("STRATEGY", "horovod", "STRATEGY: expected one of"),
        ("SEED", True, "SEED: expected a whole number from 0 to 4294967295, got True"),
        ("SEED", 1.0, "SEED: expected a whole number .*got 1.0"),
        ("EPOCHS", "3", "EPOCHS: expected a whole number .*got '3'"),
        ("FRESH", 1, "FRESH: expected True or False, got 1"),
        ("LAUNCH", "yes", "LAUNCH: expected True or False, got 'yes'"),
        ("OPACITY", math.nan, "OPACITY: expected a number from 0 to 1, got nan"),
        ("OPACITY", True, "OPACITY: expected a number from 0 to 1, got True"),
        ("ARCH", None, "ARCH: expected one of .*got None"),
        ("DATA_DIR", 3, "DATA_DIR: expected text, got 3"),
        ("PUSH_TO", "my-space", "PUSH_TO: expected '' or a Space as 'user/name', got 'my-space'"),
    ],
)
def test_a_switch_out_of_its_range_is_refused_by_name(switch, value, message):
    with pytest.raises(ValueError, match=message):
        resolve(SWITCHES | {switch: value})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("EPOCHS", "many", "ERA_EPOCHS: expected a whole number from 0 to 10000, got 'many'"),
        ("SEED", "1.0", "ERA_SEED: expected a whole number .*got '1.0'"),
        ("SEED", "", "ERA_SEED: expected a whole number .*got ''"),
        ("OPACITY", "half", "ERA_OPACITY: expected a number from 0 to 1, got 'half'"),
        ("OPACITY", "nan", "OPACITY: expected a number from 0 to 1, got nan"),
        ("FRESH", "perhaps", "ERA_FRESH: expected true or false, got 'perhaps'"),
        ("EPOCH", "3", r"unknown environment variables \['ERA_EPOCH'\], expected ERA_ and one of"),
    ],
)
def test_text_of_another_kind_is_refused_by_name(monkeypatch, name, text, message):
    monkeypatch.setenv(f"ERA_{name}", text)
    with pytest.raises(ProjectError, match=message):
        resolve(SWITCHES)


@pytest.mark.parametrize("text", ["1", "true", "True", "YES", "on", " y "])
def test_yes_has_one_meaning_everywhere(monkeypatch, text):
    for name in ("ERA_LAUNCH", "ERA_FRESH", "SMOKE_TEST"):
        monkeypatch.setenv(name, text)
    s = resolve(SWITCHES)
    assert (s.launch, s.options.fresh, s.smoke) == (True, True, True)


@pytest.mark.parametrize("text", ["0", "false", "False", "NO", "off", "", " "])
def test_no_has_one_meaning_everywhere(monkeypatch, text):
    for name in ("ERA_LAUNCH", "ERA_FRESH", "SMOKE_TEST"):
        monkeypatch.setenv(name, text)
    s = resolve(SWITCHES | {"LAUNCH": True, "FRESH": True})
    assert (s.launch, s.options.fresh, s.smoke) == (False, False, False)


def test_a_smoke_test_trains_in_one_process(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProjectError, match="SMOKE_TEST is for one process, got 2"):
        resolve(SWITCHES)
    monkeypatch.delenv("WORLD_SIZE")
    assert resolve(SWITCHES).options.devices == 1  # also where there are several GPUs
    assert resolve(SWITCHES | {"DEVICES": "2"}).options.devices == 2  # but what is asked is tried


def test_a_smoke_test_is_not_guessed(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST", "maybe")
    with pytest.raises(ProjectError, match="SMOKE_TEST: expected true or false, got 'maybe'"):
        resolve(SWITCHES)


def test_a_whole_number_in_the_cell_takes_a_fraction_from_the_environment(monkeypatch):
    assert resolve(SWITCHES | {"OPACITY": 1}).opacity == 1
    monkeypatch.setenv("ERA_OPACITY", "0.5")
    assert resolve(SWITCHES | {"OPACITY": 1}).opacity == 0.5


@pytest.mark.parametrize("name", ["DATA_DIR", "CHECKPOINT_DIR", "OUT_DIR"])
def test_a_folder_may_begin_at_home_and_nothing_is_the_default(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    field = name.lower()
    assert getattr(resolve(SWITCHES | {name: "~/here"}), field) == tmp_path / "here"
    assert getattr(resolve(SWITCHES | {name: ""}), field) == Path(SWITCHES[name])
    monkeypatch.setenv(f"ERA_{name}", "~/there")
    assert getattr(resolve(SWITCHES), field) == tmp_path / "there"
    monkeypatch.setenv(f"ERA_{name}", "")
    assert getattr(resolve(SWITCHES), field) == Path(SWITCHES[name])
    monkeypatch.setenv(f"ERA_{name}", "~nobody-of-this-name/there")
    with pytest.raises(ProjectError, match=f"{name}: expected a folder, got '~nobody"):
        resolve(SWITCHES)


def test_an_empty_data_dir_is_none(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "")
    assert resolve(SWITCHES).data_dir == Path("data")
    monkeypatch.setenv("DATA_DIR", "~/data")
    assert resolve(SWITCHES).data_dir == Path.home() / "data"


def test_the_device_is_the_one_that_trains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for right, device, arch in ((True, "mps", "ResNet18"), (False, "cpu", "FastNet")):
        monkeypatch.setattr(hardware, "mps_trains_correctly", lambda right=right: right)
        s = resolve(SWITCHES)
        assert (s.device, s.recipe.network) == (device, arch)


def test_a_network_of_the_reader_s_own_may_be_chosen(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "Deeper", registry.NETWORKS["ResNet18"])
    monkeypatch.setitem(RECIPES, "deeper-1", Recipe("Deeper"))
    assert resolve(SWITCHES | {"ARCH": "Deeper", "RECIPE": "deeper-1"}).recipe.network == "Deeper"


def test_a_recipe_of_another_network_is_refused():
    with pytest.raises(ValueError, match="recipe for ResNet18"):
        resolve(SWITCHES | {"ARCH": "ResNet18", "RECIPE": "custom-10"})


def test_a_missing_switch_is_named():
    with pytest.raises(ValueError, match="expected the switches"):
        resolve({name: value for name, value in SWITCHES.items() if name != "SEED"})


def test_the_loader_and_the_precision_are_the_chosen_ones(monkeypatch):
    assert not resolve(SWITCHES).fast_loader and resolve(SWITCHES).options.precision == "auto"
    chosen = resolve(SWITCHES | {"LOADER": "fast", "PRECISION": "32-true"})
    assert chosen.fast_loader and chosen.options.precision == "32-true"
    with pytest.raises(ValueError, match="16-mixed"):
        resolve(SWITCHES | {"PRECISION": "16-mixed"})  # of a GPU


def test_smoke_mode_is_short_and_leaves_the_checkpoints_alone(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST", "1")
    assert resolve(SWITCHES).checkpoint_dir != Path("checkpoints")
    assert (
        resolve(SWITCHES).recipe.epochs <= 2
        and resolve(SWITCHES | {"EPOCHS": 90}).recipe.epochs <= 2
    )


def test_checkpoints_go_to_drive_if_it_is_mounted_and_nothing_else_is_wanted(monkeypatch, tmp_path):
    assert resolve(SWITCHES).checkpoint_dir == Path("checkpoints")
    monkeypatch.setattr(settings, "DRIVE", tmp_path)
    assert resolve(SWITCHES).checkpoint_dir == tmp_path / "cifar10-checkpoints"
    assert resolve(SWITCHES | {"CHECKPOINT_DIR": "here"}).checkpoint_dir == Path("here")


def test_a_run_on_the_sample_never_writes_into_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    s = resolve(SWITCHES)
    assert output_folder(s, is_cifar10=True).resolve() == PROJECT
    scratch = output_folder(s, is_cifar10=False).resolve()
    assert scratch.is_dir() and PROJECT not in [scratch, *scratch.parents]
    elsewhere = resolve(SWITCHES | {"OUT_DIR": str(tmp_path / "run")})
    assert (
        output_folder(elsewhere, is_cifar10=False) == tmp_path / "run"
        and (tmp_path / "run").is_dir()
    )


def placed(cell: dict) -> dict:
    options = resolve(cell).options
    return {name: getattr(options, name) for name in ("devices", "num_nodes", "strategy")}


def test_the_devices_are_as_wanted_or_as_torchrun_has_started_us(monkeypatch):
    assert placed(SWITCHES) == {"devices": "auto", "num_nodes": 1, "strategy": "auto"}
    wanted = SWITCHES | {"DEVICES": "4", "NUM_NODES": 2, "STRATEGY": "ddp"}
    assert placed(wanted) == {"devices": 4, "num_nodes": 2, "strategy": "ddp"}
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_WORLD_SIZE": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert placed(SWITCHES) == {"devices": 8, "num_nodes": 3, "strategy": "auto"}


# ---- what auto chose before ----------------------------------------------------------------------


def test_auto_keeps_what_it_chose_when_the_run_began_on_another_machine(
    monkeypatch, tmp_path, tiny_splits, capsys, pace
):
    cell = SWITCHES | {"CHECKPOINT_DIR": str(tmp_path)}
    monkeypatch.setattr(settings, "choose_device", lambda: torch.device("cpu"))
    s = resolve(cell)
    assert (s.recipe.network, s.options.auto.recipe_name) == ("FastNet", "fastnet-9")
    data = runs.build_datamodule(s.recipe, tiny_splits, s.seed)
    monkeypatch.setattr(runs, "fit", lambda *_, **__: None)
    runs.train(s.recipe, data, s.checkpoint_dir, s.options)
    pace["FastNet"] *= 2  # now it is busy
    assert resolve(cell).recipe_name == "fastnet-4"  # as long as no epoch is finished
    (folder,) = tmp_path.glob("auto-*")
    (folder / "epoch000.ckpt").touch()
    assert resolve(cell).recipe_name == "fastnet-9"
    assert resolve(cell | {"FRESH": True}).recipe_name == "fastnet-4"
    monkeypatch.setattr(settings, "choose_device", lambda: torch.device("cuda"))
    capsys.readouterr()
    assert resolve(cell).recipe.network == "FastNet"
    said = 'ARCH = "auto" chose fastnet-9 when this run began; FRESH = True chooses anew\n'
    assert capsys.readouterr().out == said
    assert resolve(cell | {"FRESH": True}).recipe.network == "ResNet18"  # as it was told
    assert resolve(cell | {"EPOCHS": 3}).recipe.network == "ResNet18"  # asked for something else
    assert resolve(cell | {"ARCH": "ResNet18"}).options.auto is None


# ---- what a CPU can afford -----------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, monkeypatch) -> Callable[..., None]:
    """Return a function that replaces the measured validation accuracies: recipe -> fraction."""
    path = tmp_path / "accuracy.json"
    monkeypatch.setattr(recipes, "MEASURED", path)

    def write(**accuracies: float) -> None:
        rows = [
            {"recipe": name.replace("_", "-"), "val_single": accuracy}
            for name, accuracy in accuracies.items()
        ]
        rows = [row | {"network": RECIPES[row["recipe"]].network} for row in rows]
        path.write_text(json.dumps(rows))

    return write


@pytest.mark.parametrize(
    ("minutes", "name"),
    [(11, "fastnet-9"), (14, "fastnet-7"), (16, "fastnet-4"), (33, "fastnet-2"), (99, "fastnet-2")],
)
def test_auto_takes_the_best_that_trains_in_a_quarter_of_an_hour(pace, minutes, name, capsys):
    pace["FastNet"] = 60 * minutes / batches_of_work(RECIPES["fastnet-7"])
    assert resolve(SWITCHES).recipe_name == name
    first, *more = capsys.readouterr().out.splitlines()
    why = "the best measured" if minutes < 99 else "nothing that was measured trains"
    assert re.fullmatch(
        rf'ARCH = "auto" chose {name} \(\d\d\.\d%, about \d+ min\): {why} .* 15 minutes .*',
        first,
    )
    assert more[0].startswith("More accurate, and slower: ")


def test_auto_goes_by_validation_accuracy_and_says_how_to_ask_for_more(measured, pace, capsys):
    accuracies = {"fastnet_7": 0.91, "fastnet_4": 0.92, "fastnet_2": 0.99, "custom_10": 0.995}
    measured(resnet18_20=0.999, **accuracies)
    pace["FastNet"] = 60 * 40 / batches_of_work(RECIPES["fastnet-7"])
    assert budget.choose_affordable("32-true") == "fastnet-2"
    said = capsys.readouterr().out
    assert "More accurate, and slower: custom-10 (99.5%, about 3 h" in said
    assert ", resnet18-20 (99.9%, " in said
    assert 'set ARCH = "CustomResNet", RECIPE = "custom-10"' in said  # the next better one
    assert "fastnet-7" not in said  # slower, and worse


def test_a_larger_network_is_timed_only_where_it_may_be_affordable(measured, pace):
    measured(fastnet_2=0.86, custom_10=0.94)
    offers = budget.list_offers("32-true")  # CustomResNet's pace is not even asked for
    assert [offer.name for offer in offers] == ["custom-10", "fastnet-2"]
    pace["FastNet"] /= 4
    pace["CustomResNet"] = 600 / batches_of_work(RECIPES["custom-10"])
    assert budget.list_offers("32-true") == [budget.Offer("custom-10", 0.94, 600)]


def test_on_the_sample_a_training_is_short():
    short = settings.shorten_for_sample(RECIPES["resnet18-20"])
    assert short == replace(RECIPES["resnet18-20"], epochs=3)
    assert settings.shorten_for_sample(RECIPES["fastnet-2"]) == RECIPES["fastnet-2"]


@pytest.mark.usefixtures("measured")  # of which nothing is written
def test_without_measurements_auto_takes_fastnet():
    assert budget.choose_affordable("32-true") == "fastnet-7"


@pytest.mark.parametrize(
    ("name", "value"),
    [("SMOKE_TEST", "1"), ("ERA_EPOCHS", "3"), ("ERA_RECIPE", "fastnet-4")]
    + [("ERA_DEVICES", "2"), ("ERA_NUM_NODES", "2")],
)
def test_nothing_is_timed_where_nothing_is_to_be_chosen_or_several_would_choose(
    monkeypatch, pace, name, value
):
    monkeypatch.setenv(name, value)
    pace.clear()
    assert resolve(SWITCHES).recipe.network == "FastNet"


@pytest.mark.numeric
def test_a_batch_s_time_is_measured_on_the_network_and_moves_no_random_number(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(workload, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    recipe, state = (
        Recipe("FastNet", batch_size=8, micro_batch=2, muon_lr=0.1),
        torch.get_rng_state(),
    )
    # Each look at the clock is a second after the last: 4 micro-batches, and the optimiser's step.
    assert workload.seconds_per_batch(recipe, "32-true") == 4 + 1
    assert torch.equal(torch.get_rng_state(), state)
