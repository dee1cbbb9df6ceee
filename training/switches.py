"""The notebook's switches: their types and allowed values, read, overridden and checked."""

import os
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
from training.recipes import RECIPES


class Switches(BaseModel):
    """The switches of the notebook's cell: type, default and allowed values of each."""

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
    def is_registered(cls, value: str, info: ValidationInfo) -> str:
        """Refuse a network or a recipe that is not registered."""
        if value not in allowed_names(str(info.field_name)):
            raise ValueError  # `validate` writes the message
        return value


def allowed_names(name: str) -> list[str]:
    """List the allowed values of ARCH or RECIPE: its default and all that are registered."""
    return [SWITCHES[name], *{"ARCH": NETWORKS, "RECIPE": RECIPES}[name]]


SWITCHES = {name: field.default for name, field in Switches.model_fields.items()}

PATTERN_DESCRIPTIONS = {
    "DEVICES": "'auto' or a number from '1' to '1000'",
    "PUSH_TO": "'' or a Space as 'user/name'",
}


def parse_bool(name: str, text: str) -> bool:
    """Read a yes or no from an environment variable.

    Args:
        name: of the variable, for the message.
        text: true, yes, on, 1 or false, no, off, 0, or blank for no.

    Raises:
        InvalidValue: if the text is none of these.
    """
    try:
        return TypeAdapter(bool).validate_python(text.strip() or "no")
    except ValidationError as error:
        raise InvalidValue(f"{name}: expected true or false, got {text!r:.60}") from error


def from_environment(name: str, value: object) -> object:
    """Read ERA_<name> as a value of the switch's type.

    DATA_DIR is read where ERA_DATA_DIR is not set: it tells other programs too where the data are.

    Args:
        name: of the switch.
        value: of the notebook's cell.

    Returns:
        The environment's value, or the cell's where the variable is not set.

    Raises:
        InvalidValue: if the text cannot be read as that type.
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
        raise InvalidValue(
            f"ERA_{name}: expected {describe_allowed(name)}, got {text!r:.60}"
        ) from error


def data_folder() -> Path:
    """Return the folder of CIFAR-10 where there is no notebook: the environment's, or 'data'."""
    return parse_folder("DATA_DIR", str(from_environment("DATA_DIR", "")))


def describe_allowed(name: str) -> str:
    """Describe the allowed values of a switch, for a message."""
    field = Switches.model_fields[name]
    if name in ("ARCH", "RECIPE"):
        return f"one of {allowed_names(name)}"
    if name in PATTERN_DESCRIPTIONS:
        return PATTERN_DESCRIPTIONS[name]
    if field.annotation in (int, float):
        low, high = field.metadata
        kind = "a whole number" if field.annotation is int else "a number"
        return f"{kind} from {low.ge} to {high.le}"
    if field.annotation in (bool, str):
        return "True or False" if field.annotation is bool else "text"
    return f"one of {list(get_args(field.annotation))}"


def validate(switches: dict) -> Switches:
    """Check the type and the range of every switch.

    Args:
        switches: name -> value.

    Raises:
        InvalidValue: for the first switch that is missing, unknown, of another type or out of
            range, and for a variable ERA_... of no switch.
    """
    unknown = {name for name in os.environ if name.startswith("ERA_")}
    unknown -= {f"ERA_{name}" for name in SWITCHES}
    if unknown:
        raise InvalidValue(
            f"unknown environment variables {sorted(unknown)}, expected ERA_ and one of"
            f" {sorted(SWITCHES)}"
        )
    if set(switches) != set(SWITCHES):
        raise InvalidValue(f"expected the switches {sorted(SWITCHES)}, got {sorted(switches)}")
    try:
        return Switches(**switches)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        raise InvalidValue(
            f"{name}: expected {describe_allowed(name)}, got {problem['input']!r:.60}"
        ) from error


def parse_folder(name: str, text: str) -> Path:
    """Read the folder that a switch names.

    Args:
        name: of the switch.
        text: its value; '~' is the home folder, blank the switch's default.

    Raises:
        InvalidValue: if a home folder cannot be found.
    """
    try:
        return Path(text.strip() or SWITCHES[name]).expanduser()
    except RuntimeError as error:
        raise InvalidValue(f"{name}: expected a folder, got {text!r:.200}: {error}") from error
