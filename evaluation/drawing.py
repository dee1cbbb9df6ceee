"""The look of the project's figures: one style, titles, labels, grids of images, PNG files.

A figure is at most 10.5 inches wide. One of that width is saved with 1,680 pixels and shown 840
pixels wide, so that a point of text is 1.1 pixels high. The title states what the figure shows,
computed from its numbers.
"""

import io
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from PIL import Image, PngImagePlugin
from torch import Tensor

from models.errors import InvalidValue

MAX_SAMPLES = 20
WIDTH = 10.5  # inches
DPI = 160  # of a file
TEXT = 11  # points, 12 pixels where a figure is shown 840 pixels wide; no text is smaller
TITLE = 14  # points
TITLE_COLUMNS = 88  # characters of a title in a line, at full width
PALETTE_BYTES = 350_000  # a larger file gets a palette of 256 colours
GREY = "0.35"

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito
STYLE: dict[Any, Any] = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "figure.facecolor": "white",  # also on a dark page
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
}
styled = matplotlib.rc_context(STYLE)  # a decorator of every function that draws

# ---- figures -------------------------------------------------------------------------------------
# They are made without pyplot, which would keep each one open and let a notebook show it twice.


@styled
def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of a width and a height in inches."""
    padding = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    return Figure(figsize=(width, height), layout=padding)


@styled
def new_chart(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of a width and a height in inches with a single pair of axes."""
    fig = new_figure(width, height)
    axis = fig.subplots()
    style_chart(axis)
    return fig, axis


def style_chart(axis: Axes) -> None:
    """Give the axes of a chart a faint grid and readable ticks.

    Matplotlib makes ticks when it draws them, and would give them the size of that time.
    """
    axis.tick_params(labelsize=TEXT)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)


@styled
def new_image_grid(
    rows: int, columns: int, width: float, height: float
) -> tuple[Figure, np.ndarray]:
    """Create a figure with a grid of axes for images, all of them without ticks.

    Args:
        rows: number of rows.
        columns: number of columns.
        width: of the figure, inches.
        height: of the figure, inches.

    Returns:
        The figure and an array (rows, columns) of `Axes`.
    """
    fig = new_figure(width, height)
    axes = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        hide_frame(axis)
    return fig, axes


def hide_frame(axis: Axes) -> None:
    """Remove ticks and frame of the axes of an image; labels and title stay."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def headline(fig: Figure, finding: str, shows: str, note: str = "") -> None:
    """Write the title of a figure, and keep a text for those who cannot see it.

    Args:
        fig: the figure.
        finding: what it shows, with the numbers.
        shows: what kind of figure it is, for the alternative text.
        note: a line under the title.
    """
    columns = round(TITLE_COLUMNS * fig.get_figwidth() / WIDTH)
    # No line begins with a percent sign: the space before it is not one to break at.
    whole = finding.replace(" %", "\N{NO-BREAK SPACE}%")
    title = textwrap.fill(whole, columns).replace("\N{NO-BREAK SPACE}", " ")
    title = with_note(title, textwrap.fill(note, columns))
    fig.suptitle(title, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
    fig.set_label(". ".join(filter(None, (shows, finding, note))))


def alt_text(fig: Figure) -> str:
    """Return the text that describes a figure to those who cannot see it."""
    return str(fig.get_label())


# ---- axes ----------------------------------------------------------------------------------------


def percent(fraction: float, decimals: int = 1) -> str:
    """Format a fraction for humans, as in 94.4 %."""
    return f"{100 * fraction:.{decimals}f} %"


def format_confidence(probability: float) -> str:
    """Format a confidence in percent, of which none is said to be 100 %."""
    return ">99 %" if probability >= 0.995 else percent(probability, 0)


def listed(names: Sequence[str]) -> str:
    """Join names, as in 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def percent_axis(axis: Axes, of: str = "y") -> None:
    """Label the ticks of an axis of fractions in percent."""
    axes = axis.xaxis if of == "x" else axis.yaxis
    axes.set_major_formatter(PercentFormatter(1, symbol=" %"))


def spread(values: Sequence[float], gap: float) -> np.ndarray:
    """Move values apart until neighbours differ by at least `gap`; their order and mean stay."""
    order = np.argsort(values, kind="stable")
    wanted = np.asarray(values, float)[order]
    placed = wanted.copy()
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    result = np.empty_like(placed)
    result[order] = placed - (placed - wanted).mean()
    return result


def label_ends(axis: Axes, labels: Iterable[tuple[float, str, object]], lines: int = 1) -> None:
    """Write labels to the right of the axes, beside the ends of their lines.

    Args:
        axis: its limits are set already.
        labels: height in data coordinates, text and colour of each.
        lines: of each text.
    """
    heights, texts, colours = zip(*labels, strict=True)
    low, high = axis.get_ylim()
    inches = axis.get_window_extent().height / axis.figure.dpi  # before the layout: about
    gap = 1.35 * lines * TEXT / 72 / inches * (high - low)
    for height, text, colour in zip(spread(heights, gap), texts, colours, strict=True):
        axis.annotate(
            text,
            (1.01, height),
            xycoords=axis.get_yaxis_transform(),
            color=colour,
            va="center",
            annotation_clip=False,
            fontsize=TEXT,
        )


# ---- images --------------------------------------------------------------------------------------


def show_image(axis: Axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image with sharp pixels and, if there is one, a title above it.

    Args:
        axis: where to draw.
        image: RGB (H, W, 3), uint8 or float in [0, 1].
        title: of one or more lines.
    """
    axis.imshow(image, interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=TEXT)


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
            f"expected 1 to {MAX_SAMPLES} samples, at most the {available} there are, got {wanted}"
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

    @styled
    def grid(self, title: str = "", note: str = "") -> Figure:
        """Draw the images row by row; the last row may be short.

        Args:
            title: of the figure.
            note: a line under the title.
        """
        rows = math.ceil(len(self.images) / self.columns)
        lines = 1 + max(text.count("\n") for text in self.titles)
        width = max(6.5, min(2.1 * self.columns, WIDTH))
        height = width / self.columns * 0.92 + 0.2 * lines
        fig, axes = new_image_grid(rows, self.columns, width, height * rows + 0.5)
        for axis, image, caption in zip(axes.flat, self.images, self.titles, strict=False):
            show_image(axis, image, caption)
        if title or note:
            headline(fig, title or note, "A grid of images", note if title else "")
        else:
            fig.set_label(
                f"A grid of images: {', '.join(' '.join(t.split()) for t in self.titles)}"
            )
        return fig


# ---- files ---------------------------------------------------------------------------------------


def png_bytes(fig: Figure) -> bytes:
    """Return a figure as a PNG file, small enough for a repository.

    Its alternative text is in the file's metadata, under 'Description'.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    picture = Image.open(drawn).convert("RGB")
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", alt_text(fig))
    picture.save(packed, "PNG", optimize=True, pnginfo=info)
    if packed.tell() > PALETTE_BYTES:
        packed = io.BytesIO()
        few = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(packed, "PNG", optimize=True, pnginfo=info)
    return packed.getvalue()


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file, small enough for a repository."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png_bytes(fig))


def copy_figures(drafts: Path, target: Path) -> None:
    """Copy finished figures into the folder where they stay, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in drafts.glob("*.png"):
        partial = shutil.copyfile(path, target / f"{path.name}.part")
        partial.replace(target / path.name)
