"""The notebook, the README, the committed results and the committed Space tell the same story."""

import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import nbformat
import pytest
import torch

import dataload
import utils
from benchmarks import leaderboard, learned_when, report, scaling, shortcuts, trust
from dataload import CIFAR10_MEAN, CIFAR10_STD, CLASSES
from models.bundle import load_bundle
from models.errors import InvalidValue
from models.registry import build
from models.resnet import model_summary
from tests.conftest import PROJECT, tracked_files
from tests.warm import WarmProcess
from tools import publish, run
from tools.project import NOTEBOOKS
from training.history import epoch_line, read_table
from training.recipes import RECIPES
from training.results import Run, stored_run
from training.settings import SWITCHES

NOTEBOOK = PROJECT / "ERA_S12_Assignment.ipynb"
README = (PROJECT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((report.RESULTS / "accuracy.json").read_text())
STEPS = json.loads(leaderboard.FILE.read_text())


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((PROJECT / "results.json").read_text(encoding="utf-8"))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    """All text that the stored notebook shows."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs
    )


# ---- notebook ----


def test_the_sections_come_in_the_order_of_the_story(notebook):
    headings = re.findall(
        r"^## (\d+)\. (.+)$",
        "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"),
        re.M,
    )
    assert [int(number) for number, _ in headings] == list(range(1, 15))
    words = [
        "build",
        "Data",
        "network",
        "learns",
        "Training",
        "good",
        "Calibration",
        "Robustness",
        "Errors",
        "Grad-CAM",
        "trust",
        "Export",
        "Exercises",
        "learned",
    ]
    assert all(word in title for word, (_, title) in zip(words, headings, strict=True))


def test_every_code_cell_is_announced_and_short(notebook):
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert len(cell.source.splitlines()) <= 20, cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_were_run_from_top_to_bottom_without_an_error(name):
    cells = code_cells(nbformat.read(PROJECT / name, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


def test_the_animation_is_html_which_every_page_shows(notebook):
    outputs = [o.data for cell in code_cells(notebook) for o in cell.outputs if "data" in o]
    (page,) = [data["text/html"] for data in outputs if "image/gif" in str(data.get("text/html"))]
    assert re.search(r'^<img src="data:image/gif;base64,[^"]+" alt="[^"]+" width="840">$', page)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_can_be_shown_on_github(name):
    assert (PROJECT / name).stat().st_size < 5_000_000
    assert "widgets" not in nbformat.read(PROJECT / name, as_version=4).metadata


def test_the_switches_are_two_cells_of_literals_the_important_ones_first(notebook):
    cells = [cell.source for cell in code_cells(notebook) if "#@title" in cell.source]
    found = [re.findall(r"^(\w+) = (.+?)  #@param", source, re.M) for source in cells]
    values = {
        name: json.loads(value.replace("True", "true").replace("False", "false"))
        for cell in found
        for name, value in cell
    }
    assert values == SWITCHES
    assert [name for name, _ in found[0]] == ["ARCH", "RECIPE", "EPOCHS", "TRAIN"]
    offered = json.loads(re.search(r"RECIPE = .*#@param (\[.*\])", cells[0]).group(1))
    assert offered == ["", *RECIPES]


def test_the_stored_outputs_are_of_a_run_on_cifar10(notebook, results):
    text = printed(notebook)
    assert "train 45,000 images" in re.sub(" +", " ", text) and "built-in sample" not in text
    assert len(re.findall(r"^epoch +\d+/", text, re.M)) == results["epochs"]
    assert f"accuracy {results['test_acc']:.2%}" in text
    assert results["sha256"] in text


# What is not measured but fixed: by the data, the definitions, the papers, the form of the app and
# of this text.
FIXED = {
    "0": "of an interval",
    "1": "of an interval",
    "2": "a block's stride, a name",
    "3": "of 3x3",
    "4": "of 4x4, T4",
    "10": "of ln 10, CIFAR-10",
    "15": "minutes that auto allows",
    "95": "percent, of an interval",
    "16": "bits of the export",
    "20": "in a name",
    "24": "of 24x24",
    "32": "of 32x32",
    "5": "of layer5",
    "8": "in a cell's name",
    "18": "of ResNet18",
    "94": "of airbench94",
    "2.30": "ln 10",
    "60,000": "images of CIFAR-10",
    "170": "MB to download",
    "100": "percent",
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_number_of_the_text_is_fixed_or_computed(name, results):
    """Measured numbers belong into a cell that computes them, or into results.json."""
    known = {key: value for key, value in results.items() if key != "metrics"}
    stored = set(re.findall(r"\d+(?:[.,]\d+)*", json.dumps(known)))
    for cell in nbformat.read(PROJECT / name, as_version=4).cells:
        if cell.cell_type != "markdown":
            continue
        text = re.sub(
            r"\]\([^)]*\)|arXiv:[\d.]+|\b(19|20)\d\d\b|^#+ \d+\.|^\*\*\d\.|^\d\. "
            r"|(section|exercise) \d+",
            " ",
            cell.source,
            flags=re.M,
        )
        for number in re.findall(r"\d+(?:[.,]\d+)*", text):
            assert number in FIXED or number in stored, (number, cell.source)


# ---- results ----


def test_results_hold_every_key(results):
    assert set(results) >= {
        "arch",
        "epochs",
        "seed",
        "seconds",
        "test_acc",
        "test_acc_tta",
        "train_images",
        "versions",
        "hardware",
        "val_acc",
        "parameters",
        "recipe",
        "sha256",
        "data",
    }
    assert results["data"] == "CIFAR-10" and results["train_images"] == 45_000


def test_the_seed_s_budget_reaches_93_percent(results):
    if results["arch"] != "ResNet18":
        pytest.skip("the owner of this copy has published another network")
    assert results["epochs"] <= 20 and results["test_acc"] >= 0.93


def test_the_committed_space_is_of_the_same_run(results):
    model, meta = load_bundle(PROJECT / "space")
    digest = hashlib.sha256((PROJECT / "space/model.safetensors").read_bytes()).hexdigest()
    assert results["sha256"] == meta["sha256"]["weights"] == digest
    assert meta["test_acc"] == results["test_acc"] and meta["architecture"] == results["arch"]
    of_its_name = build(results["arch"])
    for network in (model, of_its_name):
        assert sum(p.numel() for p in network.parameters()) == results["parameters"]
    assert meta["classes"] == list(CLASSES)
    assert (tuple(meta["mean"]), tuple(meta["std"])) == (CIFAR10_MEAN, CIFAR10_STD)
    for path in (PROJECT / "space/models").glob("*.py"):
        fresh = path.read_bytes() == (PROJECT / "models" / path.name).read_bytes()
        refresh = 'import utils; utils.refresh_sources("space")'
        assert fresh, f"{path}: `python -c '{refresh}'` brings it up to date"


def test_the_space_shows_at_most_fifty_tiles_that_are_errors():
    tiles = json.loads((PROJECT / "space/misclassified.json").read_text(encoding="utf-8"))
    assert 0 < len(tiles) <= 50
    for tile in tiles:
        probs = tile["probabilities"]
        assert probs.index(max(probs)) == tile["predicted"] != tile["true"] and sum(
            probs
        ) == pytest.approx(1, abs=1e-4)


# ---- README ----


def test_every_measured_number_of_the_readme_is_that_of_the_results(results):
    """Accuracies have two decimals and a percent sign; the table's first row is the headline."""
    timed = json.loads((report.RESULTS / "speed.json").read_text())["time_to_94"]
    accuracies = {f"{100 * results[key]:.2f} %" for key in ("test_acc", "test_acc_tta", "val_acc")}
    measured = {
        f"{100 * row[key]:.2f} %"
        for row in [*MEASURED, *STEPS, timed["ours"], timed["reference"]]
        for key in ("single", "tta", "ece")
        if row.get(key)
    }
    found = set(re.findall(r"\d+\.\d+ %", README))
    assert accuracies <= found <= accuracies | measured
    row = next(line for line in README.splitlines() if line.startswith(f"| {results['arch']}, "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == [
        f"{results['arch']}, {results['epochs']}, {results['train_images']:,}",
        f"{100 * results['test_acc']:.2f} % (n = 1)",
        f"{100 * results['test_acc_tta']:.2f} %",
    ]


def test_the_python_of_the_readme_runs_and_names_the_pictures(monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    told = capsys.readouterr().out
    assert told.endswith("(10, 32, 32)\n") and sum(f"'{name}'" in told for name in CLASSES) >= 8


def test_the_measured_tables_of_the_readme_are_those_of_the_files(results):
    speed = json.loads((report.RESULTS / "speed.json").read_text())
    table = report.readme_block(MEASURED, speed, results, trust.read())
    steps = leaderboard.short_table(STEPS)
    assert report.MARKS[0] + table + report.MARKS[1] in README
    assert report.LEADERBOARD_MARKS[0] + steps + report.LEADERBOARD_MARKS[1] in README


def test_the_tables_of_the_scaling_page_are_those_of_the_file():
    found = json.loads((PROJECT / "benchmarks/results/scaling.json").read_text())
    page = (PROJECT / "docs/scaling.md").read_text(encoding="utf-8")
    assert report.MARKS[0] + scaling.tables(found) + report.MARKS[1] in page


def test_measured_rows_hold_every_key():
    assert MEASURED
    for row in MEASURED:
        assert set(row) >= {
            "network",
            "recipe",
            "epochs",
            "train_images",
            "n",
            "single",
            "tta",
            "ece",
            "seconds",
            "machine",
            "seeds",
        }
        assert (
            row["network"] == RECIPES[row["recipe"]].network
            and row["epochs"] == RECIPES[row["recipe"]].epochs
        )
        assert row["n"] == len(row["seeds"]) == len(row["runs"])
        assert row["single"] == pytest.approx(sum(run["single"] for run in row["runs"]) / row["n"])
        assert 0.1 < row["single"] <= 1 and 0.1 < row["tta"] <= 1  # fractions


def test_the_training_log_of_the_readme_is_the_notebook_s(notebook, results):
    lines = re.findall(r"^    (epoch +\d+/\d+ .*)$", README, re.M)
    assert lines == [epoch_line(row, results["epochs"]) for row in results["metrics"]]
    assert all(line in printed(notebook) for line in lines)


def test_the_summary_of_the_readme_is_the_reference_s():
    table = re.search(r"```\n(-+\n +Layer \(type\).*?)```", README, re.S).group(1)
    reference = (Path(__file__).parent / "reference/resnet18_torchsummary.txt").read_text()
    assert [line.split() for line in table.splitlines()] == [
        line.split() for line in reference.strip().splitlines()
    ]


@pytest.mark.parametrize("network", ["CustomResNet", "FastNet"])
def test_the_parts_of_the_other_networks_in_the_readme_are_theirs(network):
    table = re.search(rf"`{network}`, .*?```\n(.*?)```", README[README.index("-49") :], re.S)
    lines = model_summary(build(network)).splitlines()
    assert [line.split() for line in table[1].splitlines()] == [line.split() for line in lines]


def test_pictures_exist_are_small_and_are_drawn_by_a_notebook_or_a_command():
    """Those of the README and of the page of results; no other picture is in images/."""
    page = (PROJECT / "docs/results.md").read_text(encoding="utf-8")
    in_readme = set(re.findall(r"!\[[^\]]+\]\(\./images/([^)]+)\)", README))
    shown = in_readme | set(re.findall(r"!\[[^\]]+\]\(\.\./images/([^)]+)\)", page))
    assert in_readme >= {
        "augmentation.png",
        "loss_metrics.png",
        "acc_metrics.png",
        "results.png",
        "grad_cam.png",
    }
    assert shown == {path.name for path in (PROJECT / "images").glob("*.[pg][ni][gf]")}
    cells = [
        cell.source
        for name in NOTEBOOKS
        for cell in code_cells(nbformat.read(PROJECT / name, as_version=4))
    ]
    commands = {
        "compute.png": report.__file__,
        "space.png": PROJECT / "tests/test_browser.py",
        "shortcuts.png": shortcuts.__file__,
        "learned_when.png": learned_when.__file__,
        "learned_when.gif": learned_when.__file__,
    }
    for name in shown:
        assert 0 < (PROJECT / "images" / name).stat().st_size <= 500_000, name
        drawn = Path(commands[name]).read_text() if name in commands else "\n".join(cells)
        assert Path(name).stem in drawn, name


def test_links_of_the_readme_lead_to_files():
    for link in re.findall(r"\]\(\.?/?([\w./-]+)\)", README):
        assert (PROJECT / link).exists(), link


def test_the_front_matter_of_the_space_names_tested_versions():
    text = (PROJECT / "space/README.md").read_text(encoding="utf-8")
    front = dict(re.findall(r"^(\w+): (.+)$", text.split("---")[1], re.M))
    constraints = (PROJECT / "constraints.txt").read_text()
    assert f"gradio=={front['sdk_version']}" in constraints and front["app_file"] == "app.py"
    pinned = re.findall(
        r"^(torch\w*==[\d.]+)", (PROJECT / "space/requirements.txt").read_text(), re.M
    )
    assert len(pinned) == 2 and all(pin in constraints.splitlines() for pin in pinned)


# ---- repository ----


def test_no_file_of_cifar10_and_no_checkpoint_is_committed():
    names = tracked_files()
    if names is None:
        pytest.skip("no git checkout, or no git")
    forbidden = re.compile(
        r"data_batch_|test_batch|batches\.meta|cifar-10-python|\.ckpt$|\.parquet$|^data/|^runs/"
    )
    assert [name for name in names if forbidden.search(name)] == []
    images = [name for name in names if name.endswith((".png", ".jpg", ".webp"))]
    assert all(name.startswith(("images/", "space/")) for name in images)


# ---- make run and make publish ----


def a_run(folder: Path, data: str, space: Path, ending: str = "") -> Path:
    cell = nbformat.v4.new_code_cell("1", execution_count=None if ending == "stopped" else 1)
    if ending == "error":
        cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    (folder / "images").mkdir(parents=True)
    (folder / "images/loss_metrics.png").write_text("curve")
    shutil.copytree(space, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "results.json").write_text(json.dumps({"data": data}))
    cells = [cell, nbformat.v4.new_code_cell(" ")]  # JupyterLab adds an empty one
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / run.NOTEBOOK)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(publish, "PROJECT", tmp_path)
    monkeypatch.setattr(run, "PROJECT", tmp_path)
    return tmp_path


def test_publish_promotes_the_newest_run_on_cifar10(project, exported_space, capsys):
    """The bundle, not the app, which is the project's; of another network nothing stays."""
    older = a_run(project / "runs/with a name of its own", "CIFAR-10", exported_space)
    os.utime(older / "results.json", (0, 0))
    (project / "runs/damaged").mkdir()
    (project / "runs/damaged/results.json").write_text('{"data": "CIF')
    a_run(project / "runs/20260101-000000", "CIFAR-10", exported_space)
    a_run(project / "runs/20260102-000000", "built-in sample, not CIFAR-10", exported_space)
    (project / "runs/not executed to its end").mkdir()
    (project / "runs/not executed to its end/results.json").write_text('{"data": "CIFAR-10"}')
    (project / "space/models").mkdir(parents=True)
    for name in ("app.py", "notes.txt", "models/mine.py", "models/fastnet.py"):
        (project / "space" / name).write_text("of the project")
    listed = {"sha256": {"files": {"models/fastnet.py": ""}}}
    (project / "space/model.json").write_text(json.dumps(listed))
    assert publish.publish(None) == 0
    assert f"Published {project / 'runs/20260101-000000'}" in capsys.readouterr().out
    assert (project / "images/loss_metrics.png").read_text() == "curve"
    assert {"space", "results.json", run.NOTEBOOK} <= {path.name for path in project.iterdir()}
    assert load_bundle(project / "space")[1] == load_bundle(exported_space)[1]
    assert not (project / "space/models/fastnet.py").exists()
    for name in ("app.py", "notes.txt", "models/mine.py"):
        assert (project / "space" / name).read_text() == "of the project"


@pytest.mark.parametrize(
    ("data", "ending", "words"),
    [
        ("built-in sample, not CIFAR-10", "", "No finished run on CIFAR-10 in runs/"),
        ("CIFAR-10", "error", "holds an error and is not published"),
        ("CIFAR-10", "stopped", "was not executed to its end and is not published"),
    ],
)
def test_publish_refuses_the_sample_and_a_run_that_failed_or_was_stopped(
    project, capsys, exported_space, data, ending, words
):
    a_run(project / "runs/20260101-000000", data, exported_space, ending)
    assert publish.publish(None) == 1 and not (project / "results.json").exists()
    assert words in capsys.readouterr().out


def test_publish_refuses_a_space_that_was_changed_and_changes_nothing(
    project, capsys, exported_space
):
    folder = a_run(project / "runs/20260101-000000", "CIFAR-10", exported_space)
    (folder / "space/models/resnet.py").write_text("changed")
    assert (
        publish.publish(None) == 1 and "models/resnet.py has the sha256" in capsys.readouterr().out
    )
    assert {path.name for path in project.iterdir()} == {"runs"}


def test_a_failing_cell_is_reported_and_the_notebook_up_to_it_is_kept(project, capsys, monkeypatch):
    cells = [
        nbformat.v4.new_markdown_cell("## 1. First"),
        nbformat.v4.new_code_cell("print('so far')"),
        nbformat.v4.new_code_cell("1 / 0"),
        nbformat.v4.new_code_cell("2", execution_count=7),  # of the stored notebook
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / run.NOTEBOOK)
    monkeypatch.setattr(run, "port_is_free", lambda: True)
    monkeypatch.setattr(run, "serve", lambda space: pytest.fail("nothing should be served"))
    monkeypatch.setenv("ERA_OUT_DIR", "")
    assert run.run() == 1
    told = capsys.readouterr().out
    assert "[cell 1 of 3] 1. First" in told and "so far" in told and "ZeroDivisionError" in told
    (kept,) = (project / "runs").glob(f"*/{run.NOTEBOOK}")
    assert "so far" in kept.read_text()
    assert nbformat.read(kept, as_version=4).cells[-1].execution_count is None


def program_of(project: Path, change: str = "") -> str:
    """The code of `make run` in another folder, with a change to the module."""
    return (
        f"import sys, pathlib; from tools import run; run.PROJECT = pathlib.Path({str(project)!r})"
        f"; run.PORT = 0\n{change}\nsys.exit(run.run())"
    )


def run_of(project: Path, *sources: str, **environment: str) -> subprocess.CompletedProcess:
    """Execute a notebook with these cells by `make run` in a separate process, output as bytes."""
    cells = [nbformat.v4.new_markdown_cell("## 1. First"), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / run.NOTEBOOK)
    return subprocess.run(
        [sys.executable, "-c", program_of(project, "run.serve = lambda space: 0")],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        timeout=600,
    )


UNAVAILABLE = dataload.DataUnavailable("no mirror answers")
BLOCKS = "print('\u2588\u2588 done', '\\u03b1 \\U0001f600')"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_does_not_end_a_program(encoding):
    code = f"from training import console; console.forgive_output(); {BLOCKS}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0 and " done" in done.stdout.decode(encoding), done.stderr


def test_what_a_terminal_cannot_show_does_not_end_a_run(tmp_path):
    done = run_of(tmp_path, BLOCKS, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr[-2000:]
    assert " done" in done.stdout.decode("ascii") and b"The executed notebook is" in done.stdout
    (kept,) = (tmp_path / "runs").glob(f"*/{run.NOTEBOOK}")
    assert "\u2588\u2588 done" in kept.read_text(encoding="utf-8")


def test_a_line_that_replaces_itself_is_not_written_into_a_file(tmp_path):
    source = "print('a\\n\\rbar 1', end=''); print('\\rbar 2', end=''{}); print('\\r     \\rb')"
    for flush in ("", ", flush=True"):  # in one message or in two
        told = run_of(tmp_path, source.format(flush), "print('\\r\\nc')").stdout.decode()
        assert "a\nb\n" in told and "c\n" in told and "bar" not in told
        time.sleep(1)  # a run's folder is named by the second


def test_another_notebook_is_executed_in_its_place(project, monkeypatch):
    cell = nbformat.v4.new_code_cell("print('1 %', end='\\r', flush=True); print('done')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project / "more.ipynb")
    monkeypatch.setattr(sys, "argv", ["tools.run", "execute", "more.ipynb"])
    assert run.main() == 0
    (executed,) = nbformat.read(project / "more.ipynb", as_version=4).cells
    assert [output["text"] for output in executed["outputs"]] == ["done\n"]  # in one piece


def run_module(send, folder: Path, encoding: str, *arguments: str) -> None:
    """Run a module as `python -m` does, where standard output has this encoding.

    What it prints goes into out.txt and err.txt of the folder, its exit status is sent.
    """
    out = (folder / "out.txt").open("w", encoding=encoding)
    err = (folder / "err.txt").open("w", encoding=encoding)
    sys.stdout, sys.stderr = out, err
    sys.argv = list(arguments)
    os.chdir(PROJECT)
    code = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # as the interpreter does it
            print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    send(code)


def train_where_loading_fails(send, folder: Path, encoding: str) -> None:
    """The training's script, which prints a block and exits where it would load the images."""
    os.environ["ERA_ARCH"] = "FastNet"  # 'auto' says what it chose
    dataload.load_splits = dataload.sample_splits = lambda *_: sys.exit(print("\u2588"))
    run_module(send, folder, encoding, "training")


def train_with_a_wrong_switch(send, folder: Path, encoding: str) -> None:
    os.environ["ERA_EPOCHS"] = "many"
    run_module(send, folder, encoding, "training")


def test_the_training_script_explains_itself_and_takes_no_other_arguments():
    for argument, code, words in (("--help", 0, "The switches are the"), ("--epochs=5", 2, "--ep")):
        command = [sys.executable, "-m", "training", argument]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr


def test_a_smoke_test_of_the_training_script_needs_no_cifar10(tmp_path):
    environment = {"SMOKE_TEST": "1", "ERA_ARCH": "FastNet", "DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "training"]
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "epoch   2/2" in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answers", "asks", "sends"),
    [
        ([], True, True),
        (["YES=0", "DRY_RUN=0"], True, True),
        (["YES=no", "DRY_RUN=no"], True, True),
        (["YES=1"], False, True),
        (["DRY_RUN=1", "MODEL=c/d"], True, False),
    ],
)
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_push_takes_no_for_a_no(answers, asks, sends):
    command = ["make", "-n", "push", *answers]  # the address from the environment, as on GitHub
    told = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {"SPACE": "a/b"}, capture_output=True, text=True
    ).stdout
    assert ("--yes" not in told, "--dry-run" not in told) == (asks, sends)
    assert "push a/b" in told and ("--model c/d" in told) == ("MODEL=c/d" in answers)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_training_script_prints_what_it_can(tmp_path, encoding):
    assert list(WarmProcess(train_where_loading_fails, tmp_path, encoding)) == [None]
    assert (tmp_path / "out.txt").read_text().strip() == "?"


def push_without_a_network(send, folder: Path, encoding: str, *command: str) -> None:
    """The pushing script, which need not try half a minute to find the network."""
    from huggingface_hub import HfApi

    def list_repo_files(*_, **__):
        raise OSError("no network")

    HfApi.list_repo_files = list_repo_files
    run_module(send, folder, encoding, *command)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_pushing_script_prints_what_it_can(exported_space, tmp_path, encoding):
    space = shutil.copytree(exported_space, tmp_path / "space")
    (space / "examples/LICENSE-\u732b.txt").write_text("a licence", encoding="utf-8")
    command = ["tools.push", "me/mine", "--dry-run", "--space", str(space)]
    assert list(WarmProcess(push_without_a_network, tmp_path, encoding, *command)) == [0]
    assert "LICENSE-?.txt" in (tmp_path / "out.txt").read_text(encoding)


def test_a_reader_that_has_gone_does_not_end_a_program(tmp_path):
    code = (
        "import pathlib, sys; from training import console; console.forgive_output()\n"
        "for _ in range(20000): print('more', flush=_ % 2)\n"
        f"pathlib.Path({str(tmp_path / 'end')!r}).touch()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(60) == 0 and (tmp_path / "end").exists() and child.stderr.read() == b""
    child.stderr.close()


def test_a_log_file_grows_line_by_line():
    code = (
        "import os; from training import console; console.forgive_output()\n"
        "print('first'); os._exit(0)  # writes nothing that is still buffered"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE)
    assert done.stdout == b"first\n"


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
def test_standard_output_may_be_closed():
    code = "from training import console; console.forgive_output(); print('unheard', flush=True)"
    command = f'"{sys.executable}" -c "{code}" >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=PROJECT).returncode == 0


def test_figures_of_a_run_are_pictures(tmp_path):
    source = "import matplotlib.pyplot as plt\nplt.subplots()[0]"
    assert run_of(tmp_path, source, MPLBACKEND="TkAgg").returncode == 0
    (kept,) = (tmp_path / "runs").glob(f"*/{run.NOTEBOOK}")
    (cell,) = code_cells(nbformat.read(kept, as_version=4))
    assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        # macOS: "Segmentation fault: 11"
        ("os.kill(os.getpid(), signal.SIGSEGV)", "signal 11 (Segmentation fault"),
        ("os._exit(3)", "its exit code is 3"),
        ("os._exit(137)", "memory ran out"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_a_kernel_that_dies_is_told_from_ctrl_c_and_of_what(tmp_path, how, told):
    done = run_of(tmp_path, "print('so far')", f"import os, signal; {how}")
    text = done.stdout.decode()
    assert done.returncode == 1 and "kernel died" in text and told in text and "Stopped" not in text
    assert "Run again to continue the training" in text
    (kept,) = (tmp_path / "runs").glob(f"*/{run.NOTEBOOK}")
    assert "so far" in kept.read_text(encoding="utf-8")


@pytest.mark.parametrize(("system", "options"), [("nt", []), ("posix", [socket.SO_REUSEADDR])])
def test_a_port_is_tried_without_reuse_on_windows(monkeypatch, system, options):
    asked = []

    class Socket(socket.socket):
        def setsockopt(self, level, option, value):
            asked.append(option)

    monkeypatch.setattr(run.socket, "socket", Socket)
    monkeypatch.setattr(run, "os", SimpleNamespace(name=system))
    monkeypatch.setattr(run, "PORT", "0")
    assert run.port_is_free() and asked == options


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_an_app_ends_with_what_serves_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    app = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), None).serve_forever()"
    (tmp_path / "app.py").write_text(app)
    code = (
        "import pathlib, sys; from tools import run; sys.exit(run.serve(pathlib.Path(sys.argv[1])))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=PROJECT,
        env=os.environ | {"GRADIO_SERVER_PORT": port},
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout and child.stdout.readline() == b"\n"  # before the line that tells
        child.terminate()
        assert child.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 5)
    finally:
        child.kill()
        child.stdout.close()


def test_a_port_in_use_is_seen_and_nothing_is_served(monkeypatch, tmp_path, capsys):
    """Not even the other process's app, as if it were ours."""
    monkeypatch.setattr(run.subprocess, "Popen", lambda *_, **__: pytest.fail("it was started"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        monkeypatch.setattr(run, "PORT", port)
        assert not run.port_is_free() and run.serve(tmp_path) == 1
    assert f"Port {port} is in use" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["CIFAR-10", "built-in sample, not CIFAR-10"])
def test_a_run_serves_its_own_space_or_after_the_sample_the_committed_one(
    project, monkeypatch, data
):
    served = []
    monkeypatch.setattr(run, "port_is_free", lambda: True)
    monkeypatch.setattr(run, "serve", lambda space: served.append(space) or 0)
    monkeypatch.setenv("ERA_OUT_DIR", "")  # `run` sets it
    results = json.dumps({"data": data})
    monkeypatch.setattr(run, "execute", lambda out: (out / "results.json").write_text(results))
    assert run.run() == 0
    (folder,) = (project / "runs").iterdir()
    assert os.environ["ERA_OUT_DIR"] == f"runs/{folder.name}"  # not the project itself
    assert served == [folder / "space" if data == "CIFAR-10" else run.SPACE]


def test_make_app_serves_the_committed_space_until_ctrl_c(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.run", "app"],
        cwd=PROJECT,
        env=os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in child.stdout if "answers on" in line)
        address = re.search(r"http://\S+", line)[0]
        assert address == f"http://127.0.0.1:{port}"
        assert "CIFAR-10" in httpx.get(address, timeout=60).text
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
    finally:
        child.kill()


def stored(tmp_path, sha256: str) -> Run:
    results = {"sha256": sha256, "metrics": [{"epoch": 0, "train_loss": 1.0}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return stored_run(PROJECT / "space", 42, tmp_path / "results.json")


def test_the_stored_run_has_the_metrics_of_its_own_weights_only(tmp_path):
    meta = json.loads((PROJECT / "space/model.json").read_text())
    own = stored(tmp_path, meta["sha256"]["weights"])
    assert own.metadata == meta["training"] and type(own.model).__name__ == meta["architecture"]
    assert own.metrics_csv and read_table(own.metrics_csv)["train_loss"].tolist() == [1.0]
    assert stored(tmp_path, "0" * 64).metrics_csv is None


def test_the_stored_run_is_validated_on_its_own_validation_images_only():
    with pytest.raises(InvalidValue, match="expected SEED = 42, got 7: another one would validate"):
        stored_run(PROJECT / "space", 7)


def test_the_results_name_the_images_that_were_measured(notebook, tmp_path, monkeypatch):
    """Not those of the training: without CIFAR-10, the stored network is measured on the sample."""
    (cell,) = (cell for cell in notebook.cells if "results = trained |" in cell.source)
    names = {
        "settings": SimpleNamespace(output_folder=lambda *_: tmp_path),
        "s": SimpleNamespace(recipe_name="resnet18-20"),
        "run": SimpleNamespace(metadata={"data": "CIFAR-10"}, metrics_csv=None),
        "splits": SimpleNamespace(source="built-in sample, not CIFAR-10"),
        "bundle": SimpleNamespace(load_bundle=lambda _: (lambda images: images, {})),
        "drawing": SimpleNamespace(copy_figures=lambda *_: None),
        "model": type("Fake", (), {"cpu": lambda self: self, "__call__": lambda self, x: x})(),
        "batch": torch.eye(3),
        "torch": torch,
        "CLASSES": CLASSES,
    }
    given = "is_cifar10 temperature threshold test_acc test_acc_tta wrong denormalize confusion"
    names |= dict.fromkeys(f"{given} arch parameters drafts".split())
    monkeypatch.setattr(utils, "export_to_space", lambda *_: {"sha256": {"weights": "0"}})
    exec(cell.source, names)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["data"] == "built-in sample, not CIFAR-10"


def test_without_cifar10_the_notebook_goes_on_with_the_sample(notebook, capsys, tmp_path):
    (cell,) = (cell for cell in notebook.cells if cell.id == "data")
    s = SimpleNamespace(smoke=False, data_dir=tmp_path, seed=42)
    names = {"s": s, "settings": SimpleNamespace(scratch_folder=lambda: tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        patch.setattr(dataload, "load_splits", lambda *_: (_ for _ in ()).throw(UNAVAILABLE))
        exec(cell.source, names)
    assert "Continuing with the built-in sample" in capsys.readouterr().out
    assert not names["is_cifar10"] and names["note"] == names["splits"].source


@pytest.mark.parametrize("port", ["seven", "70000", "-1", "0"])
def test_a_port_that_is_none_is_refused(monkeypatch, capsys, port):
    monkeypatch.setattr(run, "PORT", port)
    monkeypatch.setattr(sys, "argv", ["tools.run", "app"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "GRADIO_SERVER_PORT: expected a number" in capsys.readouterr().err


def test_an_empty_port_is_the_default():
    done = subprocess.run(
        [sys.executable, "-c", "from tools import run; print(run.PORT)"],
        cwd=PROJECT,
        env=os.environ | {"GRADIO_SERVER_PORT": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "7860"


def test_the_script_refuses_in_a_sentence(tmp_path):
    assert list(WarmProcess(train_with_a_wrong_switch, tmp_path, "utf-8")) != [0]
    assert (tmp_path / "err.txt").read_text().splitlines() == [
        "InvalidValue: ERA_EPOCHS: expected a whole number from 0 to 10000, got 'many'"
    ]


def test_ctrl_c_stops_the_notebook_and_says_how_to_go_on(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("## 1. Wait"),
        nbformat.v4.new_code_cell("import time; time.sleep(60)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / run.NOTEBOOK)
    command = [sys.executable, "-c", program_of(tmp_path)]
    child = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        for line in child.stdout:
            if "[cell 1 of 1]" in line:
                break
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        rest = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    assert child.returncode == 130 and "Run again to continue the training" in rest
    assert list((tmp_path / "runs").glob(f"*/{run.NOTEBOOK}"))
