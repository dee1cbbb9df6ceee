"""A run's folder: what identifies it, whether it is whole, and which process may train in it.

Identity: the folder is named by a hash of everything that was asked for and shapes the weights.
What was left to 'auto' is part of it as 'auto'; what that became on this machine stands in
started.json, and every resume keeps it. Integrity: finished.json names the checksum of the weights
that it describes. Ownership: one process at a time trains in a folder.
"""

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dataload import CIFAR10DataModule, Splits
from models.errors import TrainingFailed
from training.files import read_json, write_json
from training.recipes import Recipe

HEARTBEAT_SECONDS = 60
DEAD_AFTER_SECONDS = 300  # without a heartbeat: five of them may be lost on the way
LOCK_PATIENCE_SECONDS = 6  # workers of a killed owner hold its lock for up to five seconds more
ARCHIVE_PATIENCE_SECONDS = 60
METADATA_KEYS = {"seconds", "hardware", "train_images", "data", "val_acc", "weights_sha256"}


class AutoChoice(NamedTuple):
    """asked: the switches that 'auto' chose a recipe from. recipe_name: the one that it chose."""

    asked: dict
    recipe_name: str


# ---- identity ------------------------------------------------------------------------------------


def data_digest(splits: Splits) -> str:
    """Checksum of the training and validation images and labels, in their order.

    So of the split's seed as well.
    """
    digest = hashlib.sha256()
    for part in (splits.train, splits.val):
        digest.update(part.images.tobytes())
        digest.update(part.labels.tobytes())
    return digest.hexdigest()


def run_identity(
    recipe: Recipe,
    data: CIFAR10DataModule,
    seed: int,
    precision: str = "auto",
    asked: dict | None = None,
) -> dict:
    """Everything that was asked for and shapes the weights, as JSON.

    Neither the number of processes nor torch.compile is part of it: they change rounding and which
    random numbers the augmentation draws, and an interrupted run may go on with another number of
    processes.

    Args:
        recipe: the numbers of the training.
        data: the loaders; their images, seed and augmentation are part of the identity.
        seed: of the weights.
        precision: Lightning's name, or 'auto'.
        asked: the switches that 'auto' chose the recipe from; then they identify the run, not what
            was chosen.
    """
    return {
        "recipe": asked or asdict(recipe),
        "seed": seed,
        "precision": precision,
        "data": data.splits.source,
        "train_images": len(data.splits.train.labels),
        "images_sha256": data_digest(data.splits),
        "split_seed": data.splits.seed,
        "augmentation": {
            "seed": data.seed,
            "loader": "fast" if data.fast else "albumentations",
            "padding": data.padding,
            "cutout": data.cutout,
        },
    }


def run_folder(root: str | Path, identity: dict) -> Path:
    """The folder of the run that is identified so.

    Its network and epochs, or 'auto', and a hash.
    """
    recipe = identity["recipe"]
    name = f"{recipe['network']}-{recipe['epochs']}" if "network" in recipe else "auto"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(root) / f"{name}-{digest[:12]}"


def chosen_before(root: str | Path, asked: dict) -> str | None:
    """The name of the recipe that 'auto' chose when a run was begun by the same switches.

    None if none was.
    """
    for path in sorted(Path(root).glob("auto-*/started.json"), key=os.path.getmtime, reverse=True):
        started = read_json(path, {"identity", "resolved"})
        if (
            started
            and "-before-" not in path.parent.name
            and started["identity"]["recipe"] == asked
        ):
            return started["resolved"]["recipe_name"]
    return None


def older_runs(root: str | Path) -> list[str]:
    """Names of the runs in this folder that earlier versions left.

    They do not say what they depend on.
    """
    names = []
    for path in sorted(Path(root).glob("*/started.json")):
        with contextlib.suppress(OSError, ValueError):
            if "identity" not in json.loads(path.read_text(encoding="utf-8")):
                names.append(path.parent.name)
    return names


# ---- integrity -----------------------------------------------------------------------------------


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Checksum of a network's weights, whatever file they are in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(
            name.encode()
            + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def archive_run(folder: Path, is_first_process: bool, started: dict | None) -> None:
    """Give a run's folder another name: the first process does it, the others wait until it is done.

    started: what started.json held before; the first process writes another one when it begins anew.

    Raises TimeoutError if the first process does not.
    """
    if is_first_process:
        folder.rename(folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
        return
    deadline = time.monotonic() + ARCHIVE_PATIENCE_SECONDS
    while started is not None and read_json(folder / "started.json", set()) == started:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the first process did not set {folder} aside; end all of them and start again"
            )
        time.sleep(0.1)


# ---- ownership -----------------------------------------------------------------------------------


class RunInUse(TrainingFailed):
    """Another process trains in this folder; the message says which."""


class Owner(pl.Callback):
    """With it, the process is the only one that trains in a folder: `with Owner(folder): ...`.

    On one machine a file lock decides; the system releases it when its process dies, however it
    dies. Another machine that shares the folder (a synced drive) does not see the lock: there a
    heartbeat decides, a file that is written every minute, and after five minutes without one its
    owner counts as dead. Both files lie beside the folder, so that the folder can be renamed or
    removed. As a callback it ends a training that was taken over in the meantime, say while this
    machine slept, before the next checkpoint is written, and puts started.json back if it was
    removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        self.card = folder.with_name(f".{folder.name}.owner.json")
        self.me = {
            "token": uuid.uuid4().hex,
            "host": f"{platform.node()}-{uuid.getnode():x}",
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.done = threading.Event()
        self.started: dict = {}  # what started.json holds

    def __enter__(self) -> "Owner":
        alone_here = self.acquire_lock()
        other = self.other_owner()
        if other and not (alone_here and other["host"] == self.me["host"]):
            if abs(time.time() - other["heartbeat"]) < DEAD_AFTER_SECONDS:
                self.lock.release()
                raise self.in_use(other)
        self.write_heartbeat()
        self.beating = threading.Thread(target=self.keep_beating, daemon=True)
        self.beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.beating.join()
        if not self.other_owner():
            self.card.unlink(missing_ok=True)
        self.lock.release()

    def acquire_lock(self) -> bool:
        """Take the lock. False where the file system has no locks.

        Raises RunInUse if a process here holds it.
        """
        try:
            self.lock.acquire(timeout=LOCK_PATIENCE_SECONDS)
        except Timeout:
            raise self.in_use(self.other_owner()) from None
        except (OSError, NotImplementedError):
            return False
        return True

    def other_owner(self) -> dict | None:
        """What the card says of an owner that is not this process."""
        with contextlib.suppress(OSError, ValueError):
            card = json.loads(self.card.read_text(encoding="utf-8"))
            known = isinstance(card, dict) and {
                "token",
                "host",
                "pid",
                "since",
                "heartbeat",
            } <= set(card)
            return card if known and card["token"] != self.me["token"] else None
        return None

    def in_use(self, other: dict | None) -> RunInUse:
        who = (
            f"process {other['pid']} on {other['host']} since {other['since']}"
            if other
            else "another process"
        )
        return RunInUse(
            f"{self.folder} is being trained in by {who}. Wait until it has finished, stop it, or set CHECKPOINT_DIR to"
            " another folder"
        )

    def write_heartbeat(self) -> None:
        write_json(self.card, self.me | {"heartbeat": time.time()})

    def keep_beating(self) -> None:
        while not self.done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk, or one that is away for a moment
                if not self.other_owner():
                    self.write_heartbeat()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        other = self.other_owner()
        if other:
            raise self.in_use(other)
        if not (self.folder / "started.json").exists():
            write_json(self.folder / "started.json", self.started)
