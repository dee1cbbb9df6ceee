"""Where the project and its parts are, and the results of a run."""

import json
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = "ERA_S12_Assignment.ipynb"
SPACE = PROJECT / "space"


def read_results(folder: Path) -> dict:
    """Read results.json of a run, or return an empty dict if there is none."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
