"""One process against two, and what the formula of docs/scaling.md makes of it: `python -m benchmarks.scaling`.

Measures for each network the seconds of a step on one core, on two, and in two processes of one core each; what of it
every process does for itself (the optimiser); how long it takes to add the gradients up; how many images a core
augments; and what FastNet learns in two epochs, in one process and in two. Writes benchmarks/results/scaling.json and
the tables of docs/scaling.md; a quarter of an hour on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.accuracy import RESULTS
from benchmarks.report import write_between_marks
from benchmarks.speed import first_images
from dataload import load_splits
from training.classifier import LitClassifier
from training.files import write_json
from training.hardware import choose_precision, hardware, versions
from training.history import read_metrics
from training.optimizer import make_optimizer
from training.recipes import RECIPES, Recipe
from training.runs import build_datamodule, train
from training.settings import SWITCHES, placement

STEPS = {"FastNet": 4, "ResNet18": 6}  # an epoch of them takes half a minute or so on a core
WAYS = {
    "one core": (1, 1),
    "two cores": (1, 2),
    "two processes": (2, 1),
}  # processes, cores of each
DOC = Path(__file__).resolve().parent.parent / "docs/scaling.md"


def median_seconds(action, times: int = 7) -> float:
    """Of so many times that this is done, after once to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def chosen(network: str) -> Recipe:
    return replace(next(r for r in RECIPES.values() if r.network == network), epochs=3, low_res=0.0)


def optimiser_seconds(recipe: Recipe) -> float:
    """What a step of the optimiser takes, which every process does for the whole network."""
    net = LitClassifier(**asdict(recipe)).model
    optimizer = make_optimizer(net, recipe, choose_precision() == "bf16-mixed")
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return median_seconds(optimizer.step)


def work(network: str, root: Path) -> None:
    """What each process of a measurement does; the first writes what came out."""
    recipe, steps = chosen(network), STEPS[network]
    splits = first_images(
        load_splits(os.environ.get("DATA_DIR", "data")), steps * recipe.batch_size
    )
    data = build_datamodule(recipe, splits, 0, fast=True)
    run = train(recipe, data, root, **placement(SWITCHES))
    seconds = read_metrics(run.metrics_csv.parent / "logs").seconds.dropna()
    found = {"step": statistics.median(seconds[1:]) / steps, "optimiser": optimiser_seconds(recipe)}
    dist.is_initialized() or dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    gradients = torch.zeros(
        sum(p.numel() for p in LitClassifier(**asdict(recipe)).parameters() if p.requires_grad)
    )
    found |= {
        "megabytes": 4e-6 * len(gradients),
        "all_reduce": median_seconds(lambda: dist.all_reduce(gradients)),
    }
    if dist.get_rank() == 0:
        write_json(root / "found.json", found)


def measured(network: str, processes: int, cores: int) -> dict:
    """Seconds of a step and of its parts, by torchrun in so many processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "-m",
    ]
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(
            [*command, "benchmarks.scaling", "--network", network, "--root", root],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(cores)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads((Path(root) / "found.json").read_text())


def predicted(one: dict, all_reduce: float, processes: int) -> float:
    """Seconds of a step in so many processes, from a step on one core.

    The formula of docs/scaling.md.
    """
    return (one["step"] - one["optimiser"]) / processes + one["optimiser"] + all_reduce


def val_acc(processes: int) -> float:
    """Validation accuracy of FastNet after two epochs of CIFAR-10, trained by `python -m training` in so many processes."""
    with tempfile.TemporaryDirectory() as root:
        switches = {
            "ARCH": "FastNet",
            "RECIPE": "fastnet-2",
            "LOADER": "fast",
            "CHECKPOINT_DIR": root,
        }
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(processes),
                "-m",
                "training",
            ],
            check=True,
            env=os.environ | {f"ERA_{name}": value for name, value in switches.items()},
            cwd=DOC.parent.parent,
        )
        (finished,) = Path(root).glob("*/finished.json")
        return json.loads(finished.read_text())["val_acc"]


def images_per_second(fast: bool) -> float:
    """That one core loads and augments, for the network that is given most of them."""
    torch.set_num_threads(1)
    recipe, count = chosen("FastNet"), 10_000
    splits = first_images(load_splits(os.environ.get("DATA_DIR", "data")), count)
    batches = build_datamodule(recipe, splits, 0, fast).train_dataloader()
    return count / median_seconds(lambda: [None for _ in batches], 3)


def tables(found: dict) -> str:
    """The two tables of docs/scaling.md."""
    lines = [
        "| network, images in a batch | one core | two cores | two processes | formula | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for network, ways in found["networks"].items():
        formula = predicted(ways["one core"], ways["two processes"]["all_reduce"], 2)
        steps = [f"{ways[way]['step']:.2f} s" for way in WAYS]
        error = formula / ways["two processes"]["step"] - 1
        cells = [
            f"{network}, {chosen(network).batch_size:,}",
            *steps,
            f"{formula:.2f} s",
            f"{100 * error:+.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| network | gradients | two processes add them up | over 10 Gbit/s, 8 processes | the optimiser's part |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network, ways in found["networks"].items():
        size, one = ways["two processes"]["megabytes"], ways["one core"]
        network_seconds = 2 * 7 / 8 * size / 1250
        cells = [network, f"{size:.1f} MB", f"{1000 * ways['two processes']['all_reduce']:.0f} ms"]
        cells += [f"{1000 * network_seconds:.0f} ms", f"{1000 * one['optimiser']:.0f} ms"]
        lines.append(f"| {' | '.join(cells)} |")
    loaders = ", ".join(
        f"{value:,.0f} with {name}" for name, value in found["images_per_second"].items()
    )
    learned = ", ".join(f"{100 * value:.2f} % in {way}" for way, value in found["val_acc"].items())
    lines += [
        "",
        f"FastNet after two epochs of CIFAR-10, seed 42, validation: {learned}. Images a second that one core loads and"
        f" augments: {loaders}. Measured on {found['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.network:
        return work(args.network, args.root)
    found = {"networks": {}, "machine": hardware(), "versions": versions()}
    for network in STEPS:
        found["networks"][network] = {way: measured(network, *how) for way, how in WAYS.items()}
        print(network, json.dumps(found["networks"][network], indent=1), flush=True)
    found["val_acc"] = {"one process": val_acc(1), "two processes": val_acc(2)}
    found["images_per_second"] = {
        "Albumentations": images_per_second(False),
        "the fast loader": images_per_second(True),
    }
    write_json(RESULTS / "scaling.json", found)
    write_between_marks(DOC, tables(found))


if __name__ == "__main__":
    main()
