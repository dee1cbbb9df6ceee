"""The result of a training run: the network, and how it was trained."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from models.bundle import load_bundle
from models.errors import InvalidValue
from models.stage import Network
from training.checkpoints import load_checkpoint, newest_checkpoint
from training.files import read_json, scratch_folder
from training.hardware import hardware, versions
from training.history import read_metrics, summarize_metrics
from training.lightning_output import print_rank_zero
from training.recipes import Recipe
from training.run_folder import METADATA_KEYS, weights_sha256


@dataclass(frozen=True)
class Run:
    """The result of training.

    Attributes:
        model: the network of the last epoch, in eval mode, on the CPU.
        metadata: how it was trained: seed, data, precision, time, hardware and so on.
        metrics_csv: the table of its epochs; None where a stored network came without it.
    """

    model: Network
    metadata: dict
    metrics_csv: Path | None


def run_metadata(started: dict) -> dict:
    """Collect the metadata that are known when a run begins.

    Args:
        started: the content of its started.json.
    """
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


def finished_run(folder: Path, recipe: Recipe) -> Run | None:
    """Load a finished run.

    Args:
        folder: of the run.
        recipe: that it must have been trained by; the recipes of ARCH = "auto" may change.

    Returns:
        The run, or None if there is no finished run in the folder by that recipe whose metadata
        describe its weights.

    Raises:
        InvalidValue: if the run is finished but has no complete checkpoint or no readable
            started.json: a synced drive may bring it later.
    """
    metadata = read_json(folder / "finished.json", METADATA_KEYS)
    if metadata is None:
        return None
    path, started = newest_checkpoint(folder), read_json(folder / "started.json", {"resolved"})
    if path is None or started is None:
        missing = "readable started.json" if path else "complete checkpoint"
        raise InvalidValue(
            f"{folder} has no {missing}; if it is on a synced drive, wait until that has"
            " brought all files, else set FRESH = True to train anew"
        )
    if not recipe.matches(started["resolved"]["recipe"]):
        return None
    classifier, epochs = load_checkpoint(path, recipe.network)
    if weights_sha256(classifier.state_dict()) != metadata["weights_sha256"]:
        print_rank_zero(
            f"{folder}: finished.json describes other weights than {path.name}, of epoch {epochs};"
            " training continues"
        )
        return None
    return Run(round_to_fp16(classifier.model), metadata, folder / "metrics.csv")


def round_to_fp16(model: Network) -> Network:
    """Round a network's weights to fp16, as the bundle stores them, and put it into eval mode.

    So the network that is measured is the one that is published.
    """
    return model.half().float().eval()


def unfinished_run(folder: str | Path) -> Run:
    """Load an interrupted run as it was after its last whole epoch.

    Args:
        folder: of the run.

    Raises:
        InvalidValue: if no epoch was finished.
    """
    folder = Path(folder)
    started = read_json(folder / "started.json", {"identity", "resolved"})
    path = newest_checkpoint(folder)
    if started is None or path is None:
        raise InvalidValue(f"{folder} holds no run that has finished an epoch")
    classifier, epochs = load_checkpoint(path, started["resolved"]["recipe"]["network"])
    table = read_metrics(folder / "logs")
    table = table.loc[table["epoch"] < epochs]  # the log may be an epoch ahead of the checkpoint
    table.to_csv(folder / "metrics.csv", index=False)
    metadata = run_metadata(started) | {"epochs": epochs} | summarize_metrics(table)
    metadata |= {"versions": versions(), "hardware": hardware()}
    return Run(round_to_fp16(classifier.model), metadata, folder / "metrics.csv")


def stored_run(space: str | Path, seed: int, results: str | Path = "results.json") -> Run:
    """Load the network of a bundle, with what is stored of its training.

    Args:
        space: the folder of the bundle, whose model.json holds the metadata.
        seed: of the split into training and validation images.
        results: the results of the same run, which hold the metrics of its epochs; those of other
            weights are not used.

    Raises:
        InvalidValue: for another seed than that of the network's own split.
    """
    model, meta = load_bundle(space)
    own = meta["training"]["split_seed"]
    if seed != own:
        raise InvalidValue(
            f"expected SEED = {own}, got {seed}: another one would validate on images that the"
            " stored network was trained on"
        )
    metrics = None
    stored = read_json(Path(results), {"sha256", "metrics"})
    if stored and stored["sha256"] == meta["sha256"]["weights"]:
        metrics = Path(tempfile.mkdtemp(dir=scratch_folder())) / "metrics.csv"
        pd.DataFrame(stored["metrics"]).to_csv(metrics, index=False)
    return Run(model, meta["training"], metrics)
