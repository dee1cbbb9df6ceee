"""What a training run left: the network, and what is known of how it was trained."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.bundle import load_bundle
from models.errors import InvalidValue
from training.checkpoints import load_checkpoint, newest_checkpoint
from training.console import print_rank_zero
from training.files import read_json
from training.history import finished_metrics, read_metrics, summarize_metrics
from training.run_folder import METADATA_KEYS, weights_sha256


@dataclass(frozen=True)
class Run:
    """What training left. model: the network of the last epoch, in eval mode, on the CPU.

    facts: of the run. metrics_csv: its epochs, or None where nothing is known of them.
    """

    model: nn.Module
    metadata: dict
    metrics_csv: Path | None


def run_metadata(started: dict) -> dict:
    """The facts of a run that are known when it begins."""
    identity, resolved = started["identity"], started["resolved"]
    return {
        "epochs": resolved["recipe"]["epochs"],
        "batch_size": resolved["recipe"]["batch_size"],
        "seed": identity["seed"],
        "split_seed": identity["split_seed"],
        "data": identity["data"],
        "train_images": identity["train_images"],
        "precision": resolved["precision"],
    }


def finished_run(folder: Path) -> Run | None:
    """The run in this folder, if it is finished and its facts are those of its weights.

    Raises ValueError if it is finished and no checkpoint is there: a synced drive may bring it
    later.
    """
    metadata = read_json(folder / "finished.json", METADATA_KEYS)
    if metadata is None:
        return None
    path, started = newest_checkpoint(folder), read_json(folder / "started.json", {"resolved"})
    if path is None or started is None:
        raise InvalidValue(
            f"{folder} has no complete checkpoint; if it is on a synced drive, wait until that has brought all files,"
            " else set FRESH = True to train anew"
        )
    classifier, epochs = load_checkpoint(path, started["resolved"]["recipe"]["network"])
    if weights_sha256(classifier.state_dict()) != metadata["weights_sha256"]:
        print_rank_zero(
            f"{folder}: finished.json describes other weights than {path.name}, of epoch {epochs}; training continues"
        )
        return None
    finished_metrics(folder)
    return Run(round_to_fp16(classifier.model), metadata, folder / "metrics.csv")


def round_to_fp16(model: nn.Module) -> nn.Module:
    """A network in eval mode, with its weights rounded to fp16, as the bundle will hold them: what is measured is what
    is published.
    """
    return model.half().float().eval()


def unfinished_run(folder: str | Path) -> Run:
    """What an interrupted run has learned, after its last whole epoch.

    ValueError if it has none yet.
    """
    folder = Path(folder)
    started, path = (
        read_json(folder / "started.json", {"identity", "resolved"}),
        newest_checkpoint(folder),
    )
    if started is None or path is None:
        raise InvalidValue(f"{folder} holds no run that has finished an epoch")
    classifier, epochs = load_checkpoint(path, started["resolved"]["recipe"]["network"])
    table = read_metrics(folder / "logs")
    table = table[table.epoch < epochs]  # the log may be an epoch ahead of the checkpoint
    table.to_csv(folder / "metrics.csv", index=False)
    metadata = run_metadata(started) | {"epochs": epochs} | summarize_metrics(table)
    return Run(round_to_fp16(classifier.model), metadata, folder / "metrics.csv")


def stored_run(space: str | Path) -> Run:
    """The network of a bundle instead of a new one, with the facts that model.json has of its training."""
    model, meta = load_bundle(space)
    return Run(model, meta["training"], None)
