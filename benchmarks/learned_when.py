"""Record what a network thinks of six validation images epoch by epoch, and draw it.

    python -m benchmarks.learned_when                # FastNet's recipe of eight epochs
    python -m benchmarks.learned_when fastnet-2      # another one

Before the training and after each of its epochs, the probabilities of all classes and the Grad-CAM
heatmap for the true class go to benchmarks/results/learned_when.json. An interrupted run continues
where it ended, as every training of the project does. At the end images/learned_when.png, a strip,
and images/learned_when.gif, an animation, are drawn: the JSON holds no pixels of the images.
"""

import argparse
import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image

from dataload import CLASSES, IMAGE_SIZE, CIFAR10DataModule, Images, load_splits, normalize
from evaluation.drawing import new_image_grid, save_figure, show_image
from lesson.explorers import png
from models import explain
from models.stage import Network, eval_mode
from training.classifier import LitClassifier
from training.files import write_json
from training.hardware import hardware
from training.lightning_output import quiet_lightning
from training.options import RunOptions
from training.recipes import RECIPES, Recipe
from training.resume import start_or_resume
from training.run_folder import RunLock, archive_run, run_folder, run_identity
from training.runs import build_datamodule, fit

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "learned_when.json"
STRIP, ANIMATION = (PROJECT / "images" / f"learned_when.{kind}" for kind in ("png", "gif"))
SHOWN = ("airplane", "ship", "truck", "bird", "cat", "horse")  # the first image of each
CELLS = 16  # side of a stored heatmap
FRAME_MS, LAST_MS = 900, 3000

# ---- recording -----------------------------------------------------------------------------------


def chosen_images(part: Images) -> list[int]:
    """Return the index of the first image of each class that is shown."""
    return [int((part.labels == CLASSES.index(name)).argmax()) for name in SHOWN]


def pack(cam: np.ndarray) -> str:
    """Reduce a heatmap (32, 32) in [0, 1] to 16x16 bytes, as text for a JSON file."""
    small = cam.reshape(CELLS, IMAGE_SIZE // CELLS, CELLS, IMAGE_SIZE // CELLS).mean((1, 3))
    return base64.b64encode(np.round(255 * small).astype(np.uint8).tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Undo `pack`, up to rounding: a heatmap (32, 32) in [0, 1]."""
    small = np.frombuffer(base64.b64decode(text), np.uint8).reshape(CELLS, CELLS) / 255
    return cv2.resize(small, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR).clip(0, 1)


def observe(model: Network, part: Images, indices: Sequence[int]) -> list[dict]:
    """Return the probabilities and the heatmap for the true class of each image.

    Args:
        model: the network; it keeps its mode.
        part: the images and their labels.
        indices: which of them.
    """
    batch = normalize(part.images[list(indices)]).to(next(model.parameters()).device)
    labels = part.labels[list(indices)].tolist()
    with torch.no_grad(), eval_mode(model):
        probs = model(batch).float().softmax(1).cpu()
    cams = explain.gradcam(model, model.stages()[-1].module, batch, labels)
    rounded = [[round(value, 4) for value in row] for row in probs.tolist()]
    return [{"probs": row, "cam": pack(cam)} for row, cam in zip(rounded, cams, strict=True)]


class Recorder(pl.Callback):
    """A callback that writes what the network thinks after each epoch.

    Args:
        path: of the JSON file.
        metadata: what is recorded; a file with other metadata is replaced.
        part: the validation images.
    """

    def __init__(self, path: Path, metadata: dict, part: Images):
        self.path, self.metadata, self.part = path, metadata, part

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the network as it is before the training."""
        if trainer.current_epoch == 0:
            self.record(0, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the network after an epoch."""
        self.record(trainer.current_epoch + 1, module)

    def record(self, epoch: int, module: pl.LightningModule) -> None:
        """Write an epoch into the file, in the place of one of the same number."""
        assert isinstance(module, LitClassifier)
        earlier = epochs_of(read(self.path), self.metadata)[:epoch]
        seen = observe(module.model, self.part, self.metadata["images"])
        write_json(self.path, self.metadata | {"epochs": [*earlier, seen]})


def metadata_of(recipe_name: str, data: CIFAR10DataModule) -> dict:
    """Return what is recorded: the recipe, the seed, the images, and on which machine."""
    images = chosen_images(data.splits.val)
    return {"recipe": recipe_name, "seed": data.seed, "images": images, "machine": hardware()}


def epochs_of(found: dict | None, metadata: dict) -> list[list[dict]]:
    """Return the epochs that were recorded with this metadata, the first before the training."""
    known = {key: value for key, value in (found or {}).items() if key != "epochs"}
    return found["epochs"] if found and known == metadata else []


def record_run(recipe: Recipe, root: Path, results: Path, data: CIFAR10DataModule, metadata: dict):
    """Train by a recipe, or continue, and record each epoch.

    Args:
        recipe: the hyperparameters.
        root: the folder of the runs.
        results: the JSON file.
        data: the loaders, made by build_datamodule.
        metadata: what metadata_of returned.
    """
    quiet_lightning()
    options = RunOptions(seed=data.seed)
    identity = run_identity(recipe, data, options)
    folder = run_folder(root, identity)
    root.mkdir(parents=True, exist_ok=True)
    started = folder / "started.json"
    if started.exists() and not epochs_of(read(results), metadata):
        archive_run(folder, True, read(started))  # its epochs were not recorded
    with RunLock(folder) as lock:
        started = start_or_resume(folder, identity, recipe, data, options)
        lock.started = started
        recorder = Recorder(results, metadata, data.splits.val)
        fit(folder, started, data, options, [lock, recorder])


def read(path: Path = RESULTS) -> dict | None:
    """Read what was recorded; None if there is nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- what it shows -------------------------------------------------------------------------------


def learned_after(found: dict) -> dict[str, int | None]:
    """Return the epoch from which on each image is classified correctly, None if it never is.

    Args:
        found: what was recorded; epoch 0 is before the training.
    """
    answers = {}
    for i, name in enumerate(SHOWN):
        label = CLASSES.index(name)
        right = [int(np.argmax(seen[i]["probs"])) == label for seen in found["epochs"]]
        wrong = [epoch for epoch, correct in enumerate(right) if not correct]
        first = wrong[-1] + 1 if wrong else 0
        answers[name] = first if first < len(right) else None
    return answers


def finding(found: dict) -> str:
    """Say in a sentence which images are learned first and last."""
    epochs = learned_after(found)
    known = {name: epoch for name, epoch in epochs.items() if epoch is not None}
    never = [name for name, epoch in epochs.items() if epoch is None]
    missing = f"; never: {', '.join(never)}" if never else ""
    if not known:
        return f"None of the {len(epochs)} images is classified correctly at the end"
    early, late = min(known.values()), max(known.values())
    first = ", ".join(name for name, epoch in known.items() if epoch == early)
    last = ", ".join(name for name, epoch in known.items() if epoch == late)
    if early == late:
        return f"From epoch {early} on correct: {first}{missing}"
    return f"Learned first: {first} (epoch {early}); last: {last} (epoch {late}){missing}"


def answer(probs: Sequence[float]) -> str:
    """Name the most probable class and its probability."""
    best = int(np.argmax(probs))
    return f"{CLASSES[best]}\n{probs[best]:.0%}"


def plot_strip(found: dict, part: Images) -> Figure:
    """Draw a row for each image: the image, then its heatmap and the answer after each epoch."""
    count = len(found["epochs"])
    fig, axes = new_image_grid(len(SHOWN), count + 1, 10.5, 1.55 * len(SHOWN) + 0.8)
    for row, index, name in zip(axes, found["images"], SHOWN, strict=True):
        show_image(row[0], part.images[index], name)
    for epoch, seen in enumerate(found["epochs"]):
        for axis, index, one in zip(axes[:, epoch + 1], found["images"], seen, strict=True):
            blended = explain.overlay(part.images[index] / 255, unpack(one["cam"]), 0.5)
            show_image(axis, blended.clip(0, 1), answer(one["probs"]))
    title = f"{finding(found)}\n{strip_legend(found)}"
    fig.suptitle(title)
    fig.set_label(f"Heatmaps and answers for six validation images, epoch by epoch. {title}.")
    return fig


def strip_legend(found: dict) -> str:
    """Explain the columns of the strip."""
    return (
        f"Left: the image. Then before the training and after each of {len(found['epochs']) - 1}"
        " epochs: the most probable class, and in red the evidence for the true one"
    )


def plot_frame(found: dict, part: Images, epoch: int) -> Figure:
    """Draw the six images, their heatmaps and answers after one epoch."""
    fig, axes = new_image_grid(2, len(SHOWN), 10.5, 4.6)
    for column, index, one, name in zip(
        axes.T, found["images"], found["epochs"][epoch], SHOWN, strict=True
    ):
        blended = explain.overlay(part.images[index] / 255, unpack(one["cam"]), 0.5)
        show_image(column[0], part.images[index], name)
        show_image(column[1], blended.clip(0, 1), answer(one["probs"]))
    fig.suptitle(f"after epoch {epoch}" if epoch else "before the training")
    return fig


def save_animation(found: dict, part: Images, path: Path) -> None:
    """Write an animated GIF with a frame for each epoch."""
    frames = []
    for epoch in range(len(found["epochs"])):
        drawn = png(plot_frame(found, part, epoch))
        path.with_suffix(".part").write_bytes(drawn)
        with Image.open(path.with_suffix(".part")) as picture:
            frames.append(picture.convert("RGB"))
    path.with_suffix(".part").unlink()
    size = min(frame.width for frame in frames), min(frame.height for frame in frames)
    few = [frame.resize(size).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(few) - 1) + [LAST_MS]
    few[0].save(path, save_all=True, append_images=few[1:], duration=durations, loop=0)


def draw(found: dict, part: Images, strip: Path = STRIP, animation: Path = ANIMATION) -> None:
    """Write both pictures."""
    save_figure(plot_strip(found, part), strip)
    save_animation(found, part, animation)


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and record, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="fastnet-8", choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--root", type=Path, default=Path("checkpoints/learned-when"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.recipe]
    splits = load_splits(os.environ.get("DATA_DIR", "data"), args.seed)
    data = build_datamodule(recipe, splits, args.seed, fast=True)
    metadata = metadata_of(args.recipe, data)
    if len(epochs_of(read(args.results), metadata)) <= recipe.epochs:
        record_run(recipe, args.root, args.results, data, metadata)
    found = read(args.results)
    assert found
    draw(found, splits.val)
    print(finding(found))


if __name__ == "__main__":
    main()
