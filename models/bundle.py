"""The bundle that travels to the Space: a network's weights, description, sources and pictures.

model.json describes the network and holds a checksum of every other file; model.safetensors holds
the weights in fp16; models/ holds the sources, byte for byte. Nothing is unpickled. Checksums find
files that were changed, lost or mixed up. They are no protection against a person who changes them
as well, and this file runs before it can compare its own.
"""

import contextlib
import hashlib
import importlib
import importlib.abc
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
from typing import Annotated, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn, no_grad, zeros

from models.errors import InvalidValue
from models.stage import Network

WEIGHTS = "model.safetensors"
PICTURES = {"confusion_matrix.png", "misclassified.json", "misclassified.png"}
# A bundle also holds the sources that these and its network import.
SOURCES = {"models/__init__.py", "models/bundle.py", "models/explain.py"}
LFS_POINTER = b"version https://git-lfs.github.com/spec"
READY = ".ready"  # a folder in the Space's: a complete new bundle that is being moved into place
SCRATCH = ".export-"  # starts the name of a folder for a bundle that is not complete yet
HOUR = 3600  # seconds
RENAMED = {"unsure_below": "confidence_threshold"}  # keys of model.json in earlier versions

# ---- model.json ----------------------------------------------------------------------------------


def check_different(names: list[str]) -> list[str]:
    """Return the names, or raise ValueError if two are equal."""
    if len(set(names)) < len(names):
        raise ValueError("expected different names")
    return names


def check_file_names(sums: dict[str, str]) -> dict[str, str]:
    """Return the checksums, or raise ValueError if one is missing or is of an unexpected file."""
    if missing := (PICTURES | SOURCES) - set(sums):
        raise ValueError(f"expected a checksum of {', '.join(sorted(missing))}")
    for name in set(sums) - PICTURES:
        if not re.fullmatch(r"models/[^\W\d]\w*\.py", name):
            raise ValueError(f"expected pictures and models/*.py, got {name!r}")
    return sums


Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e12)]
StandardDeviation = Annotated[float, Field(ge=1e-3, le=1)]


class Schema(BaseModel):
    """A part of model.json with exactly its keys, and values of exactly their types.

    Neither true nor '1' counts as 1.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StageSchema(Schema):
    """A stage that Grad-CAM can explain, as in models.stage."""

    name: str
    size: int


class TrainingSchema(Schema):
    """The metadata of a training that the app shows; other keys are allowed."""

    model_config = ConfigDict(extra="allow")
    epochs: NonNegative
    train_images: NonNegative
    seconds: NonNegative
    data: str
    hardware: str
    seed: int


class ChecksumsSchema(Schema):
    """SHA-256 of the weights, of all other keys of model.json together, and of each other file."""

    weights: str
    keys: str
    files: Annotated[dict[str, str], AfterValidator(check_file_names)]


class ModelSchema(Schema):
    """All of model.json."""

    architecture: str
    source: Annotated[str, Field(pattern=r"^[^\W\d]\w*\.py$")]
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(check_different)]
    mean: Annotated[list[Fraction], Field(min_length=3, max_length=3)]
    std: Annotated[list[StandardDeviation], Field(min_length=3, max_length=3)]
    image_size: Annotated[int, Field(ge=1, le=1024)]
    stages: list[StageSchema]
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None
    confidence_threshold: Fraction | None
    test_acc: Fraction
    test_acc_tta: Fraction | None
    training: TrainingSchema
    sha256: ChecksumsSchema


def check_schema(meta: object, path: Path) -> None:
    """Check the keys and values of model.json.

    Args:
        meta: the content of the file.
        path: of the file, for the message.

    Raises:
        ValueError: that names each key which is missing, unknown or has an unexpected value.
    """
    for old, new in RENAMED.items():
        if isinstance(meta, dict) and old in meta:
            raise InvalidValue(f"{path}: {old} is now called {new}: export the Space again")
    try:
        ModelSchema.model_validate(meta)
    except ValidationError as error:
        wrong = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"])) or "all of it"
            wrong.append(f"{key}: {problem['msg']}, got {problem['input']!r:.60}")
        raise InvalidValue(f"{path}: {'; '.join(wrong)}") from error


# ---- reading -------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_keys(meta: dict) -> str:
    """Return the SHA-256 of everything in model.json but its checksums."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_file(path: Path) -> bytes:
    """Read a file of a bundle, or raise ValueError if Git wrote only a pointer to it."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise InvalidValue(
            f"{path} is a Git-LFS pointer, expected the file that it stands for: install Git LFS"
            f" (https://git-lfs.com) and run `git lfs pull` in {path.parent}"
        )
    return content


def bundle_files(meta: dict) -> list[str]:
    """List all files of a bundle, relative to its folder, model.json last."""
    return [WEIGHTS, *sorted(meta["sha256"]["files"]), "model.json"]


def read_bundle(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Read and check all files of a bundle, and run none of them.

    A bundle that replaces this one meanwhile is read instead of it, never a mixture of both.

    Returns:
        The keys of model.json, and the content of every other file by its relative name.

    Raises:
        ValueError: if a checksum or a key is wrong, with its name, or model.json is missing.
        OSError: if another file is missing.
    """
    while True:
        finish_export(folder)
        before, busy = version_of(folder / "model.json"), bool(listed_files(folder / READY))
        try:
            return read_checked(folder)
        except (OSError, ValueError):
            # Unless another process replaced the bundle meanwhile: then read the new one. READY
            # comes first: once it is gone, model.json is the new one.
            busy = busy or bool(listed_files(folder / READY))
            if not busy and version_of(folder / "model.json") == before:
                raise


def version_of(path: Path) -> tuple[int, ...]:
    """Return what differs once a file is replaced, even by an equal one; () if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_checked(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Read and check the files of a bundle that no other process replaces meanwhile."""
    path = folder / "model.json"
    try:
        meta = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidValue(f"{path} cannot be read: {error}") from error
    check_schema(meta, path)
    contents = {name: read_file(folder / name) for name in bundle_files(meta)[:-1]}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    sums = meta["sha256"]
    compare_checksums(folder, "the keys have", sha256_of_keys(meta), sums["keys"])
    compare_checksums(folder, "the weights have", found[WEIGHTS], sums["weights"])
    for name, expected in sums["files"].items():
        compare_checksums(folder, f"{name} has", found[name], expected)
    return meta, contents


def compare_checksums(folder: Path, subject: str, got: str, expected: str) -> None:
    """Raise ValueError if two checksums differ; subject, with its verb, begins the message."""
    if got != expected:
        raise InvalidValue(f"{folder}: {subject} the sha256 {got}, expected {expected}")


class SourceFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `models` from contents that were read and checked, never from a file or a .pyc.

    Args:
        folder: of the bundle.
        contents: of its files, by their relative names.
    """

    def __init__(self, folder: Path, contents: dict[str, bytes]):
        self.folder, self.contents = folder, contents

    def file_of(self, name: str) -> str:
        """Return the relative name of a module's file."""
        return "models/__init__.py" if name == "models" else name.replace(".", "/") + ".py"

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of a module of the bundle, None for any other."""
        file = self.file_of(name)
        if file not in self.contents:
            return None
        # A package has no folder to search, so that only this finder finds its modules.
        spec = ModuleSpec(name, self, origin=str(self.folder / file), is_package=name == "models")
        spec.has_location = True  # the module gets a __file__
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: Python creates the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the source of a module in it."""
        file = self.file_of(module.__name__)
        code = compile(self.contents[file], str(self.folder / file), "exec")
        exec(code, module.__dict__)


IMPORT_LOCK = threading.RLock()


@contextlib.contextmanager
def imports_from_bundle(folder: Path, contents: dict[str, bytes]) -> Iterator[None]:
    """Let `models` mean the package of a bundle for imports within the block.

    The project has a package of that name, and so has every bundle.

    Args:
        folder: of the bundle, absolute.
        contents: of its files, as read_bundle returns them.
    """
    with IMPORT_LOCK:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if in_models(name)}
        finder = SourceFinder(folder, contents)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if in_models(name)]:
                del sys.modules[name]
            sys.modules.update(before)


def in_models(name: str) -> bool:
    """Tell whether a module is the package `models` or part of it."""
    return name.partition(".")[0] == "models"


def load_bundle(folder: str | Path) -> tuple[Network, dict]:
    """Load the network of a bundle, built by the bundle's own source.

    Returns:
        The network in eval mode, fp32, on the CPU, and the keys of model.json.

    Raises:
        ValueError: if a checksum, a key, the architecture, the stages or a weight is wrong, or
            model.json is missing.
        OSError: if another file is missing.
    """
    folder = Path(folder).resolve()
    meta, contents = read_bundle(folder)
    model = import_network(folder, meta, contents)(len(meta["classes"]))
    try:
        model.load_state_dict(load(contents[WEIGHTS]), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise InvalidValue(
            f"{folder}: the weights are not those of a {meta['architecture']}: {error}"
        ) from error
    stages = [{"name": stage.name, "size": stage.size} for stage in model.stages()]
    if meta["stages"] != stages:
        raise InvalidValue(f"{folder}: expected the stages {stages}, got {meta['stages']!r:.200}")
    model.source_file = folder / "models" / meta["source"]  # for whoever exports it again
    with no_grad():  # the network refuses images of another size
        model.eval()(zeros(1, 3, meta["image_size"], meta["image_size"]))
    return model, meta


def import_network(folder: Path, meta: dict, contents: dict[str, bytes]) -> type[Network]:
    """Import the class of a bundle's network, or raise ValueError if it is missing."""
    if f"models/{meta['source']}" not in contents:
        got = meta["source"]
        raise InvalidValue(f"{folder}: expected a Python file of the bundle as source, got {got!r}")
    try:
        with imports_from_bundle(folder, contents):
            module = importlib.import_module(f"models.{meta['source'].removesuffix('.py')}")
    except ImportError as error:
        raise InvalidValue(f"{folder}: {meta['source']} cannot be imported: {error}") from error
    network = getattr(module, meta["architecture"], None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise InvalidValue(f"{folder}: {meta['source']} has no network {meta['architecture']!r}")
    return cast(type[Network], network)  # derived from the bundle's own class Network


# ---- replacing -----------------------------------------------------------------------------------
# A bundle is many files, and no file system replaces many files at once. So the new ones are
# written to a separate folder, and one rename makes that folder READY: before it the old bundle
# counts, after it the new one. Then the files are moved into place. A process that is killed
# meanwhile leaves some of them in READY, and the next one that reads the bundle (the app as well)
# moves these first. Other files are not touched.


@contextlib.contextmanager
def new_bundle(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for a new bundle, which replaces the old one after the block.

    An error in the block leaves the old bundle unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_export(folder)
    if not listed_files(folder / READY):
        shutil.rmtree(folder / READY, ignore_errors=True)  # if it is there, a power cut damaged it
    for leftover in folder.glob(f"{SCRATCH}*"):  # of a killed process; a recent one may be in use
        if time.time() - leftover.stat().st_mtime > HOUR:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        written = Path(scratch) / "bundle"
        written.mkdir()
        yield written
        written.rename(folder / READY)
    finish_export(folder)


def listed_files(folder: Path) -> set[str]:
    """Return the files whose checksums are in model.json; none if it is missing or damaged."""
    try:
        return set(json.loads((folder / "model.json").read_bytes())["sha256"]["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def finish_export(folder: Path) -> None:
    """Move the files of a complete new bundle into place, if there is one, model.json last.

    Several processes may do so at once: a file that one no longer finds was moved by another. A new
    bundle whose model.json a power cut has damaged stays where it is, until the next export.
    """
    ready = folder / READY
    old, new = listed_files(folder), listed_files(ready)
    # After that: a bundle that becomes ready in between is left to the next call, not half moved.
    files = [Path(parent) / name for parent, _, names in os.walk(ready) for name in names]
    if new:
        for path in [path for path in files if path != ready / "model.json"]:
            target = folder / path.relative_to(ready)
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                path.replace(target)
        for path in (folder / "models").glob("*.py"):
            if f"models/{path.name}" in old - new:
                path.unlink(missing_ok=True)  # of the previous network
        shutil.rmtree(folder / "models" / "__pycache__", ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (ready / "model.json").replace(folder / "model.json")
    for parent, _, _ in os.walk(ready, topdown=False):
        with contextlib.suppress(OSError):  # not empty: the next new bundle came meanwhile
            Path(parent).rmdir()
