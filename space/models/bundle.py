"""The bundle that travels to the Space: a network's weights, description, sources and pictures.

model.json describes the network and holds a checksum of every other file; model.safetensors holds
the weights in fp16; models/ holds the sources, byte for byte. Nothing is unpickled. Checksums find
what was changed, lost or mixed up; they cannot stop a person who changes them as well, and this
file runs before it can compare its own.
"""

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn, no_grad, zeros

from models.errors import InvalidValue

WEIGHTS = "model.safetensors"
PICTURES = {"confusion_matrix.png", "misclassified.json", "misclassified.png"}
SOURCES = {
    "models/__init__.py",
    "models/bundle.py",
    "models/explain.py",
}  # and what the network needs
LFS_POINTER = b"version https://git-lfs.github.com/spec"
READY = (
    ".ready"  # in the folder of a Space: a whole new bundle whose files are being moved into place
)
SCRATCH = ".export-"  # a bundle that is not yet whole
HOUR = 3600
RENAMED = {"unsure_below": "confidence_threshold"}  # keys of model.json in earlier versions

# ---- model.json ----------------------------------------------------------------------------------


def check_different(names: list[str]) -> list[str]:
    """Return the names; ValueError if two are equal."""
    if len(set(names)) < len(names):
        raise ValueError("expected different names")
    return names


def check_file_names(sums: dict[str, str]) -> dict[str, str]:
    """Return the checksums.

    ValueError unless they are of the pictures and of sources in models/.
    """
    if missing := (PICTURES | SOURCES) - set(sums):
        raise ValueError(f"expected a checksum of {', '.join(sorted(missing))}")
    for name in set(sums) - PICTURES:
        if not re.fullmatch(r"models/[^\W\d]\w*\.py", name):
            raise ValueError(f"expected pictures and models/*.py, got {name!r}")
    return sums


Fraction = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e12)]
Colour = Annotated[list[Fraction], Field(min_length=3, max_length=3)]
Deviation = Annotated[
    list[Annotated[float, Field(ge=1e-3, le=1)]], Field(min_length=3, max_length=3)
]


class Form(BaseModel):
    """No key more or less, and no value that only resembles the right one.

    Not true for 1, not '1'.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StageForm(Form):
    name: str
    size: int


class TrainingForm(Form):
    """The facts that the app shows; a training may write more of them."""

    model_config = ConfigDict(extra="allow")
    epochs: Amount
    train_images: Amount
    seconds: Amount
    data: str
    hardware: str
    seed: int


class ChecksumsForm(Form):
    """SHA-256: of the weights, of all other keys of model.json together, and of each other file."""

    weights: str
    keys: str
    files: Annotated[dict[str, str], AfterValidator(check_file_names)]


class DescriptionForm(Form):
    """model.json."""

    architecture: str
    source: Annotated[str, Field(pattern=r"^[^\W\d]\w*\.py$")]
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(check_different)]
    mean: Colour
    std: Deviation
    image_size: Annotated[int, Field(ge=1, le=1024)]
    stages: list[StageForm]
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None
    confidence_threshold: Fraction | None
    test_acc: Fraction
    test_acc_tta: Fraction | None
    training: TrainingForm
    sha256: ChecksumsForm


def check_form(meta: object, path: Path) -> None:
    """Raise ValueError that names each key of model.json which is missing, unknown or not as expected."""
    try:
        DescriptionForm.model_validate(meta)
    except ValidationError as error:
        wrong = []
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"])) or "all of it"
            if place in RENAMED:
                place = f"{place} (now called {RENAMED[place]}; export the Space again)"
            wrong.append(f"{place}: {problem['msg']}, got {problem['input']!r:.60}")
        raise InvalidValue(f"{path}: {'; '.join(wrong)}") from error


# ---- reading -------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_keys(meta: dict) -> str:
    """The checksum of everything in model.json but the checksums."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_file(path: Path) -> bytes:
    """Read a file of a bundle. ValueError if Git wrote only a pointer to it."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise InvalidValue(
            f"{path} is a Git-LFS pointer, expected the file that it stands for: install Git LFS"
            f" (https://git-lfs.com) and run `git lfs pull` in {path.parent}"
        )
    return content


def bundle_files(meta: dict) -> list[str]:
    """List all files of a bundle, relative to its folder; model.json comes last."""
    return [WEIGHTS, *sorted(meta["sha256"]["files"]), "model.json"]


def read_bundle(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Read a bundle, complete and as it was written, and run nothing of it.

    Returns:
        What model.json says, and the content of every other file under its relative name.

    Raises:
        ValueError: that says which file or key is not as it should be.
        OSError: if a file is missing.
    """
    while True:
        finish_export(folder)
        found = content_of(folder / "model.json")
        try:
            return read_checked(folder)
        except (OSError, ValueError):
            # A new bundle may have come while this one was read; then it is the one to read.
            if content_of(folder / "model.json") == found and not (folder / READY).is_dir():
                raise


def content_of(path: Path) -> bytes:
    """The content of a file, empty if it is not there."""
    return path.read_bytes() if path.is_file() else b""


def read_checked(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Read the files that are in a folder now: read_bundle without an eye on other processes."""
    path = folder / "model.json"
    try:
        meta = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidValue(f"{path} cannot be read: {error}") from error
    check_form(meta, path)
    contents = {name: read_file(folder / name) for name in bundle_files(meta)[:-1]}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    sums = meta["sha256"]
    compare(folder, "the keys have", sha256_of_keys(meta), sums["keys"])
    compare(folder, "the weights have", found[WEIGHTS], sums["weights"])
    for name, expected in sums["files"].items():
        compare(folder, f"{name} has", found[name], expected)
    return meta, contents


def compare(folder: Path, what: str, got: str, expected: str) -> None:
    """Raise ValueError where two checksums differ."""
    if got != expected:
        raise InvalidValue(f"{folder}: {what} the sha256 {got}, expected {expected}")


class SourceFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `models` out of what was read and checked.

    No other file, and no compiled older one.
    """

    def __init__(self, folder: Path, contents: dict[str, bytes]):
        self.folder, self.contents = folder, contents

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = "models/__init__.py" if name == "models" else name.replace(".", "/") + ".py"
        if file not in self.contents:
            return None
        spec = importlib.util.spec_from_file_location(name, self.folder / file, loader=self)
        if name == "models":
            spec.submodule_search_locations = []  # a package, but without a folder to look in
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        content = self.contents[Path(module.__file__).relative_to(self.folder).as_posix()]
        exec(compile(content, module.__file__, "exec"), module.__dict__)


IMPORTING = threading.RLock()


@contextlib.contextmanager
def models_of(folder: Path, contents: dict[str, bytes]) -> Iterator[None]:
    """Let `models` mean the package of a bundle, for imports within the block, and then what it meant before.

    The project has a package of that name too, and every bundle has its own.

    Args:
        folder: of the bundle, absolute.
        contents: of its files, as read_bundle returns them.
    """
    with IMPORTING:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
        finder = SourceFinder(folder, contents)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if is_ours(name)]:
                del sys.modules[name]
            sys.modules.update(before)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "models"


def load_bundle(folder: str | Path) -> tuple[nn.Module, dict]:
    """Load the network of a bundle, made by the bundle's own source, and what model.json says of it.

    Returns:
        The network in eval mode, fp32, on the CPU, and the keys of model.json.

    Raises:
        ValueError: if a checksum, a key, the architecture or a weight is not as it should be.
        OSError: if a file is missing.
    """
    folder = Path(folder).resolve()
    meta, contents = read_bundle(folder)
    network = import_network(folder, meta, contents)
    model = network(len(meta["classes"]))
    try:
        model.load_state_dict(load(contents[WEIGHTS]), strict=True)
    except (RuntimeError, SafetensorError) as error:
        what = f"the weights are not those of a {meta['architecture']}"
        raise InvalidValue(f"{folder}: {what}: {error}") from error
    stages = [{"name": stage.name, "size": stage.size} for stage in model.stages()]
    if meta["stages"] != stages:
        raise InvalidValue(f"{folder}: expected the stages {stages}, got {meta['stages']!r:.200}")
    model.source_file = folder / "models" / meta["source"]  # for whoever exports it again
    with no_grad():
        model.eval()(
            zeros(1, 3, meta["image_size"], meta["image_size"])
        )  # refuses images of another size
    return model, meta


def import_network(folder: Path, meta: dict, contents: dict[str, bytes]) -> type[nn.Module]:
    """Import the class of a bundle's network. ValueError if it is not there."""
    if f"models/{meta['source']}" not in contents:
        got = meta["source"]
        raise InvalidValue(f"{folder}: expected a Python file of the bundle as source, got {got!r}")
    try:
        with models_of(folder, contents):
            module = importlib.import_module(f"models.{meta['source'].removesuffix('.py')}")
    except ImportError as error:
        raise InvalidValue(f"{folder}: {meta['source']} cannot be imported: {error}") from error
    network = getattr(module, meta["architecture"], None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise InvalidValue(f"{folder}: {meta['source']} has no network {meta['architecture']!r}")
    return network


# ---- replacing -----------------------------------------------------------------------------------
# A bundle is many files, and no system replaces many files at once. So the new ones are written to
# a folder of their own, and one rename makes that folder READY: before it the old bundle counts,
# after it the new one. Then the files are moved into place. Who is killed meanwhile leaves some of
# them in READY, and whoever reads the bundle next, the app at its start as well, moves these first.
# Other files are not touched.


@contextlib.contextmanager
def new_bundle(folder: Path) -> Iterator[Path]:
    """Give an empty folder for a new bundle; at the end of the block it takes the place of the old one.

    An error in the block leaves the old bundle as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_export(folder)
    for left in folder.glob(f"{SCRATCH}*"):  # by a killed process; a young one may be in use
        if time.time() - left.stat().st_mtime > HOUR:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        written = Path(scratch) / "bundle"
        written.mkdir()
        yield written
        written.rename(folder / READY)
    finish_export(folder)


def finish_export(folder: Path) -> None:
    """Move the files of a whole new bundle into place, if there is one; model.json is the last.

    Several processes may do so at once: what one does not find any more, another has moved.
    """
    ready = folder / READY
    files = [Path(place) / name for place, _, names in os.walk(ready) for name in names]
    for path in [path for path in files if path != ready / "model.json"]:
        target = folder / path.relative_to(ready)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.replace(target)
    with contextlib.suppress(FileNotFoundError):
        listed = json.loads((ready / "model.json").read_bytes())["sha256"]["files"]
        for path in (folder / "models").glob("*.py"):
            if f"models/{path.name}" not in listed:
                path.unlink(missing_ok=True)  # of the network before
        shutil.rmtree(folder / "models" / "__pycache__", ignore_errors=True)
        (ready / "model.json").replace(folder / "model.json")
    for place, _, _ in os.walk(ready, topdown=False):
        with contextlib.suppress(OSError):  # not empty: the next new bundle came meanwhile
            os.rmdir(place)
