"""Data flow one way: no folder imports one that stands later in the flow, and no module itself."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.conftest import PROJECT, tracked_files

# Each may import those before it; models, below all others, only itself.
FLOW = ("models", "cifar10", "dataload", "training", "evaluation", "utils", "lesson", "tools")
FLOW += ("benchmarks",)


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it: of `from a import b`, both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def project_modules() -> dict[str, Path]:
    """Every module of the project but the tests and the app, by its dotted name.

    A file that a reader has put beside them is none.
    """
    rooms = [name for name in FLOW if (PROJECT / name).is_dir()]
    paths = [path for room in rooms for path in (PROJECT / room).rglob("*.py")]
    known = {*(tracked_files() or ()), *(f"{name}.py" for name in FLOW)}
    paths += [path for path in PROJECT.glob("*.py") if path.name in known]
    names = {path: ".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def forbidden(module: str, imports: set[str]) -> set[str]:
    """Those of the imports that do not stand before a module in the flow."""
    later = {*FLOW[FLOW.index(room(module)) + 1 :], "space", "tests"}
    return {name for name in imports if room(name) in later}


MODULES = project_modules()


def test_every_room_is_part_of_the_flow():
    assert {room(name) for name in MODULES} == {*FLOW}


@pytest.mark.parametrize("module", MODULES)
def test_no_folder_imports_one_that_stands_later_in_the_flow(module):
    assert forbidden(module, imported_modules(MODULES[module])) == set()


def test_a_step_back_is_seen():
    assert forbidden("training.runs", {"torch", "dataload", "models.stage"}) == set()
    assert forbidden("training.runs", {"evaluation.predict", "torch"}) == {"evaluation.predict"}
    assert forbidden("models.resnet", {"dataload"}) == {"dataload"}
    assert forbidden("tools.run", {"benchmarks.report"}) == {"benchmarks.report"}


def test_no_module_needs_itself():
    graph = {
        name: imported_modules(path) & MODULES.keys() - {name} for name, path in MODULES.items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    with pytest.raises(graphlib.CycleError):
        tuple(
            graphlib.TopologicalSorter(graph | {"models.stage": {"models.resnet"}}).static_order()
        )


def test_the_app_imports_nothing_from_outside_its_folder():
    folder = PROJECT / "space"
    beside = {path.stem for path in folder.glob("*.py")} | {"models"}
    ours = {room(name) for name in MODULES} - beside
    for path in folder.rglob("*.py"):
        assert not {room(name) for name in imported_modules(path)} & ours, path


def test_the_root_shows_what_the_project_is_made_of():
    names = tracked_files()
    if names is None:
        pytest.skip("no git checkout, or no git")
    entries = {name.partition("/")[0] for name in names}
    assert len(entries) <= 32 and sum(name.endswith(".py") for name in entries) <= 3


def test_importing_a_package_imports_nothing_else():
    """A folder's __init__ imports no module of ours, nor one that takes its time."""
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert imported_modules(path) <= {"os"}, name
