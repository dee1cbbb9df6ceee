"""A run's folder: what identifies it, whether it is whole, and which process may train in it.

Identity: the folder is named by a hash of everything that was asked for and shapes the weights.
What was left to 'auto' is part of it as 'auto'; what that became on this machine is written to
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

import pytorch_lightning as pl
import torch
from filelock import FileLock, SoftFileLock, Timeout
from torch import Tensor, nn

from dataload import CIFAR10DataModule, Splits
from models.errors import TrainingFailed
from training.files import read_json, write_json
from training.options import RunOptions
from training.recipes import Recipe

HEARTBEAT_SECONDS = 60
DEAD_AFTER_SECONDS = 300  # without a heartbeat: five of them may be lost on the way
LOCK_PATIENCE_SECONDS = 6  # workers of a killed owner hold its lock for up to five seconds more
START_PATIENCE_SECONDS = 300
METADATA_KEYS = {"seconds", "hardware", "train_images", "data", "val_acc", "weights_sha256"}
STARTED_KEYS = {"identity", "resolved"}
OWNER_KEYS = {"token", "host", "pid", "since", "heartbeat"}


# ---- identity ------------------------------------------------------------------------------------


def data_sha256(splits: Splits) -> str:
    """Compute the checksum of the training and validation images and labels.

    Their order counts, and so the seed of the split does.
    """
    digest = hashlib.sha256()
    for part in (splits.train, splits.val):
        digest.update(part.images.tobytes())
        digest.update(part.labels.tobytes())
    return digest.hexdigest()


def run_identity(recipe: Recipe, data: CIFAR10DataModule, options: RunOptions) -> dict:
    """Collect everything that was asked for and shapes the weights.

    Neither the number of processes nor torch.compile is part of it: they change rounding and which
    random numbers the augmentation draws, and an interrupted run may be continued with another
    number of processes.

    Args:
        recipe: the hyperparameters.
        data: the loaders; their images, seed and augmentation are part of the identity.
        options: their seed and precision are part of the identity. Where 'auto' chose the recipe,
            the switches that it chose from identify the run, not what it chose.

    Returns:
        Values that JSON can hold.
    """
    return {
        "recipe": options.auto.asked if options.auto else asdict(recipe),
        "seed": options.seed,
        "precision": options.precision,
        "data": data.splits.source,
        "train_images": len(data.splits.train.labels),
        "images_sha256": data_sha256(data.splits),
        "split_seed": data.splits.seed,
        "augmentation": {
            "seed": data.seed,
            "loader": data.loader_name,
            "padding": data.augmentation.padding,
            "cutout": data.augmentation.cutout,
            "mirror": "in every other epoch" if data.augmentation.mirror else "never",
        },
    }


def run_folder(root: str | Path, identity: dict) -> Path:
    """Return the folder of a run in `root`.

    It is named by the network and the number of epochs, or by 'auto', and a hash of the identity.
    """
    recipe = identity["recipe"]
    name = f"{recipe['network']}-{recipe['epochs']}" if "network" in recipe else "auto"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(root) / f"{name}-{digest[:12]}"


def earlier_auto_choice(root: str | Path, wanted: dict) -> str | None:
    """Find the recipe that 'auto' chose when the same switches began a run.

    Args:
        root: the folder of the runs.
        wanted: those values of the run's identity that the switches settle.

    Returns:
        The recipe's name, of the latest such run with a checkpoint, or None.
    """
    for path in sorted(Path(root).glob("auto-*/started.json"), key=os.path.getmtime, reverse=True):
        started = read_json(path, STARTED_KEYS)
        trained = any(path.parent.glob("*.ckpt"))  # else it was stopped in its first epoch
        if not started or not trained or "-before-" in path.parent.name:
            continue
        identity = started["identity"]
        if wanted.items() <= (identity["augmentation"] | identity).items():
            return started["resolved"]["recipe_name"]
    return None


# ---- integrity -----------------------------------------------------------------------------------


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Compute the checksum of a network's weights, whatever file they are in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(name.encode() + numbers.tobytes())
    return digest.hexdigest()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two networks have the same names and values of weights."""
    return weights_sha256(first.state_dict()) == weights_sha256(second.state_dict())


def archive_run(folder: Path) -> None:
    """Rename a run's folder, so that the run can be trained anew and the old one is kept."""
    folder.rename(folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))


def wait_until_begun(folder: Path, before: dict | None) -> dict:
    """Wait until the first process has begun a run: all others train as it does.

    Args:
        folder: of the run.
        before: what started.json holds before, of a run that is set aside; None: nothing.

    Returns:
        The content of the new started.json.

    Raises:
        TrainingFailed: if the first process does not begin.
    """
    deadline = time.monotonic() + START_PATIENCE_SECONDS
    while (started := read_json(folder / "started.json", STARTED_KEYS)) in (None, before):
        if time.monotonic() > deadline:
            raise TrainingFailed(
                f"the first process did not begin a run in {folder}, which all of them have to"
                " see; end all of them and start again"
            )
        time.sleep(0.1)
    return started


# ---- ownership -----------------------------------------------------------------------------------


def this_machine() -> str:
    """Name this machine, by its network address if it has one."""
    address = uuid.getnode()
    made_up = address >> 40 & 1  # without a network, anew in each process
    return platform.node() if made_up else f"{platform.node()}-{address:x}"


class RunInUse(TrainingFailed):
    """Another process trains in this folder; the message says which."""


class RunLock(pl.Callback):
    """The exclusive right of a process to train in a folder: `with RunLock(folder): ...`.

    On one machine a file lock decides; the system releases it when its process dies, however it
    dies. Another machine that shares the folder (a synced drive) does not see the lock: there a
    heartbeat decides, a file that is written every minute, and after five minutes without one its
    owner counts as dead. Both files lie beside the folder, so that the folder can be renamed or
    removed.

    As a callback it ends a training that was taken over in the meantime, say while this machine
    slept, before the next checkpoint is written, and writes started.json again if it was removed.

    Attributes:
        started: what started.json holds, to be set when the run begins.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        self.owner_file = folder.with_name(f".{folder.name}.owner.json")
        self.this_process = {
            "token": uuid.uuid4().hex,
            "host": this_machine(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.released = threading.Event()
        self.heartbeat = threading.Thread(target=self._beat_until_released, daemon=True)
        self.started: dict = {}

    def __enter__(self) -> "RunLock":
        locked, other = self.acquire_lock(), self.other_owner()
        if other and not (locked and other["host"] == self.this_process["host"]):
            alive = abs(time.time() - other["heartbeat"]) < DEAD_AFTER_SECONDS
            if alive:
                self.lock.release()
                raise self.in_use(other)
        self.write_heartbeat()
        self.heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.heartbeat.join()
        if not self.other_owner():
            self.owner_file.unlink(missing_ok=True)
        self.lock.release()

    def acquire_lock(self) -> bool:
        """Take the file lock.

        Returns:
            Whether this process has it: False where the file system has no locks.

        Raises:
            RunInUse: if another process of this machine has it.
        """
        try:
            self.lock.acquire(timeout=LOCK_PATIENCE_SECONDS)
        except Timeout:
            if isinstance(self.lock, SoftFileLock):  # a mere file, which a killed process leaves
                return False
            raise self.in_use(self.other_owner()) from None
        except (OSError, NotImplementedError):
            return False
        return True

    def other_owner(self) -> dict | None:
        """Read which other process owns the folder: its token, host, pid, since and heartbeat."""
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(self.owner_file.read_text(encoding="utf-8"))
            known = isinstance(owner, dict) and set(owner) >= OWNER_KEYS
            return owner if known and owner["token"] != self.this_process["token"] else None
        return None

    def in_use(self, other: dict | None) -> RunInUse:
        """Make the error that names the other owner, as far as it is known."""
        name = "another process"
        if other:
            name = f"process {other['pid']} on {other['host']} since {other['since']}"
        return RunInUse(
            f"{self.folder} is being trained in by {name}. Wait until it has finished, stop it, or"
            " set CHECKPOINT_DIR to another folder. If it is gone, run again in"
            f" {DEAD_AFTER_SECONDS // 60} minutes"
        )

    def write_heartbeat(self) -> None:
        """Write that this process owns the folder, and when it last said so."""
        write_json(self.owner_file, self.this_process | {"heartbeat": time.time()})

    def _beat_until_released(self) -> None:
        while not self.released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk, or one that is away for a moment
                if not self.other_owner():
                    self.write_heartbeat()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End the training if another process has taken the folder over."""
        other = self.other_owner()
        if other:
            raise self.in_use(other)
        if not (self.folder / "started.json").exists():
            write_json(self.folder / "started.json", self.started)
