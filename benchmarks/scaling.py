"""Measure one process against two, and check the formula of docs/scaling.md.

    python -m benchmarks.scaling    # a quarter of an hour on two cores

Measures for each network the seconds of a training step on one core, on two cores, and in two
processes of one core each; of these, how long the optimiser and the all-reduce of the gradients
take; how many images per second one core loads and augments; and the validation accuracy of FastNet
after two epochs in one process and in two. Writes benchmarks/results/scaling.json and the tables of
docs/scaling.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.accuracy import RESULTS
from benchmarks.report import write_between_marks
from benchmarks.speed import epoch_seconds, first_images
from dataload import load_splits
from lesson.findings import markdown_table
from models.errors import InvalidValue
from training.classifier import LitClassifier
from training.console import command_line
from training.files import PROJECT, write_json
from training.hardware import choose_device, choose_precision, hardware, versions
from training.optimizer import make_optimizer
from training.options import RunOptions
from training.recipes import Recipe, choose_recipe
from training.runs import build_datamodule, train
from training.settings import resolve_placement
from training.switches import SWITCHES, data_folder

STEPS = {"FastNet": 4, "ResNet18": 6}  # of an epoch, which then takes up to a minute on a core
LAYOUTS = {  # (processes, cores of each process)
    "one core": (1, 1),
    "two cores": (1, 2),
    "two processes": (2, 1),
}
DOC = PROJECT / "docs/scaling.md"
TEN_GBIT = 1250  # megabytes per second


def median_seconds(action: Callable[[], object], times: int = 7) -> float:
    """Measure an action so many times, after once to warm up, and return the median."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def full_resolution_recipe(network: str) -> Recipe:
    """Return the first recipe of a network, for three epochs of 32x32 pixels."""
    return replace(choose_recipe(network)[1], epochs=3, low_res=0.0)


def optimiser_seconds(recipe: Recipe) -> float:
    """Measure a step of the optimiser, which every process does for the whole network."""
    net = LitClassifier(**asdict(recipe)).model
    optimizer = make_optimizer(net, recipe, choose_precision() == "bf16-mixed")
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return median_seconds(optimizer.step)


def measure_all_reduce(recipe: Recipe) -> dict[str, float]:
    """Measure the all-reduce of the gradients: their 'megabytes', and 'all_reduce' in seconds."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    parameters = LitClassifier(**asdict(recipe)).parameters()
    gradients = torch.zeros(sum(p.numel() for p in parameters if p.requires_grad))
    seconds = median_seconds(lambda: dist.all_reduce(gradients))
    return {"megabytes": 4e-6 * len(gradients), "all_reduce": seconds}


def measure_process(network: str, root: Path) -> None:
    """Measure within one of the processes that torchrun starts; the first writes found.json.

    Args:
        network: Its name.
        root: A new folder, the same for all processes.
    """
    recipe, steps = full_resolution_recipe(network), STEPS[network]
    all_splits = load_splits(data_folder())
    splits = first_images(all_splits, steps * recipe.batch_size)
    data = build_datamodule(recipe, splits, 0, fast=True)
    run = train(recipe, data, root, RunOptions(**resolve_placement(SWITCHES)))
    found = {"step": statistics.median(epoch_seconds(run)[1:]) / steps}
    if int(os.environ["WORLD_SIZE"]) > 1:
        found |= measure_all_reduce(recipe)
    elif torch.get_num_threads() == 1:  # as in each of several processes
        found["optimiser"] = optimiser_seconds(recipe)
    if int(os.environ["RANK"]) == 0:
        write_json(root / "found.json", found)


def torchrun(processes: int, *arguments: str, **options) -> None:
    """Run a module of this project in so many processes.

    Args:
        processes: How many.
        arguments: The module and its arguments.
        options: Those of subprocess.run.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    subprocess.run([*command, "-m", *arguments], check=True, cwd=PROJECT, **options)


def measure_layout(network: str, processes: int, cores: int) -> dict[str, float]:
    """Measure a training step in so many processes of so many cores.

    Returns:
        'step' in seconds; on one core 'optimiser', its part of the step in seconds; in several
        processes 'megabytes' of gradients, and 'all_reduce', what adding them up takes in seconds.
    """
    with tempfile.TemporaryDirectory() as root:
        arguments = ("benchmarks.scaling", "--network", network, "--root", root)
        environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
        torchrun(processes, *arguments, env=environment, stdout=subprocess.DEVNULL)
        return json.loads((Path(root) / "found.json").read_text())


def predicted_step(one: dict[str, float], all_reduce: float, processes: int) -> float:
    """Predict the seconds of a step in several processes by the formula of docs/scaling.md.

    Args:
        one: 'step' and 'optimiser' of one process, in seconds.
        all_reduce: Seconds.
        processes: How many.
    """
    return (one["step"] - one["optimiser"]) / processes + one["optimiser"] + all_reduce


def two_epoch_accuracy(processes: int) -> float:
    """Train FastNet for two epochs of CIFAR-10 by `python -m training` in so many processes.

    Returns:
        The validation accuracy, a fraction.
    """
    with tempfile.TemporaryDirectory() as root:
        switches = {"ARCH": "FastNet", "RECIPE": "fastnet-2", "LOADER": "fast"}
        switches["CHECKPOINT_DIR"] = root
        environment = {f"ERA_{name}": value for name, value in switches.items()}
        torchrun(processes, "training", env=os.environ | environment)
        (finished,) = Path(root).glob("*/finished.json")
        return json.loads(finished.read_text())["val_acc"]


def images_per_second(fast: bool) -> float:
    """Measure how many images one core loads and augments for FastNet, which needs most of them.

    Args:
        fast: Use the fast loader instead of Albumentations.
    """
    torch.set_num_threads(1)
    recipe, count = full_resolution_recipe("FastNet"), 10_000
    splits = first_images(load_splits(data_folder()), count)
    batches = build_datamodule(recipe, splits, 0, fast).train_dataloader()
    return count / median_seconds(lambda: [None for _ in batches], 3)


def step_row(network: str, batch_size: int, layouts: dict[str, dict]) -> list[str]:
    """Format the steps of a network in each layout, what the formula predicts, and its error."""
    two = layouts["two processes"]
    formula = predicted_step(layouts["one core"], two["all_reduce"], 2)
    seconds = [*(layouts[name]["step"] for name in LAYOUTS), formula]
    error = f"{100 * (formula / two['step'] - 1):+.0f} %"
    return [f"{network}, {batch_size:,}", *(f"{value:.2f} s" for value in seconds), error]


def part_row(network: str, layouts: dict[str, dict]) -> list[str]:
    """Format what goes into the formula: size of the gradients, all-reduce, optimiser step."""
    size, measured = (layouts["two processes"][key] for key in ("megabytes", "all_reduce"))
    eight = 2 * 7 / 8 * size / TEN_GBIT  # a ring of eight processes
    seconds = (measured, eight, layouts["one core"]["optimiser"])
    return [network, f"{size:.1f} MB", *(f"{1000 * value:.0f} ms" for value in seconds)]


def tables(found: dict) -> str:
    """Format results/scaling.json as the two tables and the sentences of docs/scaling.md."""
    step_names = ["network, images in a batch", *LAYOUTS, "formula", "error"]
    part_names = ["network", "gradients", "all-reduce, 2 processes"]
    part_names += ["all-reduce, 8 processes, 10 Gbit/s", "optimiser step"]
    sizes, networks = found["batch_sizes"], found["networks"].items()
    steps = [step_row(network, sizes[network], layouts) for network, layouts in networks]
    parts = [part_row(network, layouts) for network, layouts in networks]
    rates = found["images_per_second"].items()
    loaders = ", ".join(f"{value:,.0f} with {name}" for name, value in rates)
    accuracies = ", ".join(f"{100 * x:.2f} % in {name}" for name, x in found["val_acc"].items())
    return (
        f"{markdown_table(step_names, steps)}\n\n{markdown_table(part_names, parts)}\n\n"
        f"Validation accuracy of FastNet after two epochs of CIFAR-10, seed 42: {accuracies}."
        f" Images per second that one core loads and augments: {loaders}."
        f" Measured on {found['machine']}.\n"
    )


def main() -> None:
    """Measure everything and write it down; with --network, what torchrun's processes do."""
    parser = command_line(__doc__)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.network:
        return measure_process(args.network, args.root)
    if choose_device().type != "cpu":
        raise InvalidValue(f"this measures processes on CPU cores, got {choose_device()}")
    found = {"networks": {}, "machine": hardware(), "versions": versions()}
    found["batch_sizes"] = {name: full_resolution_recipe(name).batch_size for name in STEPS}
    for network in STEPS:
        layouts = {name: measure_layout(network, *layout) for name, layout in LAYOUTS.items()}
        found["networks"][network] = layouts
        print(network, json.dumps(layouts, indent=1), flush=True)
    found["val_acc"] = {
        "one process": two_epoch_accuracy(1),
        "two processes": two_epoch_accuracy(2),
    }
    found["images_per_second"] = {
        "Albumentations": images_per_second(False),
        "the fast loader": images_per_second(True),
    }
    write_json(RESULTS / "scaling.json", found)
    write_between_marks(DOC, tables(found))


if __name__ == "__main__":
    main()
