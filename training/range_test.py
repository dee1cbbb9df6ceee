"""The learning-rate range test, after Smith 2015 (arXiv:1506.01186).

There the rate grows in a straight line, here exponentially.
"""

from dataclasses import replace
from typing import cast

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from dataload import CIFAR10DataModule
from models.errors import Interrupted
from training.classifier import LitClassifier
from training.hardware import Precision, choose_device, choose_precision
from training.lightning_output import quiet_lightning
from training.recipes import Recipe
from training.runs import accumulation_steps, make_classifier


class RangeTest(LitClassifier):
    """A classifier whose learning rate grows with every step, from 0.01 to 10 times the recipe's.

    Attributes:
        losses: step -> the losses of its micro-batches.
        factors: step -> the learning rate as a multiple of the recipe's. In fp16 the same one comes
            again after a step that was skipped.
    """

    def __init__(self, **recipe):
        super().__init__(**recipe)
        self.losses: dict[int, list[float]] = {}
        self.factors: dict[int, float] = {}

    def configure_optimizers(self) -> dict:
        """Make the recipe's optimiser, with learning rates that grow exponentially."""
        configured, last = super().configure_optimizers(), max(1, self.trainer.max_steps - 1)
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(
            configured["optimizer"], lambda step: 10 ** (3 * step / last - 2)
        )
        return configured

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Compute and note the loss; raise FloatingPointError if it is no number."""
        loss = super().training_step(batch, index)
        if not loss.isfinite():
            raise FloatingPointError
        self.losses.setdefault(self.global_step, []).append(float(loss.detach()))
        group = self.trainer.optimizers[0].param_groups[0]
        self.factors[self.global_step] = group["lr"] / group["initial_lr"]
        return loss


def range_test(
    recipe: Recipe,
    data: CIFAR10DataModule,
    seed: int = 42,
    steps: int = 40,
    precision: str = "auto",
) -> pd.DataFrame:
    """Train a separate throwaway model with a learning rate that grows with every step.

    The images are those that the training begins with, at low resolution if the recipe says so.
    The test ends early where the loss is no number.

    Args:
        recipe: the hyperparameters.
        data: the loaders, made by build_datamodule.
        seed: of the weights.
        steps: of the optimiser.
        precision: Lightning's name, or 'auto'.

    Returns:
        A row for each step, with the columns factor, the learning rate as a multiple of the
        recipe's peak, and loss.

    Raises:
        Interrupted: if somebody stops it.
    """
    quiet_lightning()
    data.setup()
    micro_batches = accumulation_steps(recipe, data)
    recipe = replace(recipe, low_res=float(recipe.low_res > 0))
    classifier = make_classifier(RangeTest, recipe, data, seed)
    if precision == "auto":
        precision = choose_precision()
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        devices=1,
        max_steps=steps,
        precision=cast(Precision, precision),
        accumulate_grad_batches=micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    losses = classifier.losses
    try:
        trainer.fit(classifier, datamodule=data)
    except FloatingPointError:
        losses.pop(classifier.global_step, None)  # some of its micro-batches are missing
    except SystemExit:  # what Lightning makes of an interrupt
        raise Interrupted("the range test was interrupted; run it again") from None
    rows = [
        (classifier.factors[step], sum(of_step) / micro_batches) for step, of_step in losses.items()
    ]
    return pd.DataFrame(rows, columns=["factor", "loss"])
