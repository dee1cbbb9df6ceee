"""How the notebook's cells fail: in one line where that says it all."""

import sys
from pathlib import Path
from types import TracebackType

PROJECT = Path(__file__).resolve().parent
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
