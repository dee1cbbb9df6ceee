"""Switches are read, overridden, checked, and a run on the sample stays away from the project's results."""

from pathlib import Path

import pytest
import torch

import settings
from settings import PROJECT, output_folder, resolve

DEFAULTS = {
    "SEED": 42, "ARCH": "auto", "RECIPE": "", "EPOCHS": 0, "BATCH_SIZE": 0, "LOADER": "albumentations", "PRECISION": "",
    "TRAIN": "yes", "FRESH": False, "NUM_SAMPLES": 10, "OPACITY": 0.4, "DATA_DIR": "data",
    "CHECKPOINT_DIR": "checkpoints", "OUT_DIR": ".", "PUSH_TO": "", "LAUNCH": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("SMOKE_TEST", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    for name in DEFAULTS:
        monkeypatch.delenv(f"ERA_{name}", raising=False)


@pytest.mark.parametrize(("gpu", "arch"), [(True, "ResNet18"), (False, "FastNet")])
def test_auto_is_the_large_network_on_a_gpu_only(monkeypatch, gpu, arch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert resolve(DEFAULTS).recipe.network == arch


def test_0_stands_for_the_recipe_s_own_value():
    assert resolve(DEFAULTS | {"ARCH": "ResNet18"}).recipe.epochs == 20
    chosen = resolve(DEFAULTS | {"ARCH": "ResNet18", "EPOCHS": 3, "BATCH_SIZE": 64}).recipe
    assert (chosen.epochs, chosen.batch_size) == (3, 64)


def test_the_environment_overrides_the_cell_in_the_cell_s_type(monkeypatch):
    for name, text in (("SEED", "7"), ("ARCH", "ResNet18"), ("OPACITY", "0.25"), ("FRESH", "true"), ("LAUNCH", "0")):
        monkeypatch.setenv(f"ERA_{name}", text)
    s = resolve(DEFAULTS | {"LAUNCH": True})
    assert (s.seed, s.recipe.network, s.opacity, s.fresh, s.launch) == (7, "ResNet18", 0.25, True, False)
    assert "seed            7" in str(s)


def test_data_dir_may_be_set_without_the_prefix(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    assert resolve(DEFAULTS).data_dir == Path("elsewhere")
    monkeypatch.setenv("ERA_DATA_DIR", "here")
    assert resolve(DEFAULTS).data_dir == Path("here")


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
    ],
)
def test_a_switch_out_of_its_range_is_refused_by_name(switch, value, message):
    with pytest.raises(ValueError, match=message):
        resolve(DEFAULTS | {switch: value})


def test_text_where_a_number_belongs_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ERA_EPOCHS", "many")
    with pytest.raises(ValueError, match="ERA_EPOCHS: expected a value of type int, got 'many'"):
        resolve(DEFAULTS)
    monkeypatch.setenv("ERA_EPOCHS", "1")
    monkeypatch.setenv("ERA_FRESH", "perhaps")
    with pytest.raises(ValueError, match="ERA_FRESH: expected true or false"):
        resolve(DEFAULTS)


def test_a_recipe_of_another_network_is_refused():
    with pytest.raises(ValueError, match="recipe for ResNet18"):
        resolve(DEFAULTS | {"ARCH": "ResNet18", "RECIPE": "custom-10"})


def test_a_missing_switch_is_named():
    with pytest.raises(ValueError, match="expected the switches"):
        resolve({name: value for name, value in DEFAULTS.items() if name != "SEED"})


def test_smoke_mode_is_short_and_leaves_the_checkpoints_alone(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST", "1")
    assert resolve(DEFAULTS).checkpoint_dir != Path("checkpoints")
    assert resolve(DEFAULTS).recipe.epochs <= 2 and resolve(DEFAULTS | {"EPOCHS": 90}).recipe.epochs <= 2


def test_checkpoints_go_to_drive_if_it_is_mounted_and_nothing_else_is_wanted(monkeypatch, tmp_path):
    monkeypatch.delenv("SMOKE_TEST", raising=False)
    assert resolve(DEFAULTS).checkpoint_dir == Path("checkpoints")
    monkeypatch.setattr(settings, "DRIVE", tmp_path)
    assert resolve(DEFAULTS).checkpoint_dir == tmp_path / "cifar10-checkpoints"
    assert resolve(DEFAULTS | {"CHECKPOINT_DIR": "here"}).checkpoint_dir == Path("here")


def test_a_run_on_the_sample_never_writes_into_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    s = resolve(DEFAULTS)
    assert output_folder(s, is_cifar10=True).resolve() == PROJECT
    scratch = output_folder(s, is_cifar10=False).resolve()
    assert scratch.is_dir() and PROJECT not in [scratch, *scratch.parents]
    elsewhere = resolve(DEFAULTS | {"OUT_DIR": str(tmp_path / "run")})
    assert output_folder(elsewhere, is_cifar10=False) == tmp_path / "run" and (tmp_path / "run").is_dir()


def test_the_switches_are_the_documented_ones():
    assert list(DEFAULTS) == list(settings.SWITCHES) and Path(settings.PROJECT, "settings.py").exists()
