"""Checkpoints that are complete or not there.

Written whole, with a checksum beside each, checked when read.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from models.bundle import sha256
from models.errors import InvalidValue, StorageError
from training.classifier import LitClassifier


def sidecar(path: Path) -> Path:
    """The small file beside a checkpoint that holds its sha256."""
    return path.with_name(path.name + ".sha256")


class ChecksumIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and its sha256 after it.

    No sidecar, or a wrong one, no checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict, path: str | Path, storage_options: object = None
    ) -> None:
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        super().save_checkpoint(checkpoint, partial, storage_options)
        digest = sha256(partial)
        os.replace(partial, path)
        sidecar(path).write_text(digest)

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        sidecar(Path(path)).unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Whether the checkpoint has the checksum that was written after it."""
    try:
        return sidecar(path).read_bytes() == sha256(path).encode()
    except OSError:
        return False


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that is complete, or None: last.ckpt, else the epochs' own, latest first.

    Other files, such as the copies that a synced drive makes of conflicting ones, are not looked at.
    """
    epochs = [path for path in run_dir.glob("epoch*.ckpt") if re.fullmatch(r"epoch\d+", path.stem)]
    epochs.sort(key=lambda path: int(path.stem[5:]), reverse=True)
    for path in [run_dir / "last.ckpt", *epochs]:
        if path.exists():
            if is_complete(path):
                return path
            print(f"{path.name} is incomplete or damaged and is not used")
    return None


def load_checkpoint(path: Path, arch: str) -> tuple[LitClassifier, int]:
    """The network of a checkpoint, in eval mode, on the CPU, and how many epochs it has been trained for.

    Raises ValueError if the file is damaged or holds another architecture.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        classifier = LitClassifier(**content["hyper_parameters"])
        classifier.load_state_dict(content["state_dict"])
        epochs = content["epoch"] + 1
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise InvalidValue(f"{path} holds no network of this project: {error!r:.300}") from error
    if classifier.recipe.network != arch:
        raise InvalidValue(f"{path} holds a {classifier.recipe.network}, expected a {arch}")
    return classifier.eval(), epochs


def check_disk_space(folder: Path, parameters: int) -> None:
    """Raise OSError if the checkpoints of a network of so many parameters cannot be written into the folder.

    Four files at most, the last one half written, of the weights and as many numbers of the optimiser, in fp32; less
    what is there of them.
    """
    needed = 4 * 2 * 4 * parameters
    try:
        folder.mkdir(parents=True, exist_ok=True)
        needed -= sum(path.stat().st_size for path in folder.glob("*.ckpt"))
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(
            f"cannot write into {folder}: {error}; set CHECKPOINT_DIR to a folder where you may"
        ) from error
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e6:,.0f} MB left, its checkpoints may need {needed / 1e6:,.0f} MB; make room, or"
            " set CHECKPOINT_DIR to another place"
        )
