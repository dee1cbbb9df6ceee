"""Recipes: sets of hyperparameters, those that there are, and what is known of them."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar10.images import IMAGE_SIZE
from models.errors import InvalidValue
from models.registry import NETWORKS, check_name
from training.files import PROJECT

LOW_RESOLUTION = 24  # pixels: 9/16 of the work of 32
MIN_MICRO_BATCH = 32  # images: BatchNorm's statistics of fewer are too noisy to learn with

RANGES = {  # of a recipe's hyperparameters: type, smallest, largest
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
    "padding": (int, 0, IMAGE_SIZE - 1),  # a reflection needs one pixel more than it adds
    "cutout": (int, 0, IMAGE_SIZE),
    "low_res": (float, 0, 1),
}


@dataclass(frozen=True)
class Recipe:
    """A set of hyperparameters.

    Attributes:
        network: its name in models.registry.NETWORKS.
        epochs: of the training.
        batch_size: images per step of the optimiser.
        micro_batch: images that pass through the network at a time where there is no GPU
            (gradient accumulation): what fits the cache need not wait for the memory; 0: the batch.
        max_lr: the peak of the learning rate, for SGD with Nesterov momentum.
        bias_lr: the peak for the biases of convolutions and BatchNorm; 0: max_lr.
        muon_lr: the peak for the 3x3 filters, trained by Muon; 0: SGD trains them too.
        momentum: of SGD.
        weight_decay: of what SGD trains.
        label_smoothing: of the cross-entropy.
        warmup: the fraction of the steps before the peak.
        bn_momentum: the weight of a batch in BatchNorm's running statistics.
        fixed_bn_scale: keep BatchNorm's scales at 1, so that only its biases are learned: the
            convolution after it can scale its output.
        padding: pixels by which a training image is shifted at most.
        cutout: side of the square, in pixels, that is masked in half of the training images;
            0: none.
        low_res: the fraction of the steps, at the start, on images of 24x24 pixels.

    Raises:
        InvalidValue: if a value is out of its range or does not fit the others.
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
    fixed_bn_scale: bool = False
    padding: int = 4
    cutout: int = 8
    low_res: float = 0.0

    @property
    def peak_lr(self) -> float:
        """The peak learning rate that is logged: Muon's, or SGD's without Muon."""
        return self.muon_lr or self.max_lr

    def matches(self, stored: dict) -> bool:
        """Tell whether stored hyperparameters are these; where one is missing, its default is."""
        return asdict(Recipe(self.network)) | stored == asdict(self)

    def __post_init__(self):
        check_name(self.network)
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            right_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not right_kind or not low <= value <= high:  # which NaN is not either
                whole = ", a whole number" if kind is int else ""
                raise InvalidValue(f"expected {name} from {low} to {high}{whole}, got {value!r}")
        if not isinstance(self.fixed_bn_scale, bool):
            got = self.fixed_bn_scale
            raise InvalidValue(f"expected fixed_bn_scale True or False, got {got!r}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise InvalidValue(
                f"a batch_size of {self.batch_size} is no multiple of the micro_batch"
                f" {self.micro_batch}"
            )


FASTNET = Recipe(
    "FastNet",
    epochs=7,
    batch_size=1000,
    micro_batch=250,
    max_lr=0.0102,
    bias_lr=53,
    muon_lr=0.17,
    momentum=0.85,
    weight_decay=0.196,
    label_smoothing=0.2,
    warmup=0,
    bn_momentum=0.225,
    fixed_bn_scale=True,
    padding=2,
    cutout=0,
    low_res=0.4,
)

# Fewer epochs are few steps: smaller batches make more of them. The rates of SGD fall in
# proportion, that of Muon with the square root.
SHORT_FASTNET = replace(
    FASTNET, batch_size=500, max_lr=0.0051, bias_lr=26.5, muon_lr=0.12, bn_momentum=0.12
)

CUSTOM = Recipe(
    "CustomResNet",
    epochs=10,
    batch_size=512,
    micro_batch=128,
    max_lr=0.05,
    muon_lr=0.1,
    label_smoothing=0.1,
    warmup=0.1,
    bn_momentum=0.2,
    cutout=0,
    low_res=0.3,
)

RESNET18 = Recipe(
    "ResNet18",
    epochs=20,
    batch_size=512,
    micro_batch=128,
    max_lr=0.05,
    muon_lr=0.1,
    label_smoothing=0.0,
    warmup=0.1,
    bn_momentum=0.2,
    cutout=12,
    low_res=0.5,
)

# One per network and budget, named by the epochs; the first of a network is its default.
# Those of 30 and 200 epochs need a GPU and are not yet measured; the latter follows published ones.
RECIPES = {
    "resnet18-20": RESNET18,
    "resnet18-30": replace(RESNET18, epochs=30),
    # Like published long runs: SGD alone, at full resolution, with larger cutouts.
    "resnet18-200": Recipe("ResNet18", 200, 512, 128, max_lr=0.2, warmup=0.1, cutout=16),
    "custom-10": CUSTOM,
    # More epochs allow more overfitting, so there is more augmentation.
    "custom-24": replace(CUSTOM, epochs=24, cutout=8),
    "fastnet-7": FASTNET,
    "fastnet-9": replace(FASTNET, epochs=9),
    "fastnet-4": replace(SHORT_FASTNET, epochs=4),
    "fastnet-2": replace(SHORT_FASTNET, epochs=2),
}


def fitting_micro_batch(batch_size: int, wanted: int) -> int:
    """Find the largest micro-batch into which a batch can be divided.

    Args:
        batch_size: images of the batch.
        wanted: images of a micro-batch at most, or 0 for no micro-batches.

    Returns:
        Images of a micro-batch; 0, which means the whole batch, where the micro-batches would be
        smaller than BatchNorm can learn with.
    """
    sizes = range(1, min(batch_size, wanted) + 1)
    largest = max((size for size in sizes if batch_size % size == 0), default=0)
    return largest if MIN_MICRO_BATCH <= largest < batch_size else 0


def choose_recipe(
    arch: str, name: str = "", epochs: int = 0, batch_size: int = 0
) -> tuple[str, Recipe]:
    """Choose a recipe.

    Args:
        arch: the network's name.
        name: the recipe's; '' for the network's first.
        epochs: to replace the recipe's, or 0.
        batch_size: to replace the recipe's, or 0. Any from 1 on fits: the micro-batches become
            smaller, or are not used, where it is no multiple of theirs.

    Returns:
        The recipe's name, and the recipe.

    Raises:
        InvalidValue: for an unknown name or network, and for a recipe of another network.
    """
    check_name(arch)
    fitting = [key for key, recipe in RECIPES.items() if recipe.network == arch]
    name = name or next(iter(fitting), "")
    if name not in fitting:
        raise InvalidValue(
            f"expected a recipe for {arch} ({', '.join(fitting) or 'there is none in RECIPES'}),"
            f" got {name!r}"
        )
    changes = {
        key: value for key, value in (("epochs", epochs), ("batch_size", batch_size)) if value
    }
    if batch_size > 0:
        changes["micro_batch"] = fitting_micro_batch(batch_size, RECIPES[name].micro_batch)
    return name, replace(RECIPES[name], **changes)


MEASURED = PROJECT / "benchmarks/results/accuracy.json"


@functools.cache
def multiply_adds(network: str) -> int:
    """Count the multiply-adds with which a registered network classifies an image, in millions."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        NETWORKS[network](10).eval()(torch.zeros(1, 3, 32, 32))
    return round(counter.get_total_flops() / 2e6)


def measured_runs() -> list[dict]:
    """Read the rows of benchmarks/accuracy.py's file that were validated and can be repeated.

    Returns:
        The rows; an empty list if the file is missing or damaged.
    """
    try:
        rows = json.loads(MEASURED.read_text(encoding="utf-8"))
        known = [row for row in rows if row["recipe"] in RECIPES and row["network"] in NETWORKS]
        return [row for row in known if row.get("val_single")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def training_work(row: Mapping) -> float:
    """Return the multiply-adds of a training, in millions per training image.

    Args:
        row: of a file of benchmarks/accuracy.py: network and epochs.
    """
    return row["epochs"] * multiply_adds(row["network"])
