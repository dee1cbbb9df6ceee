"""How fast training is, as ratios within one run: `make bench`.

    python -m benchmarks.speed            # all three parts; more than an hour on two cores python
    -m benchmarks.speed steps      # (a) our training step, data pipeline included, against a bare
    PyTorch loop python -m benchmarks.speed to94       # (b) FastNet against the published schedule:
    epochs in turn, a full run each python -m benchmarks.speed scaling    # (c) seconds per epoch
    for parts of the images, and for 1 and 2 cores

Every part writes what it measured into benchmarks/results/speed.json, with the machine and the
versions. `--images N` makes it a quick trial on that many images, which is printed and not written.
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

import torch
import torch.nn.functional as F

from benchmarks.accuracy import RESULTS, all_images
from dataload import Images, Splits, load_splits
from evaluation.predict import accuracy, predict
from training.classifier import LitClassifier
from training.files import write_json
from training.hardware import choose_device, choose_precision, hardware, versions
from training.history import read_metrics
from training.optimizer import make_optimizer
from training.recipes import RECIPES, Recipe
from training.runs import build_datamodule, train

DEVICE = choose_device().type
# Enough that what an epoch costs once hardly counts, few enough to alternate every few minutes; on
# a GPU all images.
STEP_IMAGES = {"FastNet": 16_000, "CustomResNet": 8_192, "ResNet18": 8_192}
ROUNDS = 3


def first_images(splits: Splits, count: int) -> Splits:
    """The first training images, nothing to validate on, the same test images."""
    train_part, empty = (Images(*(array[:n] for array in splits.train)) for n in (count, 0))
    return splits._replace(train=train_part, val=empty)


def our_seconds(recipe: Recipe, splits: Splits, fast: bool) -> float:
    """Of the second epoch of a run of ours.

    The first one warms up. All that belongs to an epoch included.
    """
    recipe = replace(recipe, epochs=2)
    data = build_datamodule(recipe, splits, 0, fast)
    with tempfile.TemporaryDirectory() as root:
        run = train(recipe, data, root)
        return float(read_metrics(run.metrics_csv.parent / "logs").seconds.dropna().iloc[-1])


def bare_seconds(recipe: Recipe, count: int) -> float:
    """Of the same steps in a plain loop over resident random images.

    No loader, no augmentation, no Lightning.
    """
    micro_batch = recipe.batch_size if DEVICE == "cuda" else recipe.micro_batch or recipe.batch_size
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
        group["lr"] = (
            1e-6  # random labels teach nothing; this keeps the numbers in an ordinary range
        )
    seconds = 0.0
    for timed in (False, True):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for step in range(1, (count // micro_batch if timed else accumulation_steps) + 1):
            with torch.autocast(DEVICE, dtype, enabled=precision != "32-true"):
                loss = F.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)
            (loss / accumulation_steps).backward()
            if step % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


# ---- (a) ----


def measure_steps(splits: Splits, images: int) -> dict:
    """(a) step_ratio[network][path].

    Mean seconds of the bare loop over ours; 1 would mean that all else is free.
    """
    ratios = {}
    for recipe in {recipe.network: recipe for recipe in reversed(RECIPES.values())}.values():
        recipe = replace(recipe, low_res=0.0)  # the bare loop has no start at low resolution
        micro_batch = recipe.micro_batch or recipe.batch_size
        enough = STEP_IMAGES[recipe.network] if DEVICE == "cpu" else len(splits.train.labels)
        count = (images or enough) // micro_batch * micro_batch
        bare, ours = (
            [],
            {path: [] for path in (("fast",) if DEVICE == "cuda" else ("albumentations", "fast"))},
        )
        for _ in range(ROUNDS):
            for path, seconds in ours.items():
                bare.append(bare_seconds(recipe, count))
                seconds.append(our_seconds(recipe, first_images(splits, count), path == "fast"))
                print(
                    f"{recipe.network:12s} {path:14s} bare {count / bare[-1]:7.0f} images/s, ours"
                    f" {count / seconds[-1]:7.0f} images/s",
                    flush=True,
                )
        ratios[recipe.network] = {
            path: round(statistics.mean(bare) / statistics.mean(seconds), 3)
            for path, seconds in ours.items()
        }
    return {"step_ratio": ratios}


# ---- (b) ----


class ReferenceProcess:
    """benchmarks.reference in a process of its own.

    It gets memory as it comes, ours in large pages.
    """

    def __init__(self, images: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reference", "--images", str(images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"THP_MEM_ALLOC_ENABLE": "0"},
        )

    def ask(self, what: str) -> dict:
        """'epoch': train for one. 'test': evaluate. Returns what it measured."""
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def measure_to94(splits: Splits, images: int) -> dict:
    """(b) time_to_94_ratio.

    Our seconds for a whole training over those of the published schedule.
    """
    recipe = RECIPES["fastnet-8"]
    splits = all_images(splits) if not images else first_images(splits, images)
    reference, seconds, pairs = ReferenceProcess(images), [], []
    for _ in range(3):
        seconds.append(reference.ask("epoch")["seconds"])
        pairs.append(our_seconds(replace(recipe, low_res=0.0), splits, True) / seconds[-1])
        print(
            f"an epoch at full resolution: {pairs[-1]:.3f} of the reference's {seconds[-1]:.1f} s",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as root:
        data = build_datamodule(recipe, splits, 0, fast=True)
        run = train(recipe, data, root, 0)
    seconds += [reference.ask("epoch")["seconds"] for _ in range(5)]
    single, six = (
        accuracy(*predict(run.model, DEVICE, data.test_dataloader(), tta)) for tta in (False, True)
    )
    ours = {"seconds": run.metadata["seconds"], "single": single, "tta": six}
    theirs = {"seconds": round(sum(seconds), 1)} | reference.ask("test")
    print(f"ours {ours}\nreference {theirs}")
    return {
        "time_to_94_ratio": round(ours["seconds"] / theirs["seconds"], 3),
        "time_to_94": {
            "ours": ours,
            "reference": theirs,
            "epoch_ratios": [round(pair, 3) for pair in pairs],
        },
    }


# ---- (c) ----


def measure_scaling(splits: Splits, images: int) -> dict:
    """(c) seconds_per_epoch[fraction] of FastNet at full resolution, and [cores] for a quarter of the images."""
    recipe, images = replace(RECIPES["fastnet-8"], low_res=0.0), images or len(splits.train.labels)
    by_fraction = {
        name: round(our_seconds(recipe, first_images(splits, images // part), True), 2)
        for name, part in (("1/8", 8), ("1/4", 4), ("1/2", 2), ("1", 1))
    }
    threads, by_cores = torch.get_num_threads(), {}
    for cores in sorted({1, threads}):
        torch.set_num_threads(cores)
        by_cores[str(cores)] = round(
            our_seconds(recipe, first_images(splits, images // 4), True), 2
        )
    torch.set_num_threads(threads)
    return {
        "seconds_per_epoch": by_fraction,
        "seconds_per_quarter_epoch_by_cores": by_cores,
        "images": images,
    }


PARTS = {"steps": measure_steps, "to94": measure_to94, "scaling": measure_scaling}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=list(PARTS))
    parser.add_argument("--images", type=int, default=0)
    args = parser.parse_args()
    splits = load_splits(os.environ.get("DATA_DIR", "data"))
    path = RESULTS / "speed.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in [args.part] if args.part else PARTS:
        found |= PARTS[name](splits, args.images) | {"versions": versions(), "seeds": [0]}
        found["machine"] = found.get("machine", {}) | {
            name: hardware()
        }  # the parts may be measured on different ones
        if not args.images:
            write_json(path, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
