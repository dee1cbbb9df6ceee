"""Drawings that explain: residual block, receptive field, Grad-CAM, BatchNorm, Muon's step.

All but the first are computed from a real network and real images.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from torch import Tensor, nn

from evaluation.drawing import (
    COLOURS,
    GREY,
    TEXT,
    WIDTH,
    headline,
    hide_frame,
    new_figure,
    new_image_grid,
    percent,
    rgb,
    show_image,
    style_chart,
    styled,
)
from evaluation.features import receptive_fields
from models import explain
from models.errors import InvalidValue
from models.stage import Network, eval_mode
from training.optimizer import orthogonalize

# ---- plain and residual block --------------------------------------------------------------------

SHOWN_MAPS = 4  # feature maps of plot_gradcam_recipe
LAYERS = ("conv 3x3", "BatchNorm", "ReLU", "conv 3x3", "BatchNorm")


@styled
def plot_residual_block() -> Figure:
    """Draw a plain block beside a residual block."""
    fig = new_figure(WIDTH, 5.6)
    plain, residual = fig.subplots(1, 2, squeeze=False)[0]
    for axis, name in (
        (plain, "plain block: y = relu(F(x))"),
        (residual, "residual block: y = relu(F(x) + x)"),
    ):
        axis.set(xlim=(-3.2, 4.8), ylim=(-0.9, 9.2))
        axis.axis("off")
        axis.set_title(name, fontsize=TEXT + 2, pad=12)
        draw_layers(axis)
    draw_box(plain, 1.0, "ReLU", COLOURS[0])
    arrow(plain, (0, 2.63), (0, 1.38))
    draw_shortcut(residual)
    finding = "A residual block adds its input x to F(x): it only has to learn the difference"
    headline(fig, finding, "Drawing of a plain block beside a residual block")
    return fig


def draw_layers(axis: Axes) -> None:
    """Draw the five layers that both blocks share from top to bottom, with arrows."""
    axis.annotate("x", (0, 9.1), ha="center", va="center", fontsize=TEXT + 3, style="italic")
    for i, name in enumerate(LAYERS):
        height = 7.8 - 1.2 * i
        arrow(axis, (0, height + 0.85), (0, height + 0.38))
        draw_box(axis, height, name, COLOURS[0] if "ReLU" in name else GREY)
    arrow(axis, (0, 0.62), (0, 0.1))
    axis.annotate("y", (0, -0.3), ha="center", va="center", fontsize=TEXT + 3, style="italic")
    axis.annotate("F(x)", (-1.9, 5.4), ha="right", va="center", fontsize=TEXT + 2, style="italic")
    axis.plot([-1.5, -1.7, -1.7, -1.5], [8.1, 8.1, 2.7, 2.7], color=GREY)


def draw_box(axis: Axes, height: float, text: str, colour: str) -> None:
    """Draw a layer: a box with its name."""
    box = FancyBboxPatch((-1.2, height - 0.3), 2.4, 0.6, "round,pad=0.06", fill=False, ec=colour)
    axis.add_patch(box)
    axis.text(0, height, text, ha="center", va="center", color=colour)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    """Draw an arrow from start to end."""
    look = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0} | style
    axis.annotate("", end, start, arrowprops=look)


def draw_shortcut(axis: Axes) -> None:
    """Draw the way of x around the layers, the sum, and the ReLU behind it."""
    way = COLOURS[1]
    middle = 1.98  # of the sum
    axis.plot([0, 2.2, 2.2], [8.45, 8.45, middle], color=way, linewidth=2)
    arrow(axis, (2.2, middle), (0.28, middle), color=way, linewidth=2)
    name = "shortcut:\nx unchanged, or,\nwhere the shape\nchanges, after a\n1x1 conv and\nBatchNorm"
    axis.annotate(name, (2.4, 5.4), color=way, va="center")
    axis.add_patch(Circle((0, middle), 0.26, fill=False, ec=way, linewidth=2))
    axis.text(0, middle, "+", ha="center", va="center", color=way, fontsize=TEXT + 4)
    arrow(axis, (0, 2.63), (0, middle + 0.28))
    draw_box(axis, 1.0, "ReLU", COLOURS[0])
    arrow(axis, (0, middle - 0.28), (0, 1.38))


# ---- receptive field -----------------------------------------------------------------------------


def receptive_title(sizes: dict[str, int], pixels: int) -> str:
    """Say how much of an image one cell of each stage sees.

    Args:
        sizes: name of the stage -> side of its receptive field, pixels.
        pixels: side of the image.
    """
    small = [f"{size}x{size} pixels in {name}" for name, size in sizes.items() if size < pixels]
    whole = [name for name, size in sizes.items() if size >= pixels]
    if not small:
        return f"A middle cell depends on the whole image in every stage from {whole[0]}"
    ending = f"; from {whole[0]} on, the whole image" if whole else ""
    return f"A middle cell depends on {', '.join(small)}{ending}"


@styled
def plot_receptive_field(
    model: Network, image: Tensor, inv_normalize: Callable[[Tensor], Tensor], note: str = ""
) -> Figure:
    """Draw what one cell in the middle of each stage sees of an image.

    Args:
        model: the network.
        image: normalised (3, 32, 32).
        inv_normalize: normalised (3, H, W) -> [0, 1].
        note: a line under the title.
    """
    fields, stages = receptive_fields(model), model.stages()
    picture = rgb(image, inv_normalize)
    fig, axes = new_image_grid(2, len(stages), WIDTH, 6.2)
    for column, stage in enumerate(stages):
        above, below = axes[:, column]
        cell = stage.size // 2
        first, end = fields[stage.name].of_cell(cell)
        draw_field(above, picture, (max(first, 0), min(end, len(picture))))
        size = fields[stage.name].size
        more = ", beyond the image" if size > len(picture) else " pixels"
        above.set_title(f"{stage.name}\n{size}x{size}{more}")
        draw_cells(below, stage.size, cell)
        below.set_xlabel(f"{stage.size}x{stage.size} cells", fontsize=TEXT)
    axes[0, 0].set_ylabel("the image")
    axes[1, 0].set_ylabel("a cell of the stage")
    sizes = {name: field.size for name, field in fields.items()}
    shows = "The receptive field of a cell of each stage, drawn over an image"
    headline(fig, receptive_title(sizes, len(picture)), shows, note)
    return fig


def draw_field(axis: Axes, picture: np.ndarray, seen: tuple[int, int]) -> None:
    """Draw an image in which all but a square of pixels is pale."""
    first, end = seen
    pale = 0.3 * picture + 0.7
    pale[first:end, first:end] = picture[first:end, first:end]
    show_image(axis, pale)
    side = end - first
    corner = (first - 0.5, first - 0.5)
    axis.add_patch(Rectangle(corner, side, side, fill=False, ec=COLOURS[1], linewidth=2.5))


def draw_cells(axis: Axes, side: int, cell: int) -> None:
    """Draw a grid of side x side cells, one of them coloured."""
    axis.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    lines = np.arange(side + 1)
    axis.hlines(lines, 0, side, color="0.7", linewidth=0.6)
    axis.vlines(lines, 0, side, color="0.7", linewidth=0.6)
    axis.add_patch(Rectangle((cell, cell), 1, 1, color=COLOURS[1], linewidth=0))


# ---- Grad-CAM ------------------------------------------------------------------------------------


class GradCamParts(NamedTuple):
    """What a Grad-CAM heatmap of one image is made of.

    Attributes:
        maps: the feature maps of the stage, (channels, side, side).
        weights: of each feature map, its mean gradient, (channels,).
    """

    maps: np.ndarray
    weights: np.ndarray

    def heatmap(self) -> np.ndarray:
        """Return the sum of weights times feature maps, where it is positive: (side, side)."""
        return np.maximum(np.tensordot(self.weights, self.maps, 1), 0)

    def contributions(self) -> np.ndarray:
        """Return what each feature map adds to all cells together, (channels,)."""
        return self.weights * self.maps.sum((1, 2))


def gradcam_parts(model: Network, image: Tensor, target: int) -> GradCamParts:
    """Compute feature maps and weights of the last stage for one image and class.

    Args:
        model: the network; it keeps its mode, and its parameters get no gradient.
        image: normalised (3, 32, 32).
        target: the class to explain.
    """
    kept: list[Any] = []
    stage = model.stages()[-1].module
    with (
        eval_mode(model),
        torch.enable_grad(),
        stage.register_forward_hook(lambda _module, _inputs, output: kept.append(output)),
    ):
        inputs = image[None].to(next(model.parameters()).device).requires_grad_()
        logit = model(inputs)[0, target]
        (gradient,) = torch.autograd.grad(logit, kept[0])
    weights = gradient[0].mean((1, 2))
    return GradCamParts(kept[0][0].detach().cpu().numpy(), weights.cpu().numpy())


def gradcam_recipe_title(parts: GradCamParts, shown: int, name: str) -> str:
    """Say what part of the positive evidence the feature maps that are shown hold."""
    added = np.maximum(parts.contributions(), 0)
    share = np.sort(added)[::-1][:shown].sum() / max(added.sum(), 1e-12)
    return (
        f"Weights x feature maps = heatmap: the {shown} maps that add most, of {len(added)}, hold"
        f" {percent(share, 0)} of the evidence for {name}"
    )


@styled
def plot_gradcam_recipe(
    model: Network,
    image: Tensor,
    target: int,
    classes: Sequence[str],
    inv_normalize: Callable[[Tensor], Tensor],
    note: str = "",
) -> Figure:
    """Draw how Grad-CAM makes a heatmap: feature maps, their weights, their sum, the overlay.

    The feature maps are those that add most to the heatmap.

    Args:
        model: the network.
        image: normalised (3, 32, 32).
        target: the class to explain.
        classes: their names.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        note: a line under the title.
    """
    parts = gradcam_parts(model, image, target)
    most = np.argsort(-parts.contributions(), kind="stable")[:SHOWN_MAPS]
    cam = explain.gradcam(model, model.stages()[-1].module, image[None], [target])[0]
    fig, axes = new_image_grid(1, SHOWN_MAPS + 3, WIDTH, 2.9)
    row, picture = axes[0], rgb(image, inv_normalize)
    show_image(row[0], picture, "image")
    brightest = parts.maps[most].max()
    for i, channel in enumerate(most):
        axis = row[1 + i]
        axis.imshow(parts.maps[channel], cmap="Greys_r", vmin=0, vmax=brightest)
        axis.set_title(f"{'+ ' if i else ''}{parts.weights[channel]:.3f} x\nmap {channel}")
    row[-2].imshow(explain.colorize(scaled(parts.heatmap())), interpolation="nearest")
    others = len(parts.weights) - SHOWN_MAPS
    row[-2].set_title(f"+ {others} others,\nReLU: heatmap")
    show_image(row[-1], explain.overlay(picture, cam, 0.5), "enlarged, over\nthe image")
    title = gradcam_recipe_title(parts, SHOWN_MAPS, classes[target])
    headline(fig, title, "Feature maps, their weights and the heatmap that they give", note)
    return fig


def scaled(values: np.ndarray) -> np.ndarray:
    """Scale values to 0..1, by their own minimum and maximum."""
    return (values - values.min()) / max(float(np.ptp(values)), 1e-12)


# ---- BatchNorm -----------------------------------------------------------------------------------


def batchnorm_values(model: nn.Module, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute what the second BatchNorm of a network makes of a batch in training, in two steps.

    Args:
        model: the network; a copy of it runs, so that its statistics stay.
        images: normalised (N, 3, 32, 32), one batch.

    Returns:
        What enters it, the same with mean 0 and standard deviation 1 in each channel, and what
        leaves it: that times the learned scale, plus the bias. Each is (channels, values).

    Raises:
        ValueError: if the network has fewer than two BatchNorms.
    """
    copied = copy.deepcopy(model).cpu().train()
    kept: list[Any] = []
    norms = [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]
    if len(norms) < 2:
        name = type(model).__name__
        raise InvalidValue(f"expected a network with two BatchNorms, got {name} with {len(norms)}")
    norms[1].register_forward_hook(lambda _module, inputs, output: kept.extend((inputs[0], output)))
    with torch.no_grad():
        copied(images.cpu())
    before, after = (values.transpose(0, 1).flatten(1) for values in kept)
    mean, variance = before.mean(1, keepdim=True), before.var(1, correction=0, keepdim=True)
    normalized = (before - mean) / (variance + norms[1].eps).sqrt()
    return before.numpy(), normalized.numpy(), after.numpy()


def batchnorm_title(before: np.ndarray, after: np.ndarray) -> str:
    """Say between what bounds the channels' standard deviations lie, before and after."""
    (low, high), (lowest, highest) = (
        (values.std(1).min(), values.std(1).max()) for values in (before, after)
    )
    title = f"BatchNorm makes standard deviations of {low:.2f} to {high:.2f} all 1"
    if f"{lowest:.2f}" == f"{highest:.2f}" == "1.00":
        return title
    return f"{title}, its learned scales make them {lowest:.2f} to {highest:.2f}"


@styled
def plot_batchnorm(model: nn.Module, images: Tensor, note: str = "") -> Figure:
    """Draw histograms of four channels before, in and after the second BatchNorm of a network.

    The channels range from the smallest to the largest standard deviation.

    Args:
        model: the network.
        images: normalised (N, 3, 32, 32), one batch.
        note: a line under the title.
    """
    values = batchnorm_values(model, images)
    order = np.argsort(values[0].std(1))
    chosen = order[np.linspace(0, len(order) - 1, 4).round().astype(int)]
    before, normalized, after = (part[chosen] for part in values)
    fig = new_figure(WIDTH, 4)
    axes = fig.subplots(1, 3, squeeze=False, sharex=True)[0]
    low, high = np.quantile([before, normalized, after], (0.002, 0.998))
    names = "before BatchNorm", "normalised", "times scale, plus bias"
    for axis, channels, name in zip(axes, (before, normalized, after), names, strict=True):
        for channel, number, colour in zip(channels, chosen, COLOURS[:4], strict=True):
            axis.hist(
                channel,
                bins=np.linspace(low, high, 90),
                density=True,
                histtype="step",
                linewidth=1.8,
                color=colour,
                label=f"channel {number}",
            )
        style_chart(axis)
        axis.set(xlabel=f"value {name}", yticks=[])
        axis.spines["left"].set_visible(False)
    axes[0].set_ylabel("frequency")
    axes[-1].legend(frameon=False)
    shows = "Histograms of four channels before, in and after BatchNorm"
    headline(fig, batchnorm_title(before, after), shows, note)
    return fig


# ---- Muon ----------------------------------------------------------------------------------------


def singular_values(matrix: Tensor) -> np.ndarray:
    """Return the singular values of a matrix, the largest first, divided by the largest."""
    values = torch.linalg.svdvals(matrix.double()).numpy()
    return values / max(values[0], 1e-300)


def muon_title(before: np.ndarray, after: np.ndarray) -> str:
    """Say how many directions hold most of a gradient, and what orthogonalisation makes of it.

    Args:
        before: singular values of the gradient, the largest first.
        after: those of the orthogonalised step.
    """
    squared = np.cumsum(before**2) / (before**2).sum()
    count = int(np.searchsorted(squared, 0.9)) + 1
    direction = "direction holds" if count == 1 else "directions hold"
    within = int(((after >= 0.5) & (after <= 1.5)).sum())
    rest = "all" if within == len(after) else f"{within}"
    return (
        f"{count} of {len(before)} {direction} 90 % of the gradient (sum of squares); after"
        f" orthogonalisation {rest} of its {len(after)} singular values are between 0.5 and 1.5"
    )


@styled
def plot_orthogonalization(gradient: Tensor, note: str = "") -> Figure:
    """Draw what Muon does to a step: singular values before and after, and two directions of it.

    Args:
        gradient: of filters, as a matrix (out, in * k * k).
        note: a line under the title.
    """
    gradient = gradient.detach().cpu()
    before = singular_values(gradient)
    after = torch.linalg.svdvals(orthogonalize(gradient).double()).numpy()
    fig = new_figure(WIDTH, 4.4)
    left, right = fig.subplots(1, 2, squeeze=False, width_ratios=(1, 1.5))[0]
    tenth = len(before) // 10
    draw_ellipses(left, (before[0], before[tenth]), (after[0], after[tenth]))
    places = np.arange(1, len(before) + 1)
    for values, colour, name in (
        (before, COLOURS[0], "gradient"),
        (after, COLOURS[1], "after orthogonalisation"),
    ):
        right.semilogy(places, values, color=colour)
        middle = (places[-1] * 0.5, values[len(values) // 2])
        right.annotate(name, middle, (0, 8), textcoords="offset points", color=colour)
    for bound in (0.5, 1.5):
        right.axhline(bound, linestyle=":", color=GREY, linewidth=1)
    style_chart(right)
    right.set(
        xlabel="direction, the strongest first", ylabel="singular value (largest of gradient: 1)"
    )
    right.set_ylim(max(1e-4, float(before.min()) / 2), 4)
    right.yaxis.set_major_formatter("{x:g}")
    shows = "Singular values of a gradient before and after orthogonalisation"
    headline(fig, muon_title(before, after), shows, note)
    return fig


def draw_ellipses(axis: Axes, before: tuple[float, float], after: tuple[float, float]) -> None:
    """Draw what a step makes of a circle of inputs, before and after orthogonalisation.

    Args:
        axis: where to draw.
        before: the largest singular value, and the one a tenth of the way down.
        after: the same of the orthogonalised step.
    """
    turn = np.linspace(0, 2 * np.pi, 200)
    tilt = np.array([[0.8, -0.6], [0.6, 0.8]])
    for axes_of, colour, name, place in (
        (before, COLOURS[0], "gradient: far less\nin the weaker one", (-1.45, 1.35)),
        (after, COLOURS[1], "orthogonal: both\nalmost alike", (-0.35, -1.75)),
    ):
        curve = tilt @ (np.array(axes_of)[:, None] * np.stack([np.cos(turn), np.sin(turn)]))
        axis.plot(*curve, color=colour, linewidth=2)
        axis.annotate(name, place, color=colour)
        for direction in (0, 1):
            arrow(axis, (0, 0), tuple(tilt[:, direction] * axes_of[direction]), color=colour)
    axis.set(xlim=(-1.5, 1.6), ylim=(-1.9, 1.9), aspect="equal")
    axis.set_title("how far a step goes in two directions:\nthe strongest and a weaker one")
    hide_frame(axis)
