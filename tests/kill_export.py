"""Exports, or publishes, again and again, killed before one or another of its changes of files.

After each the folder is loaded: it has to be all of the old bundle or all of the new one.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import utils
from dataload import CLASSES, denormalize
from evaluation.bundle_check import logits_of_bundle
from evaluation.errors import plot_confusion
from models.bundle import load_bundle
from models.registry import build
from tests.conftest import space_meta, wrong_predictions
from tools import publish

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
OLD, NEW = ("CustomResNet", 3), ("FastNet", 12)  # the network, and how many misclassified images


def export(folder: Path, arch: str, count: int) -> None:
    """Export an untrained network."""
    images, labels = np.zeros((count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10
    wrong = wrong_predictions(images, labels)
    confusion = plot_confusion(wrong, np.arange(count + 10) % 10, CLASSES)
    utils.export_to_space(folder, build(arch), space_meta(), wrong, denormalize, confusion)


def watch(folder: Path, stop: int) -> Callable[[], tuple[int, int]]:
    """Kill this process before its change number `stop` in a folder, -1: never.

    Returns a function that gives the number of the change from which on the new bundle counts, and
    how many there were.
    """
    seen, commit = 0, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen, commit
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in CHANGES) and any(str(folder) in str(value) for value in arguments):
            if seen == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "os.rename" and str(arguments[1]).endswith(".ready"):
                commit = seen
            seen += 1

    sys.addaudithook(hook)
    return lambda: (commit, seen)


def attempt(project: Path, action: Callable[[], object], stop: int) -> int:
    """Do it to a fresh copy of the old folder, in a process that is killed.

    Returns how that process ended.
    """
    shutil.rmtree(project / "space", ignore_errors=True)
    shutil.copytree(project / "pristine", project / "space")
    child = os.fork()
    if not child:
        numbers = watch(project, stop)
        action()
        (project.parent / "numbers").write_text(json.dumps(numbers()))
        os._exit(0)
    return os.waitpid(child, 0)[1]


def files(folder: Path) -> dict[Path, bytes]:
    """The content of all files, but of what a killed export left aside."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [
        path
        for path in paths
        if not path.parts[0].startswith(".export-") and "__pycache__" not in path.parts
    ]
    return {path: (folder / path).read_bytes() for path in kept}


def check(project: Path) -> str:
    """Load the folder; it has to be the old bundle or the new one.

    Returns the name of its network.
    """
    space = project / "space"
    _, meta = load_bundle(space)
    found, old = files(space), files(project / "pristine")
    assert found[Path("mine/notes.txt")] == b"of the user"
    listed = {name for name in meta["sha256"]["files"] if name.startswith("models/")}
    assert {f"models/{path.name}" for path in (space / "models").glob("*.py")} == listed
    assert not (space / ".ready").exists()
    count = len(json.loads(found[Path("misclassified.json")]))
    assert (meta["architecture"], count) in (OLD, NEW)
    assert found == old or meta["architecture"] == NEW[0]
    return meta["architecture"]


def kill_again_and_again(send: Callable, project: Path, name: str) -> None:
    """Kill an export, or a publishing, at all its steps, and check the folder after each.

    Sends how often it was the old bundle and how often the new one.
    """
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    publish.PROJECT = project
    assert utils.EXAMPLES
    utils.EXAMPLES = ()  # many files that are moved like any other
    utils.check_bundle = lambda *_: None  # changes nothing in the folder, and takes seconds
    utils.save_figure = lambda _, path: path.write_bytes(b"figure")  # so does this
    export(project / "pristine", *OLD)
    (project / "pristine/mine").mkdir()
    (project / "pristine/mine/notes.txt").write_text("of the user")
    export(project / "runs/a/space", *NEW)
    actions = {
        "export": lambda: export(project / "space", *NEW),
        "publish": lambda: publish.publish(project / "runs/a"),
    }
    assert attempt(project, actions[name], -1) == 0
    commit, total = json.loads((project.parent / "numbers").read_text())
    found, started = [], False
    # All that are near the commit or after it.
    for stop in [*range(0, commit - 3, 9), *range(commit - 3, total)]:
        assert os.WTERMSIG(attempt(project, actions[name], stop)) == signal.SIGKILL
        if not started and (project / "space/.ready").exists():  # as the Space itself begins, once
            logits_of_bundle(project / "space", torch.zeros(1, 3, 32, 32))
            started = True
        found.append(check(project))
    assert started and found == sorted(found)  # one step, and no way back
    send((found.count(OLD[0]), found.count(NEW[0])))
