"""Pictures of what was learned, and the export of it: Plot, plot_metrics, misclassified images, Grad-CAM, the bundle.

Every drawing function takes data and returns a Figure; save_figure writes it. Nothing is chosen at random.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from evaluation import predict
from models import bundle, explain
from models.errors import InvalidValue
from models.registry import FOLDER, source_files, source_of

MAX_SAMPLES = 20
MAX_TILES = 50
APP_FOLDER = Path(__file__).resolve().parent / "space"
APP_FILES = {
    "app.py",
    "pictures.py",
    "uploads.py",
    "about.md",
    "README.md",
    "requirements.txt",
    "examples",
    ".gitattributes",
}  # what no training changes


class Misclassified(NamedTuple):
    """A wrong prediction. image: normalised (3, 32, 32). prob: softmax of the predicted class. probs: of all (10,)."""

    image: Tensor
    label: int
    pred: int
    prob: float
    probs: Tensor


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure as PNG, small enough for a repository."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80, bbox_inches="tight")


def check_count(wanted: int, available: int) -> None:
    """Raise ValueError unless 1 <= wanted <= 20 and there are so many samples."""
    if not 1 <= wanted <= min(MAX_SAMPLES, available):
        raise InvalidValue(f"expected 1 to {MAX_SAMPLES} samples of the {available} there are, got {wanted}")


def with_note(title: str, note: str) -> str:
    return f"{title}\n{note}" if note else title


# ---- plots ----------------------------------------------------------------------------------------------------------


def class_accuracy(misclassified: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str]) -> pd.Series:
    """Accuracy (fraction) per class name. labels: int (N,), of all images, of which some were misclassified."""
    wrong = np.bincount([sample.label for sample in misclassified], minlength=len(classes))
    return pd.Series(1 - wrong / np.bincount(labels, minlength=len(classes)), index=classes, name="accuracy")


class Plot:
    """Grids of images with titles: Plot(images, titles).grid("Samples")."""

    def __init__(self, images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5):
        """images: 1 to 20 of them, RGB (H, W, 3), uint8 or float in [0, 1]. titles: one for each."""
        check_count(len(images), len(images))
        if len(titles) != len(images) or columns < 1:
            raise InvalidValue(f"expected {len(images)} titles and columns >= 1, got {len(titles)} and {columns}")
        self.images, self.titles, self.columns = images, titles, min(columns, len(images))

    def grid(self, title: str = "") -> Figure:
        """Draw the images row by row; the last row may be short."""
        rows = math.ceil(len(self.images) / self.columns)
        fig, axes = plt.subplots(
            rows, self.columns, figsize=(2.1 * self.columns, 2.5 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, caption in zip(axes.flat, self.images, self.titles, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(caption, fontsize=9)
        fig.suptitle(title)
        plt.close(fig)  # or a notebook would show it twice
        return fig


def read_table(metrics_csv: str | Path) -> pd.DataFrame:
    """A table of epochs. What a killed process left half written is left out; ValueError names a file that is none."""
    try:
        return pd.read_csv(metrics_csv).apply(pd.to_numeric, errors="coerce").dropna(subset="epoch")
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise InvalidValue(f"{metrics_csv} is damaged ({error})") from error


def plot_metrics(metrics_csv: str | Path, note: str = "") -> tuple[Figure, Figure]:
    """Loss and accuracy against the epoch, training against validation, as two figures.

    metrics_csv: the table of a run, columns epoch, train_loss, val_loss, train_acc, val_acc (fractions).
    """
    # Lightning writes training and validation in rows of their own; the mean of an epoch joins them.
    table = read_table(metrics_csv).groupby("epoch").mean().dropna(subset=["train_loss", "val_loss"])
    figures = []
    for name, label in (("loss", "loss (cross-entropy)"), ("acc", "accuracy (fraction)")):
        fig, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
        for stage, style in (("train", "o-"), ("val", "s-")):
            axis.plot(table.index + 1, table[f"{stage}_{name}"], style, markersize=4, label=stage)
        axis.set(xlabel="epoch", ylabel=label, title=note)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
        plt.close(fig)
        figures.append(fig)
    return figures[0], figures[1]


def plot_confusion(
    misclassified: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str], note: str = ""
) -> Figure:
    """How often each true class (row) was taken for each class (column). labels: int (N,), of all images."""
    counts = np.diag(np.bincount(labels, minlength=len(classes)))
    for sample in misclassified:
        counts[sample.label, sample.label] -= 1
        counts[sample.label, sample.pred] += 1
    fig, axis = plt.subplots(figsize=(7, 6.4), layout="constrained")
    errors = counts - np.diag(np.diag(counts))
    axis.imshow(errors, cmap="Oranges", vmax=2 * max(1, errors.max()))  # colours for the errors only, pale under text
    for row, column in np.ndindex(counts.shape):
        axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=9)
    ticks = range(len(classes))
    axis.set(xticks=ticks, yticks=ticks, yticklabels=classes, xlabel="predicted class", ylabel="true class", title=note)
    axis.set_xticklabels(classes, rotation=45, ha="right")
    plt.close(fig)
    return fig


# ---- errors ---------------------------------------------------------------------------------------------------------


def check_sequential(loader: DataLoader) -> None:
    """Raise ValueError unless a loader gives the images of its dataset in their order."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list):  # the numbers themselves: of CIFAR10DataModule
        if sum(batches, []) == list(range(len(loader.dataset))):
            return
        got = "batches of other numbers"
    elif type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler:
        return
    else:
        ordered = batches.sampler if type(batches) is BatchSampler else batches or loader
        got = f"one ordered by {type(ordered).__name__}"
    raise InvalidValue(
        f"expected a loader that gives all images in order, got {got}; make it with shuffle=False and no sampler"
    )


def get_misclassified_data(
    model: nn.Module, device: str | torch.device, test_loader: DataLoader, temperature: float = 1.0,
    predictions: tuple[Tensor, Tensor] | None = None,
) -> list[Misclassified]:  # fmt: skip
    """All wrong predictions, in the loader's order. temperature: divides the logits before the softmax.

    test_loader: gives each image once, in order: not shuffled. predictions: logits and labels of these images, if
    `predict` gave them before. Raises ValueError if the loader or the predictions have another order or length.
    """
    check_sequential(test_loader)
    dataset = test_loader.dataset
    logits, labels = predictions or predict(model, device, test_loader)
    if not len(logits) == len(labels) == len(dataset):
        raise InvalidValue(f"expected predictions of {len(dataset)} images, got {len(logits)} and {len(labels)} labels")
    probs, preds = (logits / temperature).softmax(1), logits.argmax(1)
    found = []
    for i in (preds != labels).nonzero().flatten().tolist():
        image, label = dataset[i]
        if int(label) != int(labels[i]):
            raise InvalidValue(
                f"image {i} has the label {label}, its prediction was made for label {int(labels[i])};"
                " the predictions must be of the same loader"
            )
        found.append(Misclassified(image, int(label), int(preds[i]), float(probs[i, preds[i]]), probs[i]))
    return found


def caption(sample: Misclassified, classes: Sequence[str]) -> str:
    return f"true: {classes[sample.label]}\npredicted: {classes[sample.pred]} ({sample.prob:.2f})"


def rgb(image: Tensor, inv_normalize: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Normalised (3, H, W) -> RGB (H, W, 3) in [0, 1], for drawing."""
    return inv_normalize(image).clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def plot_misclassified(
    data: Sequence[Misclassified], classes: Sequence[str], inv_normalize: Callable[[Tensor], Tensor],
    number_of_samples: int = 10, note: str = "",
) -> Figure:  # fmt: skip
    """The first samples with their true class, predicted class and probability. note: a line under the title."""
    check_count(number_of_samples, len(data))
    chosen = data[:number_of_samples]
    images = [rgb(sample.image, inv_normalize) for sample in chosen]
    return Plot(images, [caption(sample, classes) for sample in chosen]).grid(
        with_note("Misclassified test images", note)
    )


def display_gradcam_output(
    data: Sequence[Misclassified], classes: Sequence[str], inv_normalize: Callable[[Tensor], Tensor],
    model: nn.Module, target_layers: Sequence[nn.Module], targets: Sequence[int] | None = None,
    number_of_samples: int = 10, transparency: float = 0.60, note: str = "",
) -> Figure:  # fmt: skip
    """The first samples, each beside its Grad-CAM overlay.

    data: of get_misclassified_data. inv_normalize: normalised (3, H, W) -> [0, 1]. target_layers: modules of model;
    with several, their maps are averaged. targets: the class to explain for each sample; None: the predicted one.
    transparency: of the heat map, 1 - opacity: 0 shows the map alone, 1 the photograph alone.
    """
    check_count(number_of_samples, len(data))
    chosen = data[:number_of_samples]
    if targets is not None and len(targets) < len(chosen):
        raise InvalidValue(f"expected a target for each of {len(chosen)} samples, got {len(targets)}")
    if not target_layers:
        raise InvalidValue("expected at least one target layer, got none")
    explained = [sample.pred for sample in chosen] if targets is None else list(targets[: len(chosen)])
    batch = torch.stack([sample.image for sample in chosen])
    cams = np.mean([explain.gradcam(model, layer, batch, explained) for layer in target_layers], axis=0)
    pairs, columns = math.ceil(len(chosen) / 5), min(5, len(chosen))
    fig, axes = plt.subplots(
        2 * pairs, columns, figsize=(2.1 * columns, 4.6 * pairs), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (sample, cam) in enumerate(zip(chosen, cams, strict=True)):
        above, below = axes[2 * (i // 5), i % 5], axes[2 * (i // 5) + 1, i % 5]
        image = rgb(sample.image, inv_normalize)
        above.imshow(image, interpolation="nearest")
        above.set_title(caption(sample, classes), fontsize=9)
        below.imshow(explain.overlay(image, cam, 1 - transparency), interpolation="nearest")
        below.set_title(f"for {classes[explained[i]]}", fontsize=9)
    fig.suptitle(with_note("Grad-CAM: red marks what spoke for the class named above each map", note))
    plt.close(fig)
    return fig


# ---- export ---------------------------------------------------------------------------------------------------------


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = Path(path).with_name(Path(path).name + ".part")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def copy_figures(drafts: Path, target: Path) -> None:
    """Put finished figures into the folder where they stay, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in drafts.glob("*.png"):
        partial = shutil.copyfile(path, target / f"{path.name}.part")
        partial.replace(target / path.name)


def tile_figure(data: Sequence[Misclassified], inv_normalize: Callable[[Tensor], Tensor]) -> Image.Image:
    """At most 50 misclassified images as one figure, ten in a row, each pixel enlarged three times."""
    tiles = [np.uint8(np.round(255 * rgb(sample.image, inv_normalize))) for sample in data[:MAX_TILES]]
    side = 3 * (tiles[0].shape[0] if tiles else 1)
    figure = Image.new("RGB", (10 * side, max(1, math.ceil(len(tiles) / 10)) * side), "white")
    for i, tile in enumerate(tiles):
        figure.paste(
            Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST), (i % 10 * side, i // 10 * side)
        )
    return figure


# What is asked of a new bundle: to load and answer in a process that has nothing of the project.
TRIAL = """
import sys
from safetensors.torch import load_file, save_file
from models.bundle import load_bundle
model, _ = load_bundle(".")
save_file({"logits": model(load_file(sys.argv[1])["images"])}, sys.argv[2])
"""
TRIAL_MINUTES = 10  # a slow drive needs one


def write_weights(model: nn.Module, path: Path) -> None:
    """Write a network's weights in fp16."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    path.chmod(0o644)  # safetensors makes it readable for its owner alone


def write_bundle(
    folder: Path,
    model: nn.Module,
    meta: dict,
    misclassified: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    confusion: Figure,
) -> dict:
    """Write everything of the Space that training decides into an empty folder. Returns model.json."""
    source = source_of(model)
    (folder / "models").mkdir()
    for path in source_files(source):
        shutil.copyfile(path, folder / "models" / path.name)
    write_weights(model, folder / bundle.WEIGHTS)
    tile_figure(misclassified, inv_normalize).save(folder / "misclassified.png", optimize=True)
    tiles = [
        {"true": s.label, "predicted": s.pred, "probabilities": [round(p, 6) for p in s.probs.tolist()]}
        for s in misclassified[:MAX_TILES]
    ]
    write_json(folder / "misclassified.json", tiles)
    save_figure(confusion, folder / "confusion_matrix.png")
    stages = [{"name": stage.name, "size": stage.size} for stage in model.stages()]
    meta = meta | {"architecture": type(model).__name__, "source": source.name, "stages": stages}
    meta = json.loads(json.dumps(meta))  # tuples become lists, as the reader will find them
    return seal_bundle(folder, meta)


def seal_bundle(folder: Path, meta: dict) -> dict:
    """Write model.json with the checksums of all other files of a bundle. Returns what it says."""
    apart = (bundle.WEIGHTS, "model.json")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in apart)
    sums = {
        "weights": bundle.sha256(folder / bundle.WEIGHTS),
        "keys": bundle.sha256_of_keys(meta),
        "files": {path.relative_to(folder).as_posix(): bundle.sha256(path) for path in files},
    }
    meta = meta | {"sha256": sums}
    write_json(folder / "model.json", meta)
    return meta


def logits_of_bundle(folder: Path, images: Tensor) -> Tensor:
    """Ask a bundle in a process of its own, which has that folder and nothing else of the project.

    Args:
        folder: of the bundle.
        images: normalised (N, 3, H, W).

    Returns:
        Logits (N, num_classes).

    Raises:
        ValueError: with what that process said, if it failed.
    """
    paths = ("PYTHONPATH", "PYTHONSAFEPATH")  # the project could be in the one, the other hides the folder
    environment = {name: value for name, value in os.environ.items() if name not in paths}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # compiled sources are no part of a bundle
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "images", Path(scratch) / "logits"
        save_file({"images": images.contiguous()}, asked)
        done = subprocess.run(
            [sys.executable, "-c", TRIAL, asked, answered],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60 * TRIAL_MINUTES,
        )
        if done.returncode:
            raise InvalidValue(f"the exported Space does not work on its own: {done.stderr.strip()[-2000:]}")
        return load_file(answered)["logits"]


def check_bundle(folder: Path, model: nn.Module, image_size: int) -> None:
    """Raise ValueError unless the bundle in a folder answers as the network that it was made of."""
    images = torch.randn(8, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((logits_of_bundle(folder, images) - model.cpu()(images)).abs().max())
    if not difference < 0.05:  # also catches NaN
        raise InvalidValue(f"the exported network's logits differ by {difference}, expected less than 0.05")


def copy_app(folder: Path) -> None:
    """Copy the files of the Space that no training changes into another folder."""
    for path in APP_FOLDER.iterdir():
        if path.name in APP_FILES:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def export_to_space(
    space: str | Path,
    model: nn.Module,
    meta: dict,
    misclassified: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    confusion: Figure,
) -> dict:
    """Put the bundle of a trained network, and the app as the project has it, into the folder of a Space.

    The new bundle is written to a folder of its own, then loaded and asked in a process that has nothing
    else, and only then takes the place of the old one, in one step: see models/bundle.py. Files that are
    neither of the bundle nor of the app stay.

    Args:
        space: the folder; it is made if it is not there.
        model: the network.
        meta: the keys of model.json that are not known here: classes, mean, std, image_size,
            temperature, unsure_below, test_acc, test_acc_tta, training.
        misclassified: test images, of which the first 50 are shown.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        confusion: the figure of the confusion matrix.

    Returns:
        What model.json says.

    Raises:
        ValueError: if the bundle does not load there, or answers differently; then nothing is changed.
    """
    space, model = Path(space), model.eval()
    with bundle.new_bundle(space) as folder:
        written = write_bundle(folder, model, meta, misclassified, inv_normalize, confusion)
        check_bundle(folder, model, written["image_size"])
        if space.resolve() != APP_FOLDER:
            copy_app(folder)
    return written


def refresh_sources(space: str | Path) -> dict:
    """Give a Space the sources as the project has them now, after a change that leaves the answers the same.

    Returns what model.json says. ValueError if the network answers differently with them.
    """
    space = Path(space)
    model, meta = bundle.load_bundle(space)
    with bundle.new_bundle(space) as folder:
        (folder / "models").mkdir()
        for path in source_files(FOLDER / meta["source"]):
            shutil.copyfile(path, folder / "models" / path.name)
        for name in (bundle.WEIGHTS, *bundle.PICTURES):
            shutil.copyfile(space / name, folder / name)
        written = seal_bundle(folder, {key: meta[key] for key in meta if key != "sha256"})
        check_bundle(folder, model, meta["image_size"])
    return written


def load_app(space: str | Path) -> ModuleType:
    """Load the app of a Space anew, with the network and the sources that are in its folder now.

    `import app` would give the first one for as long as Python runs. `load_app(space).demo.launch()` serves it.
    """
    space = Path(space).resolve()
    _, contents = bundle.read_bundle(space)
    beside = [path.stem for path in space.glob("*.py")]  # the app's other modules, as they are there now
    for name in beside:
        sys.modules.pop(name, None)
    spec = importlib.util.spec_from_file_location("space_app", space / "app.py")
    app = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(space))
    try:
        with bundle.models_of(space, contents):
            spec.loader.exec_module(app)
    finally:
        sys.path.remove(str(space))
        for name in beside:
            sys.modules.pop(name, None)
    return app
