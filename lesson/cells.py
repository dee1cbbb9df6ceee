"""What the notebook's cells say of themselves.

Errors in one line where that says it all, and their time.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from models.errors import EXPLAINED
from training.console import kernel_shell

PROJECT = Path(__file__).resolve().parent.parent


def format_error(kind: type, problem: BaseException, trace: TracebackType) -> str:
    """One line for an error that the project raised on purpose, or for a name that is not there yet.

    Any other is a fault of somebody's code, ours perhaps: '' asks for its traceback.
    """
    if issubclass(kind, EXPLAINED):
        return f"{kind.__name__}: {problem}"
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if (
        kind is NameError
        and code.co_name == "<module>"
        and PROJECT not in Path(code.co_filename).parents
    ):
        return (
            f"{problem.name!r} is not there yet: run the cells above this one first (Runtime, Run before), or check its"
            " spelling."
        )
    return ""


def inline_figures() -> None:
    """Show figures as pictures in the notebook, whatever MPLBACKEND says.

    Outside a notebook: nothing happens.
    """
    shell = kernel_shell()
    if shell:
        shell.run_line_magic("matplotlib", "inline")


def enable_short_errors() -> None:
    """From now on the notebook shows such errors as one line.

    Outside a notebook: nothing happens.
    """
    shell = kernel_shell()
    if not shell:
        return

    def show(shell, kind, problem, trace, tb_offset=None) -> list[str]:
        line = format_error(kind, problem, trace)
        lines = (
            [line]
            if line
            else shell.InteractiveTB.structured_traceback(kind, problem, trace, tb_offset)
        )
        shell._showtraceback(kind, problem, lines)
        return lines

    shell.set_custom_exc((NameError, *EXPLAINED), show)


def headings(notebook: Path) -> dict[str, str]:
    """Source of a cell -> the heading of its section; empty for a file that is no notebook."""
    found, heading = {}, ""
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
    """How long each cell took, the last time that it ran."""

    def __init__(self):
        self.began, self.seconds = 0.0, {}  # source of a cell -> seconds

    def start(self, _info: object) -> None:
        self.began = time.perf_counter()

    def stop(self, result: object) -> None:
        self.seconds[result.info.raw_cell] = time.perf_counter() - self.began

    def table(self, folders: Iterable[Path] = (Path(), PROJECT)) -> str:
        """The seconds of each section of the notebook; cells that were changed count as 'changed cells'.

        A notebook does not know its own name, so of those in the folders it is the one with most of these
        cells; where it is in none of them, all cells count as 'changed cells'.
        """
        notebooks = [
            headings(path) for folder in folders for path in sorted(folder.glob("*.ipynb"))
        ]
        ours = max(notebooks, key=lambda found: len(found.keys() & self.seconds.keys()), default={})
        sums = {}
        for source, seconds in self.seconds.items():
            name = ours.get(source, "changed cells")
            sums[name] = sums.get(name, 0) + seconds
        total = sum(sums.values())
        lines = [
            f"{name:32s} {seconds:7.1f} s {seconds / (total or 1):5.0%}"
            for name, seconds in sums.items()
        ]
        return "\n".join([*lines, f"{'all cells':32s} {total:7.1f} s"])


clock = Clock()


def time_cells() -> None:
    """From now on `clock` measures the notebook's cells. Outside a notebook: nothing happens."""
    shell = kernel_shell()
    if shell:
        clock.seconds.clear()
        clock.start(None)  # of the cell that calls this
        shell.events.register("pre_run_cell", clock.start)  # once: a second time changes nothing
        shell.events.register("post_run_cell", clock.stop)
