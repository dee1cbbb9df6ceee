"""The notebook's switches.

Environment variables over the cell's values, checked, and what follows from them.
"""

import functools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from models.errors import InvalidValue
from models.registry import NETWORKS
from training.hardware import check_precision, choose_device
from training.recipes import RECIPES, Recipe, choose_recipe
from training.run_folder import AutoChoice, chosen_before

PROJECT = Path(__file__).resolve().parent.parent
DRIVE = Path(
    "/content/drive/MyDrive"
)  # Google Drive, where Colab mounts it: what is there outlives the runtime


class Switches(BaseModel):
    """The notebook's switches, as its cell has them: type, default and what is allowed of each."""

    model_config = ConfigDict(strict=True, extra="forbid")  # strict: 1 is no boolean, "1" no number

    SEED: int = Field(42, ge=0, le=2**32 - 1)
    ARCH: str = "auto"
    RECIPE: str = ""
    EPOCHS: int = Field(0, ge=0, le=10_000)
    BATCH_SIZE: int = Field(0, ge=0, le=50_000)
    LOADER: Literal["albumentations", "fast"] = "albumentations"
    PRECISION: str = ""
    DEVICES: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,2}|1000)$")
    NUM_NODES: int = Field(1, ge=1, le=1_000)
    STRATEGY: Literal["auto", "ddp", "ddp_notebook"] = "auto"
    TRAIN: Literal["yes", "stored"] = "yes"
    FRESH: bool = False
    NUM_SAMPLES: int = Field(10, ge=1, le=20)
    OPACITY: float = Field(0.4, ge=0, le=1)
    DATA_DIR: str = "data"
    CHECKPOINT_DIR: str = "checkpoints"
    OUT_DIR: str = "."
    PUSH_TO: str = Field("", pattern=r"^([\w.-]+/[\w.-]+)?$")
    LAUNCH: bool = False

    @field_validator("ARCH", "RECIPE")
    @classmethod
    def known(cls, value: str, info: ValidationInfo) -> str:
        if value not in choices(info.field_name):
            raise ValueError  # `check` says it
        return value


def choices(name: str) -> list[str]:
    """What ARCH or RECIPE may be: its default, and what is registered, a reader's own among it."""
    return [SWITCHES[name], *{"ARCH": NETWORKS, "RECIPE": RECIPES}[name]]


SWITCHES = {name: field.default for name, field in Switches.model_fields.items()}
IN_WORDS = {
    "DEVICES": "'auto' or a number from '1' to '1000'",
    "PUSH_TO": "'' or a Space as 'user/name'",
}


@dataclass(frozen=True)
class Settings:
    """What applies. recipe: with the epochs and batch size that apply.

    placement: devices, num_nodes and strategy, as Lightning's Trainer has them. auto: given if ARCH
    = "auto" chose the recipe. smoke: tests only, two epochs of the sample.
    """

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
    auto: AutoChoice | None

    def __str__(self) -> str:
        return "\n".join(f"{name:15s} {value}" for name, value in vars(self).items())


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="era-scratch-")


def scratch_folder() -> Path:
    """A folder that goes when Python ends, the same one each time."""
    return Path(_temporary().name)


def parse_bool(name: str, text: str) -> bool:
    """Read a yes or no from an environment variable.

    True, yes, on, 1 or false, no, off, 0; nothing is no.
    """
    try:
        return TypeAdapter(bool).validate_python(text.strip() or "no")
    except ValidationError as error:
        raise InvalidValue(f"{name}: expected true or false, got {text!r:.60}") from error


def from_environment(name: str, value: object) -> object:
    """Read ERA_<name> as a value of the switch's type; without it, the value itself.

    Where the data are, other programs ask DATA_DIR; so do we, if ERA_DATA_DIR is not set.

    Raises:
        InvalidValue: The text is none of that type.
    """
    text = os.environ.get(f"ERA_{name}")
    if name == "DATA_DIR":
        text = text or os.environ.get("DATA_DIR")
    if text is None or name not in SWITCHES or (name.endswith("_DIR") and not text):
        return value
    kind = type(SWITCHES[name])
    if kind is bool:
        return parse_bool(f"ERA_{name}", text)
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidValue(f"ERA_{name}: expected {expected(name)}, got {text!r:.60}") from error


def expected(name: str) -> str:
    """What may stand in a switch, in words."""
    field = Switches.model_fields[name]
    if name in ("ARCH", "RECIPE"):
        return f"one of {choices(name)}"
    if field.annotation in (int, float):
        low, high = field.metadata
        return f"{'a whole number' if field.annotation is int else 'a number'} from {low.ge} to {high.le}"
    format_error = IN_WORDS.get(name) or {bool: "True or False", str: "text"}.get(field.annotation)
    return format_error or f"one of {list(get_args(field.annotation))}"


def check(switches: dict) -> Switches:
    """Raise InvalidValue for the first switch that is missing, unknown, of another type or out of range."""
    if set(switches) != set(SWITCHES):
        raise InvalidValue(f"expected the switches {sorted(SWITCHES)}, got {sorted(switches)}")
    try:
        return Switches(**switches)
    except ValidationError as error:
        problem = error.errors()[0]
        name = problem["loc"][0]
        raise InvalidValue(
            f"{name}: expected {expected(name)}, got {problem['input']!r:.60}"
        ) from error


def folder(name: str, text: str) -> Path:
    """The folder that a switch names: '~' is the home folder, nothing is the default."""
    try:
        return Path(text.strip() or SWITCHES[name]).expanduser()
    except RuntimeError as error:
        raise InvalidValue(f"{name}: expected a folder, got {text!r:.200}: {error}") from error


def resolve(switches: dict) -> Settings:
    """The settings that follow from the cell's switches (name -> value) and the environment."""
    switches = {name: from_environment(name, value) for name, value in switches.items()}
    chosen = check(switches)
    smoke, device = parse_bool("SMOKE_TEST", os.environ.get("SMOKE_TEST", "")), choose_device().type
    checkpoint_dir = scratch_folder() if smoke else checkpoint_folder(chosen.CHECKPOINT_DIR)
    arch, name, auto = chosen.ARCH, chosen.RECIPE, None
    if arch == "auto":
        auto = choose_automatically(chosen, checkpoint_dir, device)
        name, arch = auto.recipe_name, RECIPES[auto.recipe_name].network
    epochs = min(chosen.EPOCHS or 2, 2) if smoke else chosen.EPOCHS
    name, recipe = choose_recipe(arch, name, epochs, chosen.BATCH_SIZE)
    if chosen.PRECISION:
        check_precision(chosen.PRECISION)
    return Settings(
        seed=chosen.SEED,
        recipe_name=name,
        recipe=recipe,
        fast_loader=chosen.LOADER == "fast",
        precision=chosen.PRECISION,
        placement=placement(switches),
        train=chosen.TRAIN,
        fresh=chosen.FRESH,
        num_samples=chosen.NUM_SAMPLES,
        opacity=chosen.OPACITY,
        data_dir=folder("DATA_DIR", chosen.DATA_DIR),
        checkpoint_dir=checkpoint_dir,
        out_dir=folder("OUT_DIR", chosen.OUT_DIR),
        push_to=chosen.PUSH_TO,
        launch=chosen.LAUNCH,
        smoke=smoke,
        device=device,
        auto=auto,
    )


def choose_automatically(chosen: Switches, checkpoint_dir: Path, device: str) -> AutoChoice:
    """Choose the recipe for ARCH = "auto": ResNet18's on a GPU, FastNet's without one.

    A run that the same switches began keeps the recipe that was chosen then, on whatever machine,
    unless FRESH is set.
    """
    asked = {name: getattr(chosen, name) for name in ("ARCH", "RECIPE", "EPOCHS", "BATCH_SIZE")}
    name, _ = choose_recipe("FastNet" if device == "cpu" else "ResNet18", chosen.RECIPE)
    before = None if chosen.FRESH else chosen_before(checkpoint_dir, asked)
    if before in RECIPES and before != name:
        print(
            f'ARCH = "auto" chose {before} when this run began; with FRESH = True it would choose {name} here'
        )
        name = before
    return AutoChoice(asked, name)


def placement(switches: dict) -> dict:
    """On how many devices of how many machines to train, and how.

    Torchrun knows it if it has started us.
    """
    devices, num_nodes = switches["DEVICES"], switches["NUM_NODES"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, num_nodes = os.environ["LOCAL_WORLD_SIZE"], int(os.environ["GROUP_WORLD_SIZE"])
    devices = devices if devices == "auto" else int(devices)
    return {"devices": devices, "num_nodes": num_nodes, "strategy": switches["STRATEGY"]}


def checkpoint_folder(wanted: str) -> Path:
    """Where checkpoints go.

    As wanted, or on Google Drive if nothing else is wanted and it is mounted.
    """
    path = folder("CHECKPOINT_DIR", wanted)
    return DRIVE / "cifar10-checkpoints" if path == Path("checkpoints") and DRIVE.is_dir() else path


def short(recipe: Recipe) -> Recipe:
    """The recipe for the sample: at most three epochs, which leave a few errors to look at."""
    return replace(recipe, epochs=min(recipe.epochs, 3))


def output_folder(settings: Settings, is_cifar10: bool) -> Path:
    """Where a run leaves its results.

    On the sample that is never the project itself, but a scratch folder.
    """
    if settings.out_dir.resolve() == PROJECT and not is_cifar10:
        return scratch_folder()
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    return settings.out_dir
