"""Whether a folder has room for what is to be written into it."""

import shutil
import tempfile
from pathlib import Path

from models.errors import StorageError


def check_disk_space(folder: Path, needed: float, what: str, variable: str) -> None:
    """Make a folder if it is missing, and check that so many bytes can be written into it.

    Args:
        folder: to write into.
        needed: bytes.
        what: needs them, for the message.
        variable: the setting that names the folder, for the message.

    Raises:
        StorageError: if nothing can be written, or the disk has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(
            f"cannot write into {folder}: {error}; set {variable} to a folder where you may"
        ) from error
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e6:,.0f} MB left, {what} may need {needed / 1e6:,.0f} MB;"
            f" make room, or set {variable} to another place"
        )
