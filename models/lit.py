"""How a network learns: the recipes, and the LightningModule that carries one out."""

from dataclasses import dataclass, replace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from models.resnet import NETWORKS, build

NUM_CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run. ValueError if one is out of its range.

    batch_size: images per step. max_lr: the peak of the one-cycle schedule, for SGD with Nesterov momentum 0.9.
    warmup: the fraction of the steps before that peak. weight_decay: of all parameters.
    """

    network: str
    epochs: int
    batch_size: int
    max_lr: float
    weight_decay: float
    label_smoothing: float
    warmup: float

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.warmup < 1:
            raise ValueError(f"expected a warmup between 0 and 1, got {self.warmup}")


# Small batches take more steps per epoch, and on a CPU they stay in the cache: 128 is a seventh faster than 500 there.
# The peaks are 0.6 and 0.8 per 512 images, above the customary 0.4: in few epochs, too, the weights should decay
# by about exp(-2), as in the tuned short runs of others. Smoothed labels give short runs a few tenths of a percent.
RECIPES = {
    "resnet18-20": Recipe("ResNet18", 20, 128, 0.15, 5e-4, 0.1, 0.2),
    "custom-10": Recipe("CustomResNet", 10, 128, 0.2, 5e-4, 0.1, 0.2),
}


def choose_recipe(arch: str, name: str = "", epochs: int = 0, batch_size: int = 0) -> tuple[str, Recipe]:
    """The recipe of that name, or the network's first, with its epochs and batch size replaced where they are not 0.

    Raises ValueError for an unknown name or network, and for a recipe of another network.
    """
    if arch not in NETWORKS:
        raise ValueError(f"unknown network {arch!r}, expected one of {', '.join(NETWORKS)}")
    name = name or next(key for key, recipe in RECIPES.items() if recipe.network == arch)
    if name not in RECIPES or RECIPES[name].network != arch:
        fitting = [key for key, recipe in RECIPES.items() if recipe.network == arch]
        raise ValueError(f"expected a recipe for {arch} ({', '.join(fitting)}), got {name!r}")
    changes = {key: value for key, value in (("epochs", epochs), ("batch_size", batch_size)) if value}
    return name, replace(RECIPES[name], **changes)


class LitClassifier(pl.LightningModule):
    """A network with its loss, metric, optimiser and schedule. Takes and returns what the network does.

    arch: a name that models.resnet.build knows. The other arguments are Recipe's.
    """

    def __init__(
        self, arch: str, max_lr: float = 0.1, weight_decay: float = 5e-4, label_smoothing: float = 0.1,
        warmup: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.acc = MulticlassAccuracy(NUM_CLASSES, average="micro")
        # channels_last: the layout in which convolutions are fastest, on a CPU and on tensor cores alike.
        self.model = build(arch, NUM_CLASSES).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams.label_smoothing)
        values = {f"{stage}_loss": loss, f"{stage}_acc": self.acc(logits, labels)}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.log("lr", self.lr_schedulers().get_last_lr()[0], on_step=True, on_epoch=False)
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> dict:
        """SGD-Nesterov; the learning rate rises linearly to max_lr and falls linearly to 0, a little each step."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.hparams.max_lr, 0.9, weight_decay=self.hparams.weight_decay, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.max_lr, self.trainer.estimated_stepping_batches, pct_start=self.hparams.warmup,
            anneal_strategy="linear", cycle_momentum=False, final_div_factor=1e4,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
