"""A training run that can be interrupted: its folder, its checkpoints, its precision, its progress.

A run's folder is named by what was asked for (run_folder.py). Asking for the same again continues where the last
complete checkpoint ends, or loads the result if the run is finished.
"""

import contextlib
import logging
import re
import uuid
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from cells import kernel_shell
from checkpoints import ChecksumIO, check_room, load_checkpoint, newest_checkpoint
from dataload import CIFAR10DataModule, Splits, normalize
from machine import check_precision, choose_device, choose_precision, hardware, native_precisions, versions
from models.bundle import load_bundle
from models.errors import Interrupted, InvalidValue, TrainingFailed
from models.lit import LitClassifier, Recipe
from models.registry import build
from progress import Progress, clock, epoch_line
from run_folder import (
    FACTS,
    AutoChoice,
    Owner,
    archive_run,
    older_runs,
    read_json,
    run_folder,
    run_identity,
    weights_sha256,
)
from utils import read_table, write_json

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # or each fit prints an advertisement
for harmless in (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
    ".*bf16-mixed is not supported by the model summary",
):
    warnings.filterwarnings("ignore", harmless)

say = rank_zero_only(print)  # once, however many processes train

# ---- what a run leaves ----------------------------------------------------------------------------------------------


def read_metrics(logs: Path) -> pd.DataFrame:
    """Lightning's metrics.csv files of a run, one per start, as one table; an epoch begun again counts once."""
    table = pd.DataFrame({"epoch": []})
    starts = {
        int(match[1]): path
        for path in logs.glob("*/metrics.csv")
        if (match := re.fullmatch(r"version_(\d+)", path.parent.name))  # not a synced drive's copy 'version_0 (1)'
    }
    for _, path in sorted(starts.items()):
        try:
            rows = read_table(path)
        except (OSError, ValueError) as error:
            print(f"{error} and is not used")
            continue
        if len(rows):
            table = pd.concat([table[table.epoch < rows.epoch.min()], rows])
    return table.reset_index(drop=True)


@dataclass(frozen=True)
class Run:
    """What training left. model: the network of the last epoch, in eval mode, on the CPU. facts: of the run.
    metrics_csv: its epochs, or None where nothing is known of them."""

    model: nn.Module
    facts: dict
    metrics_csv: Path | None


def data_for(recipe: Recipe, splits: Splits, seed: int = 42, fast: bool = False) -> CIFAR10DataModule:
    """The loaders as a recipe wants them on this machine: without a GPU in micro-batches, and without workers, which
    would take the cores that train."""
    gpu = choose_device().type != "cpu"
    return CIFAR10DataModule(
        batch_size=recipe.batch_size if gpu else recipe.micro_batch or recipe.batch_size, num_workers=2 if gpu else 0,
        seed=seed, splits=splits, padding=recipe.padding, cutout=recipe.cutout, fast=fast,
    )  # fmt: skip


def accumulation_steps(recipe: Recipe, data: CIFAR10DataModule) -> int:
    """How many of the loader's batches make one of the recipe's. ValueError if they do not."""
    steps, rest = divmod(recipe.batch_size, data.batch_size)
    if rest:
        raise InvalidValue(f"a batch of {recipe.batch_size} cannot be made of loader batches of {data.batch_size}")
    return steps


def prepare(kind: type[LitClassifier], recipe: Recipe, data: CIFAR10DataModule, seed: int) -> LitClassifier:
    """A new classifier, its stem made from the training images if it has such a one."""
    pl.seed_everything(seed, workers=True, verbose=False)
    classifier = kind(**asdict(recipe))
    if hasattr(classifier.model, "whiten"):
        classifier.model.whiten(normalize(data.splits.train.images[:5000]))
    return classifier


def train(
    recipe: Recipe, data: CIFAR10DataModule, root: str | Path = "checkpoints", seed: int = 42, fresh: bool = False,
    precision: str = "auto", compiled: bool = False, devices: int | str = "auto", num_nodes: int = 1,
    strategy: str = "auto", auto: AutoChoice | None = None,
) -> Run:  # fmt: skip
    """Train a network, continue an interrupted run, or load a finished one, and say which.

    root: where the runs' folders are. fresh: train anew even if the run is finished, or began on a machine of another
    kind (its old folder is kept aside). precision: Lightning's name, or 'auto'. compiled: let torch.compile make the
    network faster, which pays on a GPU, after a minute. devices, num_nodes, strategy: as Lightning's Trainer has them;
    the images of a batch are shared out, so the recipe is the same for any number of devices. auto: given if it was
    'auto' that chose the recipe. Returns the weights of the last epoch.

    Raises ValueError for what this machine cannot train, and RunInUse if another process trains in the run's folder.
    """
    precision = precision or "auto"
    if precision != "auto":
        check_precision(precision)
    accumulation_steps(recipe, data)
    if devices not in ("auto", 1) and kernel_shell() and torch.cuda.is_initialized():
        raise InvalidValue(
            f"a notebook that has used a GPU cannot train on {devices}; run"
            f" `torchrun --nproc-per-node {devices} train.py` with the same switches, then this loads the result"
        )
    data.setup()
    identity = run_identity(recipe, data, seed, precision, auto.asked if auto else None)
    folder = run_folder(root, identity)
    if older_runs(root):
        say(f"not used, for an earlier version left them: {', '.join(older_runs(root))} in {root}")
    finished = None if fresh else finished_run(folder)
    if finished:
        say(f"loaded the finished run in {folder}: trained on {finished.facts['hardware']}"
            f" in {clock(finished.facts['seconds'])}")  # fmt: skip
        for _, row in finished_metrics(folder).groupby("epoch").mean().reset_index().iterrows():
            say(epoch_line(row, finished.facts["epochs"]))
        return finished
    check_room(folder, sum(p.numel() for p in build(recipe.network).parameters()))
    with Owner(folder) if rank_zero_only.rank == 0 else contextlib.nullcontext() as owner:
        started = begin(folder, identity, recipe, data, auto.recipe_name if auto else "", fresh)
        if owner:
            owner.started = started
        placement = {"devices": devices, "num_nodes": num_nodes, "strategy": strategy}
        return fit(folder, started, data, [owner] if owner else [], compiled, **placement)


def begin(folder: Path, identity: dict, recipe: Recipe, data: CIFAR10DataModule, recipe_name: str, fresh: bool) -> dict:
    """What started.json holds of a run: its identity, and what 'auto' became when it began.

    It is written if the run begins now. A run that is resumed keeps its device, precision and loader batches.
    Raises ValueError if this machine cannot continue it; with fresh it is then set aside, and so is a finished one.
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
    data.batch_size, data.num_workers = (started["resolved"][key] for key in ("batch_size", "num_workers"))
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
    """Why the run in this folder cannot go on here, and what to do, as the first half of a sentence; '' if it can."""
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
    return (
        f"the run in {folder} began with {began}, and {hardware()} has {here}; continue it on a machine like the first"
    )


def fit(
    folder: Path, started: dict, data: CIFAR10DataModule, callbacks: list[pl.Callback], compiled: bool = False,
    **placement: int | str,
) -> Run:  # fmt: skip
    """Train to the last epoch, from the newest checkpoint if there is one.

    started: what `begin` returned. placement: devices, num_nodes, strategy.
    """
    recipe, seed = Recipe(**started["resolved"]["recipe"]), started["identity"]["seed"]
    classifier = prepare(LitClassifier, recipe, data, seed)
    if compiled:
        classifier.model.compile()
    keep_two = ModelCheckpoint(
        folder, "epoch{epoch:03d}", monitor="epoch", mode="max", save_top_k=2, save_last=True,
        auto_insert_metric_name=False, save_on_train_epoch_end=True, enable_version_counter=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator=choose_device().type, max_epochs=recipe.epochs, precision=started["resolved"]["precision"],
        logger=CSVLogger(folder, "logs"), callbacks=[Progress(read_metrics(folder / "logs")), *callbacks, keep_two],
        plugins=[ChecksumIO()], log_every_n_steps=10, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=accumulation_steps(recipe, data),
        limit_val_batches=1.0 if len(data.splits.val.labels) else 0, use_distributed_sampler=False, **placement,
    )  # fmt: skip
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        say(f"continuing the interrupted run in {folder}")
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (torch.OutOfMemoryError, ProcessRaisedException) as error:  # the latter of one of several processes
        if "OutOfMemoryError" not in repr(error):
            raise TrainingFailed(str(error).strip().splitlines()[-1]) from error
        smaller = f"set BATCH_SIZE to {recipe.batch_size // 2}" if recipe.batch_size > 1 else "take a smaller network"
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
    """What a run that has reached its last epoch leaves; its facts and the table of its epochs are written."""
    table = read_metrics(folder / "logs")
    classifier, _ = load_checkpoint(newest_checkpoint(folder), started["resolved"]["recipe"]["network"])
    facts = run_facts(started) | {
        "versions": versions(),
        "hardware": hardware(trainer.world_size),
        "weights_sha256": weights_sha256(classifier.state_dict()),
    }
    facts |= result(table)
    if trainer.is_global_zero:
        table.to_csv(folder / "metrics.csv", index=False)
        write_json(folder / "finished.json", facts)
    return Run(rounded(classifier.model), facts, folder / "metrics.csv")


def run_facts(started: dict) -> dict:
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

    Raises ValueError if it is finished and no checkpoint is there: a synced drive may bring it later.
    """
    facts = read_json(folder / "finished.json", FACTS)
    if facts is None:
        return None
    path, started = newest_checkpoint(folder), read_json(folder / "started.json", {"resolved"})
    if path is None or started is None:
        raise InvalidValue(
            f"{folder} has no complete checkpoint; if it is on a synced drive, wait until that has brought all files,"
            " else set FRESH = True to train anew"
        )
    classifier, epochs = load_checkpoint(path, started["resolved"]["recipe"]["network"])
    if weights_sha256(classifier.state_dict()) != facts["weights_sha256"]:
        say(f"{folder}: finished.json describes other weights than {path.name}, of epoch {epochs}; training continues")
        return None
    finished_metrics(folder)
    return Run(rounded(classifier.model), facts, folder / "metrics.csv")


def finished_metrics(folder: Path) -> pd.DataFrame:
    """The metrics.csv of a finished run; where it is damaged or gone, it is put together again from the logs."""
    try:
        table = read_table(folder / "metrics.csv")
        if len(table) and {"train_loss", "train_acc", "seconds"} <= set(table):
            return table
        problem = f"{folder / 'metrics.csv'} holds no epochs"
    except (OSError, ValueError) as error:
        problem = error
    print(f"{problem}; it is made again")
    table = read_metrics(folder / "logs")
    table.to_csv(folder / "metrics.csv", index=False)
    return table


def result(table: pd.DataFrame) -> dict:
    """What training gave so far, from its epochs: its time, all interruptions left out, and the last validation."""
    val_acc = float(table.val_acc.dropna().iloc[-1]) if "val_acc" in table else None
    return {"seconds": round(float(table.seconds.sum()), 1), "val_acc": val_acc}


def rounded(model: nn.Module) -> nn.Module:
    """A network in eval mode, with its weights rounded to fp16, as the bundle will hold them: what is measured is what
    is published."""
    return model.half().float().eval()


def unfinished_run(folder: str | Path) -> Run:
    """What an interrupted run has learned, after its last whole epoch. ValueError if it has none yet."""
    folder = Path(folder)
    started, path = read_json(folder / "started.json", {"identity", "resolved"}), newest_checkpoint(folder)
    if started is None or path is None:
        raise InvalidValue(f"{folder} holds no run that has finished an epoch")
    classifier, epochs = load_checkpoint(path, started["resolved"]["recipe"]["network"])
    table = read_metrics(folder / "logs")
    table = table[table.epoch < epochs]  # the log may be an epoch ahead of the checkpoint
    table.to_csv(folder / "metrics.csv", index=False)
    facts = run_facts(started) | {"epochs": epochs} | result(table)
    return Run(rounded(classifier.model), facts, folder / "metrics.csv")


class RangeTest(LitClassifier):
    """Training with a learning rate that grows with every step, from a hundredth of the recipe's to ten times it."""

    def configure_optimizers(self) -> dict:
        configured, self.losses = super().configure_optimizers(), {}  # step -> the losses of its parts
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(
            configured["optimizer"], lambda step: growing(step / self.trainer.max_steps)
        )
        return configured

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if not loss.isfinite():
            raise FloatingPointError
        self.losses.setdefault(self.global_step, []).append(float(loss.detach()))
        return loss


def growing(done: float) -> float:
    """0.01 at the start, 10 at the end, and as many steps from 0.01 to 0.1 as from 1 to 10."""
    return 10 ** (3 * done - 2)


def range_test(
    recipe: Recipe, data: CIFAR10DataModule, seed: int = 42, steps: int = 40, precision: str = "auto"
) -> pd.DataFrame:
    """The learning-rate range test (Smith 2015, arXiv:1506.01186), on a network of its own that is thrown away.

    With the images that the training begins with, small ones if the recipe says so. Returns a row for each step:
    factor, the learning rate as a multiple of the recipe's peak, and loss. It ends where the loss is no number.
    """
    data.setup()
    steps_per_batch = accumulation_steps(recipe, data)
    classifier = prepare(RangeTest, replace(recipe, low_res=float(recipe.low_res > 0)), data, seed)
    trainer = pl.Trainer(
        accelerator=choose_device().type, devices=1, max_steps=steps,
        precision=choose_precision() if precision in ("", "auto") else precision,
        accumulate_grad_batches=steps_per_batch, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    with contextlib.suppress(FloatingPointError):
        trainer.fit(classifier, datamodule=data)
    rows = [(growing(step / steps), sum(losses) / steps_per_batch) for step, losses in classifier.losses.items()]
    return pd.DataFrame(rows, columns=["factor", "loss"])


def stored_run(space: str | Path) -> Run:
    """The network of a bundle instead of a new one, with the facts that model.json has of its training."""
    model, meta = load_bundle(space)
    return Run(model, meta["training"], None)
