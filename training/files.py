"""JSON files that are written whole or not at all, and read with care."""

import json
from pathlib import Path


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = Path(path).with_name(Path(path).name + ".part")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, keys: set[str]) -> dict | None:
    """The object that a JSON file holds.

    None if it is not there, or damaged, or without these keys, which it says.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not keys <= set(value):
            raise ValueError("values are missing")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        print(f"{path} is damaged ({error}) and is not used")
        return None
    return value
