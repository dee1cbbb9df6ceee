"""What a program says while it runs: in a notebook, in a terminal, or where nobody reads."""

import contextlib
import io
import logging
import os
import sys
import warnings

from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm


def kernel_shell() -> object | None:
    """IPython's shell of the notebook that runs this; None in a script or a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


# Lightning's warnings that nobody can act on here, as regular expressions, each with the reason.
HARMLESS = (
    ".*LeafSpec.*",  # of torch's own code, about torch's own code
    ".*does not have many workers.*",  # without a GPU they would take the cores that train
    ".*Checkpoint directory .* exists and is not empty.*",  # so it is when a run is resumed
    ".*smaller than the logging interval.*",  # Progress logs every step itself
    ".*bf16-mixed is not supported by the model summary",  # no summary is shown
)


def quiet_lightning() -> None:
    """Silence what Lightning prints at every fit: advertisements, and warnings that are no problem here.

    Its errors stay, and what it says where it uses one of several GPUs.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for package in ("pytorch_lightning", "lightning_fabric"):
        logger = logging.getLogger(
            f"{package}.utilities.rank_zero"
        )  # most messages come from there
        logger.setLevel(logging.INFO)
        logger.addFilter(is_worth_reading)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Tell whether a message of Lightning is an error, or says that it leaves GPUs unused."""
    return record.levelno >= logging.ERROR or "will use only 1 of" in record.getMessage()


print_rank_zero = rank_zero_only(
    print
)  # once, however many processes train  # once, however many processes train


def format_duration(seconds: float) -> str:
    """Seconds in words: '42 s', '17 min', '2 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def placeholder():
    """A place in the notebook's output whose content can be replaced, empty at first.

    None outside a notebook.
    """
    if not kernel_shell():
        return None
    from IPython.display import display

    return display({"text/plain": ""}, raw=True, display_id=True)


class TransientLine:
    """A line that replaces itself, in a notebook or a terminal, and leaves nothing behind.

    Plain tqdm on standard output: the widget of tqdm.auto stays in a stored notebook as an empty
    output.
    """

    def __init__(self):
        shown = kernel_shell() or sys.stdout.isatty()
        self.bar = tqdm(bar_format="{desc}", leave=False, file=sys.stdout, disable=not shown)

    def show(self, text: str) -> None:
        """Replace the line; the empty text removes it."""
        if text:
            self.bar.set_description_str(text)
        else:
            self.bar.clear()


class ForgivingOutput(io.TextIOWrapper):
    """Standard output that goes on when a character cannot be shown or nobody reads any more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:  # a broken pipe, a full disk
            self.discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.discard()

    def discard(self) -> None:
        """Send what is still to come to nowhere, as Python's documentation advises for a broken pipe."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def forgive_output() -> None:
    """From now on printing never ends this program.

    For scripts; a notebook's or a test's output stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program was started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper:
            stream.flush()
            lines = stream.line_buffering
            setattr(
                sys,
                name,
                ForgivingOutput(stream.buffer, stream.encoding, "replace", line_buffering=lines),
            )
