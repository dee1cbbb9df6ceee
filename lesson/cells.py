"""How the notebook's cells report their errors and the time that they take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from models.errors import EXPLAINED
from training.console import kernel_shell
from training.files import PROJECT

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell


# ---- errors --------------------------------------------------------------------------------------


def format_error(kind: type, problem: BaseException, trace: TracebackType) -> str:
    """Return one line for an error that needs no traceback.

    These are the errors that the project raises on purpose, and the NameError of a cell that needs
    an earlier cell.

    Args:
        kind: the class of the error.
        problem: the error.
        trace: its traceback.

    Returns:
        The line, or '' for any other error: it is a fault in somebody's code, perhaps in the
        project's, and needs its traceback.
    """
    if issubclass(kind, EXPLAINED):
        return f"{kind.__name__}: {problem}"
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    in_cell = code.co_name == "<module>" and PROJECT not in Path(code.co_filename).parents
    if type(problem) is NameError and in_cell:
        return (
            f"{problem.name!r} is not there yet: run the cells above this one first"
            " (Runtime, Run before), or check its spelling."
        )
    return ""


def enable_short_errors(shell: InteractiveShell) -> None:
    """Show an error that needs no traceback as one line, from now on."""

    def show(shell, kind, problem, trace, tb_offset=None) -> list[str]:
        line = format_error(kind, problem, trace)
        full = shell.InteractiveTB.structured_traceback
        lines = [line] if line else full(kind, problem, trace, tb_offset)
        shell._showtraceback(kind, problem, lines)
        return lines

    shell.set_custom_exc((NameError, *EXPLAINED), show)


# ---- time ----------------------------------------------------------------------------------------


def headings(notebook: Path) -> dict[str, str]:
    """Map the source of each cell to the heading of its section; {} for a file that is damaged."""
    found, heading = {}, "before section 1"
    try:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if source.startswith("## "):
                heading = source.splitlines()[0][3:]
            found[source] = heading
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


class Clock:
    """The seconds that each cell took, the last time that it ran."""

    def __init__(self):
        self.began = 0.0
        self.seconds: dict[str, float] = {}  # by the source of the cell

    def start(self, _info: object) -> None:
        """Begin to time a cell; IPython calls this before it runs one."""
        self.began = time.perf_counter()

    def stop(self, result: ExecutionResult) -> None:
        """Record the time of a cell; IPython calls this after it has run one."""
        if result.info:
            self.seconds[str(result.info.raw_cell)] = time.perf_counter() - self.began

    def table(self, folders: Iterable[Path] = (Path(), PROJECT)) -> str:
        """Format the seconds of each section of the notebook.

        A notebook does not know its own name: it is taken to be the one that has most of the timed
        cells. Cells that are not in it count as 'changed cells'.

        Args:
            folders: where to look for the notebook.

        Returns:
            A line for each section and a last one for all cells.
        """
        notebooks = [
            headings(path) for folder in folders for path in sorted(folder.glob("*.ipynb"))
        ]
        ours = max(notebooks, key=lambda found: len(found.keys() & self.seconds.keys()), default={})
        sums: dict[str, float] = {}
        for source, seconds in self.seconds.items():
            name = ours.get(source, "changed cells")
            sums[name] = sums.get(name, 0) + seconds
        total = sum(sums.values())
        width = max(map(len, [*sums, "all cells"]))
        lines = [
            f"{name:{width}s} {seconds:7.1f} s {seconds / (total or 1):5.0%}"
            for name, seconds in sums.items()
        ]
        return "\n".join([*lines, f"{'all cells':{width}s} {total:7.1f} s"])


clock = Clock()


def time_cells(shell: InteractiveShell) -> None:
    """Let `clock` time the notebook's cells from now on."""
    clock.seconds.clear()
    clock.start(None)  # of the cell that calls this
    # IPython ignores a callback that is registered already.
    shell.events.register("pre_run_cell", clock.start)
    shell.events.register("post_run_cell", clock.stop)


def prepare_notebook() -> None:
    """Show figures as pictures, errors as one line, and time the cells.

    Outside a notebook nothing happens.
    """
    shell = kernel_shell()
    if shell:
        shell.run_line_magic("matplotlib", "inline")  # whatever MPLBACKEND is
        enable_short_errors(shell)
        time_cells(shell)
