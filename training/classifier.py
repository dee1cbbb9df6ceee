"""The LightningModule that trains a network by a recipe."""

from dataclasses import asdict

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from models.errors import Diverged
from models.registry import build
from training.optimizer import make_optimizer
from training.recipes import Recipe

NUM_CLASSES = 10
LOW_RESOLUTION = 24  # pixels: 9/16 of the work of 32


def one_cycle_factor(done: float, warmup: float) -> float:
    """The learning rate as a fraction of its peak: from 0 up in a straight line to `warmup`, then down to 0 at 1.

    With a warmup of 0 it only falls, with 1 it only rises. done: from 0 to 1, or a step beyond.
    """
    if done < warmup or warmup == 1:
        return min(1.0, done / warmup)
    return (1 - done) / (1 - warmup)


class LitClassifier(pl.LightningModule):
    """A network with its loss, metric, optimiser and schedule.

    Takes and returns what the network does.

    The arguments are Recipe's: LitClassifier(network="ResNet18", max_lr=0.1).
    """

    def __init__(self, **recipe):
        super().__init__()
        self.recipe = Recipe(**recipe)
        self.save_hyperparameters(asdict(self.recipe))
        self.acc = MulticlassAccuracy(NUM_CLASSES, average="micro")
        # channels_last: the layout in which convolutions are fastest, on a CPU and on tensor cores
        # alike.
        self.model = build(self.recipe.network, NUM_CLASSES).to(memory_format=torch.channels_last)
        self.history = []  # of the epoch: (loss, images classified rightly) of each batch, and how many it had
        self.rates = {}  # of the epoch: step -> learning rate

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))

    # ---- training ----

    def on_fit_start(self) -> None:
        accumulation_steps = self.trainer.accumulate_grad_batches
        for module in self.modules():
            if isinstance(
                module, nn.BatchNorm2d
            ):  # parts of a batch together weigh as much as the batch
                module.momentum = 1 - (1 - self.recipe.bn_momentum) ** (1 / accumulation_steps)

    def on_train_epoch_start(self) -> None:
        self.rates.clear()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if self.global_step < self.recipe.low_res * self.trainer.estimated_stepping_batches:
            images = F.interpolate(images, size=LOW_RESOLUTION, mode="bilinear")
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.history.append((loss.detach().float(), correct, len(labels)))
        # To read a number back from a GPU stops it, so there this waits until the epoch's last
        # batch.
        if self.trainer.is_last_batch or not loss.is_cuda:
            self.check_finite()
        self.rates[self.global_step] = self.logged_rate()
        if self.trainer.is_last_batch:
            self.log_epoch()
        return loss * self.loss_share(len(labels), index)

    def loss_share(self, images: int, index: int) -> float:
        """What the mean loss of these images is multiplied by, so that every image of a step counts alike.

        The gradient of a step is the mean over all its images, in however many micro-batches and processes they come,
        and whatever the last step of an epoch holds. Lightning divides each micro-batch's gradient by the number of
        micro-batches of a full step, and DDP the sum by the number of processes; this takes both back.
        """
        steps = self.trainer.accumulate_grad_batches
        step_images = self.trainer.datamodule.step_images(index, steps)
        return images * steps * self.trainer.world_size / step_images

    def logged_rate(self) -> float:
        """The learning rate that stands for all.

        Muon's where it trains anything, or else that of the last group.
        """
        groups = self.trainer.optimizers[0].param_groups
        return next((group for group in groups if group["muon"]), groups[-1])["lr"]

    def check_finite(self) -> None:
        """Raise Diverged if a loss of this epoch is no number; it names the step of the first."""
        finite = torch.stack([loss for loss, _, _ in self.history]).isfinite()
        if not finite.all():
            first, accumulation_steps = (
                int(finite.long().argmin()),
                self.trainer.accumulate_grad_batches,
            )
            step = (
                self.global_step
                + 1
                - ((len(self.history) - 1) // accumulation_steps - first // accumulation_steps)
            )
            raise Diverged(
                f"the loss is {float(self.history[first][0])} at step {step}, epoch {self.current_epoch + 1}, with a"
                f" learning rate of {self.logged_rate():.3g}; the last checkpoint is kept"
            )

    def log_epoch(self) -> None:
        """Log what the epoch's batches gave."""
        losses, correct, counts = zip(*self.history, strict=True)
        images = sum(counts)
        self.log_dict(
            {
                "train_loss": (torch.stack(losses) * torch.tensor(counts, device=self.device)).sum()
                / images,
                "train_acc": torch.stack(correct).sum() / images,
                "lr": self.logged_rate(),
            },
            on_step=False,
            on_epoch=True,
            logger=False,
            batch_size=float(images),
            sync_dist=True,
        )
        self.history.clear()

    def configure_optimizers(self) -> dict:
        """The recipe's optimiser.

        Every group's learning rate follows `triangle`, a little each step.
        """
        recipe, steps = self.recipe, self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.model, recipe, self.trainer.precision == "bf16-mixed")
        # The rate in the middle of a step: neither the first step nor the last is wasted on a rate
        # of 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, one_cycle_factor((step + 0.5) / steps, recipe.warmup))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- evaluation ----

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        values = {f"{stage}_loss": loss, f"{stage}_acc": self.acc(logits, labels)}
        # A float: Lightning's mean over gloo's processes would round an integer down.
        self.log_dict(
            values,
            on_step=False,
            on_epoch=True,
            logger=False,
            batch_size=float(len(labels)),
            sync_dist=True,
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.evaluate(batch, "test")
