"""Measure what a recipe reaches: accuracy with and without TTA, calibration, training time.

    # trained on 45,000 images, a temperature fitted on the other 5,000
    python -m benchmarks.accuracy fastnet-7 --seeds 0 1 2
    # trained on all 50,000 images
    python -m benchmarks.accuracy fastnet-7 --seeds 0 1 2 --all-images
    # an ablation: one technique left out, compared with --without nothing
    python -m benchmarks.accuracy fastnet-7 --seeds 0 1 2 --without muon
    # a trial of other hyperparameters
    python -m benchmarks.accuracy custom-10 --change muon_lr=0.2 low_res=0.5

Ablations and other hyperparameters are judged by the validation images: with --without, --change
and --images no test image is used. An interrupted run continues where it ended. The results go to
benchmarks/results/accuracy.json and ablations.json; those of --change, and of --images N, a quick
trial on the first N training images, are only printed.
"""

import argparse
import ast
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import training.runs
from dataload import Images, Splits, load_splits
from evaluation.calibration import expected_calibration_error, fit_temperature
from evaluation.predict import accuracy, predict
from training import optimizer
from training.console import command_line
from training.files import write_json
from training.hardware import choose_device, hardware
from training.optimizer import parameter_groups
from training.options import RunOptions
from training.recipes import RECIPES, Recipe
from training.runs import build_datamodule, train
from training.switches import data_folder

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Ablation:
    """How a technique is left out of a recipe.

    Attributes:
        factors: Fields of the recipe -> what they are multiplied by without the technique.
        patch: A module or class, the name of a function in it, and what replaces that function.
    """

    factors: dict[str, float] = field(default_factory=dict)
    patch: tuple[object, str, Callable] | None = None

    def changes(self, recipe: Recipe) -> dict[str, float]:
        """Return the fields of a recipe that are others without the technique."""
        return {name: factor * getattr(recipe, name) for name, factor in self.factors.items()}


def skip_whitening(conv: nn.Conv2d, images: Tensor) -> None:
    """Replace whitening.whiten: leave the first layer at its random initial weights."""


def sgd_parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Replace optimizer.parameter_groups: train the filters of Muon by SGD.

    The learning rate is that of airbench94 before it had Muon, 2.93 for batches of 2,000, without
    its warm-up and averaging of weights (Lookahead).
    """
    groups = parameter_groups(model, recipe)
    lr = 2.93 * recipe.batch_size / 2000
    groups[0] |= {"muon": False, "lr": lr, "momentum": 0.85, "weight_decay": 0.0013}
    return groups


WITHOUT = {
    "nothing": Ablation(),
    "whitening": Ablation(patch=(training.runs, "whiten", skip_whitening)),
    "dirac": Ablation(patch=(nn.init, "dirac_", lambda weight: weight)),
    "fast_biases": Ablation({"bias_lr": 1 / 64}),
    "muon": Ablation(patch=(optimizer, "parameter_groups", sgd_parameter_groups)),
    "low_res": Ablation({"low_res": 0}),
}


def all_images(splits: Splits) -> Splits:
    """Return splits whose validation images are training images."""
    pairs = zip(splits.train, splits.val, strict=True)
    train_part = Images(*(np.concatenate(pair) for pair in pairs))
    return splits._replace(train=train_part, val=splits.val.first(0))


def store(path: Path, row: dict) -> None:
    """Add a row to the list in a JSON file, in the place of an earlier measurement of the same."""
    rows = json.loads(path.read_text()) if path.exists() else []
    keys = ("recipe", "without", "train_images")
    rows = [old for old in rows if any(old[key] != row[key] for key in keys)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*rows, row])


def measure(
    name: str, recipe: Recipe, splits: Splits, root: str, options: RunOptions, fast: bool
) -> dict[str, float | None]:
    """Train once and evaluate, in fp32 as the Space does, whatever the training used.

    Args:
        name: The recipe's name in RECIPES, or '' to leave the test images alone.
        recipe: What is trained. Test images are used only if it is the one of that name.
        splits: The images. Without validation images the temperature is the one stored for `name`.
        root: The folder of the runs' folders.
        options: Seed and compilation.
        fast: Use the fast loader instead of Albumentations.

    Returns:
        'seconds' of training; with validation images 'val_single' (accuracy), 'val_tta' (accuracy
        with TTA) and 'temperature'; with test images 'single' (accuracy), 'tta' (accuracy with TTA)
        and 'ece', which is None without a temperature. Accuracies and ECE are fractions.
    """
    data = build_datamodule(recipe, splits, options.seed, fast)
    run = train(recipe, data, root, options)
    device = choose_device().type
    row: dict[str, float | None] = {"seconds": run.metadata["seconds"]}
    if len(splits.val.labels):
        logits, labels = predict(run.model, device, data.val_dataloader())
        averaged, _ = predict(run.model, device, data.val_dataloader(), tta=True)
        row |= {"val_single": accuracy(logits, labels), "val_tta": accuracy(averaged, labels)}
        row["temperature"] = fit_temperature(logits, labels)
    if recipe == RECIPES.get(name):
        logits, labels = predict(run.model, device, data.test_dataloader())
        averaged, _ = predict(run.model, device, data.test_dataloader(), tta=True)
        row |= {"single": accuracy(logits, labels), "tta": accuracy(averaged, labels)}
        temperature = row.get("temperature") or stored_temperature(name)
        row["ece"] = (
            expected_calibration_error(logits, labels, temperature) if temperature else None
        )
    return row


def stored_temperature(name: str) -> float | None:
    """Return the temperature of the recipe trained on 45,000 images, if that has been measured.

    A network that was trained on all images has none left to fit a temperature on.
    """
    path = RESULTS / "accuracy.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    fitted = (row for row in rows if row["recipe"] == name and "temperature" in row)
    return next((row["temperature"] for row in fitted), None)


def means(runs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Average each value over the runs; None where a run could not measure it."""
    result: dict[str, float | None] = {}
    for key in runs[0]:
        known = [value for run in runs if (value := run[key]) is not None]
        result[key] = statistics.mean(known) if len(known) == len(runs) else None
    return result


def deviations(runs: list[dict[str, float | None]]) -> dict[str, float]:
    """Return 'single_std' and 'tta_std', the standard deviations over the runs, if there are two.

    Runs without test images have neither.
    """
    result: dict[str, float] = {}
    for key in ("single", "tta"):
        known = [value for run in runs if (value := run.get(key)) is not None]
        if len(known) > 1:
            result[f"{key}_std"] = statistics.stdev(known)
    return result


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--all-images", action="store_true", help="train on all 50,000 images")
    parser.add_argument("--without", choices=list(WITHOUT), help="leave out a technique of FastNet")
    parser.add_argument("--images", type=int, default=0, help="train on the first N images only")
    parser.add_argument("--compiled", action="store_true", help="compile the network: for a GPU")
    parser.add_argument("--change", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--root", default="checkpoints", help="folder of the runs")
    parser.add_argument("--albumentations", action="store_true", help="instead of the fast loader")
    args = parser.parse_args()
    if args.without and RECIPES[args.recipe].network != "FastNet":
        parser.error(f"--without is for FastNet's recipes, got {args.recipe}")
    if args.all_images and (args.without or args.images or args.change is not None):
        parser.error(
            "--without, --images and --change are judged by validation images, of which"
            " --all-images leaves none"
        )
    return args


def chosen_splits(all_for_training: bool, images: int) -> Splits:
    """Load CIFAR-10 and change its splits as the command line says; 0 images: no limit."""
    splits = load_splits(data_folder())
    splits = all_images(splits) if all_for_training else splits
    return splits._replace(train=splits.train.first(images)) if images else splits


def main() -> None:
    """Train with each seed, print the results, and store their means."""
    args = parse_arguments()
    ablation = WITHOUT[args.without] if args.without else Ablation()
    is_trial = args.change is not None or args.images > 0
    pairs = (item.split("=") for item in args.change or ())
    changes = {key: ast.literal_eval(value) for key, value in pairs}
    recipe, root = RECIPES[args.recipe], args.root
    recipe = replace(recipe, **ablation.changes(recipe), **changes)
    if args.without:
        root = f"{root}/without-{args.without}"  # a run's folder does not tell a patched function
    if ablation.patch:
        setattr(*ablation.patch)
    splits = chosen_splits(args.all_images, args.images)
    name, runs = "" if args.without or is_trial else args.recipe, []
    for seed in args.seeds:
        options = RunOptions(seed=seed, compiled=args.compiled)
        runs.append(measure(name, recipe, splits, root, options, not args.albumentations))
        print(f"seed {seed}:", json.dumps(runs[-1]), flush=True)
    row = {
        "network": recipe.network,
        "recipe": args.recipe,
        "without": args.without,
        "epochs": recipe.epochs,
        "train_images": len(splits.train.labels),
        "n": len(runs),
        **means(runs),
        **deviations(runs),
        "machine": hardware(),
        "seeds": args.seeds,
    }
    if not is_trial:
        path = RESULTS / ("ablations.json" if args.without else "accuracy.json")
        if args.without:
            row["full_recipe"] = asdict(RECIPES[args.recipe])
        store(path, row | {"runs": runs})
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
