"""Where uploads and answers lie.

A folder of this app's own, swept of what is old when it starts and while it runs.
"""

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

NAME = "cifar10-space"


def keep_seconds() -> float:
    """How long a file is kept, from UPLOADS_KEEP_SECONDS.

    Raises SystemExit if that is no such number.
    """
    text = (
        os.environ.get("UPLOADS_KEEP_SECONDS") or "3000"
    )  # with a sixth of it between two sweeps: within an hour
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= 3000:
        raise SystemExit(
            f"UPLOADS_KEEP_SECONDS: a number from 1 to 3000, please; got {text!r:.40}."
        )
    return seconds


def own_folder() -> Path:
    """The folder for uploads, below GRADIO_TEMP_DIR or else the system's temporary folder.

    It holds nothing but this app's files, so it can be swept. Raises SystemExit if nothing can be
    written there.
    """
    folder = os.environ.get("GRADIO_TEMP_DIR")
    try:
        folder = Path(folder or tempfile.gettempdir()).expanduser().resolve()
        if folder.name != NAME:  # it is NAME where this process has imported the app before
            folder = folder / NAME
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown user
        raise SystemExit(
            f"The folder for uploads cannot be written: {folder} ({getattr(error, 'strerror', None) or error}). "
            "Set GRADIO_TEMP_DIR to a folder that you may write."
        ) from None
    return folder


def sweep(folder: Path, kept: set[str], seconds: float) -> None:
    """Delete the files below folder that were written more than so many seconds ago, and folders that are empty.

    kept: paths that are still needed. They are touched: another app that sweeps the same folder leaves them as well.
    """
    for parent, folders, files in os.walk(
        folder, topdown=False
    ):  # what is in a folder before the folder
        for path in (os.path.join(parent, name) for name in (*files, *folders)):
            with contextlib.suppress(OSError):  # another app was faster, or the folder is not empty
                if path in kept:
                    os.utime(path)
                elif os.lstat(path).st_mtime < time.time() - seconds:
                    (os.rmdir if os.path.basename(path) in folders else os.remove)(path)


def start_sweeping(folder: Path, kept: set[str], seconds: float) -> None:
    """Sweep now, and again in every sixth part of that time, for as long as the process lives."""

    def run() -> None:
        while True:
            sweep(folder, kept, seconds)
            time.sleep(seconds / 6)

    threading.Thread(target=run, daemon=True).start()
