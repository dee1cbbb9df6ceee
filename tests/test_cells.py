"""Errors that say it all in a sentence are shown as one; the others keep their traceback."""

import io
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lesson import cells
from training import console, settings

PREPARE = "import sys; sys.path.insert(0, '.'); from lesson import cells; cells.prepare_notebook()"


def notebook_of(*sources: str) -> tuple[nbformat.NotebookNode, NotebookClient]:
    """A notebook with these cells, and what executes it in the project's folder."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources]
    )
    where = {"metadata": {"path": cells.PROJECT}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where
    )
    return notebook, client


def line_for(source: str, namespace: dict | None = None) -> str:
    """What the notebook would show for the error of this cell."""
    try:
        exec(compile(source, "<cell>", "exec"), namespace or {})
    except BaseException as problem:
        return cells.format_error(type(problem), problem, problem.__traceback__.tb_next)
    raise AssertionError("the cell raised nothing")


def test_a_name_that_is_not_there_yet_says_what_to_run():
    assert line_for("wrong[0]").startswith(
        "'wrong' is not there yet: run the cells above this one first"
    )


def test_what_our_code_refuses_is_one_line():
    source = "settings.validate({})"
    assert line_for(source, {"settings": settings}).startswith(
        "InvalidValue: expected the switches"
    )


@pytest.mark.parametrize(
    "source",
    [
        "1 / 0",
        "int('x')",
        "def f(): return missing\nf()",
        "import json; json.loads('{')",
        "from evaluation.drawing import percent; percent('x')",
        "from training import console; console.format_duration('long')",
        "import pathlib; from cifar10 import download; download.md5(pathlib.Path('missing'))",
    ],
    ids=[
        "other kind",
        "of a cell",
        "in a function",
        "of a library",
        "ValueError of ours",
        "TypeError of ours",
        "OSError of ours",
    ],
)
def test_what_nobody_meant_to_raise_keeps_its_traceback(source):
    assert line_for(source) == ""


def test_in_a_kernel_the_cell_still_fails_but_shortly():
    notebook, client = notebook_of(PREPARE, "wrong[0]")
    with pytest.raises(CellExecutionError):
        client.execute()
    (error,) = notebook.cells[1].outputs
    assert error.output_type == "error" and "\n".join(error.traceback).count("\n") <= 2
    assert "'wrong' is not there yet" in "\n".join(error.traceback)


def test_the_clock_adds_up_the_cells_of_each_section(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("## 1. Setup\n\nText."),
            nbformat.v4.new_code_cell("setup"),
            nbformat.v4.new_markdown_cell("## 2. Work"),
            nbformat.v4.new_code_cell("first\nline"),
            nbformat.v4.new_markdown_cell("text"),
            nbformat.v4.new_code_cell("second"),
        ]
    )
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    (tmp_path / "other.ipynb").write_text(
        '{"cells": [{"source": "## 9. Other"}, {"source": ["second"]}]}'
    )
    clock = cells.Clock()
    clock.seconds = {"setup": 1.0, "first\nline": 4.0, "second": 2.5, "changed by a reader": 2.5}
    lines = [line.split() for line in clock.table([tmp_path]).splitlines()]
    assert lines[0] == ["1.", "Setup", "1.0", "s", "10%"] and lines[1] == [
        "2.",
        "Work",
        "6.5",
        "s",
        "65%",
    ]
    assert lines[2] == ["changed", "cells", "2.5", "s", "25%"] and lines[3] == [
        "all",
        "cells",
        "10.0",
        "s",
    ]


def test_the_clock_needs_no_notebook(tmp_path):
    clock = cells.Clock()
    assert clock.table([tmp_path]).split() == ["all", "cells", "0.0", "s"]
    clock.seconds = {"first": 0.0, "second": 0.0}
    assert clock.table([tmp_path]).splitlines()[0].split() == ["changed", "cells", "0.0", "s", "0%"]


@pytest.mark.parametrize("backend", ["Agg", "TkAgg", None])
def test_figures_are_pictures_whatever_the_backend_is_called(monkeypatch, backend):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if backend:
        monkeypatch.setenv("MPLBACKEND", backend)
    notebook, client = notebook_of(
        f"import matplotlib.pyplot; {PREPARE}",
        "import matplotlib.pyplot as plt\nfig, _ = plt.subplots(); plt.close(fig)\nfig",
    )
    client.execute()
    (output,) = notebook.cells[1].outputs
    assert "image/png" in output.data


def test_the_transient_line_is_shown_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    line = console.TransientLine()
    line.show("3 min left")
    assert "3 min left" in terminal.getvalue()
    line.show("")


def test_the_transient_line_leaves_nothing_in_a_notebook():
    source = """import sys; sys.path.insert(0, '.')
import time
from training import console
print('before')
earlier = console.TransientLine()  # of a training, not yet gone
earlier.show('epoch')
line = console.TransientLine()
for number in range(3):
    line.show(f'epoch {number}'); time.sleep(0.2)
line.show('')
print('after')"""
    notebook, client = notebook_of(source)
    client.execute()
    (output,) = notebook.cells[0].outputs
    assert "\x1b" not in output.text  # which moves the cursor between lines
    assert output.text.split() == ["before", "after"] and "widgets" not in notebook.metadata


def test_in_a_kernel_the_clock_measures_every_cell_once_however_often_it_is_started():
    notebook, client = notebook_of(
        f"{PREPARE}; cells.prepare_notebook()",
        "import time; time.sleep(0.5)",
        "print(cells.clock.table().splitlines()[-1], len(cells.clock.seconds))",
    )
    client.execute()
    words = notebook.cells[2].outputs[0].text.split()
    assert words[:2] == ["all", "cells"] and float(words[2]) >= 0.5 and words[4] == "2"


def test_outside_a_notebook_nothing_happens():
    done = subprocess.run(
        [sys.executable, "-c", f"{PREPARE}; print(1)"],
        cwd=cells.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n" and done.stderr == ""
