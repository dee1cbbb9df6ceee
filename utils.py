"""The names that the lesson began with, and the export of a trained network into space/."""

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

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.drawing import rgb, save_figure
from evaluation.errors import Misclassified
from models import bundle
from models.errors import InvalidValue
from models.registry import FOLDER, source_files, source_of
from training.files import write_json

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


def tile_figure(
    data: Sequence[Misclassified], inv_normalize: Callable[[Tensor], Tensor]
) -> Image.Image:
    """At most 50 misclassified images as one figure, ten in a row, each pixel enlarged three times."""
    tiles = [
        np.uint8(np.round(255 * rgb(sample.image, inv_normalize))) for sample in data[:MAX_TILES]
    ]
    side = 3 * (tiles[0].shape[0] if tiles else 1)
    figure = Image.new("RGB", (10 * side, max(1, math.ceil(len(tiles) / 10)) * side), "white")
    for i, tile in enumerate(tiles):
        figure.paste(
            Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST),
            (i % 10 * side, i // 10 * side),
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
    weights = {
        k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()
    }
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
    """Write everything of the Space that training decides into an empty folder.

    Returns model.json.
    """
    source = source_of(model)
    (folder / "models").mkdir()
    for path in source_files(source):
        shutil.copyfile(path, folder / "models" / path.name)
    write_weights(model, folder / bundle.WEIGHTS)
    tile_figure(misclassified, inv_normalize).save(folder / "misclassified.png", optimize=True)
    tiles = [
        {
            "true": s.label,
            "predicted": s.pred,
            "probabilities": [round(p, 6) for p in s.probs.tolist()],
        }
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
    paths = (
        "PYTHONPATH",
        "PYTHONSAFEPATH",
    )  # the project could be in the one, the other hides the folder
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
            raise InvalidValue(
                f"the exported Space does not work on its own: {done.stderr.strip()[-2000:]}"
            )
        return load_file(answered)["logits"]


def check_bundle(folder: Path, model: nn.Module, image_size: int) -> None:
    """Raise ValueError unless the bundle in a folder answers as the network that it was made of."""
    images = torch.randn(8, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((logits_of_bundle(folder, images) - model.cpu()(images)).abs().max())
    if not difference < 0.05:  # also catches NaN
        raise InvalidValue(
            f"the exported network's logits differ by {difference}, expected less than 0.05"
        )


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
            temperature, confidence_threshold, test_acc, test_acc_tta, training.
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

    `import app` would give the first one for as long as Python runs.
    `load_app(space).demo.launch()` serves it.
    """
    space = Path(space).resolve()
    _, contents = bundle.read_bundle(space)
    beside = [
        path.stem for path in space.glob("*.py")
    ]  # the app's other modules, as they are there now
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
