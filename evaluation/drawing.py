"""The look of the project's figures: grids of images, titles with notes, PNG files."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models.errors import InvalidValue

MAX_SAMPLES = 20

# ---- figures -------------------------------------------------------------------------------------
# They are made without pyplot, which would keep each one open and let a notebook show it twice.


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of a width and a height in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def new_chart(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of a width and a height in inches with a single pair of axes."""
    fig = new_figure(width, height)
    return fig, fig.subplots()


def new_image_grid(
    rows: int, columns: int, width: float, height: float, frames: bool = False
) -> tuple[Figure, np.ndarray]:
    """Create a figure with a grid of axes for images, all of them without ticks.

    Args:
        rows: number of rows.
        columns: number of columns.
        width: of the figure, inches.
        height: of the figure, inches.
        frames: keep the frame of each image and the labels of the axes.

    Returns:
        The figure and an array (rows, columns) of `Axes`.
    """
    fig = new_figure(width, height)
    axes = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        if frames:
            axis.set(xticks=[], yticks=[])
        else:
            axis.axis("off")
    return fig, axes


def show_image(axis: Axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image with sharp pixels and, if there is one, a small title above it.

    Args:
        axis: where to draw.
        image: RGB (H, W, 3), uint8 or float in [0, 1].
        title: of one or more lines.
    """
    axis.imshow(image, interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=9)


def with_note(title: str, note: str) -> str:
    """Append a note to a title, on a line of its own; an empty note changes nothing."""
    return f"{title}\n{note}" if note else title


def rgb(image: Tensor, inv_normalize: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Convert a normalised image (3, H, W) to RGB (H, W, 3) in [0, 1], for drawing."""
    return inv_normalize(image).clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def check_count(wanted: int, available: int) -> None:
    """Raise ValueError unless 1 <= wanted <= 20 and that many samples are available."""
    if not 1 <= wanted <= min(MAX_SAMPLES, available):
        raise InvalidValue(
            f"expected 1 to {MAX_SAMPLES} samples of the {available} there are, got {wanted}"
        )


class Plot:
    """Grids of images with titles: `Plot(images, titles).grid("Samples")`."""

    def __init__(self, images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5):
        """Keep the images and their titles.

        Args:
            images: 1 to 20 of them, RGB (H, W, 3), uint8 or float in [0, 1].
            titles: one for each image.
            columns: images per row.

        Raises:
            ValueError: if there are too few or too many images, titles or columns.
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
        fig, axes = new_image_grid(rows, self.columns, 2.1 * self.columns, 2.5 * rows)
        for axis, image, caption in zip(axes.flat, self.images, self.titles, strict=False):
            show_image(axis, image, caption)
        fig.suptitle(title)
        return fig


# ---- files ---------------------------------------------------------------------------------------


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file, small enough for a repository."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80, bbox_inches="tight")


def copy_figures(drafts: Path, target: Path) -> None:
    """Copy finished figures into the folder where they stay, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in drafts.glob("*.png"):
        partial = shutil.copyfile(path, target / f"{path.name}.part")
        partial.replace(target / path.name)
