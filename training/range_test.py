"""The learning-rate range test."""

import contextlib
from dataclasses import replace

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from dataload import CIFAR10DataModule
from training.classifier import LitClassifier
from training.console import quiet_lightning
from training.hardware import choose_device, choose_precision
from training.recipes import Recipe
from training.runs import accumulation_steps, prepare


class RangeTest(LitClassifier):
    """Training with a learning rate that grows with every step, from a hundredth of the recipe's to ten times it."""

    def configure_optimizers(self) -> dict:
        configured, self.losses = (
            super().configure_optimizers(),
            {},
        )  # step -> the losses of its parts
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(
            configured["optimizer"],
            lambda step: exponential_lr_factor(step / self.trainer.max_steps),
        )
        return configured

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if not loss.isfinite():
            raise FloatingPointError
        self.losses.setdefault(self.global_step, []).append(float(loss.detach()))
        return loss


def exponential_lr_factor(done: float) -> float:
    """0.01 at the start, 10 at the end, and as many steps from 0.01 to 0.1 as from 1 to 10."""
    return 10 ** (3 * done - 2)


def range_test(
    recipe: Recipe,
    data: CIFAR10DataModule,
    seed: int = 42,
    steps: int = 40,
    precision: str = "auto",
) -> pd.DataFrame:
    """The learning-rate range test (Smith 2015, arXiv:1506.01186), on a network of its own that is thrown away.

    With the images that the training begins with, small ones if the recipe says so. Returns a row for each step:
    factor, the learning rate as a multiple of the recipe's peak, and loss. It ends where the loss is no number.
    """
    quiet_lightning()
    data.setup()
    steps_per_batch = accumulation_steps(recipe, data)
    classifier = prepare(RangeTest, replace(recipe, low_res=float(recipe.low_res > 0)), data, seed)
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        devices=1,
        max_steps=steps,
        precision=choose_precision() if precision in ("", "auto") else precision,
        accumulate_grad_batches=steps_per_batch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    with contextlib.suppress(FloatingPointError):
        trainer.fit(classifier, datamodule=data)
    rows = [
        (exponential_lr_factor(step / steps), sum(losses) / steps_per_batch)
        for step, losses in classifier.losses.items()
    ]
    return pd.DataFrame(rows, columns=["factor", "loss"])
