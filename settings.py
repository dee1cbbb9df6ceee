"""The notebook's switches: environment variables over the cell's values, checked, and what follows from them."""

import functools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from machine import check_precision
from models.lit import RECIPES, Recipe, choose_recipe
from models.registry import NETWORKS

PROJECT = Path(__file__).resolve().parent
DRIVE = Path("/content/drive/MyDrive")  # Google Drive, where Colab mounts it: what is there outlives the runtime
SWITCHES = {  # as the notebook's cell has them
    "SEED": 42, "ARCH": "auto", "RECIPE": "", "EPOCHS": 0, "BATCH_SIZE": 0, "LOADER": "albumentations", "PRECISION": "",
    "DEVICES": "auto", "NUM_NODES": 1, "STRATEGY": "auto", "TRAIN": "yes", "FRESH": False, "NUM_SAMPLES": 10,
    "OPACITY": 0.4, "DATA_DIR": "data", "CHECKPOINT_DIR": "checkpoints", "OUT_DIR": ".", "PUSH_TO": "", "LAUNCH": False,
}  # fmt: skip
NUMBERS = {
    "SEED": int, "EPOCHS": int, "BATCH_SIZE": int, "NUM_NODES": int, "NUM_SAMPLES": int, "OPACITY": int | float
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What applies. recipe: with the epochs and batch size that apply. placement: devices, num_nodes and strategy, as
    Lightning's Trainer has them. smoke: tests only, two epochs of the sample."""

    seed: int
    recipe_name: str
    recipe: Recipe
    fast_loader: bool
    precision: str
    placement: dict
    train: str
    fresh: bool
    num_samples: int
    opacity: float
    data_dir: Path
    checkpoint_dir: Path
    out_dir: Path
    push_to: str
    launch: bool
    smoke: bool
    device: str

    def __str__(self) -> str:
        return "\n".join(f"{name:15s} {value}" for name, value in vars(self).items())


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="era-scratch-")


def scratch_folder() -> Path:
    """A folder that goes when Python ends, the same one each time."""
    return Path(_temporary().name)


def from_environment(name: str, value: object) -> object:
    """ERA_<name> as a value of the same type, or the value itself. ValueError if it is none of that type.

    Where the data are, other programs ask DATA_DIR; so do we, if ERA_DATA_DIR is not set.
    """
    text = os.environ.get(f"ERA_{name}", os.environ.get("DATA_DIR") if name == "DATA_DIR" else None)
    if text is None:
        return value
    if isinstance(value, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"ERA_{name}: expected true or false, got {text!r}")
        return text.lower() in ("true", "1")
    try:
        return type(value)(text)
    except ValueError as error:
        raise ValueError(f"ERA_{name}: expected a value of type {type(value).__name__}, got {text!r}") from error


def check(switches: dict) -> None:
    """Raise ValueError for the first switch that is missing, unknown or out of range."""
    if set(switches) != set(SWITCHES):
        raise ValueError(f"expected the switches {sorted(SWITCHES)}, got {sorted(switches)}")
    for name, value in switches.items():
        wanted = NUMBERS.get(name, bool if name in ("FRESH", "LAUNCH") else str)
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise ValueError(
                f"{name}: expected a value of type {getattr(wanted, '__name__', 'float')}, got {value!r:.60}"
            )
    for name, allowed in (
        ("ARCH", ["auto", *NETWORKS]), ("RECIPE", ["", *RECIPES]), ("LOADER", ["albumentations", "fast"]),
        ("STRATEGY", ["auto", "ddp", "ddp_notebook"]), ("TRAIN", ["yes", "stored"]),
    ):  # fmt: skip
        if switches[name] not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {switches[name]!r}")
    for name, low, high in (
        ("SEED", 0, 2**32 - 1),
        ("EPOCHS", 0, 10_000),
        ("BATCH_SIZE", 0, 50_000),
        ("NUM_NODES", 1, 1_000),
        ("NUM_SAMPLES", 1, 20),
        ("OPACITY", 0, 1),
    ):
        if not low <= switches[name] <= high:
            raise ValueError(f"{name}: expected a value from {low} to {high}, got {switches[name]}")
    if switches["DEVICES"] != "auto" and switches["DEVICES"] not in map(str, range(1, 1001)):
        raise ValueError(f"DEVICES: expected 'auto' or a number from '1' to '1000', got {switches['DEVICES']!r:.60}")


def resolve(switches: dict) -> Settings:
    """The settings that follow from the cell's switches (name -> value) and the environment."""
    switches = {name: from_environment(name, value) for name, value in switches.items()}
    check(switches)
    smoke = bool(os.environ.get("SMOKE_TEST"))
    arch = switches["ARCH"]
    if arch == "auto":
        arch = "ResNet18" if torch.cuda.is_available() else "FastNet"
    epochs = min(switches["EPOCHS"] or 2, 2) if smoke else switches["EPOCHS"]
    name, recipe = choose_recipe(arch, switches["RECIPE"], epochs, switches["BATCH_SIZE"])
    if switches["PRECISION"]:
        check_precision(switches["PRECISION"])
    return Settings(
        seed=switches["SEED"], recipe_name=name, recipe=recipe, fast_loader=switches["LOADER"] == "fast",
        precision=switches["PRECISION"], placement=placement(switches), train=switches["TRAIN"],
        fresh=switches["FRESH"], num_samples=switches["NUM_SAMPLES"], opacity=switches["OPACITY"],
        data_dir=Path(switches["DATA_DIR"]),
        checkpoint_dir=scratch_folder() if smoke else checkpoint_folder(switches["CHECKPOINT_DIR"]),
        out_dir=Path(switches["OUT_DIR"]), push_to=switches["PUSH_TO"], launch=switches["LAUNCH"], smoke=smoke,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip


def placement(switches: dict) -> dict:
    """On how many devices of how many machines to train, and how; torchrun knows it if it has started us."""
    devices, num_nodes = switches["DEVICES"], switches["NUM_NODES"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, num_nodes = os.environ["LOCAL_WORLD_SIZE"], int(os.environ["GROUP_WORLD_SIZE"])
    devices = devices if devices == "auto" else int(devices)
    return {"devices": devices, "num_nodes": num_nodes, "strategy": switches["STRATEGY"]}


def checkpoint_folder(wanted: str) -> Path:
    """Where checkpoints go: as wanted, or on Google Drive if nothing else is wanted and it is mounted."""
    return DRIVE / "cifar10-checkpoints" if wanted == "checkpoints" and DRIVE.is_dir() else Path(wanted)


def short(recipe: Recipe) -> Recipe:
    """The recipe for the sample: at most three epochs, which leave a few errors to look at."""
    return replace(recipe, epochs=min(recipe.epochs, 3))


def output_folder(settings: Settings, is_cifar10: bool) -> Path:
    """Where a run leaves its results. On the sample that is never the project itself, but a scratch folder."""
    if settings.out_dir.resolve() == PROJECT and not is_cifar10:
        return scratch_folder()
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    return settings.out_dir
