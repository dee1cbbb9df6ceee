"""`make colab-check`: run the notebook in an environment with what Colab preinstalls.

Installs colab.txt into an empty environment (with Python 3.13 if it is installed), executes a copy
of the project's notebook there in smoke mode, serves the app for a moment, and says whether the
install cell changed a package that was installed: on Colab that would need a restart.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tools.project import NOTEBOOK, PROJECT
from tools.space_check import create_environment
from training.console import forgive_output


def installed_packages(python: Path) -> dict[str, str]:
    """Return the packages of an interpreter's environment and their versions."""
    listed = subprocess.check_output(
        [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    )
    return {package["name"]: package["version"] for package in json.loads(listed)}


def copy_project(target: Path) -> None:
    """Copy all files that git tracks."""
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=PROJECT, text=True)
    for name in filter(None, tracked.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, target / name)


def install_kernel(python: Path, jupyter: Path) -> None:
    """Let Jupyter find an interpreter as the kernel 'colab'.

    Args:
        python: the interpreter.
        jupyter: a folder, which is then in JUPYTER_PATH.
    """
    kernel = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
    }
    (jupyter / "kernels/colab").mkdir(parents=True)
    (jupyter / "kernels/colab/kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(jupyter)


def execute(project: Path) -> None:
    """Execute the notebook of a copy of the project in smoke mode, and raise if a cell fails."""
    os.environ["SMOKE_TEST"] = "1"
    notebook = nbformat.read(project / NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(project)}}
    NotebookClient(notebook, timeout=1200, kernel_name="colab", resources=resources).execute()


def load_app(python: Path, project: Path) -> None:
    """Load the app, as LAUNCH = True does at the end of a training; raise if that fails."""
    code = "from utils import load_app; load_app('space').serve(prevent_thread_lock=True)"
    subprocess.check_call([python, "-c", code], cwd=project)


def main() -> int:
    """Run the check, and return 0 if no installed package was changed."""
    forgive_output()
    with tempfile.TemporaryDirectory() as folder:
        print("installing what Colab preinstalls into an empty environment", flush=True)
        packages = ("-r", Path(__file__).with_name("colab.txt"))
        python = create_environment(Path(folder) / "env", "3.13", *packages)
        copy_project(Path(folder) / "project")
        install_kernel(python, Path(folder) / "jupyter")
        before = installed_packages(python)
        print("executing the notebook", flush=True)
        execute(Path(folder) / "project")
        load_app(python, Path(folder) / "project")
        after = installed_packages(python)
    changed = {
        name: (version, after.get(name))
        for name, version in before.items()
        if after.get(name) != version
    }
    print("installed:", ", ".join(sorted(set(after) - set(before))))
    print(f"changed: {changed or 'nothing'}")
    would = "would need a RESTART" if changed else "runs as"
    print(f"the notebook {would} on Colab")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
