"""Checkpoints, written whole or not at all, each with a checksum that is checked when read."""

import re
from pathlib import Path

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from models.bundle import sha256
from models.errors import InvalidValue
from training.classifier import LitClassifier


def sidecar(path: Path) -> Path:
    """Return the path of the small file beside a checkpoint that holds its sha256."""
    return path.with_name(path.name + ".sha256")


class ChecksumIO(TorchCheckpointIO):
    """The plugin that writes a checkpoint whole or not at all, and its sha256 after it.

    A checkpoint without its sidecar, or with a wrong one, does not count. Of earlier epochs, only
    the last one's is kept.
    """

    def save_checkpoint(
        self, checkpoint: dict, path: str | Path, storage_options: object = None
    ) -> None:
        """Write a checkpoint under another name, rename it, then write its sidecar.

        Then remove those that are no longer needed. Lightning's own count of them would begin anew
        in a folder that was moved.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, partial)  # Lightning would first fill a file in the system's /tmp
        digest = sha256(partial)
        partial.replace(path)
        sidecar(path).write_text(digest)
        epochs = epoch_checkpoints(path.parent)
        if path in epochs:  # several processes also pass their result on in a file
            for old in epochs[epochs.index(path) + 2 :]:
                self.remove_checkpoint(old)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its sidecar."""
        super().remove_checkpoint(path)
        sidecar(Path(path)).unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Tell whether a checkpoint has the checksum that was written after it."""
    try:
        return sidecar(path).read_bytes() == sha256(path).encode()
    except OSError:
        return False


def epoch_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first.

    Other files, such as the copies that a synced drive makes of conflicting ones, are left out.
    """
    epochs = [path for path in run_dir.glob("epoch*.ckpt") if re.fullmatch(r"epoch\d+", path.stem)]
    return sorted(epochs, key=lambda path: int(path.stem[5:]), reverse=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Find the newest complete checkpoint of a run.

    Returns:
        Its path, or None. Newer ones that are incomplete or damaged are named in a printed line.
    """
    for path in epoch_checkpoints(run_dir):
        if is_complete(path):
            return path
        print(f"{path.name} is incomplete or damaged and is not used")
    return None


def load_checkpoint(path: Path, arch: str) -> tuple[LitClassifier, int]:
    """Load a checkpoint.

    Args:
        path: of the checkpoint.
        arch: the network that it is expected to hold.

    Returns:
        The classifier, in eval mode, on the CPU, and the number of epochs it was trained for.

    Raises:
        InvalidValue: if the file is damaged or holds another network.
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


def needed_space(folder: Path, parameters: int, fresh: bool = False) -> int:
    """Return how many bytes the checkpoints of a run may need besides those that are there.

    Args:
        folder: of the run.
        parameters: of the network.
        fresh: whether the checkpoints that are there are kept beside the new ones.
    """
    # Three files at most, one of them half written, of the weights and as many numbers of the
    # optimiser, in fp32.
    there = 0 if fresh else sum(path.stat().st_size for path in folder.glob("*.ckpt"))
    return 3 * 2 * 4 * parameters - there
