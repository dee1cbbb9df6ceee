"""`make space-check`: try the Space in an empty environment, as Hugging Face builds it.

Installs space/requirements.txt and the gradio that space/README.md names (with Python 3.12 if it is
installed), copies space/ away from the project, serves it there, and asks it for the classes and
heatmaps of an example.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.project import SPACE

EXPECTED = {"classes": 3, "maps": 2, "panels": 6}
SMOKE_TEST = """
import json, sys, app
from gradio_client import Client, handle_file
app.serve(prevent_thread_lock=True, quiet=True)
client, cat = Client(app.demo.local_url, verbose=False), handle_file("examples/cat.png")
stage = list(app.STAGES)[-1]
_, answer, _ = client.predict(cat, 3, api_name="/classify")
maps = client.predict(cat, True, 2, stage, "GradCAM", 0.4, api_name="/explain")
wrong = (True, 2, app.ANY, app.ANY, True, stage, "LayerCAM", 0.4)
panels, _ = client.predict(*wrong, api_name="/misclassified")
app.demo.close(verbose=False)
print(json.dumps({"python": sys.version.split()[0], "maps": len(maps), "panels": len(panels),
                  "classes": len(answer["confidences"])}))
"""


def find_python(version: str) -> str:
    """Find an interpreter that can create environments.

    Args:
        version: such as "3.12".

    Returns:
        Its path, or that of the running interpreter if there is none of this version.
    """
    of_pyenv = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python")))
    for python in (shutil.which(f"python{version}"), *of_pyenv):
        command = [python, "-c", "import ensurepip"]
        if python and not subprocess.run(command, capture_output=True).returncode:
            return python
    return sys.executable


def create_environment(folder: Path, version: str, *packages: str | Path) -> Path:
    """Create a virtual environment and install packages.

    Args:
        folder: for the environment.
        version: of Python, if it is installed.
        packages: arguments of `pip install`.

    Returns:
        The path of its interpreter.
    """
    subprocess.check_call([find_python(version), "-m", "venv", folder])
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.check_call([*pip, *packages])
    return python


def gradio_version() -> str:
    """Read the version of gradio from the front matter of the Space's README."""
    readme = (SPACE / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^sdk_version: (\S+)$", readme, re.M)
    if found is None:
        raise SystemExit("space/README.md: expected a line 'sdk_version: ...', found none")
    return found.group(1)


def main() -> int:
    """Try the Space, and return 0 if it gives what is expected."""
    version = gradio_version()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "space"
        print(
            f"installing requirements.txt and gradio {version} into an empty environment",
            flush=True,
        )
        packages = ("-r", SPACE / "requirements.txt", f"gradio=={version}")
        python = create_environment(Path(folder) / "env", "3.12", *packages)
        shutil.copytree(SPACE, copy, ignore=shutil.ignore_patterns("__pycache__", ".gradio"))
        command = [python, "-c", SMOKE_TEST]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    print(done.stdout, done.stderr[-2000:], sep="\n")
    answers = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    works = EXPECTED.items() <= answers.items()
    print("the Space works on its own" if works else "the Space does NOT work on its own")
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
