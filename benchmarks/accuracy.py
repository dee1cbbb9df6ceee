"""Train by a recipe, several seeds, and write down what came out: accuracy, calibration, time.

    python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2                 # on 45,000 images; also fits the temperature
    python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2 --all-images    # on all 50,000, for the final figures
    python -m benchmarks.accuracy fastnet-8 --seeds 0 1 2 --change low_res=0   # a recipe with one trick left out

While something is being chosen, it is chosen by the validation images: with --change no test image is looked at.
Runs that were interrupted go on. Results go to benchmarks/results/accuracy.json, or ablations.json with --change.
"""

import argparse
import ast
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dataload import Images, Splits, load_splits
from evaluation import accuracy, calibration_error, fit_temperature, predict
from machine import choose_precision, hardware
from models.lit import RECIPES
from training import data_for, train
from utils import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def all_images(splits: Splits) -> Splits:
    """The same with the validation images given back to training."""
    train_part = Images(*(np.concatenate(parts) for parts in zip(splits.train, splits.val, strict=True)))
    return splits._replace(train=train_part, val=Images(splits.val.images[:0], splits.val.labels[:0]))


def store(path: Path, row: dict, same: tuple[str, ...]) -> None:
    """Put a row into a list in a file, in place of the one that has the same values of the keys `same`."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old.get(key) != row[key] for key in same)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*rows, row])


def measure(name: str, changes: dict, splits: Splits, seed: int, root: str, fast: bool) -> dict:
    """One run: its figures as fractions, its training time in seconds."""
    recipe = replace(RECIPES[name], **changes)
    data = data_for(recipe, splits, seed, fast)
    run = train(recipe, data, root, seed)
    figures = {"seconds": run.facts["seconds"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(splits.val.labels):
        with torch.autocast(device, torch.bfloat16, enabled=choose_precision() == "bf16-mixed"):
            logits, labels = predict(run.model, device, data.val_dataloader())
            six, _ = predict(run.model, device, data.val_dataloader(), tta=True)
        figures |= {"val_single": accuracy(logits, labels), "val_tta": accuracy(six, labels)}
        figures["temperature"] = fit_temperature(logits, labels)
    if not changes:
        logits, labels = predict(run.model, device, data.test_dataloader())
        six, _ = predict(run.model, device, data.test_dataloader(), tta=True)
        figures |= {"single": accuracy(logits, labels), "tta": accuracy(six, labels)}
        temperature = figures.get("temperature") or stored_temperature(name)
        figures["ece"] = calibration_error(logits, labels, temperature) if temperature else None
    return figures


def stored_temperature(name: str) -> float | None:
    """Of the run of the same recipe on 45,000 images: who has seen all images has none left to fit one on."""
    path = RESULTS / "accuracy.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return next((row["temperature"] for row in rows if row["recipe"] == name and "temperature" in row), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--all-images", action="store_true")
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--root", default="checkpoints")
    parser.add_argument("--albumentations", action="store_true", help="instead of the fast loader")
    args = parser.parse_args()
    changes = {key: ast.literal_eval(value) for key, value in (change.split("=") for change in args.change)}
    splits = load_splits(os.environ.get("DATA_DIR", "data"))
    splits = all_images(splits) if args.all_images else splits
    runs = []
    for seed in args.seeds:
        runs.append(measure(args.recipe, changes, splits, seed, args.root, not args.albumentations))
        print(f"seed {seed}:", json.dumps(runs[-1]), flush=True)
    recipe = replace(RECIPES[args.recipe], **changes)
    means = {key: statistics.mean(run[key] for run in runs) for key, value in runs[0].items() if value is not None}
    row = {
        "network": recipe.network, "recipe": args.recipe, "changes": changes, "epochs": recipe.epochs,
        "train_images": len(splits.train.labels), "n": len(runs), **means, "machine": hardware(), "seeds": args.seeds,
        "runs": runs,
    }  # fmt: skip
    file, same = ("ablations.json", "changes") if changes else ("accuracy.json", "train_images")
    store(RESULTS / file, row, ("recipe", same))
    print(json.dumps({key: value for key, value in row.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
