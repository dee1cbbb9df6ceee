"""Train by a recipe, several seeds, and write down what came out: accuracy, calibration, time.

    python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2                 # on 45,000 images; also
    fits the temperature python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2 --all-images    # on
    all 50,000, for the final figures python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2
    --without muon  # with one trick left out python -m benchmarks.accuracy custom-10 --change
    muon_lr=0.1 low_res=0.3  # another value, to try it

Tricks and values are judged by the validation images: with --without and --change no test image is
looked at. Runs that were interrupted go on. Results go to benchmarks/results/accuracy.json and
ablations.json; those of --change, and of --images N, a quick trial on the first N images, are
printed only.
"""

import argparse
import ast
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dataload import Images, Splits, load_splits
from evaluation.calibration import expected_calibration_error, fit_temperature
from evaluation.predict import accuracy, predict
from models.fastnet import FastNet
from training import optimizer
from training.files import write_json
from training.hardware import choose_device, hardware
from training.optimizer import parameter_groups
from training.recipes import RECIPES, Recipe
from training.runs import build_datamodule, train

RESULTS = Path(__file__).resolve().parent / "results"


def random_stem(model: FastNet, images: Tensor) -> None:
    """Instead of FastNet.whiten: leave the stem as it is, random."""


def sgd_for_filters(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Instead of optimizer.parameter_groups.

    SGD at the rate that airbench94 had before Muon, for batches of 2,000.
    """
    groups = parameter_groups(model, recipe)
    groups[0] |= {"muon": False, "lr": 2.93, "momentum": 0.85, "weight_decay": 0.0013}
    return groups


# What is left out: changed numbers of the recipe, and a function put in the place of another.
WITHOUT = {
    "whitening": ({}, (FastNet, "whiten", random_stem)),
    "dirac": ({}, (nn.init, "dirac_", lambda weight: weight)),
    "fast_biases": ({"bias_lr": 106 / 64}, None),
    "muon": ({}, (optimizer, "parameter_groups", sgd_for_filters)),
    "low_res": ({"low_res": 0.0}, None),
}


def all_images(splits: Splits) -> Splits:
    """The same with the validation images given back to training."""
    train_part = Images(
        *(np.concatenate(parts) for parts in zip(splits.train, splits.val, strict=True))
    )
    return splits._replace(
        train=train_part, val=Images(splits.val.images[:0], splits.val.labels[:0])
    )


def store(path: Path, row: dict) -> None:
    """Put a row into a list in a file, in the place of an earlier measurement of the same."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [
        old
        for old in rows
        if any(old[key] != row[key] for key in ("recipe", "without", "train_images"))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*rows, row])


def measure(
    name: str,
    recipe: Recipe,
    splits: Splits,
    seed: int,
    root: str,
    fast: bool,
    compiled: bool = False,
) -> dict:
    """One run: its figures as fractions, its training time in seconds.

    Without a name no test image is looked at.

    Validation, temperature and test are all computed in fp32, as the Space computes, whatever the
    training used.
    """
    data = build_datamodule(recipe, splits, seed, fast)
    run = train(recipe, data, root, seed, compiled=compiled)
    figures = {"seconds": run.metadata["seconds"]}
    device = choose_device().type
    if len(splits.val.labels):
        logits, labels = predict(run.model, device, data.val_dataloader())
        six, _ = predict(run.model, device, data.val_dataloader(), tta=True)
        figures |= {"val_single": accuracy(logits, labels), "val_tta": accuracy(six, labels)}
        figures["temperature"] = fit_temperature(logits, labels)
    if recipe == RECIPES.get(name):
        logits, labels = predict(run.model, device, data.test_dataloader())
        six, _ = predict(run.model, device, data.test_dataloader(), tta=True)
        figures |= {"single": accuracy(logits, labels), "tta": accuracy(six, labels)}
        temperature = figures.get("temperature") or stored_temperature(name)
        figures["ece"] = (
            expected_calibration_error(logits, labels, temperature) if temperature else None
        )
    return figures


def stored_temperature(name: str) -> float | None:
    """Of the run of the same recipe on 45,000 images.

    Who has seen all images has none left to fit one on.
    """
    path = RESULTS / "accuracy.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return next(
        (row["temperature"] for row in rows if row["recipe"] == name and "temperature" in row), None
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--all-images", action="store_true")
    parser.add_argument("--without", choices=list(WITHOUT))
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="compile the network: for a GPU")
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--root", default="checkpoints")
    parser.add_argument("--albumentations", action="store_true", help="instead of the fast loader")
    args = parser.parse_args()
    changes, instead = WITHOUT[args.without] if args.without else ({}, None)
    changes = changes | {
        key: ast.literal_eval(value) for key, value in (item.split("=") for item in args.change)
    }
    recipe, root = replace(RECIPES[args.recipe], **changes), args.root
    if args.without:
        root = f"{root}/without-{args.without}"  # a function put in the place of another does not show in the settings
    if instead:
        setattr(*instead)
    splits = load_splits(os.environ.get("DATA_DIR", "data"))
    splits = all_images(splits) if args.all_images else splits
    if args.images:
        splits = splits._replace(train=Images(*(part[: args.images] for part in splits.train)))
    name = "" if args.without or args.change else args.recipe
    runs = []
    for seed in args.seeds:
        runs.append(
            measure(name, recipe, splits, seed, root, not args.albumentations, args.compiled)
        )
        print(f"seed {seed}:", json.dumps(runs[-1]), flush=True)
    means = {
        key: None if value is None else statistics.mean(run[key] for run in runs)
        for key, value in runs[0].items()
    }
    row = {
        "network": recipe.network,
        "recipe": args.recipe,
        "without": args.without,
        "epochs": recipe.epochs,
        "train_images": len(splits.train.labels),
        "n": len(runs),
        **means,
        "machine": hardware(),
        "seeds": args.seeds,
        "runs": runs,
    }
    if not args.change and not args.images:
        store(RESULTS / ("ablations.json" if args.without else "accuracy.json"), row)
    print(json.dumps({key: value for key, value in row.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
