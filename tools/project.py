"""Where the project and its parts are, and the results of a run."""

from pathlib import Path

from training.files import PROJECT, read_json

NOTEBOOK = "ERA_S12_Assignment.ipynb"
NOTEBOOKS = (NOTEBOOK, "more.ipynb", "solutions.ipynb")
SPACE = PROJECT / "space"


def read_results(folder: Path) -> dict:
    """Read results.json of a run, or return an empty dict if there is none or it is damaged."""
    return read_json(folder / "results.json", set()) or {}
