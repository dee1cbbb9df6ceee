"""`make colab-check`: the notebook in an environment with what Colab preinstalls, on Python 3.13 where there is one.

Installs colab.txt into an empty environment, executes a copy of the project's notebook there in smoke mode, and says
whether its install cell changed a package that was there: on Colab that would need a restart.
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

from tools.space_check import find_python
from training.console import forgive_output

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = "ERA_S12_Assignment.ipynb"


def packages(python: Path) -> dict[str, str]:
    """The packages of an environment and their versions."""
    listed = subprocess.check_output(
        [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    )
    return {package["name"]: package["version"] for package in json.loads(listed)}


def main() -> int:
    forgive_output()
    with tempfile.TemporaryDirectory() as folder:
        environment, copy = Path(folder) / "env", Path(folder) / "project"
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        kernels = Path(folder) / "jupyter/kernels/colab"
        print("installing what Colab preinstalls into an empty environment", flush=True)
        subprocess.check_call([find_python("3.13"), "-m", "venv", environment])
        subprocess.check_call(
            [
                python,
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "-r",
                Path(__file__).with_name("colab.txt"),
            ]
        )
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=PROJECT, text=True).split(
            "\0"
        )
        for name in filter(None, tracked):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, copy / name)
        kernels.mkdir(parents=True)
        command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": command, "display_name": "Colab", "language": "python"}
        (kernels / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
        os.environ |= {"JUPYTER_PATH": str(kernels.parent.parent), "SMOKE_TEST": "1"}
        before = packages(python)
        print("executing the notebook", flush=True)
        notebook = nbformat.read(copy / NOTEBOOK, as_version=4)
        NotebookClient(
            notebook, timeout=1200, kernel_name="colab", resources={"metadata": {"path": str(copy)}}
        ).execute()  # raises at the first cell that fails
        after = packages(python)
        changed = {
            name: (version, after.get(name))
            for name, version in before.items()
            if after.get(name) != version
        }
        print("installed:", ", ".join(sorted(set(after) - set(before))))
        print(f"changed: {changed or 'nothing'}")
        print(
            "the notebook runs as on Colab"
            if not changed
            else "the notebook would need a RESTART on Colab"
        )
        return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
