"""Train a deep residual network with and without its shortcuts, and draw the losses.

    python -m benchmarks.shortcuts                       # three seeds of each network
    # a quick trial, which leaves the stored results as they are
    python -m benchmarks.shortcuts --seeds 0 --epochs 2 --results trial.json --figure trial.png

The network is that of He et al. 2015, section 4.2, for CIFAR-10: 56 layers of 16, 32 and 64
channels, with shortcuts that have no parameters, and the plain network without them. To fit a CPU,
it is trained on a part of the training images, made smaller, and for fewer epochs than there; the
results say so. They go to benchmarks/results/shortcuts.json, a run as soon as it has ended; what is
there is not trained again. images/shortcuts.png is drawn at the end.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from cifar10.fast_loader import FastLoader
from cifar10.images import Augmentation
from dataload import Images, load_splits, normalize
from evaluation.drawing import save_figure
from evaluation.over_epochs import NAMES, plot_shortcuts, shortcuts_title
from training.console import command_line
from training.files import PROJECT, write_json
from training.hardware import choose_device, hardware
from training.schedule import one_cycle_factor
from training.switches import data_folder

FILE = Path(__file__).resolve().parent / "results" / "shortcuts.json"
FIGURE = PROJECT / "images" / "shortcuts.png"
MAX_LR, WARMUP = 0.1, 0.1
VAL_IMAGES = 2_000

# ---- the networks --------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions, with or without a shortcut that has no parameters.

    Args:
        in_channels: of the input, (N, in_channels, S, S).
        out_channels: of the output, (N, out_channels, S / stride, S / stride).
        stride: of the first convolution.
        shortcut: whether the input is added to the result. Where the shapes differ, every second
            pixel of it is taken, and channels of zeros are added.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.shortcut = stride, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(F(x) + x), or relu(F(x)) without the shortcut."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut:
            missing = out.shape[1] - x.shape[1]
            out = out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, missing))
        return F.relu(out)


def build_network(depth: int, shortcuts: bool) -> nn.Sequential:
    """Build a network of 6n + 2 layers: (N, 3, S, S) -> (N, 10).

    Args:
        depth: its layers with weights: 8, 14, 20, ... 56.
        shortcuts: whether its blocks have them.

    Raises:
        ValueError: for another depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"expected a depth of 8, 14, 20 or any 6n + 2, got {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    channels = 16
    for out_channels in (16, 32, 64):
        for index in range(blocks):
            stride = 2 if index == 0 and out_channels > 16 else 1
            layers.append(Block(channels, out_channels, stride, shortcuts))
            channels = out_channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# ---- the runs ------------------------------------------------------------------------------------


def shrink(part: Images, count: int, pixels: int) -> Images:
    """Take the first images of a part and average their pixels to another side.

    Args:
        part: uint8 (N, 32, 32, 3) with labels.
        count: how many of them.
        pixels: the side, a divisor of 32.
    """
    images, factor = part.images[:count], 32 // pixels
    means = images.reshape(len(images), pixels, factor, pixels, factor, 3).mean((2, 4))
    return Images(np.round(means).astype(np.uint8), part.labels[:count])


@torch.no_grad()
def validate(model: nn.Module, part: Images) -> dict[str, float]:
    """Compute val_loss and val_acc, a fraction, on a part."""
    device, labels = next(model.parameters()).device, torch.from_numpy(part.labels).long()
    batches = torch.arange(len(labels)).split(500)
    model.eval()
    logits = torch.cat([model(normalize(part.images[b.numpy()]).to(device)).cpu() for b in batches])
    correct = (logits.argmax(1) == labels).double().mean()
    return {"val_loss": float(F.cross_entropy(logits, labels)), "val_acc": float(correct)}


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: FastLoader, epochs: int
) -> dict[str, float]:
    """Train for the epoch that the loader gives, and return train_loss and train_acc.

    Args:
        model: the network.
        optimizer: its learning rate follows one_cycle_factor.
        loader: its attribute `epoch` counts from 0.
        epochs: of the whole run.
    """
    model.train()
    losses, correct, steps = 0.0, 0, epochs * len(loader)
    for index, (images, labels) in enumerate(loader):
        done = (loader.epoch * len(loader) + index + 0.5) / steps
        for group in optimizer.param_groups:
            group["lr"] = MAX_LR * one_cycle_factor(done, WARMUP)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += float(loss.detach()) * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
    count = len(loader.labels)
    return {"train_loss": losses / count, "train_acc": correct / count}


def train_network(settings: dict, shortcuts: bool, seed: int, parts: tuple[Images, Images]) -> dict:
    """Train one network.

    Args:
        settings: layers, images, pixels, epochs and batch_size.
        shortcuts: whether the network has them.
        seed: of the weights and of the order of the images.
        parts: training and validation images.

    Returns:
        shortcuts, seed, machine, and of each epoch train_loss, train_acc, val_loss, val_acc and
        seconds.
    """
    device = choose_device()
    torch.manual_seed(seed)
    model = build_network(settings["layers"], shortcuts).to(device)
    optimizer = torch.optim.SGD(model.parameters(), MAX_LR, momentum=0.9, weight_decay=1e-4)
    loader = FastLoader(parts[0], Augmentation(4, 0), settings["batch_size"], seed, device=device)
    rows = []
    for epoch in range(settings["epochs"]):
        began, loader.epoch = time.perf_counter(), epoch
        row = train_epoch(model, optimizer, loader, settings["epochs"])
        row |= validate(model, parts[1]) | {"seconds": time.perf_counter() - began}
        rows.append(row)
        print(
            f"{NAMES[shortcuts]}, seed {seed}, epoch {epoch + 1}/{settings['epochs']}: train loss"
            f" {row['train_loss']:.3f}, val acc {row['val_acc']:.3f}, {row['seconds']:.0f} s",
            flush=True,
        )
    run = {"shortcuts": shortcuts, "seed": seed, "machine": hardware()}
    return run | {name: [round(row[name], 5) for row in rows] for name in rows[0]}


def finished_runs(settings: dict, path: Path) -> list[dict]:
    """Return the runs that a file holds; none if they are of other settings."""
    found = read(path) or {}
    runs = found.pop("runs", [])
    return runs if found == settings else []


def read(path: Path = FILE) -> dict | None:
    """Read what was measured: the settings and 'runs'; None if nothing was measured yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- what they show ------------------------------------------------------------------------------


def is_complete(found: dict | None) -> bool:
    """Tell whether there are runs of both networks."""
    return bool(found) and {run["shortcuts"] for run in found["runs"]} == set(NAMES)


def conditions(found: dict) -> str:
    """Say what was trained, and how that differs from the paper."""
    return (
        f"{found['images']:,} training images of {found['pixels']}x{found['pixels']} pixels,"
        f" {found['epochs']} epochs; He et al. trained on 45,000 of 32x32, for about 180 epochs"
    )


def plot(found: dict) -> Figure:
    """Draw training loss and validation accuracy of both networks, and say what was trained."""
    return plot_shortcuts(found, conditions(found))


# ---- the command ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--pixels", type=int, default=16, choices=(8, 16, 32), help="their side")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args()


def main() -> None:
    """Train both networks with each seed, then draw the losses."""
    args = parse_arguments()
    settings = {"layers": args.depth, "images": args.images, "pixels": args.pixels}
    settings |= {"epochs": args.epochs, "batch_size": args.batch_size}
    splits = load_splits(data_folder())
    parts = (
        shrink(splits.train, args.images, args.pixels),
        shrink(splits.val, VAL_IMAGES, args.pixels),
    )
    runs = finished_runs(settings, args.results)
    for seed, shortcuts in itertools.product(args.seeds, NAMES):
        if all((run["seed"], run["shortcuts"]) != (seed, shortcuts) for run in runs):
            runs.append(train_network(settings, shortcuts, seed, parts))
            runs.sort(key=lambda run: (not run["shortcuts"], run["seed"]))
            write_json(args.results, settings | {"runs": runs})
    found = settings | {"runs": runs}
    save_figure(plot(found), args.figure)
    print(shortcuts_title(found))


if __name__ == "__main__":
    main()
