"""The networks by name, and the source files that a network needs outside the project."""

import ast
import inspect
import sys
from pathlib import Path

from models.errors import InvalidValue
from models.fastnet import FastNet
from models.resnet import CustomResNet, ResNet18
from models.stage import Network

FOLDER = Path(__file__).resolve().parent
NETWORKS: dict[str, type[Network]] = {
    "ResNet18": ResNet18,
    "CustomResNet": CustomResNet,
    "FastNet": FastNet,
}


def check_name(arch: object) -> None:
    """Raise ValueError if a value is no key of NETWORKS, with the known ones."""
    if not isinstance(arch, str) or arch not in NETWORKS:
        raise InvalidValue(f"unknown network {arch!r}, expected one of {', '.join(NETWORKS)}")


def build(arch: str, num_classes: int = 10) -> Network:
    """Build a new network, with random weights.

    Args:
        arch: a key of NETWORKS.
        num_classes: the number of logits.

    Raises:
        ValueError: for an unknown name, with the known ones, and for a network that cannot be
            explained or exported: this is found before its training instead of after it.
    """
    check_name(arch)
    model = NETWORKS[arch](num_classes)
    source_files(source_of(model))
    if getattr(type(model), "stages", Network.stages) is Network.stages:
        raise InvalidValue(
            f"expected {arch} to name its stages for Grad-CAM, got no method stages()"
        )
    return model


def source_of(model: Network) -> Path:
    """Find the file of a network's class, in models/ or in the bundle it was loaded from.

    Raises:
        ValueError: if the class is elsewhere, such as in a notebook's cell.
    """
    if source := getattr(model, "source_file", None):  # set by load_bundle
        return source
    network = type(model)
    module = sys.modules.get(network.__module__)
    path = Path(getattr(module, "__file__", None) or "a cell").resolve()
    if path.parent != FOLDER or getattr(module, network.__name__, None) is not network:
        raise InvalidValue(
            f"expected the class {network.__name__} at the top level of a file in {FOLDER}, got it"
            f" from {inspect.getmodule(network)}: only what is in that folder travels to the Space"
        )
    return path


def source_files(source: Path) -> list[Path]:
    """List the sources that a bundle of a network needs.

    They are the file of the network, explain and bundle, and what these import of models/, directly
    or indirectly.

    Args:
        source: the file of the network's class.

    Returns:
        Paths in the folder of source, sorted.

    Raises:
        ValueError: if one of them imports a module of the project that is not in models/.
    """
    always = [source.with_name(f"{name}.py") for name in ("__init__", "bundle", "explain")]
    found, queue = set(), [source, *always]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            imports = [imported_file(path, name) for name in imported_names(path)]
            queue += [file for file in imports if file]
    return sorted(found)


def imported_names(path: Path) -> list[str]:
    """List the modules that a file imports anywhere, those of its own folder as 'models.NAME'."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "models" if node.level else ""  # a relative import
            module = ".".join(part for part in (package, node.module) if part)
            from_package = [f"models.{alias.name}" for alias in node.names]
            names += from_package if module == "models" else [module]
    return names


def imported_file(path: Path, name: str) -> Path | None:
    """Find the file in models/ of an imported module.

    Args:
        path: the file that imports it, in models/.
        name: of the module, such as 'models.stage'.

    Returns:
        The path, or None for a module of a library and for the package itself.

    Raises:
        ValueError: if it is a module of the project that is not in models/.
    """
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
