"""Measure how fast training is, as ratios within one run: `make bench`.

    python -m benchmarks.speed          # both parts; more than an hour on two cores
    python -m benchmarks.speed steps    # our training step against a bare PyTorch loop
    python -m benchmarks.speed to94     # FastNet's training against the published schedule

Both sides of `to94` compute in the same precision: the fastest of this machine, or --precision. It
trains by the recipe of the leaderboard's last row, or --recipe, and compares what comes out with
that row.

The results go to benchmarks/results/speed.json, with the machine and the versions. `--images N`
makes a quick trial on N images, which is only printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F

from benchmarks.accuracy import RESULTS, all_images
from benchmarks.leaderboard import compare, last_row, precision_suffix
from benchmarks.reference import EPOCHS
from dataload import Splits, load_splits
from evaluation.predict import accuracy, predict
from models.errors import InvalidValue
from models.registry import NETWORKS
from training.classifier import LitClassifier
from training.console import command_line
from training.files import write_json
from training.hardware import (
    check_precision,
    choose_device,
    choose_precision,
    hardware,
    versions,
)
from training.history import read_metrics
from training.optimizer import make_optimizer
from training.options import RunOptions
from training.recipes import RECIPES, Recipe, choose_recipe
from training.results import Run
from training.runs import build_datamodule, train
from training.switches import data_folder

DEVICE = choose_device().type
# Enough that the fixed cost of an epoch hardly counts, few enough to alternate every few minutes;
# on a GPU all images.
STEP_IMAGES, FASTNET_STEP_IMAGES = 8_192, 16_000
ROUNDS = 3


def first_images(splits: Splits, count: int) -> Splits:
    """Return the first training images, no validation images, and the same test images."""
    return splits._replace(train=splits.train.first(count), val=splits.val.first(0))


def epoch_seconds(run: Run) -> list[float]:
    """Read how many seconds each epoch of a new run took, all that belongs to it included."""
    if run.metrics_csv is None:
        raise InvalidValue("expected a run with a log of its epochs, got one without")
    # Not metrics.csv itself: of several processes only the first writes that, at the end.
    return read_metrics(run.metrics_csv.parent / "logs")["seconds"].dropna().tolist()


def our_seconds(recipe: Recipe, splits: Splits, fast: bool) -> float:
    """Measure the second epoch of a training run, in seconds; the first one warms up.

    Args:
        recipe: What is trained.
        splits: The images.
        fast: Use the fast loader instead of Albumentations.
    """
    recipe = replace(recipe, epochs=2)
    data = build_datamodule(recipe, splits, 0, fast)
    with tempfile.TemporaryDirectory() as root:
        return epoch_seconds(train(recipe, data, root))[-1]


def synchronized_time() -> float:
    """Return the time in seconds, after all work on the device has ended."""
    if DEVICE != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def loop_batch(recipe: Recipe) -> int:
    """Return how many images pass through the bare loop's network at a time."""
    return (recipe.micro_batch if DEVICE == "cpu" else 0) or recipe.batch_size


def bare_seconds(recipe: Recipe, count: int) -> float:
    """Measure the same steps in a plain loop over random images that stay on the device.

    There is no loader, no augmentation and no Lightning.

    Args:
        recipe: What is trained.
        count: The number of images of the measured epoch. One batch before it warms up.

    Returns:
        Seconds.
    """
    micro_batch = loop_batch(recipe)
    net = LitClassifier(**asdict(recipe)).model.to(DEVICE).train()
    images = torch.randn(micro_batch, 3, 32, 32, device=DEVICE).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, 10, (micro_batch,), device=DEVICE)
    precision = choose_precision()
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision, torch.float32)
    optimizer = make_optimizer(net, recipe, dtype == torch.bfloat16)
    accumulation_steps = recipe.batch_size // micro_batch
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # random labels teach nothing; so the weights stay in an ordinary range
    seconds = 0.0
    for micro_batches in (accumulation_steps, count // micro_batch):
        start = synchronized_time()
        for step in range(1, micro_batches + 1):
            with torch.autocast(DEVICE, dtype, enabled=precision != "32-true"):
                loss = F.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)
            (loss / accumulation_steps).backward()
            if step % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        seconds = synchronized_time() - start
    return seconds


def measure_steps(splits: Splits, images: int) -> dict:
    """Compare our training step, data loading included, with that of the bare loop.

    Args:
        splits: CIFAR-10.
        images: The number of images of an epoch, or 0 for STEP_IMAGES.

    Returns:
        {'step_ratio': network -> loader -> ratio}: mean seconds of the bare loop over ours. 1 would
        mean that everything but the bare step is free.
    """
    return {
        "step_ratio": {
            network: step_ratios(choose_recipe(network)[1], splits, images) for network in NETWORKS
        }
    }


def step_ratios(recipe: Recipe, splits: Splits, images: int) -> dict[str, float]:
    """Measure the ratios of one network, as measure_steps describes them: loader -> ratio."""
    recipe = replace(recipe, low_res=0.0)  # the bare loop has no start at low resolution
    micro_batch = loop_batch(recipe)
    on_a_cpu = FASTNET_STEP_IMAGES if recipe.network == "FastNet" else STEP_IMAGES
    enough = on_a_cpu if DEVICE == "cpu" else len(splits.train.labels)
    count = (images or enough) // micro_batch * micro_batch
    bare, ours = [], {"fast": []} if DEVICE == "cuda" else {"albumentations": [], "fast": []}
    for _ in range(ROUNDS):
        for loader, seconds in ours.items():
            bare.append(bare_seconds(recipe, count))
            seconds.append(our_seconds(recipe, first_images(splits, count), loader == "fast"))
            print(
                f"{recipe.network:12s} {loader:14s} bare {count / bare[-1]:7.0f} images/s,"
                f" ours {count / seconds[-1]:7.0f} images/s",
                flush=True,
            )
    return {
        loader: round(statistics.mean(bare) / statistics.mean(seconds), 3)
        for loader, seconds in ours.items()
    }


class ReferenceProcess:
    """benchmarks.reference in a separate process, which does not allocate memory in large pages."""

    def __init__(self, images: int, precision: str):
        arguments = ["--images", str(images), "--precision", precision]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reference", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"THP_MEM_ALLOC_ENABLE": "0"},
        )

    def ask(self, command: str) -> dict:
        """Send 'epoch' (train for one) or 'test' (evaluate) and return what was measured."""
        assert self.process.stdout  # a pipe, as __init__ asks
        print(command, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def measure_to94(splits: Splits, images: int, precision: str, name: str) -> dict:
    """Compare a whole training of FastNet with the published schedule.

    Args:
        splits: CIFAR-10.
        images: The number of training images, or 0 for all 50,000.
        precision: Of both sides, by Lightning's name.
        name: Of FastNet's recipe.

    Returns:
        'time_to_94_ratio': our seconds over those of the published schedule; 'time_to_94': seconds
        and test accuracies of both. Both names end in '_fp32' where that is the precision.

    Raises:
        InvalidValue: on a GPU, where the published schedule would not run.
    """
    if DEVICE != "cpu":
        raise InvalidValue(f"the published schedule runs on a CPU only, FastNet here on {DEVICE}")
    recipe = RECIPES[name]
    splits = all_images(splits) if not images else first_images(splits, images)
    reference, before = ReferenceProcess(images, precision), 3
    # Some of its epochs before ours and some after: a machine that changes its pace slows both.
    seconds = [reference.ask("epoch")["seconds"] for _ in range(before)]
    with tempfile.TemporaryDirectory() as root:
        data = build_datamodule(recipe, splits, 0, fast=True)
        run = train(recipe, data, root, RunOptions(seed=0, precision=precision))
    seconds += [reference.ask("epoch")["seconds"] for _ in range(EPOCHS - before)]
    single, tta = (
        accuracy(*predict(run.model, DEVICE, data.test_dataloader(), tta)) for tta in (False, True)
    )
    ours = {"seconds": run.metadata["seconds"], "single": single, "tta": tta}
    theirs = {"seconds": round(sum(seconds), 1)} | reference.ask("test")
    ratio, mark = round(ours["seconds"] / theirs["seconds"], 3), precision_suffix(precision)
    print(f"ours {ours}\nreference {theirs}\n{compare(last_row(), name, ratio, precision, tta)}")
    return {
        f"time_to_94_ratio{mark}": ratio,
        f"time_to_94{mark}": {"recipe": name, "ours": ours, "reference": theirs},
    }


def main() -> None:
    """Measure the parts that the command line names and write them into speed.json."""
    parser = command_line(__doc__)
    parser.add_argument("part", nargs="?", choices=["steps", "to94"])
    parser.add_argument("--images", type=int, default=0, help="a trial on so many images")
    parser.add_argument("--precision", default=choose_precision(), help="of to94's two sides")
    fastnets = [name for name, recipe in RECIPES.items() if recipe.network == "FastNet"]
    parser.add_argument("--recipe", choices=fastnets, default=last_row()["recipe"], help="of to94")
    args = parser.parse_args()
    check_precision(args.precision)
    splits = load_splits(data_folder())
    if args.part in (None, "steps"):
        keep(measure_steps(splits, args.images), "steps", args.images)
    if args.part in (None, "to94"):
        name = f"to94{precision_suffix(args.precision)}"
        found = measure_to94(splits, args.images, args.precision, args.recipe)
        keep(found, name, args.images)


def keep(measured: dict, part: str, images: int) -> None:
    """Print what was measured and, unless it was a trial on a few images, store it.

    Args:
        measured: What the part returned.
        part: Its name, beside which the machine is named: parts may be measured on several.
        images: Of the trial, or 0.
    """
    print(json.dumps(measured, indent=1))
    path = RESULTS / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = results.get("machine", {}) | {part: hardware()}
    if not images:
        found = measured | {"versions": versions(), "seeds": [0], "machine": machine}
        write_json(path, results | found)


if __name__ == "__main__":
    main()
