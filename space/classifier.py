"""The bundle in this folder: the network, computed in batches, and images that it got wrong."""

import contextlib
import ctypes
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from batches import Batches
from models.bundle import load_bundle

with contextlib.suppress(Exception):  # of glibc, M_ARENA_MAX: a heap per thread makes memory grow
    ctypes.CDLL(None).mallopt(-8, 1)

HERE = Path(__file__).resolve().parent
MODEL, META = load_bundle(HERE)  # checks the other sources as well, so they are imported after it
from models.explain import classify_and_explain

CLASSES, SIZE = META["classes"], META["image_size"]
STAGES = {stage.name: stage for stage in MODEL.stages()}


def normalize(image: np.ndarray) -> torch.Tensor:
    """Normalise an image as in the test: uint8 RGB (32, 32, 3) -> float (1, 3, 32, 32)."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


def run_network(key: tuple[str, str] | None, items: list[tuple]) -> list[tuple]:
    """Compute a batch.

    Args:
        key: stage and method of the heatmaps, or None if there are none.
        items: of each image its pixels, uint8 RGB (32, 32, 3), and the logits to explain.

    Returns:
        Of each image its logits (num_classes,), and its heatmaps (number of logits, 32, 32).
    """
    images = torch.cat([normalize(image) for image, _ in items])
    if key is None:
        with torch.inference_mode():
            return [(logits, []) for logits in MODEL(images)]
    targets, layer = [targets for _, targets in items], STAGES[key[0]].module
    return list(zip(*classify_and_explain(MODEL, layer, images, targets, key[1]), strict=True))


NETWORK = Batches(run_network, limit=32)  # heatmaps at once, so that memory stays bounded


def load_tiles() -> list[dict]:
    """Read the misclassified test images, most confident first, "image": uint8 RGB (32, 32, 3)."""
    tiles = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
    enlarged = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))  # 3 times
    pixels = enlarged[::3, ::3]
    for i, tile in enumerate(tiles):
        top, left = i // 10 * SIZE, i % 10 * SIZE
        tile["image"] = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
    return sorted(tiles, key=lambda tile: -max(tile["probabilities"]))


TILES = load_tiles()
