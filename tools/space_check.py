"""`make space-check`: the Space in an environment of its own, as Hugging Face builds it, with nothing else installed.

Installs space/requirements.txt and the front matter's gradio into an empty environment (Python 3.12 if there is one),
copies space/ away from the project, serves it there, and asks it for an example's classes and maps.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SPACE = Path(__file__).resolve().parent.parent / "space"
SMOKE_TEST = """
import json, sys, app
from gradio_client import Client, handle_file
_, address, _ = app.demo.queue().launch(prevent_thread_lock=True, quiet=True)
client, cat, stage = Client(address, verbose=False), handle_file("examples/cat.png"), list(app.STAGES)[-1]
_, answer, _ = client.predict(cat, 3, api_name="/classify")
maps = client.predict(cat, True, 2, stage, "GradCAM", 0.4, api_name="/explain")
panels, _ = client.predict(True, 2, app.ANY, app.ANY, True, stage, "LayerCAM", 0.4, api_name="/misclassified")
app.demo.close(verbose=False)
print(json.dumps({"python": sys.version.split()[0], "says": answer["label"], "classes": len(answer["confidences"]),
                  "maps": len(maps), "panels": len(panels)}))
"""


def find_python(version: str) -> str:
    """An interpreter of this version, such as "3.12", or the one that runs this."""
    beside = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python")))
    for found in (shutil.which(f"python{version}"), *beside):
        if (
            found
            and not subprocess.run(
                [found, "-c", "import ensurepip"], capture_output=True
            ).returncode
        ):
            return found
    return sys.executable


def main() -> int:
    version = re.search(
        r"^sdk_version: (\S+)$", (SPACE / "README.md").read_text(encoding="utf-8"), re.M
    ).group(1)
    with tempfile.TemporaryDirectory() as folder:
        environment, copy = Path(folder) / "env", Path(folder) / "space"
        print(
            f"installing requirements.txt and gradio {version} into an empty environment",
            flush=True,
        )
        subprocess.check_call([find_python("3.12"), "-m", "venv", environment])
        pip = [
            environment / "bin/python",
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
        ]
        subprocess.check_call([*pip, "-r", SPACE / "requirements.txt", f"gradio=={version}"])
        shutil.copytree(SPACE, copy, ignore=shutil.ignore_patterns("__pycache__", ".gradio"))
        done = subprocess.run(
            [environment / "bin/python", "-c", SMOKE_TEST],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=300,
        )
        print(done.stdout, done.stderr[-2000:], sep="\n")
        said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        right = said | {"says": "cat", "classes": 3, "maps": 2, "panels": 6} == said and bool(said)
        print("the Space works on its own" if right else "the Space does NOT work on its own")
        return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
