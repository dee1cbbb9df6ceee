"""What visitors upload, and every picture made for them, in a folder of this start's own that is swept by age."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

PREFIX = "cifar10-space-"
KEPT_SECONDS = 3000  # then a file is deleted; the variable UPLOADS_KEPT_SECONDS changes it


def own_folder() -> Path:
    """Make a folder for all temporary files of this process, in GRADIO_TEMP_DIR or the system's place for them.

    Ends the program, with a sentence, where that cannot be written to.
    """
    parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
    except OSError as error:
        sys.exit(f"Cannot write into {parent} ({error}): set the variable GRADIO_TEMP_DIR to a folder where you may.")
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder  # uploads that break off lie there as well
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def sweep(own: Path, kept: set[Path], seconds: float) -> None:
    """Delete what is older: files of this start, except the page's own, and whole folders of starts that have ended.

    A running start renews the age of its folder each time.
    """
    os.utime(own)
    now = time.time()
    for path in (path for path in own.rglob("*") if path.is_file() and path not in kept):
        if now - path.stat().st_ctime > seconds:
            path.unlink(missing_ok=True)
    for folder in own.parent.glob(f"{PREFIX}*"):
        if folder != own and now - folder.stat().st_mtime > seconds:
            shutil.rmtree(folder, ignore_errors=True)


def start_sweeping(own: Path) -> None:
    """Sweep now and again and again, in a thread; what is in the folder now belongs to the page and stays."""
    kept, seconds = set(own.rglob("*")), float(os.environ.get("UPLOADS_KEPT_SECONDS") or KEPT_SECONDS)

    def run() -> None:
        while True:
            try:
                sweep(own, kept, seconds)
            except OSError as error:  # a file went meanwhile; the next round is soon
                print(f"sweeping {own}: {error}", file=sys.stderr)
            time.sleep(min(60, seconds / 5))

    threading.Thread(target=run, daemon=True).start()
