"""The networks by name, and the files that a network needs to live without the project."""

import ast
import inspect
import sys
from pathlib import Path

from torch import nn

from models.errors import InvalidValue
from models.fastnet import FastNet
from models.resnet import CustomResNet, ResNet18

FOLDER = Path(__file__).resolve().parent
NETWORKS = {"ResNet18": ResNet18, "CustomResNet": CustomResNet, "FastNet": FastNet}


def build(arch: str, num_classes: int = 10) -> nn.Module:
    """Make the network of that name.

    Raises:
        ValueError: for another name, with those that there are, and for a network that could not be
            explained or exported. It is better to know that before the training.
    """
    if arch not in NETWORKS:
        raise InvalidValue(f"unknown network {arch!r}, expected one of {', '.join(NETWORKS)}")
    model = NETWORKS[arch](num_classes)
    source_files(source_of(model))
    if not hasattr(model, "stages"):
        raise ValueError(f"expected {arch} to name its stages for Grad-CAM, got no method stages()")
    return model


def source_of(model: nn.Module) -> Path:
    """Find the file of a network's class: in models/, or in the bundle that it was loaded from.

    Raises:
        ValueError: if the class is elsewhere, such as in a notebook's cell.
    """
    if hasattr(model, "source_file"):  # set by load_bundle
        return model.source_file
    network = type(model)
    module = sys.modules.get(network.__module__)
    path = Path(getattr(module, "__file__", None) or "a cell").resolve()
    if path.parent != FOLDER or getattr(module, network.__name__, None) is not network:
        raise InvalidValue(
            f"expected the class {network.__name__} at the top level of a file in {FOLDER}, got it from"
            f" {inspect.getmodule(network)}: only what is in that folder travels to the Space"
        )
    return path


def source_files(source: Path) -> list[Path]:
    """List what travels with a network: its file, explain, bundle, and what these import of models/.

    Raises:
        ValueError: if one of them imports a module of the project that is not in models/.
    """
    folder = source.parent
    found, left = (
        set(),
        [source, *(folder / f"{name}.py" for name in ("__init__", "bundle", "explain"))],
    )
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            imports = [imported_file(path, name) for name in imported_names(path)]
            left += [file for file in imports if file]
    return sorted(found)


def imported_names(path: Path) -> list[str]:
    """List the modules that a file imports, wherever in it.

    'models.stage' for what is in models/.
    """
    names = []
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(
                part for part in ("models" if node.level else "", node.module) if part
            )
            names += (
                [f"models.{alias.name}" for alias in node.names] if module == "models" else [module]
            )
    return names


def imported_file(path: Path, name: str) -> Path | None:
    """Find the file in models/ of a module that a file imports; None for a module of a library."""
    top, _, module = name.partition(".")
    project = path.parent.parent
    if top == "models" and module:
        file = path.parent / f"{module}.py"
        if file.is_file():
            return file
    elif top == "models" or not (
        (project / f"{top}.py").is_file() or any((project / top).glob("*.py"))
    ):
        return None
    raise InvalidValue(f"{path} imports {name}, expected only files of {path.parent} and libraries")
