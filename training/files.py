"""The project's folder; a temporary folder; JSON files, written whole and checked when read."""

import functools
import json
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="era-scratch-")


def scratch_folder() -> Path:
    """Return a temporary folder, the same one each time, that is removed when Python ends."""
    return Path(_temporary().name)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = Path(path).with_name(Path(path).name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, keys: set[str]) -> dict | None:
    """Read the object that a JSON file holds.

    Args:
        path: of the file.
        keys: that the object must have.

    Returns:
        The object, or None if the file is missing, or damaged, which is printed.
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
