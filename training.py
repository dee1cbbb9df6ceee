"""A training run that can be interrupted: its folder, its checkpoints, its precision, its progress.

A run's folder is named by its settings. Running again with the same settings continues where the last complete
checkpoint ends, or loads the result if the run is finished.
"""

import contextlib
import hashlib
import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from cells import kernel_shell
from checkpoints import ChecksumIO, check_room, load_classifier, newest_checkpoint
from dataload import CIFAR10DataModule, Splits, normalize
from machine import check_precision, choose_device, choose_precision, hardware, versions
from models.bundle import load_bundle
from models.lit import LitClassifier, Recipe
from progress import Progress, clock, epoch_line
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
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        try:
            rows = read_table(path)
        except ValueError as error:
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


def run_folder(root: str | Path, recipe: Recipe, seed: int, data: CIFAR10DataModule) -> Path:
    """The folder of a run: what it trains, for how long, and a hash of everything that shapes the result."""
    settings = asdict(recipe) | {"seed": seed, "images": len(data.splits.train.labels), "data": data.splits.source}
    settings |= {"fast": data.fast}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(root) / f"{recipe.network}-{recipe.epochs}-{digest[:8]}"


def prepare(kind: type[LitClassifier], recipe: Recipe, data: CIFAR10DataModule, seed: int) -> tuple[LitClassifier, int]:
    """A new classifier, its stem made from the training images if it has such a one, and how many of the loader's
    batches make one of the recipe's."""
    parts, rest = divmod(recipe.batch_size, data.batch_size)
    if rest:
        raise ValueError(f"a batch of {recipe.batch_size} cannot be made of loader batches of {data.batch_size}")
    pl.seed_everything(seed, workers=True, verbose=False)
    classifier = kind(**asdict(recipe))
    if hasattr(classifier.model, "whiten"):
        classifier.model.whiten(normalize(data.splits.train.images[:5000]))
    return classifier, parts


def fit(
    recipe: Recipe, data: CIFAR10DataModule, folder: Path, seed: int, precision: str, compiled: bool = False,
    **placement: int | str,
) -> dict:  # fmt: skip
    """Train, or continue; returns the facts of the finished run. placement: devices, num_nodes, strategy."""
    classifier, parts = prepare(LitClassifier, recipe, data, seed)
    check_room(folder, sum(p.numel() for p in classifier.parameters()))
    if compiled:
        classifier.model.compile()
    keep_two = ModelCheckpoint(
        folder, "epoch{epoch:03d}", monitor="epoch", mode="max", save_top_k=2, save_last=True,
        auto_insert_metric_name=False, save_on_train_epoch_end=True, enable_version_counter=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        max_epochs=recipe.epochs, precision=precision, callbacks=[Progress(read_metrics(folder / "logs")), keep_two],
        logger=CSVLogger(folder, "logs"), plugins=[ChecksumIO()], log_every_n_steps=10, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=parts, limit_val_batches=1.0 if len(data.splits.val.labels) else 0,
        use_distributed_sampler=False, **placement,
    )  # fmt: skip
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        say(f"continuing the interrupted run in {folder}")
    facts = {
        "epochs": recipe.epochs, "batch_size": recipe.batch_size, "seed": seed, "data": data.splits.source,
        "train_images": len(data.splits.train.labels), "precision": precision, "versions": versions(),
        "hardware": hardware(trainer.world_size),
    }  # fmt: skip
    if trainer.is_global_zero:
        write_json(folder / "started.json", facts)
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (torch.OutOfMemoryError, ProcessRaisedException) as error:  # the latter of one of several processes
        if "OutOfMemoryError" not in repr(error):
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        raise RuntimeError(
            f"the GPU's memory is too small for batches of {recipe.batch_size} images; set BATCH_SIZE to"
            f" {recipe.batch_size // 2}"
        ) from error
    except SystemExit:  # what Lightning makes of an interrupt
        raise KeyboardInterrupt(
            f"training was interrupted in epoch {trainer.current_epoch + 1} of {recipe.epochs}; run again to continue"
            f" from {folder}, or take what it has learned: run = unfinished_run({str(folder)!r})"
        ) from None
    table = read_metrics(folder / "logs")
    facts |= result(table)
    if trainer.is_global_zero:
        table.to_csv(folder / "metrics.csv", index=False)
        write_json(folder / "finished.json", facts)
    return facts


def train(
    recipe: Recipe, data: CIFAR10DataModule, root: str | Path = "checkpoints", seed: int = 42, fresh: bool = False,
    precision: str | None = None, compiled: bool = False, devices: int | str = "auto", num_nodes: int = 1,
    strategy: str = "auto",
) -> Run:  # fmt: skip
    """Train a network, continue an interrupted run, or load a finished one, and say which.

    root: where the runs' folders are. fresh: train anew even if the run is finished (its old folder is kept aside).
    precision: Lightning's name, or None for choose_precision(). compiled: let torch.compile make the network faster,
    which pays on a GPU, after a minute. devices, num_nodes, strategy: as Lightning's Trainer has them; the images of a
    batch are shared out, so the recipe is the same for any number of devices. Returns the weights of the last epoch.
    """
    precision = precision or choose_precision()
    check_precision(precision)
    if devices not in ("auto", 1) and kernel_shell() and torch.cuda.is_initialized():
        raise ValueError(
            f"a notebook that has used a GPU cannot train on {devices}; run"
            f" `torchrun --nproc-per-node {devices} train.py` with the same switches, then this loads the result"
        )
    data.setup()
    folder = run_folder(root, recipe, seed, data)
    if fresh and (folder / "finished.json").exists():  # one that was interrupted is as fresh as can be
        set_aside(folder)
    facts = read_facts(folder / "finished.json")
    if facts:
        say(f"loaded the finished run in {folder}: trained on {facts['hardware']} in {clock(facts['seconds'])}")
        for _, row in finished_metrics(folder).groupby("epoch").mean().reset_index().iterrows():
            say(epoch_line(row, recipe.epochs))
    else:
        placement = {"devices": devices, "num_nodes": num_nodes, "strategy": strategy}
        facts = fit(recipe, data, folder, seed, precision, compiled, **placement)
    return Run(rounded_network(folder, recipe.network), facts, folder / "metrics.csv")


def set_aside(folder: Path) -> None:
    """Give a finished run's folder another name: the first process does it, the others wait until it is done."""
    if rank_zero_only.rank == 0:
        folder.rename(folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    while (folder / "finished.json").exists():
        time.sleep(0.1)


def read_facts(path: Path) -> dict | None:
    """The facts of a run that this file holds; None if it is not there, or damaged, which it says."""
    try:
        facts = json.loads(path.read_text())
        if not {"seconds", "hardware", "train_images", "data", "val_acc"} <= set(facts):
            raise ValueError("facts are missing")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        print(f"{path} is damaged ({error}) and is not used")
        return None
    return facts


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


def rounded_network(folder: Path, arch: str) -> nn.Module:
    """The network of a run's newest checkpoint, in eval mode, with its weights rounded to fp16, as the bundle will
    hold them: what is measured is what is published."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} has no complete checkpoint; remove it, or set FRESH, to train again")
    return load_classifier(checkpoint, arch).model.half().float().eval()


def unfinished_run(folder: str | Path) -> Run:
    """What an interrupted run has learned, after its last whole epoch. ValueError if it has none yet."""
    folder = Path(folder)
    started = json.loads((folder / "started.json").read_text())
    model = rounded_network(folder, folder.name.split("-")[0])
    table = read_metrics(folder / "logs").dropna(subset="train_loss")
    table.to_csv(folder / "metrics.csv", index=False)
    facts = started | {"epochs": table.epoch.nunique()} | result(table)
    return Run(model, facts, folder / "metrics.csv")


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
    recipe: Recipe, data: CIFAR10DataModule, seed: int = 42, steps: int = 40, precision: str | None = None
) -> pd.DataFrame:
    """The learning-rate range test (Smith 2015, arXiv:1506.01186), on a network of its own that is thrown away.

    With the images that the training begins with, small ones if the recipe says so. Returns a row for each step:
    factor, the learning rate as a multiple of the recipe's peak, and loss. It ends where the loss is no number.
    """
    data.setup()
    classifier, parts = prepare(RangeTest, replace(recipe, low_res=float(recipe.low_res > 0)), data, seed)
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        max_steps=steps, precision=precision or choose_precision(), devices=1, accumulate_grad_batches=parts,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    with contextlib.suppress(FloatingPointError):
        trainer.fit(classifier, datamodule=data)
    rows = [(growing(step / steps), np.mean(losses)) for step, losses in classifier.losses.items()]
    return pd.DataFrame(rows, columns=["factor", "loss"])


def stored_run(space: str | Path) -> Run:
    """The network of a bundle instead of a new one, with the facts that model.json has of its training."""
    model, meta = load_bundle(space)
    return Run(model, meta["training"], None)
