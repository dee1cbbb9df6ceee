"""`make publish`: promote a finished run on CIFAR-10 to the committed results."""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

from evaluation.drawing import copy_figures
from models.bundle import bundle_files, load_bundle, new_bundle
from tools.colab_badge import set_badge
from tools.project import NOTEBOOK, PROJECT, read_results
from training.console import forgive_output


def run_to_publish(folder: str | Path | None) -> Path | None:
    """Find the run to publish, or print why there is none.

    Args:
        folder: of the run; None takes the newest one on CIFAR-10.

    Returns:
        The folder of a run on CIFAR-10 whose notebook was executed without an error, else None.
    """
    results = (PROJECT / "runs").glob("*/results.json")
    newest_first = sorted(results, key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = [Path(folder)] if folder else [path.parent for path in newest_first]
    finished = (
        path
        for path in candidates
        if (path / NOTEBOOK).exists() and read_results(path).get("data") == "CIFAR-10"
    )
    source = next(finished, None)
    if source is None:
        print(f"No finished run on CIFAR-10 in {folder or 'runs/'}: `make run` makes one.")
        return None
    notebook = nbformat.read(source / NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if any(output.output_type == "error" for output in outputs):
        print(f"{source / NOTEBOOK} holds an error and is not published.")
        return None
    code = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    if not all(cell.execution_count for cell in code):
        print(f"{source / NOTEBOOK} was not executed to its end and is not published.")
        return None
    return source


def publish(folder: str | Path | None) -> int:
    """Copy a run's images/, bundle, results.json and executed notebook into the project.

    The app itself is not replaced. If this is killed, the next call publishes all of it.

    Args:
        folder: of the run; None takes the newest one on CIFAR-10.

    Returns:
        The exit status: 0, or 1 if there is no such run or its bundle is damaged.
    """
    source = run_to_publish(folder)
    if source is None:
        return 1
    try:
        _, meta = load_bundle(source / "space")
    except (OSError, ValueError) as error:
        print(f"The Space of this run cannot be published: {error}")
        return 1
    with new_bundle(PROJECT / "space") as staged:
        (staged / "models").mkdir()
        for name in bundle_files(meta):
            shutil.copyfile(source / "space" / name, staged / name)
    copy_figures(source / "images", PROJECT / "images")
    for name in (NOTEBOOK, "results.json"):
        partial = shutil.copyfile(source / name, PROJECT / f"{name}.part")
        partial.replace(PROJECT / name)
    try:
        set_badge(PROJECT)
    except (OSError, ValueError) as error:  # the results are published nevertheless
        print(f"The Colab badge was not set: {error}")
    print(
        f"Published {source}. Look at it, bring README.md's numbers up to date (`make test`"
        f" compares them), then commit it with images/, space/, results.json and {NOTEBOOK}."
    )
    return 0


def main() -> int:
    """Parse the command line and publish."""
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", metavar="RUN", help="its folder; default: the newest on CIFAR-10"
    )
    return publish(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
