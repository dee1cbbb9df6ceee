"""A training run that can be interrupted.

A run's folder is named by what was asked for (run_folder.py). Asking for the same again continues
where the last complete checkpoint ends, or loads the result if the run is finished.
"""

import contextlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.multiprocessing.spawn import ProcessException

from cifar10.disk import check_disk_space
from dataload import Augmentation, CIFAR10DataModule, FastDataModule, Splits, normalize
from models.errors import Interrupted, InvalidValue, TrainingFailed
from models.registry import build
from training.checkpoints import ChecksumIO, load_checkpoint, needed_space, newest_checkpoint
from training.classifier import LitClassifier
from training.console import format_duration, kernel_shell
from training.files import write_json
from training.hardware import check_precision, choose_device, hardware, versions
from training.history import (
    epoch_line,
    epoch_means,
    read_finished_metrics,
    read_metrics,
    rows_of,
    summarize_metrics,
)
from training.lightning_output import print_rank_zero, quiet_lightning
from training.options import DEFAULT_OPTIONS, RunOptions
from training.progress import Progress
from training.recipe_check import check_rates
from training.recipes import Recipe
from training.results import Run, finished_run, round_to_fp16, run_metadata
from training.resume import start_or_resume
from training.run_folder import (
    RunLock,
    run_folder,
    run_identity,
    weights_sha256,
)
from training.whitening import whiten


def build_datamodule(
    recipe: Recipe, splits: Splits, seed: int = 42, fast: bool = False
) -> CIFAR10DataModule:
    """Make the loaders that a recipe needs on this machine.

    Without a GPU they load micro-batches, and without workers, which would take the cores that
    train.

    Args:
        recipe: the hyperparameters.
        splits: the images.
        seed: of the order of the images and of the augmentation.
        fast: whether the fast loader replaces Albumentations.
    """
    gpu = choose_device().type != "cpu"
    # Where a worker does not begin as a copy of this process, it imports everything every epoch.
    forks = multiprocessing.get_all_start_methods()[0] == "fork"  # the default is the first
    kind = FastDataModule if fast else CIFAR10DataModule
    return kind(
        batch_size=recipe.batch_size if gpu else recipe.micro_batch or recipe.batch_size,
        num_workers=2 if gpu and forks else 0,
        seed=seed,
        splits=splits,
        augmentation=Augmentation(recipe.padding, recipe.cutout),
    )


def accumulation_steps(recipe: Recipe, data: CIFAR10DataModule) -> int:
    """Return how many of the loader's batches make one of the recipe's.

    Raises:
        InvalidValue: if no whole number of them does.
    """
    steps, rest = divmod(recipe.batch_size, data.batch_size)
    if rest:
        raise InvalidValue(
            f"a batch of {recipe.batch_size} cannot be made of loader batches of {data.batch_size}"
        )
    return steps


Classifier = TypeVar("Classifier", bound=LitClassifier)


def make_classifier(
    kind: type[Classifier], recipe: Recipe, data: CIFAR10DataModule, seed: int
) -> Classifier:
    """Make a new classifier of that kind, with its whitening layer, if any, set from the images.

    Args:
        kind: LitClassifier or a class derived from it.
        recipe: the hyperparameters, the network's name among them.
        data: the loaders; a whitening layer decorrelates the first 5,000 training images.
        seed: of the weights, and of all random numbers from here on.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    classifier = kind(**asdict(recipe))
    layer = classifier.model.whitening_layer()
    if layer is not None:
        whiten(layer, normalize(data.splits.train.images[:5000]))
    return classifier


def train(
    recipe: Recipe,
    data: CIFAR10DataModule,
    root: str | Path = "checkpoints",
    options: RunOptions = DEFAULT_OPTIONS,
    callbacks: Sequence[pl.Callback] = (),
) -> Run:
    """Train a network, continue an interrupted run, or load a finished one, and say which.

    Args:
        recipe: the hyperparameters.
        data: the loaders, made by build_datamodule.
        root: the folder that holds a folder for each run.
        options: seed, precision, devices, and whether to train anew.
        callbacks: further callbacks of the trainer.

    Returns:
        The network with the weights of the last epoch, and what is known of its training.

    Raises:
        InvalidValue: for what this machine cannot train, or cannot continue.
        RunInUse: if another process trains in the run's folder.
        StorageError: if the folder cannot hold the checkpoints.
        TrainingFailed: if the memory is too small, or one of several processes fails.
        Diverged: if a loss is no number.
        Interrupted: if somebody stops it; the message says how to continue.
    """
    quiet_lightning()
    if options.precision != "auto":
        check_precision(options.precision)
    accumulation_steps(recipe, data)  # raises where a batch cannot be divided
    data.setup()
    identity = run_identity(recipe, data, options)
    folder = run_folder(root, identity)
    finished = None if options.fresh else finished_run(folder, recipe)
    if finished:
        print_finished(folder, finished)
        return finished
    check_placement(options)
    network = build(recipe.network)
    check_rates(network, recipe)
    parameters = sum(p.numel() for p in network.parameters())
    needed = needed_space(folder, parameters, options.fresh)
    check_disk_space(folder, needed, "its checkpoints", "CHECKPOINT_DIR")
    with RunLock(folder) if rank_zero_only.rank == 0 else contextlib.nullcontext() as lock:
        started = start_or_resume(folder, identity, recipe, data, options)
        if lock:
            lock.started = started
            callbacks = [*callbacks, lock]
        return fit(folder, started, data, options, callbacks)


def check_placement(options: RunOptions) -> None:
    """Raise InvalidValue if the devices that are asked for cannot train together, or from here."""
    device, in_notebook = choose_device().type, kernel_shell() is not None
    wanted = 1 if options.devices == "auto" else int(options.devices)
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    if device != "cpu" and wanted > gpus:
        raise InvalidValue(f"expected DEVICES of at most {gpus}, the GPUs here, got {wanted}")
    if in_notebook and options.strategy == "ddp":
        raise InvalidValue(
            "expected STRATEGY 'auto' in a notebook, got 'ddp', which is for scripts"
        )
    forks = options.strategy == "ddp_notebook" or (in_notebook and wanted > 1)
    can_fork = device != "cuda" and "fork" in multiprocessing.get_all_start_methods()
    if forks and not can_fork:
        raise InvalidValue(
            "a process that has used a GPU, or that runs on Windows, cannot be forked; set STRATEGY"
            " = 'auto' and DEVICES = '1', or run `torchrun --nproc-per-node"
            f" {wanted} -m training` with the same switches, then this loads the result"
        )


def print_finished(folder: Path, run: Run) -> None:
    """Print where a finished run was loaded from, and a line for each of its epochs."""
    print_rank_zero(
        f"loaded the finished run in {folder}: trained on {run.metadata['hardware']}"
        f" in {format_duration(run.metadata['seconds'])}"
    )
    epochs = run.metadata["epochs"]
    for metrics in rows_of(epoch_means(read_finished_metrics(folder, epochs))):
        print_rank_zero(epoch_line(metrics, epochs))


def fit(
    folder: Path,
    started: dict,
    data: CIFAR10DataModule,
    options: RunOptions,
    callbacks: Sequence[pl.Callback],
) -> Run:
    """Train to the last epoch, from the newest checkpoint if there is one.

    Args:
        folder: of the run.
        started: what start_or_resume returned; its recipe, seed and precision are trained with.
        data: the loaders.
        options: whether to compile, and the devices.
        callbacks: further callbacks of the trainer.

    Returns:
        The network with the weights of the last epoch, and what is known of its training.
    """
    recipe, seed = Recipe(**started["resolved"]["recipe"]), started["identity"]["seed"]
    classifier = make_classifier(LitClassifier, recipe, data, seed)
    if options.compiled:
        classifier.model.compile()
    trainer = make_trainer(folder, started, data, options, callbacks)
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        print_rank_zero(f"continuing the interrupted run in {folder}")
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, ProcessException) as error:
        if isinstance(error, ProcessException) or is_out_of_memory(error):
            raise training_failed(error, data.batch_size) from error
        raise
    except SystemExit:  # what Lightning makes of an interrupt
        raise Interrupted(
            f"training was interrupted in epoch {trainer.current_epoch + 1} of {recipe.epochs}; run"
            f" again to continue from {folder}, or take what it has learned: from training.results"
            f" import unfinished_run; run = unfinished_run({str(folder)!r})"
        ) from None
    return finish_run(folder, started, trainer)


def make_trainer(
    folder: Path,
    started: dict,
    data: CIFAR10DataModule,
    options: RunOptions,
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    """Make the trainer that logs, prints and writes checkpoints into a run's folder.

    The arguments are those of `fit`.
    """
    recipe = Recipe(**started["resolved"]["recipe"])
    each_epoch = ModelCheckpoint(
        folder,
        "epoch{epoch:03d}",
        save_top_k=-1,  # ChecksumIO removes the old ones
        auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    return pl.Trainer(
        accelerator=choose_device().type,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        max_epochs=recipe.epochs,
        precision=started["resolved"]["precision"],
        logger=CSVLogger(folder, "logs"),
        callbacks=[Progress(read_metrics(folder / "logs")), *callbacks, each_epoch],
        plugins=[ChecksumIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=accumulation_steps(recipe, data),
        limit_val_batches=1.0 if len(data.splits.val.labels) else 0,
        use_distributed_sampler=False,  # the loaders split each batch themselves
    )


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error is torch's for too little memory, of a GPU or of the computer."""
    known = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(name in repr(error) for name in known)


def training_failed(error: Exception, batch_size: int) -> TrainingFailed:
    """Make the error that says what failed in this process or another, and what to do.

    Args:
        error: for too little memory, or what one of several processes raised.
        batch_size: images that pass through the network at a time.
    """
    if not is_out_of_memory(error):
        return TrainingFailed(str(error).strip().splitlines()[-1])
    smaller = f"set BATCH_SIZE to {batch_size // 2}" if batch_size > 1 else "take a smaller network"
    return TrainingFailed(f"the memory is too small for batches of {batch_size} images; {smaller}")


def finish_run(folder: Path, started: dict, trainer: pl.Trainer) -> Run:
    """Write the metadata and the metrics of a run that has reached its last epoch.

    Args:
        folder: of the run.
        started: the content of its started.json.
        trainer: the one that has trained it.

    Returns:
        The network with the weights of the last epoch, and what is known of its training.
    """
    table = read_metrics(folder / "logs")
    checkpoint = newest_checkpoint(folder)
    assert checkpoint, f"the last epoch left no checkpoint in {folder}"
    classifier, _ = load_checkpoint(checkpoint, started["resolved"]["recipe"]["network"])
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
