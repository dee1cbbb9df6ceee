"""The LightningModule that trains a network by a recipe."""

from dataclasses import asdict

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from dataload import CLASSES, CIFAR10DataModule
from models.errors import Diverged, InvalidValue
from models.registry import build
from training.optimizer import make_optimizer
from training.recipes import LOW_RESOLUTION, Recipe
from training.schedule import one_cycle_factor

NUM_CLASSES = len(CLASSES)


def datamodule_of(trainer: pl.Trainer) -> CIFAR10DataModule:
    """Return the data module that was given to a trainer's `fit`."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] # fit sets it


def check_trainer(trainer: pl.Trainer) -> None:
    """Check that a trainer trains as meant.

    Raises:
        InvalidValue: if `fit` was given other data than a CIFAR10DataModule, or if the order and
            augmentation of the first epoch would be those of all others.
    """
    data = datamodule_of(trainer)
    if not isinstance(data, CIFAR10DataModule):
        got = "loaders" if data is None else type(data).__name__
        raise InvalidValue(f"expected fit(..., datamodule=CIFAR10DataModule(...)), got {got}")
    every = trainer.reload_dataloaders_every_n_epochs  # pyright: ignore[reportAttributeAccessIssue]
    if trainer.max_epochs != 1 and every != 1:
        raise InvalidValue(
            "expected Trainer(reload_dataloaders_every_n_epochs=1), so that each epoch has its"
            f" own augmentation, got {every}"
        )


class LitClassifier(pl.LightningModule):
    """A network with its loss, metric, optimiser and schedule.

    It takes and returns what the network does. Its arguments are those of Recipe:
    LitClassifier(network="ResNet18", max_lr=0.1).

    Attributes:
        recipe: the hyperparameters.
        model: the network.
        history: of the epoch so far: (loss, correctly classified images, images) of each batch.
        rates: of the epoch so far: step -> learning rate.
        stepped: whether the optimiser has taken a step since the schedule was last asked.
    """

    def __init__(self, **recipe):
        super().__init__()
        self.recipe = Recipe(**recipe)
        self.save_hyperparameters(asdict(self.recipe))
        self.acc = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.model = build(self.recipe.network, NUM_CLASSES)
        if self.recipe.fixed_bn_scale:
            for norm in filter(lambda m: isinstance(m, nn.BatchNorm2d), self.model.modules()):
                norm.weight.requires_grad_(False)
        # The layout in which convolutions are fastest, on a CPU and on tensor cores alike.
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.history: list[tuple[Tensor, Tensor, int]] = []
        self.rates: dict[int, float] = {}
        self.stepped = False

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of normalised images: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    # ---- training ----

    def setup(self, stage: str) -> None:
        """Let a process that was forked from a notebook compute in one thread.

        GNU's OpenMP, which has computed before the fork, waits for ever for its other threads.
        """
        launcher = self.trainer.strategy.launcher
        if launcher and launcher.is_interactive_compatible:  # it forks
            torch.set_num_threads(1)

    def on_fit_start(self) -> None:
        """Lower BatchNorm's momentum, so that all micro-batches together count as one batch."""
        check_trainer(self.trainer)
        micro_batches = self.trainer.accumulate_grad_batches
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1 - (1 - self.recipe.bn_momentum) ** (1 / micro_batches)

    def on_train_epoch_start(self) -> None:
        """Forget the learning rates of the epoch before, and seed torch's random numbers.

        So a network that draws some, for dropout, draws the same after an interruption. Each
        process draws its own.
        """
        self.rates.clear()
        torch.manual_seed(datamodule_of(self.trainer).epoch_seed() + self.trainer.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Compute the loss of a batch, at low resolution in the first part of the training.

        Args:
            batch: images (N, 3, 32, 32) and labels (N,).
            index: of the batch in the epoch.

        Returns:
            The mean loss, multiplied by loss_weight.

        Raises:
            Diverged: if the loss is no number.
        """
        images, labels = batch
        if self.global_step < self.recipe.low_res * self.trainer.estimated_stepping_batches:
            images = F.interpolate(images, size=LOW_RESOLUTION, mode="bilinear")
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.history.append((loss.detach().float(), correct, len(labels)))
        # Reading a number back makes a GPU wait: there, losses are checked at the epoch's end.
        if self.trainer.is_last_batch or (loss.device.type == "cpu" and not loss.isfinite()):
            self.check_finite()
        self.rates[self.global_step] = self.logged_rate()
        if self.trainer.is_last_batch:
            self.log_epoch()
        return loss * self.loss_weight(len(labels), index)

    def loss_weight(self, images: int, index: int) -> float:
        """Return the weight of a mean loss, with which every image of a step counts alike.

        The gradient of a step is the mean over all its images, in however many micro-batches and
        processes they come, and whatever the last step of an epoch holds. Lightning divides each
        micro-batch's gradient by the number of micro-batches of a full step, and DDP the sum by the
        number of processes; this undoes both.

        Args:
            images: of this process's micro-batch.
            index: of the micro-batch in the epoch.
        """
        steps = self.trainer.accumulate_grad_batches
        step_images = datamodule_of(self.trainer).step_images(index, steps)
        return images * steps * self.trainer.world_size / step_images

    def logged_rate(self) -> float:
        """Return the learning rate that is logged: Muon's, or the last group's without Muon."""
        groups = self.trainer.optimizers[0].param_groups
        return next((group for group in groups if group["muon"]), groups[-1])["lr"]

    def check_finite(self) -> None:
        """Raise Diverged if a loss of this epoch is no number, with the step of the first."""
        finite = torch.stack([loss for loss, _, _ in self.history]).isfinite()
        if finite.all():
            return
        first, micro_batches = int(finite.long().argmin()), self.trainer.accumulate_grad_batches
        step = self.global_step - (len(self.history) - 1) // micro_batches + first // micro_batches
        raise Diverged(
            f"the loss is {float(self.history[first][0])} at step {step + 1}, epoch"
            f" {self.current_epoch + 1}, with a learning rate of"
            f" {self.rates.get(step, self.logged_rate()):.3g}; the last checkpoint is kept"
        )

    def log_epoch(self) -> None:
        """Log the mean loss and accuracy of the epoch's images, and the learning rate."""
        losses, correct, counts = zip(*self.history, strict=True)
        images = sum(counts)
        weighted = torch.stack(losses) * torch.tensor(counts, device=self.device)
        metrics = {
            "train_loss": weighted.sum() / images,
            "train_acc": torch.stack(correct).sum() / images,
            "lr": self.logged_rate(),
        }
        self.log_means(metrics, images)
        self.history.clear()

    def log_means(self, metrics: dict, images: int, logger: bool = False) -> None:
        """Log means over this process's images; Lightning averages them over all processes.

        Args:
            metrics: name -> mean.
            images: how many images it is the mean of.
            logger: whether the trainer's logger gets them too. In `fit`, Progress writes it.
        """
        self.log_dict(
            metrics,
            on_step=False,
            on_epoch=True,
            logger=logger,
            # A float: Lightning's mean over gloo's processes would round an integer down.
            batch_size=float(images),  # pyright: ignore[reportArgumentType]
            sync_dist=True,
        )

    def configure_optimizers(self) -> dict:
        """Make the recipe's optimiser, with learning rates that follow one_cycle_factor."""
        recipe, steps = self.recipe, self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.model, recipe, self.trainer.precision == "bf16-mixed")
        # The rate in the middle of a step: neither the first step nor the last is wasted on a rate
        # of 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, one_cycle_factor((step + 0.5) / steps, recipe.warmup))
        )
        optimizer.register_step_post_hook(self.note_step)  # fp16 may skip one: lr_scheduler_step
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def note_step(self, *_: object) -> None:
        """Note that the optimiser has taken a step."""
        self.stepped = True

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: object) -> None:
        """Advance the schedule, unless the step was skipped.

        In fp16 the gradients are scaled up, and a step is skipped where one of them overflows.
        """
        if self.stepped:
            scheduler.step()
        self.stepped = False

    # ---- evaluation ----

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log the loss and the accuracy of a batch of validation images, as val_loss and val_acc.

        Args:
            batch: images (N, 3, 32, 32) and labels (N,).
        """
        self.log_evaluation(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log what validation_step does, as test_loss and test_acc."""
        self.log_evaluation(batch, "test")

    def log_evaluation(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        """Log the loss and the accuracy of a batch of a part, 'val' or 'test'."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        metrics = {f"{part}_loss": loss, f"{part}_acc": self.acc(logits, labels)}
        # Lightning's validate and test return what the logger gets.
        self.log_means(metrics, len(labels), logger=self.trainer.state.fn != "fit")
