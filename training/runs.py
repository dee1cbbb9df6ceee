"""A training run that can be interrupted.

A run's folder is named by what was asked for (run_folder.py). Asking for the same again continues
where the last complete checkpoint ends, or loads the result if the run is finished.
"""

import contextlib
import uuid
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.multiprocessing import ProcessRaisedException

from dataload import CIFAR10DataModule, Splits, normalize
from models.errors import Interrupted, InvalidValue, TrainingFailed
from models.registry import build
from training.checkpoints import ChecksumIO, check_disk_space, load_checkpoint, newest_checkpoint
from training.classifier import LitClassifier
from training.console import format_duration, kernel_shell, print_rank_zero, quiet_lightning
from training.files import read_json, write_json
from training.hardware import (
    check_precision,
    choose_device,
    choose_precision,
    hardware,
    native_precisions,
    versions,
)
from training.history import epoch_line, finished_metrics, read_metrics, summarize_metrics
from training.progress import Progress
from training.recipes import Recipe
from training.results import Run, finished_run, round_to_fp16, run_metadata
from training.run_folder import (
    AutoChoice,
    Owner,
    archive_run,
    older_runs,
    run_folder,
    run_identity,
    weights_sha256,
)


def build_datamodule(
    recipe: Recipe, splits: Splits, seed: int = 42, fast: bool = False
) -> CIFAR10DataModule:
    """The loaders as a recipe wants them on this machine: without a GPU in micro-batches, and without workers, which
    would take the cores that train.
    """
    gpu = choose_device().type != "cpu"
    return CIFAR10DataModule(
        batch_size=recipe.batch_size if gpu else recipe.micro_batch or recipe.batch_size,
        num_workers=2 if gpu else 0,
        seed=seed,
        splits=splits,
        padding=recipe.padding,
        cutout=recipe.cutout,
        fast=fast,
    )


def accumulation_steps(recipe: Recipe, data: CIFAR10DataModule) -> int:
    """How many of the loader's batches make one of the recipe's. ValueError if they do not."""
    steps, rest = divmod(recipe.batch_size, data.batch_size)
    if rest:
        raise InvalidValue(
            f"a batch of {recipe.batch_size} cannot be made of loader batches of {data.batch_size}"
        )
    return steps


def prepare(
    kind: type[LitClassifier], recipe: Recipe, data: CIFAR10DataModule, seed: int
) -> LitClassifier:
    """A new classifier, its stem made from the training images if it has such a one."""
    pl.seed_everything(seed, workers=True, verbose=False)
    classifier = kind(**asdict(recipe))
    if hasattr(classifier.model, "whiten"):
        classifier.model.whiten(normalize(data.splits.train.images[:5000]))
    return classifier


def train(
    recipe: Recipe,
    data: CIFAR10DataModule,
    root: str | Path = "checkpoints",
    seed: int = 42,
    fresh: bool = False,
    precision: str = "auto",
    compiled: bool = False,
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    auto: AutoChoice | None = None,
) -> Run:
    """Train a network, continue an interrupted run, or load a finished one, and say which.

    root: where the runs' folders are. fresh: train anew even if the run is finished, or began on a
    machine of another kind (its old folder is kept aside). precision: Lightning's name, or 'auto'.
    compiled: let torch.compile make the network faster, which pays on a GPU, after a minute.
    devices, num_nodes, strategy: as Lightning's Trainer has them; the images of a batch are shared
    out, so the recipe is the same for any number of devices. auto: given if it was 'auto' that
    chose the recipe. Returns the weights of the last epoch.

    Raises ValueError for what this machine cannot train, and RunInUse if another process trains in
    the run's folder.
    """
    quiet_lightning()
    precision = precision or "auto"
    if precision != "auto":
        check_precision(precision)
    accumulation_steps(recipe, data)
    if devices not in ("auto", 1) and kernel_shell() and torch.cuda.is_initialized():
        raise InvalidValue(
            f"a notebook that has used a GPU cannot train on {devices}; run"
            f" `torchrun --nproc-per-node {devices} -m training` with the same switches, then this loads the result"
        )
    data.setup()
    identity = run_identity(recipe, data, seed, precision, auto.asked if auto else None)
    folder = run_folder(root, identity)
    if older_runs(root):
        print_rank_zero(
            f"not used, for an earlier version left them: {', '.join(older_runs(root))} in {root}"
        )
    finished = None if fresh else finished_run(folder)
    if finished:
        print_rank_zero(
            f"loaded the finished run in {folder}: trained on {finished.metadata['hardware']}"
            f" in {format_duration(finished.metadata['seconds'])}"
        )
        for _, row in finished_metrics(folder).groupby("epoch").mean().reset_index().iterrows():
            print_rank_zero(epoch_line(row, finished.metadata["epochs"]))
        return finished
    check_disk_space(folder, sum(p.numel() for p in build(recipe.network).parameters()))
    with Owner(folder) if rank_zero_only.rank == 0 else contextlib.nullcontext() as owner:
        started = begin(folder, identity, recipe, data, auto.recipe_name if auto else "", fresh)
        if owner:
            owner.started = started
        placement = {"devices": devices, "num_nodes": num_nodes, "strategy": strategy}
        return fit(folder, started, data, [owner] if owner else [], compiled, **placement)


def begin(
    folder: Path,
    identity: dict,
    recipe: Recipe,
    data: CIFAR10DataModule,
    recipe_name: str,
    fresh: bool,
) -> dict:
    """What started.json holds of a run: its identity, and what 'auto' became when it began.

    It is written if the run begins now. A run that is resumed keeps its device, precision and
    loader batches. Raises ValueError if this machine cannot continue it; with fresh it is then set
    aside, and so is a finished one.
    """
    path = folder / "started.json"
    started = read_json(path, {"identity", "resolved"})
    problem = cannot_continue(folder, started, recipe)
    if fresh and (problem or (folder / "finished.json").exists()):
        archive_run(folder, rank_zero_only.rank == 0, started)
        started, problem = None, ""
    if problem:
        raise InvalidValue(f"{problem}, or set FRESH = True to set that run aside and train anew")
    if started is None:
        resolved = {"recipe_name": recipe_name} | resolve_auto(recipe, data, identity["precision"])
        started = {"identity": identity, "resolved": resolved, "run_id": uuid.uuid4().hex}
        if rank_zero_only.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, started)
    data.batch_size, data.num_workers = (
        started["resolved"][key] for key in ("batch_size", "num_workers")
    )
    return started


def resolve_auto(recipe: Recipe, data: CIFAR10DataModule, precision: str) -> dict:
    """What was left to this machine, as it decides it when a run begins."""
    return {
        "recipe": asdict(recipe),
        "device": choose_device().type,
        "precision": choose_precision() if precision == "auto" else precision,
        "batch_size": data.batch_size,
        "num_workers": data.num_workers,
    }


def cannot_continue(folder: Path, started: dict | None, recipe: Recipe) -> str:
    """Why the run in this folder cannot go on here, and what to do, as the first half of a sentence.

    '' if it can.
    """
    if started is None:
        return (
            f"{folder} holds checkpoints without a readable started.json, so how they were trained is not known; bring"
            " that file back"
            if newest_checkpoint(folder)
            else ""
        )
    resolved, automatic = started["resolved"], started["identity"]["precision"] == "auto"
    if resolved["recipe"] != asdict(recipe):
        return (
            f"the run in {folder} began with a recipe that 'auto' no longer chooses; continue it with the version of"
            " this project that began it"
        )
    if resolved["device"] != choose_device().type:
        began, here = resolved["device"], choose_device().type
    elif automatic and resolved["precision"] not in native_precisions():
        began, here = resolved["precision"], f"{', '.join(native_precisions())} only"
    else:
        return ""
    return f"the run in {folder} began with {began}, and {hardware()} has {here}; continue it on a machine like the first"


def fit(
    folder: Path,
    started: dict,
    data: CIFAR10DataModule,
    callbacks: list[pl.Callback],
    compiled: bool = False,
    **placement: int | str,
) -> Run:
    """Train to the last epoch, from the newest checkpoint if there is one.

    started: what `begin` returned. placement: devices, num_nodes, strategy.
    """
    recipe, seed = Recipe(**started["resolved"]["recipe"]), started["identity"]["seed"]
    classifier = prepare(LitClassifier, recipe, data, seed)
    if compiled:
        classifier.model.compile()
    keep_two = ModelCheckpoint(
        folder,
        "epoch{epoch:03d}",
        monitor="epoch",
        mode="max",
        save_top_k=2,
        save_last=True,
        auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        max_epochs=recipe.epochs,
        precision=started["resolved"]["precision"],
        logger=CSVLogger(folder, "logs"),
        callbacks=[Progress(read_metrics(folder / "logs")), *callbacks, keep_two],
        plugins=[ChecksumIO()],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=accumulation_steps(recipe, data),
        limit_val_batches=1.0 if len(data.splits.val.labels) else 0,
        use_distributed_sampler=False,
        **placement,
    )
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        print_rank_zero(f"continuing the interrupted run in {folder}")
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (
        torch.OutOfMemoryError,
        ProcessRaisedException,
    ) as error:  # the latter of one of several processes
        if "OutOfMemoryError" not in repr(error):
            raise TrainingFailed(str(error).strip().splitlines()[-1]) from error
        smaller = (
            f"set BATCH_SIZE to {recipe.batch_size // 2}"
            if recipe.batch_size > 1
            else "take a smaller network"
        )
        raise TrainingFailed(
            f"the GPU's memory is too small for batches of {recipe.batch_size} images; {smaller}"
        ) from error
    except SystemExit:  # what Lightning makes of an interrupt
        raise Interrupted(
            f"training was interrupted in epoch {trainer.current_epoch + 1} of {recipe.epochs}; run again to continue"
            f" from {folder}, or take what it has learned: run = unfinished_run({str(folder)!r})"
        ) from None
    return finish(folder, started, trainer)


def finish(folder: Path, started: dict, trainer: pl.Trainer) -> Run:
    """What a run that has reached its last epoch leaves.

    Its facts and the table of its epochs are written.
    """
    table = read_metrics(folder / "logs")
    classifier, _ = load_checkpoint(
        newest_checkpoint(folder), started["resolved"]["recipe"]["network"]
    )
    metadata = run_metadata(started) | {
        "versions": versions(),
        "hardware": hardware(trainer.world_size),
        "weights_sha256": weights_sha256(classifier.state_dict()),
    }
    metadata |= summarize_metrics(table)
    if trainer.is_global_zero:
        table.to_csv(folder / "metrics.csv", index=False)
        write_json(folder / "finished.json", metadata)
    return Run(round_to_fp16(classifier.model), metadata, folder / "metrics.csv")
