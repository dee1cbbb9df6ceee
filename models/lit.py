"""How a network learns: the recipes, and the LightningModule that carries one out."""

from dataclasses import asdict, dataclass, replace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from models.errors import Diverged, InvalidValue
from models.muon import Muon
from models.registry import NETWORKS, build

NUM_CLASSES = 10
LOW_RESOLUTION = 24  # pixels: 9/16 of the work of 32
FEW = 32  # images: BatchNorm's statistics of fewer are too noisy to learn with
RANGES = {  # of a recipe's numbers: type, smallest, largest
    "epochs": (int, 1, 10_000),
    "batch_size": (int, 1, 50_000),
    "micro_batch": (int, 0, 50_000),
    "max_lr": (float, 0, 10**9),
    "bias_lr": (float, 0, 10**9),
    "muon_lr": (float, 0, 10**9),
    "momentum": (float, 0, 1),
    "weight_decay": (float, 0, 100),
    "label_smoothing": (float, 0, 1),
    "warmup": (float, 0, 1),
    "bn_momentum": (float, 0, 1),
    "padding": (int, 0, 31),  # a reflection needs one pixel more than it adds
    "cutout": (int, 0, 32),
    "low_res": (float, 0, 1),
}


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run. InvalidValue if one is out of its range or does not fit the others.

    batch_size: images per step of the optimiser. micro_batch: images that pass through the network at a time where
    there is no GPU, their gradients added up: what stays in the cache need not wait for the memory; 0: the batch.
    max_lr: the peak of the schedule, for SGD with Nesterov momentum. bias_lr: the peak for the biases of convolutions
    and BatchNorm; 0: max_lr. muon_lr: the peak for the 3x3 filters, trained by Muon; 0: by SGD as well. warmup: the
    fraction of the steps before the peak. weight_decay: of what SGD trains. bn_momentum: the weight of a batch in
    BatchNorm's running statistics. padding: pixels by which an image is shifted at most. cutout: side of the square
    that is painted over in half of the images; 0: none. low_res: the fraction of the steps, at the start, on images of
    24x24 pixels.
    """

    network: str
    epochs: int = 1
    batch_size: int = 128
    micro_batch: int = 0
    max_lr: float = 0.1
    bias_lr: float = 0.0
    muon_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    warmup: float = 0.2
    bn_momentum: float = 0.1
    padding: int = 4
    cutout: int = 8
    low_res: float = 0.0

    def __post_init__(self):
        if not isinstance(self.network, str) or self.network not in NETWORKS:
            raise InvalidValue(f"unknown network {self.network!r}, expected one of {', '.join(NETWORKS)}")
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            right_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not right_kind or not low <= value <= high:  # which NaN is not either
                whole = ", a whole number" if kind is int else ""
                raise InvalidValue(f"expected {name} from {low} to {high}{whole}, got {value!r}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise InvalidValue(
                f"a batch_size of {self.batch_size} is no multiple of the micro_batch {self.micro_batch}"
            )


FASTNET = Recipe(
    "FastNet", 8, 2000, 250, max_lr=0.0204, bias_lr=106, muon_lr=0.24, momentum=0.85, weight_decay=0.196,
    label_smoothing=0.2, warmup=0, bn_momentum=0.4, padding=2, cutout=0, low_res=0.4,
)  # fmt: skip

CUSTOM = Recipe(
    "CustomResNet", 10, 512, 128, max_lr=0.05, muon_lr=0.1, label_smoothing=0.1, warmup=0.1, bn_momentum=0.2, cutout=0,
    low_res=0.3,
)  # fmt: skip

RESNET18 = Recipe(
    "ResNet18", 20, 512, 128, max_lr=0.05, muon_lr=0.1, label_smoothing=0, warmup=0.1, bn_momentum=0.2, cutout=12,
    low_res=0.5,
)  # fmt: skip

# One per network and budget, named by the epochs; the first of a network is its default.
# Those of 30 and 200 epochs want a GPU: they are set by what others published and not yet measured.
RECIPES = {
    "resnet18-20": RESNET18,
    "resnet18-30": replace(RESNET18, epochs=30),
    # What makes a short run faster does not make a long one better: SGD alone, at full resolution, and larger cutouts.
    "resnet18-200": Recipe("ResNet18", 200, 512, 128, max_lr=0.2, warmup=0.1, cutout=16),
    "custom-10": CUSTOM,
    "custom-24": replace(CUSTOM, epochs=24, cutout=8),  # more epochs, more to overfit: more augmentation
    "fastnet-8": FASTNET,
    "fastnet-4": replace(FASTNET, epochs=4),
    "fastnet-2": replace(FASTNET, epochs=2),
}


def fitting_micro_batch(batch_size: int, wanted: int) -> int:
    """The largest part of at most `wanted` images into which a batch can be divided, or 0 for the whole batch.

    It is 0 as well where the parts would be smaller than BatchNorm can learn with.
    """
    part = max(size for size in range(1, min(batch_size, wanted) + 1) if batch_size % size == 0) if wanted else 0
    return part if FEW <= part < batch_size else 0


def choose_recipe(arch: str, name: str = "", epochs: int = 0, batch_size: int = 0) -> tuple[str, Recipe]:
    """The recipe of that name, or the network's first, with its epochs and batch size replaced where they are not 0.

    Any batch size from 1 on fits: micro-batches become smaller, or are not used, where it is no multiple of theirs.
    Raises InvalidValue for an unknown name or network, and for a recipe of another network.
    """
    if arch not in NETWORKS:
        raise InvalidValue(f"unknown network {arch!r}, expected one of {', '.join(NETWORKS)}")
    name = name or next(key for key, recipe in RECIPES.items() if recipe.network == arch)
    if name not in RECIPES or RECIPES[name].network != arch:
        fitting = [key for key, recipe in RECIPES.items() if recipe.network == arch]
        raise InvalidValue(f"expected a recipe for {arch} ({', '.join(fitting)}), got {name!r}")
    changes = {key: value for key, value in (("epochs", epochs), ("batch_size", batch_size)) if value}
    if batch_size > 0:
        changes["micro_batch"] = fitting_micro_batch(batch_size, RECIPES[name].micro_batch)
    return name, replace(RECIPES[name], **changes)


def triangle(done: float, warmup: float) -> float:
    """The learning rate as a fraction of its peak: from 0 up in a straight line to `warmup`, then down to 0 at 1.

    With a warmup of 0 it only falls, with 1 it only rises. done: from 0 to 1, or a step beyond.
    """
    if done < warmup or warmup == 1:
        return min(1.0, done / warmup)
    return (1 - done) / (1 - warmup)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """What Muon trains, the biases of convolutions and BatchNorm, and the rest, each with its peak learning rate."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    biases = {id(layer.bias) for layer in layers} if recipe.bias_lr else set()
    groups = {"filters": [], "biases": [], "rest": []}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        # The first convolution, of three colours, is too small to be made orthogonal to any use.
        if recipe.muon_lr and p.shape[2:] == (3, 3) and p.shape[1] > 3:
            groups["filters"].append(p)
        else:
            groups["biases" if id(p) in biases else "rest"].append(p)
    decay = recipe.weight_decay * recipe.max_lr  # per step: a faster bias does not decay faster
    return [group for group in (
        {"params": groups["filters"], "lr": recipe.muon_lr, "momentum": 0.6, "muon": True},
        {"params": groups["biases"], "lr": recipe.bias_lr, "weight_decay": decay / (recipe.bias_lr or 1)},
        {"params": groups["rest"]},
    ) if group["params"]]  # fmt: skip


def make_optimizer(model: nn.Module, recipe: Recipe, bf16: bool) -> Muon:
    """Muon and SGD-Nesterov in one, as the recipe wants them. bf16: make Muon's steps orthogonal in that precision."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Muon(parameter_groups(model, recipe), recipe.max_lr, recipe.momentum, recipe.weight_decay, dtype)


class LitClassifier(pl.LightningModule):
    """A network with its loss, metric, optimiser and schedule. Takes and returns what the network does.

    The arguments are Recipe's: LitClassifier(network="ResNet18", max_lr=0.1).
    """

    def __init__(self, **recipe):
        super().__init__()
        self.recipe = Recipe(**recipe)
        self.save_hyperparameters(asdict(self.recipe))
        self.acc = MulticlassAccuracy(NUM_CLASSES, average="micro")
        # channels_last: the layout in which convolutions are fastest, on a CPU and on tensor cores alike.
        self.model = build(self.recipe.network, NUM_CLASSES).to(memory_format=torch.channels_last)
        self.history = []  # of the epoch: (loss, images classified rightly) of each batch, and how many it had
        self.rates = {}  # of the epoch: step -> learning rate

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))

    # ---- training ----

    def on_fit_start(self) -> None:
        parts = self.trainer.accumulate_grad_batches
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # parts of a batch together weigh as much as the batch
                module.momentum = 1 - (1 - self.recipe.bn_momentum) ** (1 / parts)

    def on_train_epoch_start(self) -> None:
        self.rates.clear()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if self.global_step < self.recipe.low_res * self.trainer.estimated_stepping_batches:
            images = F.interpolate(images, size=LOW_RESOLUTION, mode="bilinear")
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        rightly = (logits.detach().argmax(1) == labels).sum()
        self.history.append((loss.detach().float(), rightly, len(labels)))
        # To read a number back from a GPU stops it, so there this waits until the epoch's last batch.
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
        """The learning rate that stands for all: Muon's where it trains anything, or else that of the last group."""
        groups = self.trainer.optimizers[0].param_groups
        return next((group for group in groups if group["muon"]), groups[-1])["lr"]

    def check_finite(self) -> None:
        """Raise Diverged if a loss of this epoch is no number; it names the step of the first."""
        finite = torch.stack([loss for loss, _, _ in self.history]).isfinite()
        if not finite.all():
            first, parts = int(finite.long().argmin()), self.trainer.accumulate_grad_batches
            step = self.global_step + 1 - ((len(self.history) - 1) // parts - first // parts)
            raise Diverged(
                f"the loss is {float(self.history[first][0])} at step {step}, epoch {self.current_epoch + 1}, with a"
                f" learning rate of {self.logged_rate():.3g}; the last checkpoint is kept"
            )

    def log_epoch(self) -> None:
        """Log what the epoch's batches gave."""
        losses, rightly, counts = zip(*self.history, strict=True)
        images = sum(counts)
        self.log_dict({
            "train_loss": (torch.stack(losses) * torch.tensor(counts, device=self.device)).sum() / images,
            "train_acc": torch.stack(rightly).sum() / images,
            "lr": self.logged_rate(),
        }, on_step=False, on_epoch=True, logger=False, batch_size=float(images), sync_dist=True)  # fmt: skip
        self.history.clear()

    def configure_optimizers(self) -> dict:
        """The recipe's optimiser; every group's learning rate follows `triangle`, a little each step."""
        recipe, steps = self.recipe, self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.model, recipe, self.trainer.precision == "bf16-mixed")
        # The rate in the middle of a step: neither the first step nor the last is wasted on a rate of 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, triangle((step + 0.5) / steps, recipe.warmup))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- evaluation ----

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        values = {f"{stage}_loss": loss, f"{stage}_acc": self.acc(logits, labels)}
        # A float: Lightning's mean over gloo's processes would round an integer down.
        self.log_dict(values, on_step=False, on_epoch=True, logger=False, batch_size=float(len(labels)), sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.evaluate(batch, "test")
