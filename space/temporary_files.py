"""The folder for uploads and answers, whose old files are deleted while the app runs."""

import contextlib
import errno
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

# On a machine that several people use, each has a folder of their own.
NAME = f"cifar10-space-{os.getuid()}" if hasattr(os, "getuid") else "cifar10-space"


def keep_seconds() -> float:
    """Return how long a file is kept, from UPLOADS_KEEP_SECONDS.

    Raises:
        SystemExit: if that is not a number from 1 to 3000.
    """
    # With a sweep in every sixth of it, 3000 seconds delete a file within an hour.
    text = os.environ.get("UPLOADS_KEEP_SECONDS") or "3000"
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
    """Create the folder for uploads, in GRADIO_TEMP_DIR or the system's temporary folder.

    It holds only files of this app, so that old ones can be deleted.

    Raises:
        SystemExit: if nothing can be written there.
    """
    folder = os.environ.get("GRADIO_TEMP_DIR")
    try:
        folder = Path(folder or tempfile.gettempdir()).expanduser().resolve()
        if folder.name != NAME:  # it is NAME where this process has imported the app before
            folder = folder / NAME
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown user
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(
            f"The folder for uploads cannot be written: {folder} ({reason}). "
            "Set GRADIO_TEMP_DIR to a folder that you may write."
        ) from None
    return folder


def check_owner(folder: Path) -> None:
    """Raise PermissionError for a link, and for a folder that other users own or may write in.

    Its name can be guessed, so somebody else may have made it before.
    """
    found = folder.lstat()
    if os.name != "nt" and (  # Windows: the temporary folder is the user's own
        not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022
    ):
        raise PermissionError(errno.EPERM, "it is not this user's alone")


def sweep(folder: Path, kept: set[str], seconds: float) -> None:
    """Delete old files and empty folders.

    Args:
        folder: all below it is swept.
        kept: paths that are still needed. They are touched, so that another app that sweeps the
            same folder keeps them as well.
        seconds: the age from which a file is deleted.
    """
    for parent, folders, files in os.walk(folder, topdown=False):  # contents before their folder
        for path in (Path(parent, name) for name in (*files, *folders)):
            with contextlib.suppress(OSError):  # another app was faster, or the folder is not empty
                if str(path) in kept:
                    os.utime(path)
                elif path.lstat().st_mtime < time.time() - seconds:
                    (path.rmdir if path.name in folders else path.unlink)()


def start_sweeping(folder: Path, kept: set[str], seconds: float) -> None:
    """Call sweep now and then every sixth of the seconds, in a thread of this process."""

    def run() -> None:
        while True:
            sweep(folder, kept, seconds)
            time.sleep(seconds / 6)

    threading.Thread(target=run, daemon=True).start()
