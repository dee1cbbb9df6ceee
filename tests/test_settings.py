"""Switches are read, overridden, checked, and a run on the sample stays away from the project's results."""

from pathlib import Path

import pytest
import torch

import settings
from models.lit import RECIPES
from settings import PROJECT, SWITCHES, output_folder, resolve


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("SMOKE_TEST", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in SWITCHES:
        monkeypatch.delenv(f"ERA_{name}", raising=False)


@pytest.mark.parametrize(("gpu", "arch"), [(True, "ResNet18"), (False, "FastNet")])
def test_auto_is_the_large_network_on_a_gpu_only(monkeypatch, gpu, arch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert resolve(SWITCHES).recipe.network == arch


def test_0_stands_for_the_recipe_s_own_value():
    assert resolve(SWITCHES | {"ARCH": "ResNet18"}).recipe.epochs == RECIPES["resnet18-20"].epochs
    chosen = resolve(SWITCHES | {"ARCH": "ResNet18", "EPOCHS": 3, "BATCH_SIZE": 64}).recipe
    assert (chosen.epochs, chosen.batch_size) == (3, 64)


def test_the_environment_overrides_the_cell_in_the_cell_s_type(monkeypatch):
    for name, text in (("SEED", "7"), ("ARCH", "ResNet18"), ("OPACITY", "0.25"), ("FRESH", "true"), ("LAUNCH", "0")):
        monkeypatch.setenv(f"ERA_{name}", text)
    s = resolve(SWITCHES | {"LAUNCH": True})
    assert (s.seed, s.recipe.network, s.opacity, s.fresh, s.launch) == (7, "ResNet18", 0.25, True, False)
    assert "seed            7" in str(s)


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
        ("NUM_SAMPLES", 0, "NUM_SAMPLES: expected a value from 1 to 20, got 0"),
        ("NUM_SAMPLES", 21, "NUM_SAMPLES"),
        ("OPACITY", 1.5, "OPACITY"),
        ("DEVICES", "0", "DEVICES: expected 'auto' or a number from '1' to '1000', got '0'"),
        ("DEVICES", "all", "DEVICES: .*got 'all'"),
        ("NUM_NODES", 0, "NUM_NODES: expected a value from 1 to 1000, got 0"),
        ("STRATEGY", "horovod", "STRATEGY: expected one of"),
    ],
)
def test_a_switch_out_of_its_range_is_refused_by_name(switch, value, message):
    with pytest.raises(ValueError, match=message):
        resolve(SWITCHES | {switch: value})


def test_text_where_a_number_belongs_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ERA_EPOCHS", "many")
    with pytest.raises(ValueError, match="ERA_EPOCHS: expected a value of type int, got 'many'"):
        resolve(SWITCHES)
    monkeypatch.setenv("ERA_EPOCHS", "1")
    monkeypatch.setenv("ERA_FRESH", "perhaps")
    with pytest.raises(ValueError, match="ERA_FRESH: expected true or false"):
        resolve(SWITCHES)


def test_a_recipe_of_another_network_is_refused():
    with pytest.raises(ValueError, match="recipe for ResNet18"):
        resolve(SWITCHES | {"ARCH": "ResNet18", "RECIPE": "custom-10"})


def test_a_missing_switch_is_named():
    with pytest.raises(ValueError, match="expected the switches"):
        resolve({name: value for name, value in SWITCHES.items() if name != "SEED"})


def test_smoke_mode_is_short_and_leaves_the_checkpoints_alone(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST", "1")
    assert resolve(SWITCHES).checkpoint_dir != Path("checkpoints")
    assert resolve(SWITCHES).recipe.epochs <= 2 and resolve(SWITCHES | {"EPOCHS": 90}).recipe.epochs <= 2


def test_checkpoints_go_to_drive_if_it_is_mounted_and_nothing_else_is_wanted(monkeypatch, tmp_path):
    monkeypatch.delenv("SMOKE_TEST", raising=False)
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
    assert output_folder(elsewhere, is_cifar10=False) == tmp_path / "run" and (tmp_path / "run").is_dir()


def test_the_devices_are_as_wanted_or_as_torchrun_has_started_us(monkeypatch):
    assert resolve(SWITCHES).placement == {"devices": "auto", "num_nodes": 1, "strategy": "auto"}
    wanted = SWITCHES | {"DEVICES": "4", "NUM_NODES": 2, "STRATEGY": "ddp"}
    assert resolve(wanted).placement == {"devices": 4, "num_nodes": 2, "strategy": "ddp"}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert resolve(SWITCHES).placement == {"devices": 8, "num_nodes": 3, "strategy": "auto"}
