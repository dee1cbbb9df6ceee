"""Record what a network thinks of six validation images epoch by epoch, and draw it.

    python -m benchmarks.learned_when                # FastNet's recipe of seven epochs
    python -m benchmarks.learned_when fastnet-2      # another one

To be short, it trains on a part of the training images; the results say on how many.
Before the training and after each of its epochs, the probabilities of all classes and the Grad-CAM
heatmap for the true class are recorded. At the end they go to benchmarks/results/learned_when.json,
and images/learned_when.png, a strip, and images/learned_when.gif, an animation, are drawn: the JSON
holds no pixels of the images.
With --results, all three files are written beside each other there.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from dataload import CLASSES, CIFAR10DataModule, Images, load_splits, normalize
from evaluation.drawing import save_figure
from evaluation.over_epochs import Learned, epoch_snapshot, plot_learned, save_gif
from training.classifier import LitClassifier
from training.console import command_line
from training.files import PROJECT, write_whole
from training.hardware import hardware
from training.options import RunOptions
from training.recipes import RECIPES
from training.runs import build_datamodule, train
from training.switches import data_folder

FILE = Path(__file__).resolve().parent / "results" / "learned_when.json"
STRIP, ANIMATION = (PROJECT / "images" / f"learned_when.{kind}" for kind in ("png", "gif"))
SHOWN = ("airplane", "ship", "truck", "bird", "cat", "horse")  # the first image of each
LABELS = [CLASSES.index(name) for name in SHOWN]

# ---- recording -----------------------------------------------------------------------------------


def chosen_images(part: Images) -> list[int]:
    """Return the index of the first image of each class that is shown."""
    return [int((part.labels == label).argmax()) for label in LABELS]


class Recorder(pl.Callback):
    """A callback that records what the network thinks before the training and after each epoch.

    Args:
        part: the validation images.

    Attributes:
        epochs: what was recorded.
    """

    def __init__(self, part: Images):
        self.images, self.epochs = normalize(part.images[chosen_images(part)]), []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the network as it is before the training."""
        self.record(module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the network after an epoch."""
        self.record(module)

    def record(self, module: pl.LightningModule) -> None:
        """Record the network as it is."""
        assert isinstance(module, LitClassifier)
        seen = epoch_snapshot(module.model, self.images.to(module.device), LABELS)
        self.epochs.append({"epoch": len(self.epochs)} | seen)


def write_compact(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all, a line for each epoch."""
    head = json.dumps({key: value[key] for key in value if key != "epochs"})[:-1]
    epochs = ",\n".join(json.dumps(epoch, separators=(",", ":")) for epoch in value["epochs"])
    write_whole(path, f'{head}, "epochs": [\n{epochs}\n]}}\n')


def metadata_of(recipe_name: str, data: CIFAR10DataModule) -> dict:
    """Return what is recorded beside the epochs: how it was trained, and the images."""
    return {
        "recipe": recipe_name,
        "seed": data.seed,
        "train_images": len(data.splits.train.labels),
        "machine": hardware(),
        "classes": list(CLASSES),
        "images": chosen_images(data.splits.val),
        "labels": LABELS,
    }


def read(path: Path = FILE) -> dict | None:
    """Read what was recorded; None if there is nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- what it shows -------------------------------------------------------------------------------


def learned(found: dict, part: Images) -> Learned:
    """Put what was recorded and the validation images together, to be drawn."""
    return Learned(found, part.images[found["images"]] / 255)


def draw(found: dict, part: Images, strip: Path = STRIP, animation: Path = ANIMATION) -> None:
    """Write the strip and the animation."""
    how = f"{found['recipe']} on {found['train_images']:,} training images"
    save_figure(plot_learned(learned(found, part), how), strip)
    save_gif(learned(found, part), animation)


def learned_after(found: dict) -> dict[str, int | None]:
    """Return the epoch from which on each image is classified correctly, None if it never is.

    Args:
        found: what was recorded; epoch 0 is before the training.
    """
    answers = {}
    for i, name in enumerate(SHOWN):
        label = CLASSES.index(name)
        right = [int(np.argmax(seen["probabilities"][i])) == label for seen in found["epochs"]]
        wrong = [epoch for epoch, correct in enumerate(right) if not correct]
        first = wrong[-1] + 1 if wrong else 0
        answers[name] = first if first < len(right) else None
    return answers


def finding(found: dict) -> str:
    """Say in a sentence which images are the first and the last to be classified correctly.

    From that epoch on, they stay correct to the end.
    """
    epochs = learned_after(found)
    known = {name: epoch for name, epoch in epochs.items() if epoch is not None}
    never = [name for name, epoch in epochs.items() if epoch is None]
    missing = f"; wrong at the end: {', '.join(never)}" if never else ""
    if not known:
        return f"None of the {len(epochs)} images is classified correctly at the end"
    early, late = min(known.values()), max(known.values())
    first = ", ".join(name for name, epoch in known.items() if epoch == early)
    last = ", ".join(name for name, epoch in known.items() if epoch == late)
    if early == late:
        return f"Correct from epoch {early} on: {first}{missing}"
    return (
        f"First to stay correct: {first} (from epoch {early} on); last: {last} (from epoch"
        f" {late} on){missing}"
    )


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    """Train and record, then draw."""
    parser = command_line(__doc__)
    parser.add_argument("recipe", nargs="?", default="fastnet-7", choices=list(RECIPES))
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results", type=Path, default=FILE)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    splits = load_splits(data_folder(), args.seed)
    splits = splits._replace(train=splits.train.first(args.images))
    data = build_datamodule(recipe, splits, args.seed, fast=True)
    recorder = Recorder(splits.val)
    with tempfile.TemporaryDirectory() as root:
        train(recipe, data, root, RunOptions(seed=args.seed), [recorder])
    found = metadata_of(args.recipe, data) | {"epochs": recorder.epochs}
    write_compact(args.results, found)
    beside = [args.results.with_suffix(suffix) for suffix in (".png", ".gif")]
    draw(found, splits.val, *([STRIP, ANIMATION] if args.results == FILE else beside))
    print(finding(found))


if __name__ == "__main__":
    main()
