"""`make publish`: promote a finished run on CIFAR-10 to the committed results."""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

from evaluation.drawing import copy_figures
from models import bundle
from tools.run import NOTEBOOK, PROJECT, results
from training.console import forgive_output


def run_to_publish(folder: str | None) -> Path | None:
    """The folder of that run, or of the newest, if it was on CIFAR-10 and without an error.

    Else say why not.
    """
    candidates = [Path(folder)] if folder else sorted((PROJECT / "runs").glob("*"), reverse=True)
    source = next((path for path in candidates if results(path).get("data") == "CIFAR-10"), None)
    if source is None or not (source / NOTEBOOK).exists():
        print(f"No finished run on CIFAR-10 in {folder or 'runs/'}: `make run` makes one.")
        return None
    notebook = nbformat.read(source / NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if any(output.output_type == "error" for output in outputs):
        print(f"{source / NOTEBOOK} holds an error and is not published.")
        return None
    return source


def publish(folder: str | None) -> int:
    """Copy images/, the bundle of space/, results.json and the executed notebook of a run into the project.

    The app itself stays as the project has it. Who is killed meanwhile publishes again.
    """
    source = run_to_publish(folder)
    if source is None:
        return 1
    try:
        _, meta = bundle.load_bundle(source / "space")
    except (OSError, ValueError) as error:
        print(f"The Space of this run cannot be published: {error}")
        return 1
    with bundle.new_bundle(PROJECT / "space") as staged:
        (staged / "models").mkdir()
        for name in bundle.bundle_files(meta):
            shutil.copyfile(source / "space" / name, staged / name)
    copy_figures(source / "images", PROJECT / "images")
    for name in (NOTEBOOK, "results.json"):
        partial = shutil.copyfile(source / name, PROJECT / f"{name}.part")
        partial.replace(PROJECT / name)
    print(
        f"Published {source}. Look at it, bring README.md's numbers up to date (`make test` compares"
        f" them), then commit it with images/, space/, results.json and {NOTEBOOK}."
    )
    return 0


def main() -> int:
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="the run, default: the newest on CIFAR-10")
    return publish(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
