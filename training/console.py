"""What a program prints while it runs: in a notebook, in a terminal, or where nobody reads it."""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of a command line whose help shows a module's docstring as it is written."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=kind)


def kernel_shell() -> "InteractiveShell | None":
    """Return IPython's shell of the notebook that runs this, or None in a script or a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


def format_duration(seconds: float) -> str:
    """Format a duration: '42 s', '17 min', '2 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def display_placeholder():
    """Display nothing, in a place of the notebook's output whose content can be replaced later.

    Returns:
        IPython's handle, with a method `update`; None outside a notebook.
    """
    if not kernel_shell():
        return None
    from IPython.display import display

    return display({"text/plain": ""}, raw=True, display_id=True)


class TransientLine:
    """A line that replaces itself, in a notebook or a terminal, and leaves nothing behind.

    It is plain tqdm on standard output: the widget of tqdm.auto would stay in a stored notebook as
    an empty output.
    """

    def __init__(self):
        shown = kernel_shell() or sys.stdout.isatty()
        # At position 0, though the line of a training before may not be gone yet.
        self.bar = tqdm(
            bar_format="{desc}", leave=False, file=sys.stdout, disable=not shown, position=0
        )

    def show(self, text: str) -> None:
        """Replace the line, or remove it where the text is empty."""
        if text:
            self.bar.set_description_str(text)
        else:
            self.bar.clear()


class ForgivingOutput(io.TextIOWrapper):
    """Standard output that stays usable when its reader is gone.

    It drops what it cannot write instead of raising an error.
    """

    def write(self, text: str) -> int:
        """Write a text, and return its length even where it was dropped."""
        try:
            return super().write(text)
        except OSError:  # a broken pipe, a full disk
            self.discard()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            super().flush()
        except OSError:
            self.discard()

    def discard(self) -> None:
        """Redirect to the null device, as Python's documentation advises for a broken pipe."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def forgive_output() -> None:
    """Make sure that printing never ends this program, whatever becomes of its output.

    A character that cannot be encoded is replaced, and each line is written at once, so that a log
    file can be followed. This is for scripts; the output of a notebook or a test is left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program was started
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 # it stays open
        elif type(stream) is io.TextIOWrapper:
            stream.flush()
            forgiving = ForgivingOutput(
                stream.buffer, stream.encoding, "replace", line_buffering=True
            )
            setattr(sys, name, forgiving)
