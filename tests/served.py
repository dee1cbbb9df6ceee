"""Servers of the Space for the tests of the app and of its page.

Importing Gradio and torch takes ten seconds of CPU time, so all servers but those that show how the
app starts are forked from one process that has imported them, and nothing of the project.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from dataload import CLASSES, denormalize
from evaluation.errors import plot_confusion
from models.registry import build
from tests.conftest import space_meta, wrong_predictions
from utils import export_to_space

PROCESSES = {}  # of the servers: address -> process id
# For each line of JSON, `python app.py` in a folder, with its output in a file; prints its process.
FORK = """
import json, os, runpy, signal, sys
sys.path.remove("")
import gradio, pytorch_grad_cam, safetensors.torch, torch, PIL.ImageCms
from gradio import http_server
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended servers leave nothing behind
for line in sys.stdin:
    folder, environment, log = json.loads(line)
    process = os.fork()
    if process:
        print(process, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, name in enumerate((os.devnull, log, log)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    http_server.INITIAL_PORT_VALUE = int(environment["GRADIO_SERVER_PORT"])  # read when imported
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["app.py"]
    runpy.run_path("app.py", run_name="__main__")
"""


def few_variables() -> dict[str, str]:
    """What an app needs of this process's environment."""
    names = ("PATH", "HOME", "SYSTEMROOT", "LD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    own = {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    # Else macOS asks for its proxies by what breaks in a fork.
    return kept | own | {"no_proxy": "*"}


@functools.cache
def forker() -> subprocess.Popen:
    """The process that servers are forked from."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORK],
        cwd="/",
        env=few_variables(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.terminate)
    return process


def start_server(folder: Path, environment: dict[str, str], log: Path, new: bool) -> int:
    """Start an app, in a new Python or a forked one; return its process id."""
    if new:
        with log.open("w") as file:
            command = [sys.executable, "app.py"]
            return subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=file
            ).pid
    fork = forker()
    assert fork.stdin and fork.stdout
    fork.stdin.write(json.dumps([str(folder), environment, str(log)]) + "\n")
    fork.stdin.flush()
    return int(fork.stdout.readline())


def is_running(process: int) -> bool:
    """Whether a server has not ended yet."""
    with contextlib.suppress(ChildProcessError):  # a forked one is no child of this process
        return os.waitpid(process, os.WNOHANG) == (0, 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


@contextlib.contextmanager
def serve(folder: Path, uploads: Path, new: bool = False, **variables: str) -> Iterator[str]:
    """Serve the app of a copied folder, away from the project, and yield its address.

    Args:
        folder: of the app.
        uploads: for its files and its log.
        new: run `python app.py` instead of forking.
        variables: of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(uploads)}
    log, address = uploads / "server.log", f"http://127.0.0.1:{port}"
    log.unlink(missing_ok=True)
    process = start_server(folder, few_variables() | own | variables, log, new)
    try:
        wait_until(lambda: answers(address) or not is_running(process), 300)
        assert is_running(process), log.read_text()
        PROCESSES[address] = process
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        wait_until(lambda: not is_running(process), 30)


def answers(address: str) -> bool:
    """Whether a server has started."""
    try:
        return httpx.get(address + "/config").status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.1)


def files_of(folder: Path) -> set[Path]:
    """The files that an app keeps."""
    # Not rglob: until Python 3.12 it fails where a folder is removed meanwhile.
    found = {Path(parent, name) for parent, _, names in os.walk(folder) for name in names}
    return {path for path in found if path.name != "server.log"}


def copy_space(exported: Path, folder: Path) -> Path:
    """Copy the exported Space, with ten example pictures even where the repository has none."""
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples").mkdir(exist_ok=True)
    for i, name in enumerate(CLASSES):
        if not (folder / "examples" / f"{name}.png").exists():
            Image.new("RGB", (64, 48), (25 * i, 90, 200 - 20 * i)).save(
                folder / "examples" / f"{name}.png"
            )
    return folder


@functools.cache
def export_other(parent: Path, classes: tuple[str, ...], mistakes: int) -> Path:
    """Export the Space of an untrained ResNet18 of these classes, with so many stored mistakes.

    There is never evidence for its last class: that logit has negative weights of features that
    are not negative.
    """
    folder = parent / f"{len(classes)} classes, {mistakes} mistakes"
    torch.manual_seed(0)
    model = build("ResNet18", len(classes)) if len(classes) != 10 else build("ResNet18")
    with torch.no_grad():
        model.linear.weight[-1] = -model.linear.weight[-1].abs()
    images = np.random.default_rng(0).integers(0, 256, (mistakes + 1, 32, 32, 3), dtype=np.uint8)
    labels = np.zeros(mistakes + 1, int)
    wrong = [
        one._replace(probs=one.probs[: len(classes)])
        for one in wrong_predictions(images, labels)[:mistakes]
    ]
    confusion = plot_confusion(wrong, np.arange(len(classes)), list(classes))
    export_to_space(
        folder, model, space_meta() | {"classes": list(classes)}, wrong, denormalize, confusion
    )
    return copy_space(folder, parent / f"{folder.name}, alone")


def is_sentence(answer: str) -> bool:
    """Whether the server's answer is an error that was written for a reader."""
    kind, _, data = answer.strip().partition("\ndata: ")
    text = json.loads(data)["error"] if kind == "event: error" else ""
    return bool(re.match(r"[A-Z].+[.]$", text)) and not re.search(
        r"Traceback|object at|pydantic|Errno", text
    )
