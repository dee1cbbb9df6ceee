"""What the layers of a network see: its whitening filters, receptive fields, preferred patches."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from cifar10.images import IMAGE_SIZE
from evaluation.drawing import (
    TEXT,
    WIDTH,
    headline,
    hide_frame,
    new_figure,
    new_image_grid,
    percent,
    rgb,
    show_image,
    styled,
)
from models.errors import InvalidValue
from models.stage import Network, Stage, eval_mode
from training.whitening import LEAST_VARIANCE

BATCH = 100  # images at a time
PATCHES = 5  # of a channel
CHANNELS = 2  # of a stage, that plot_stages shows
WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)  # layers whose output depends on neighbours
OUTSIDE = 0.8  # the grey of what lies outside an image, unlike the white of many backgrounds

# ---- whitening -----------------------------------------------------------------------------------


def whitening_shares(filters: Tensor) -> np.ndarray:
    """Return what part of the variance of patches lies along each whitening filter.

    Args:
        filters: (n, 3, k, k), as `whiten` scales them.

    Returns:
        (n,), with the sum 1.
    """
    variance = filters.flatten(1).double().norm(dim=1).pow(-2) - LEAST_VARIANCE
    return (variance / variance.sum()).numpy()


def filters_title(shares: np.ndarray) -> str:
    """Say how unevenly the variance of patches is distributed over the whitening filters."""
    return (
        f"{percent(shares[0], 0)} of the variance of 2x2 patches lies along the first of"
        f" {len(shares)} directions, {percent(shares[-1], 2)} along the last;"
        " the whitening layer gives all nearly the same weight"
    )


@styled
def plot_filters(weight: Tensor, note: str = "") -> Figure:
    """Draw the filters of a whitening layer, each scaled to its own range.

    Args:
        weight: of FastNet's stem after `whiten`, (24, 3, 2, 2): filters, then their negatives.
        note: a line under the title.
    """
    filters = weight.detach().cpu()[: len(weight) // 2]
    largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8)
    images = (0.5 + filters / largest / 2).permute(0, 2, 3, 1).numpy()
    shares = whitening_shares(filters)
    fig, axes = new_image_grid(2, 6, WIDTH, 4.6)
    for axis, image, share in zip(axes.flat, images, shares, strict=True):
        show_image(axis, image, percent(share, 1 if share > 0.01 else 2))
        axis.add_patch(Rectangle((-0.5, -0.5), 2, 2, fill=False, ec="0.7"))  # also around white
    shows = "The filters of the whitening layer as small colour images"
    headline(fig, filters_title(shares), shows, note)
    return fig


# ---- receptive fields ----------------------------------------------------------------------------


class ReceptiveField(NamedTuple):
    """The square of pixels that a cell of a feature map depends on.

    Attributes:
        size: its side, pixels.
        jump: the distance between the squares of two neighbouring cells, pixels.
        start: where the square of the first cell begins; below 0 in the padding.
    """

    size: int
    jump: int
    start: int

    def of_cell(self, index: int) -> tuple[int, int]:
        """Return the first pixel of a cell's square, and the first one behind it."""
        first = self.start + index * self.jump
        return first, first + self.size

    def behind(self, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> "ReceptiveField":
        """Return the field of a cell of a layer's output; this is the field of its input."""
        kernel, stride, padding, dilation = (
            value if isinstance(value, int) else int(value[0])
            for value in (
                layer.kernel_size,
                layer.stride,
                layer.padding,
                getattr(layer, "dilation", 1),
            )
        )
        size = self.size + (kernel - 1) * dilation * self.jump
        return ReceptiveField(size, stride * self.jump, self.start - padding * self.jump)


def receptive_fields(model: Network) -> dict[str, ReceptiveField]:
    """Compute the receptive field of each stage from the layers that an image passes through.

    The layers of a `shortcut` do not count: the way around them is longer.

    Returns:
        Name of the stage -> field.

    Raises:
        InvalidValue: if the layers' strides do not lead to the size that a stage states: a side
            branch has another name.
    """
    field, found = ReceptiveField(1, 1, 0), {}

    def passed(module: nn.Module, *_: object) -> None:
        nonlocal field
        field = field.behind(module)  # type: ignore[arg-type]

    def reached(stage: Stage, *_: object) -> None:
        if abs(IMAGE_SIZE // field.jump - stage.size) > 1:  # without padding a cell may be missing
            raise InvalidValue(
                f"expected cells of {stage.name} to be {IMAGE_SIZE // stage.size} pixels apart, got"
                f" {field.jump}: name a block's side branch 'shortcut', so that it does not count"
            )
        found[stage.name] = field

    with contextlib.ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, WINDOWS) and "shortcut" not in name:
                hooks.enter_context(module.register_forward_hook(passed))
        for stage in model.stages():
            reach = functools.partial(reached, stage)
            hooks.enter_context(stage.module.register_forward_hook(reach))
        model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=next(model.parameters()).device))
    return found


# ---- stages --------------------------------------------------------------------------------------


@torch.no_grad()
def stage_outputs(model: Network, images: Tensor) -> dict[str, Tensor]:
    """Compute the feature maps (N, channels, side, side) of each stage for a batch of images."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: outputs.update({name: output.float().cpu()})

    with contextlib.ExitStack() as hooks, eval_mode(model):
        for stage in model.stages():
            hooks.enter_context(stage.module.register_forward_hook(recorder(stage.name)))
        model(images.to(next(model.parameters()).device))
    return outputs


class TopPatches(NamedTuple):
    """Where a stage's channels are most activated.

    Attributes:
        images: for each channel the indices of the images that activate it most, (channels, 5).
        cells: the cell in each image where they do, row and column, (channels, 5, 2).
        contrast: how far the strongest activation is above the mean of the images' maxima, in
            standard deviations, (channels,).
    """

    images: np.ndarray
    cells: np.ndarray
    contrast: np.ndarray


def top_patches(model: Network, images: Tensor) -> dict[str, TopPatches]:
    """Find, for each channel of each stage, the images and places that activate it most.

    Args:
        model: the network.
        images: normalised (N, 3, 32, 32), at least five.

    Returns:
        Name of the stage -> its channels' patches.

    Raises:
        ValueError: if there are fewer images.
    """
    if len(images) < PATCHES:
        raise InvalidValue(f"expected at least {PATCHES} images, got {len(images)}")
    values: dict[str, list[Tensor]] = {stage.name: [] for stage in model.stages()}
    places: dict[str, list[Tensor]] = {stage.name: [] for stage in model.stages()}
    for batch in images.split(BATCH):
        for name, maps in stage_outputs(model, batch).items():
            most, where = maps.flatten(2).max(2)  # (B, channels)
            values[name].append(most)
            places[name].append(where)
    found = {}
    for stage in model.stages():
        most, where = torch.cat(values[stage.name]), torch.cat(places[stage.name])
        best, chosen = most.topk(PATCHES, 0)  # (5, channels)
        cells = where.gather(0, chosen).T.numpy()
        contrast = (best[0] - most.mean(0)) / most.std(0).clamp(min=1e-8)
        side = stage.size
        found[stage.name] = TopPatches(
            chosen.T.numpy(), np.stack([cells // side, cells % side], -1), contrast.numpy()
        )
    return found


def cut_patch(image: np.ndarray, field: ReceptiveField, cell: Sequence[int]) -> np.ndarray:
    """Cut the receptive field of a cell out of an image; what lies outside of it is grey.

    Args:
        image: RGB (32, 32, 3) in [0, 1].
        field: of the stage; where it is larger than the image, the whole image is returned.
        cell: row and column.

    Returns:
        RGB (size, size, 3).
    """
    if field.size >= len(image):
        return image
    margin = field.size
    padded = np.pad(image, ((margin,) * 2, (margin,) * 2, (0, 0)), constant_values=OUTSIDE)
    rows, columns = (slice(*(margin + end for end in field.of_cell(int(at)))) for at in cell)
    return padded[rows, columns]


def stages_title(patches: dict[str, TopPatches], labels: np.ndarray) -> str:
    """Say for how many channels of the first and the last stage all top images are of one class.

    Args:
        patches: of `top_patches`.
        labels: (N,), of the images.
    """
    names = list(patches)
    first, last = names[0], names[-1]
    one = {
        name: float(np.mean([len(set(labels[row])) == 1 for row in found.images]))
        for name, found in patches.items()
    }
    return (
        f"In {first}, {percent(one[first], 0)} of the channels respond most to {PATCHES} images"
        f" of a single class; in {last}, {percent(one[last], 0)} (drawn: {CHANNELS} of each stage)"
    )


@styled
def plot_stages(
    model: Network,
    images: Tensor,
    labels: np.ndarray,
    inv_normalize: Callable[[Tensor], Tensor],
    note: str = "",
) -> Figure:
    """Draw, for two channels of each stage, the patches that activate them most.

    The channels are those that stand out most from their mean. A patch is the receptive field of
    the most activated cell.

    Args:
        model: the network.
        images: normalised (N, 3, 32, 32), some hundreds.
        labels: (N,), of the images.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        note: a line under the title.
    """
    patches, fields = top_patches(model, images), receptive_fields(model)
    groups = CHANNELS * (PATCHES + 1) - 1  # an empty column between two channels
    width = [0.4 if column % (PATCHES + 1) == PATCHES else 1 for column in range(groups)]
    tile = (WIDTH - 1.2) / sum(width)
    fig = new_figure(WIDTH, tile * len(patches) + 0.8)
    axes = fig.subplots(len(patches), groups, squeeze=False, width_ratios=width)
    for axis in axes.flat:
        hide_frame(axis)
    for row, (name, found) in zip(axes, patches.items(), strict=True):
        size = fields[name].size
        shown = f"{size}x{size}" if size < images.shape[2] else "whole image"
        row[0].set_ylabel(f"{name}\n{shown}", rotation=0, ha="right", va="center", fontsize=TEXT)
        for group, channel in enumerate(np.argsort(-found.contrast, kind="stable")[:CHANNELS]):
            for i in range(PATCHES):
                image = rgb(images[found.images[channel, i]], inv_normalize)
                patch = cut_patch(image, fields[name], found.cells[channel, i])
                show_image(row[group * (PATCHES + 1) + i], patch)
    shows = "For each stage, the patches of images that activate some of its channels most"
    headline(fig, stages_title(patches, labels), shows, note)
    return fig
