"""How figures look and how they are saved: a grid of images, a title with a note, a PNG."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from models.errors import InvalidValue

MAX_SAMPLES = 20


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure as PNG, small enough for a repository."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80, bbox_inches="tight")


def check_count(wanted: int, available: int) -> None:
    """Raise ValueError unless 1 <= wanted <= 20 and there are so many samples."""
    if not 1 <= wanted <= min(MAX_SAMPLES, available):
        raise InvalidValue(
            f"expected 1 to {MAX_SAMPLES} samples of the {available} there are, got {wanted}"
        )


def with_note(title: str, note: str) -> str:
    return f"{title}\n{note}" if note else title


class Plot:
    """Grids of images with titles: Plot(images, titles).grid("Samples")."""

    def __init__(self, images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5):
        """images: 1 to 20 of them, RGB (H, W, 3), uint8 or float in [0, 1].

        Titles: one for each.
        """
        check_count(len(images), len(images))
        if len(titles) != len(images) or columns < 1:
            raise InvalidValue(
                f"expected {len(images)} titles and columns >= 1, got {len(titles)} and {columns}"
            )
        self.images, self.titles, self.columns = images, titles, min(columns, len(images))

    def grid(self, title: str = "") -> Figure:
        """Draw the images row by row; the last row may be short."""
        rows = math.ceil(len(self.images) / self.columns)
        fig, axes = plt.subplots(
            rows,
            self.columns,
            figsize=(2.1 * self.columns, 2.5 * rows),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, caption in zip(axes.flat, self.images, self.titles, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(caption, fontsize=9)
        fig.suptitle(title)
        plt.close(fig)  # or a notebook would show it twice
        return fig


def rgb(image: Tensor, inv_normalize: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Normalised (3, H, W) -> RGB (H, W, 3) in [0, 1], for drawing."""
    return inv_normalize(image).clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def copy_figures(drafts: Path, target: Path) -> None:
    """Put finished figures into the folder where they stay, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in drafts.glob("*.png"):
        partial = shutil.copyfile(path, target / f"{path.name}.part")
        partial.replace(target / path.name)
