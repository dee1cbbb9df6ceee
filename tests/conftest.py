"""What the tests share.

Small images, small networks, one exported Space. No test needs CIFAR-10 or a network.
"""

import shutil
import subprocess
from pathlib import Path

import tests.environment  # noqa: F401  before those below read theirs

# isort: split
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dataload import CIFAR10_MEAN, CIFAR10_STD, CLASSES, Images, Splits, denormalize, normalize
from evaluation.errors import Misclassified, plot_confusion
from models.registry import build
from tests.faults import faults, pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401  found by pytest
from training import hardware
from training.checkpoints import newest_checkpoint
from utils import export_to_space

PROJECT = Path(__file__).resolve().parent.parent

# A Mac, too, computes on its CPU here, and so do processes that import this module.
torch.backends.mps.is_available = lambda: False
# Some tests pretend that there is a GPU, of which nothing more can be asked.
CUDA_IS_TOO_OLD = hardware.cuda_is_too_old
hardware.cuda_is_too_old = lambda: False


def tracked_files() -> list[str] | None:
    """The names of the files that git knows, None where the project is no git checkout."""
    if not shutil.which("git"):
        return None
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    return None if listed.returncode else listed.stdout.splitlines()


@pytest.fixture
def plain_environment(monkeypatch, tmp_path):
    """This is no smoke test, and no earlier run is in the folder for checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMOKE_TEST", raising=False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with one picture per class: a disc of its own colour on a transparent ground."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    inside = (rows**2 + columns**2 < 0.9).astype(np.uint8) * 255
    for name in CLASSES:
        colour = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (64, 64, 3))
        Image.fromarray(np.dstack([colour, inside])).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_splits() -> Splits:
    """64 / 32 / 40 images whose class is their colour: a network learns them in a few steps."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 1, 1, 3))

    def part(count: int) -> Images:
        labels = np.arange(count) % 10
        noisy = colours[labels] + rng.integers(-20, 21, (count, 32, 32, 3))
        return Images(np.uint8(np.clip(noisy, 0, 255)), labels)

    return Splits(part(64), part(32), part(40), "built-in sample, not CIFAR-10")


def title_of(fig: Figure) -> str:
    """A figure's title with its note, on one line."""
    return " ".join(fig.get_suptitle().split())


def wrong_predictions(images: np.ndarray, labels: np.ndarray) -> list[Misclassified]:
    """Each image as one that was taken for the next class, with a probability of 0.5 to 0.9."""
    found = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        pred, prob = (int(label) + 1) % 10, 0.5 + 0.4 * i / len(images)
        probs = torch.full((10,), (1 - prob) / 9)
        probs[pred] = prob
        found.append(Misclassified(normalize(image[None])[0], int(label), pred, prob, probs))
    return found


def space_meta() -> dict:
    """The keys that export_to_space is given, as the notebook gives them."""
    training = {
        "epochs": 1,
        "batch_size": 32,
        "seed": 42,
        "data": "built-in sample, not CIFAR-10",
        "train_images": 64,
        "seconds": 60.0,
        "precision": "32-true",
        "hardware": "a test",
        "versions": {},
        "val_acc": 0.5,
        "recipe": "none",
    }
    return {
        "classes": list(CLASSES),
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "image_size": 32,
        "temperature": None,
        "confidence_threshold": None,
        "test_acc": 0.1,
        "test_acc_tta": None,
        "training": training,
    }


@pytest.fixture(scope="session")
def exported_space(tmp_path_factory, tiny_splits) -> Path:
    """The Space of an untrained ResNet18 with 23 misclassified images, in a folder of its own.

    Tests only read it.
    """
    folder = tmp_path_factory.mktemp("exported") / "space"
    torch.manual_seed(0)
    model = build("ResNet18")
    wrong = wrong_predictions(tiny_splits.test.images[:23], tiny_splits.test.labels[:23])
    confusion = plot_confusion(wrong, tiny_splits.test.labels, CLASSES)
    export_to_space(folder, model, space_meta(), wrong, denormalize, confusion)
    return folder


def weights_and_metrics(root: Path) -> tuple[dict, pd.DataFrame]:
    """The last weights of the one run of FastNet in a folder, and the means of its epochs."""
    (folder,) = root.glob("FastNet-*")
    weights = torch.load(newest_checkpoint(folder), weights_only=True)["state_dict"]
    table = pd.read_csv(folder / "metrics.csv").groupby("epoch").mean().drop(columns="seconds")
    return weights, table
