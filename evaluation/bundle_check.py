"""The predictions of an exported bundle, in a process that has nothing else of the project."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from models.errors import InvalidValue

# What a new bundle has to do in a process that has nothing of the project: load, and predict.
TRIAL = """
import sys
from safetensors.torch import load_file, save_file
from models.bundle import load_bundle
model, _ = load_bundle(".")
save_file({"logits": model(load_file(sys.argv[1])["images"])}, sys.argv[2])
"""
TRIAL_SECONDS = 600  # importing torch from a slow drive takes a minute
MAX_DIFFERENCE = 0.05  # of two logits, for the rounding to fp16


def logits_of_bundle(folder: Path, images: Tensor) -> Tensor:
    """Compute logits by a bundle, in a process that has its folder and nothing of the project.

    Args:
        folder: of the bundle.
        images: normalised (N, 3, H, W).

    Returns:
        Logits (N, num_classes).

    Raises:
        ValueError: if that process fails, with its error.
    """
    # The project may be in PYTHONPATH; PYTHONSAFEPATH would hide the folder.
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # compiled sources are no part of a bundle
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "images", Path(scratch) / "logits"
        save_file({"images": images.contiguous()}, asked)
        try:
            done = subprocess.run(
                [sys.executable, "-c", TRIAL, asked, answered],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TRIAL_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise InvalidValue(f"the exported Space did not answer: {error}") from error
        if done.returncode:
            problem = done.stderr.strip()[-2000:]
            raise InvalidValue(f"the exported Space does not work on its own: {problem}")
        return load(answered.read_bytes())["logits"]  # of a file that is not kept open


def check_bundle(folder: Path, model: nn.Module, image_size: int) -> None:
    """Compare the logits of a bundle with those of the network that it was made of.

    Args:
        folder: of the bundle.
        model: the network.
        image_size: height and width of the random images that both are given.

    Raises:
        ValueError: if the logits differ by more than rounding explains.
    """
    images = torch.randn(8, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((logits_of_bundle(folder, images) - model.cpu()(images)).abs().max())
    if not difference < MAX_DIFFERENCE:  # also catches NaN
        raise InvalidValue(
            f"the exported network's logits differ by {difference},"
            f" expected less than {MAX_DIFFERENCE}"
        )
