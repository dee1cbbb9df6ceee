"""What networks learn over the epochs: with and without shortcuts, and image by image.

The numbers are computed once, by a command, and stored as JSON; here they are drawn.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from evaluation.drawing import (
    COLOURS,
    GREY,
    TEXT,
    WIDTH,
    format_confidence,
    headline,
    hide_frame,
    label_ends,
    new_figure,
    percent,
    percent_axis,
    show_image,
    style_chart,
    styled,
)
from models import explain
from models.errors import InvalidValue
from models.stage import Network, eval_mode

GIF_BYTES = 500_000
GIF_FRAMES = 16  # at most
FRAME_MS = 700  # of each frame; the last one stays three times as long
STRIP_EPOCHS = 6  # columns at most

# ---- with and without shortcuts ------------------------------------------------------------------

NAMES = {True: "with shortcuts", False: "without shortcuts"}


def shortcut_runs(data: dict, metric: str) -> dict[bool, np.ndarray]:
    """Collect a metric of the runs with (True) and without (False) shortcuts.

    Args:
        data: {"layers": 56, "runs": [{"shortcuts": true, "seed": 0, "train_loss": [...],
            "val_acc": [...]}, ...]}, with a value for each epoch; accuracies are fractions.
        metric: 'train_loss' or 'val_acc'.

    Returns:
        (runs, epochs) each.

    Raises:
        ValueError: if there is no run of one kind, or the runs differ in length.
    """
    found = {
        kind: [run[metric] for run in data["runs"] if run["shortcuts"] is kind] for kind in NAMES
    }
    lengths = {len(values) for runs in found.values() for values in runs}
    if not all(found.values()) or len(lengths) != 1:
        counts = ", ".join(f"{len(found[kind])} {NAMES[kind]}" for kind in NAMES)
        raise InvalidValue(
            f"expected runs of one length of both kinds, got {counts} of {sorted(lengths)} epochs"
        )
    return {kind: np.array(runs, float) for kind, runs in found.items()}


def shortcuts_title(data: dict) -> str:
    """Say which of the two networks learns better, by the training loss of the last epoch."""
    losses = shortcut_runs(data, "train_loss")
    ends = {kind: runs[:, -1] for kind, runs in losses.items()}
    count, layers = min(len(runs) for runs in losses.values()), data["layers"]
    numbers = (
        f"training loss {ends[True].mean():.2f} with shortcuts,"
        f" {ends[False].mean():.2f} without (n = {count})"
    )
    if ends[True].max() < ends[False].min():
        return f"{layers} layers learn better with shortcuts in every run: {numbers}"
    if ends[True].min() > ends[False].max():
        return f"{layers} layers learn better without shortcuts in every run: {numbers}"
    return f"The runs of {layers} layers with and without shortcuts overlap: {numbers}"


@styled
def plot_shortcuts(data: dict, note: str = "") -> Figure:
    """Draw training loss and validation accuracy of runs with and without shortcuts.

    Thin lines are runs, thick ones their means.

    Args:
        data: as of `shortcut_runs`.
        note: a line under the title.
    """
    fig = new_figure(WIDTH, 4.2)
    axes = fig.subplots(1, 2, squeeze=False)[0]
    for axis, metric in zip(axes, ("train_loss", "val_acc"), strict=True):
        draw_runs(axis, shortcut_runs(data, metric), metric == "val_acc")
    axes[0].set(ylabel="training loss", xlabel="epoch")
    axes[1].set(ylabel="validation accuracy", xlabel="epoch")
    shows = "Training loss and validation accuracy of a deep network with and without shortcuts"
    headline(fig, shortcuts_title(data), shows, note)
    return fig


def draw_runs(axis: Axes, runs: dict[bool, np.ndarray], in_percent: bool) -> None:
    """Draw the runs of both kinds, and label their means."""
    ends = []
    for (kind, values), colour in zip(runs.items(), COLOURS, strict=False):
        epochs = np.arange(1, values.shape[1] + 1)
        axis.plot(epochs, values.T, color=colour, alpha=0.35, linewidth=1)
        axis.plot(epochs, values.mean(0), color=colour, linewidth=2.2, label=NAMES[kind])
        last = float(values[:, -1].mean())
        text = percent(last) if in_percent else f"{last:.3f}"
        ends.append((last, f"{NAMES[kind]}\n{text}", colour))
    style_chart(axis)
    axis.margins(x=0.02)
    axis.locator_params(axis="x", integer=True)
    if in_percent:
        percent_axis(axis)
    label_ends(axis, ends, lines=2)


# ---- what it learned when ------------------------------------------------------------------------


def epoch_snapshot(model: Network, images: Tensor, labels: Sequence[int]) -> dict:
    """Compute what a network knows of some images after an epoch.

    Args:
        model: the network as it was after that epoch.
        images: normalised (N, 3, 32, 32).
        labels: (N,), the classes whose heatmaps are computed.

    Returns:
        probabilities (N, num_classes) and heatmaps (N, H, W), the latter in 0..255, as lists.
    """
    with eval_mode(model), torch.no_grad():
        probs = model(images).float().softmax(1)
    cams = explain.gradcam(model, model.stages()[-1].module, images, list(labels))
    return {
        "probabilities": probs.cpu().double().round(decimals=4).tolist(),
        "heatmaps": np.round(255 * cams).astype(int).tolist(),
    }


class Learned:
    """Class probabilities and heatmaps of some validation images, epoch by epoch.

    Args:
        data: {"classes": [...], "labels": [...], "epochs": [{"epoch": 1, "probabilities": ...,
            "heatmaps": ...}, ...]}, each epoch with what `epoch_snapshot` returns.
        images: the images, RGB (N, 32, 32, 3) in [0, 1].

    Raises:
        ValueError: if there are not as many images as labels.
    """

    def __init__(self, data: dict, images: np.ndarray):
        self.classes, self.labels, self.images = data["classes"], data["labels"], images
        if len(images) != len(self.labels):
            raise InvalidValue(f"expected {len(self.labels)} images, got {len(images)}")
        self.epochs = [int(entry["epoch"]) for entry in data["epochs"]]
        self.probs = np.array([entry["probabilities"] for entry in data["epochs"]], float)
        self.cams = np.array([entry["heatmaps"] for entry in data["epochs"]], float) / 255

    def correct(self) -> np.ndarray:
        """Return whether each image is classified correctly, (epochs, N)."""
        return self.probs.argmax(2) == np.array(self.labels)

    def when(self, index: int) -> str:
        """Name the time of a record: before the training, or after an epoch."""
        epoch = self.epochs[index]
        return f"after epoch {epoch}" if epoch else "before the training"

    def title(self, upto: int | None = None) -> str:
        """Say how many images are classified correctly at the first record and the last.

        Args:
            upto: the index of an epoch, to speak of that one alone.
        """
        counts, total = self.correct().sum(1), len(self.labels)
        if upto is not None:
            return f"{self.when(upto).capitalize()}: {counts[upto]} of {total} images correct"
        first, last = counts[0], counts[-1]
        begun, ended = self.when(0), self.when(-1)
        more = f" and {ended}" if first == last else f", {last} {ended}"
        return f"{first} of {total} images are classified correctly {begun}{more}"


def some_of(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` places, evenly, with the first and the last one."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


@styled
def plot_learned(learned: Learned, note: str = "") -> Figure:
    """Draw images (rows) with heatmap and prediction after some of the epochs (columns).

    Args:
        learned: what was learned when.
        note: a line under the title.
    """
    chosen, count = some_of(len(learned.epochs), STRIP_EPOCHS), len(learned.labels)
    tile = WIDTH / (len(chosen) + 1)
    fig = new_figure(WIDTH, (tile + 0.22) * count + 0.9)
    axes = fig.subplots(count, len(chosen) + 1, squeeze=False)
    for row, image, label in zip(range(count), learned.images, learned.labels, strict=True):
        show_image(axes[row, 0], image)
        axes[row, 0].set_xlabel(learned.classes[label], fontsize=TEXT)
        for axis, epoch in zip(axes[row, 1:], chosen, strict=True):
            draw_prediction(axis, learned, epoch, row)
    for axis, epoch in zip(axes[0, 1:], chosen, strict=True):
        axis.set_title(f"epoch {learned.epochs[epoch]}" if learned.epochs[epoch] else "untrained")
    axes[0, 0].set_title("true class")
    for axis in axes.flat:
        hide_frame(axis)
    shows = "Images with heatmap and prediction after several epochs"
    headline(fig, learned.title(), shows, note)
    return fig


def draw_prediction(axis: Axes, learned: Learned, epoch: int, image: int) -> None:
    """Draw an image's heatmap for its true class, and below it the prediction, orange if wrong."""
    blended = explain.overlay(learned.images[image], learned.cams[epoch, image], 0.5)
    show_image(axis, blended)
    probs = learned.probs[epoch, image]
    best = int(probs.argmax())
    colour = COLOURS[2] if best == learned.labels[image] else COLOURS[1]
    text = f"{learned.classes[best]} {format_confidence(probs[best])}"
    axis.set_xlabel(text, color=colour, fontsize=TEXT)


@styled
def draw_frame(learned: Learned, epoch: int) -> Figure:
    """Draw one frame of the animation: each image with its heatmap beside its probabilities."""
    fig = new_figure(WIDTH, 5.9)
    columns = 3
    rows = -(-len(learned.labels) // columns)
    axes = fig.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1] * columns)
    for axis in axes.flat:
        hide_frame(axis)
    for i, label in enumerate(learned.labels):
        picture, bars = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        draw_prediction(picture, learned, epoch, i)
        picture.set_title(f"true: {learned.classes[label]}")
        draw_probabilities(bars, learned, epoch, i)
    headline(fig, learned.title(epoch), "A frame of an animation")
    return fig


def draw_probabilities(axis: Axes, learned: Learned, epoch: int, image: int) -> None:
    """Draw the probabilities of all classes as bars, the true class in green."""
    label, probs = learned.labels[image], learned.probs[epoch, image]
    colours = [COLOURS[2] if i == label else GREY for i in range(len(probs))]
    axis.barh(range(len(probs)), probs, color=colours)
    axis.set(xlim=(0, 1), ylim=(len(probs) - 0.5, -0.5))
    axis.set_yticks(range(len(probs)), learned.classes, fontsize=TEXT)
    axis.tick_params(left=False)


def learned_gif(learned: Learned) -> bytes:
    """Draw what was learned when as an animated GIF of less than 500 kB.

    Args:
        learned: what was learned when; of more than 16 epochs, 16 are shown.

    Raises:
        ValueError: if even a small picture is too large.
    """
    chosen = some_of(len(learned.epochs), GIF_FRAMES)
    frames = [rendered(draw_frame(learned, epoch)) for epoch in chosen]
    for width, colours in ((840, 128), (840, 64), (700, 64), (560, 48)):
        packed = pack_gif(frames, width, colours)
        if len(packed) < GIF_BYTES:
            return packed
    raise InvalidValue(f"expected a GIF below {GIF_BYTES:,} bytes, got {len(packed):,}")


def rendered(fig: Figure) -> Image.Image:
    """Return a figure as a picture 1,050 pixels wide."""
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=100)
    return Image.open(drawn).convert("RGB")


def pack_gif(frames: list[Image.Image], width: int, colours: int) -> bytes:
    """Return pictures as an animated GIF of a width and a number of colours."""
    height = round(frames[0].height * width / frames[0].width)
    small = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    # One palette for all frames: what stays the same needs no bytes in the later ones.
    palette = small[len(small) // 2].quantize(colours)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    times = [FRAME_MS] * (len(few) - 1) + [3 * FRAME_MS]
    packed = io.BytesIO()
    few[0].save(
        packed, "GIF", save_all=True, append_images=few[1:], duration=times, loop=0, optimize=True
    )
    return packed.getvalue()


def save_gif(learned: Learned, path: str | Path) -> None:
    """Write `learned_gif` into a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(learned_gif(learned))
