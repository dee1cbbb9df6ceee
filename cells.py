"""What the notebook's cells say of themselves: an error in one line where that says it all, and how long they took."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType

PROJECT = Path(__file__).resolve().parent
NOTEBOOK = PROJECT / "ERA_S12_Assignment.ipynb"
IN_WORDS = (
    ValueError,
    FloatingPointError,
    OSError,
    RuntimeError,
    KeyboardInterrupt,
)  # what the project's own code raises


def kernel_shell() -> object | None:
    """IPython's shell of the notebook that runs this; None in a script or a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


def in_words(kind: type, problem: BaseException, trace: TracebackType) -> str:
    """One line for an error that a cell or the project's own code raised on purpose; '' where it needs a traceback."""
    while trace.tb_next:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename)
    ours = PROJECT in raised_in.parents and "site-packages" not in raised_in.parts
    if kind is NameError and not ours and trace.tb_frame.f_code.co_name == "<module>":
        return (
            f"{problem.name!r} is not there yet: run the cells above this one first (Runtime, Run before), or check its"
            " spelling."
        )
    return f"{kind.__name__}: {problem}" if ours and issubclass(kind, IN_WORDS) else ""


def short_errors() -> None:
    """From now on the notebook shows such errors as one line. Outside a notebook: nothing happens."""
    shell = kernel_shell()
    if not shell:
        return

    def show(shell, kind, problem, trace, tb_offset=None) -> list[str]:
        line = in_words(kind, problem, trace)
        lines = [line] if line else shell.InteractiveTB.structured_traceback(kind, problem, trace, tb_offset)
        shell._showtraceback(kind, problem, lines)
        return lines

    shell.set_custom_exc((NameError, *IN_WORDS), show)


class Clock:
    """How long each cell took, the last time that it ran."""

    def __init__(self):
        self.began, self.seconds = 0.0, {}  # source of a cell -> seconds

    def start(self, _info: object) -> None:
        self.began = time.perf_counter()

    def stop(self, result: object) -> None:
        self.seconds[result.info.raw_cell] = time.perf_counter() - self.began

    def table(self, notebook: Path = NOTEBOOK) -> str:
        """The seconds of each section of the notebook; cells that were changed count as 'changed cells'."""
        headings, heading = {}, ""
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if source.startswith("## "):
                heading = source.splitlines()[0][3:]
            headings[source] = heading
        sums = {}
        for source, seconds in self.seconds.items():
            name = headings.get(source, "changed cells")
            sums[name] = sums.get(name, 0) + seconds
        total = sum(sums.values())
        lines = [f"{name:32s} {seconds:7.1f} s {seconds / total:5.0%}" for name, seconds in sums.items()]
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
