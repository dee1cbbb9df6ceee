"""The bundle that travels to the Space: weights, description and checksums, written by one side, checked by the other.

model.json describes the network; model.safetensors holds its weights in fp16. Nothing is unpickled.
"""

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

KEYS = {
    "architecture", "source", "classes", "mean", "std", "image_size", "stages", "temperature", "unsure_below",
    "test_acc", "test_acc_tta", "training", "sha256",
}  # fmt: skip


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_keys(meta: dict) -> str:
    """The checksum of everything in model.json but the checksums."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_number(value: object, low: float, high: float) -> bool:
    """Whether it is a number from low to high; NaN and True are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def are_numbers(values: object, low: float, high: float) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(is_number(value, low, high) for value in values)


def are_names(values: object) -> bool:
    return (
        isinstance(values, list)
        and all(isinstance(name, str) for name in values)
        and 1 < len(set(values)) == len(values)
    )


# Of each key what it has to be, and whether a value is so. The other keys are compared with the network.
FORMS = {
    "classes": ("a list of different names", are_names),
    "mean": ("three numbers from 0 to 1", lambda value: are_numbers(value, 0, 1)),
    "std": ("three numbers from 0.001 to 1", lambda value: are_numbers(value, 1e-3, 1)),
    "image_size": ("a number of pixels", lambda value: isinstance(value, int) and is_number(value, 1, 1024)),
    "temperature": ("a number from 0.001 to 1000, or null", lambda value: value is None or is_number(value, 1e-3, 1e3)),
    "unsure_below": ("a fraction, or null", lambda value: value is None or is_number(value, 0, 1)),
    "test_acc": ("a fraction", lambda value: is_number(value, 0, 1)),
    "test_acc_tta": ("a fraction, or null", lambda value: value is None or is_number(value, 0, 1)),
    "training": (
        "the facts of a training, with its epochs, train_images and seconds as numbers",
        lambda value: (
            isinstance(value, dict)
            and all(is_number(value.get(key), 0, 1e12) for key in ("epochs", "train_images", "seconds"))
            and {"data", "hardware", "seed"} <= set(value)
        ),
    ),
}


def read_meta(folder: Path) -> dict:
    """model.json, complete and as it was written. ValueError that says what is wrong with it otherwise."""
    path = folder / "model.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict) or set(meta) != KEYS:
        got = set(meta) if isinstance(meta, dict) else set()
        raise ValueError(f"{path}: missing keys {sorted(KEYS - got)}, unknown keys {sorted(got - KEYS)}")
    sums = meta["sha256"] if isinstance(meta["sha256"], dict) else {}
    for name, got in (("keys", sha256_of_keys(meta)), ("weights", sha256(folder / "model.safetensors"))):
        if got != sums.get(name):
            raise ValueError(f"{folder}: the {name} have the sha256 {got}, expected {sums.get(name)}")
    for key, (form, fits) in FORMS.items():
        if not fits(meta[key]):
            raise ValueError(f"{path}: expected {form} as {key}, got {meta[key]!r:.60}")
    return meta


def load_bundle(folder: str | Path) -> tuple[nn.Module, dict]:
    """The network of a bundle in eval mode, fp32, on the CPU, and what model.json says of it.

    Raises ValueError if a checksum, a key, the architecture or a weight is not as it should be.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if not re.fullmatch(r"[a-z_]+\.py", str(meta["source"])) or not (folder / meta["source"]).is_file():
        raise ValueError(f"{folder}: expected a Python file of the bundle as source, got {meta['source']!r}")
    spec = importlib.util.spec_from_file_location(f"bundle_{Path(meta['source']).stem}", folder / meta["source"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = getattr(module, str(meta["architecture"]), None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise ValueError(f"{folder}: {meta['source']} has no network {meta['architecture']!r}")
    model = network(len(meta["classes"]))
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights are not those of a {meta['architecture']}: {error}") from error
    stages = [{"name": stage.name, "size": stage.size} for stage in model.stages()]
    if meta["stages"] != stages:
        raise ValueError(f"{folder}: expected the stages {stages}, got {meta['stages']!r:.200}")
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, meta["image_size"], meta["image_size"]))  # refuses images of another size
    return model, meta
