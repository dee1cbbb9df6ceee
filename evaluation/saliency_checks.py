"""Two checks that a heatmap must pass to explain a network (saliency checks).

Randomised weights (Adebayo et al. 2018, arXiv:1810.03292): a network that has learned nothing must
give other heatmaps. If it gives the same ones, they show the image or the architecture instead of
what was learned. Deletion (Petsiuk et al. 2018, arXiv:1806.07421): masking what a heatmap calls
important must lower the network's confidence sooner than masking other places, and showing it
first must raise the confidence sooner (insertion; the paper begins with a blurred image, this with
the mean colour). The controls are random places, but also the centre of the image, where objects
usually are, and the heatmap of another image. A heatmap that is no better than the latter two says
nothing about its image.

Both take minutes on two cores: `python -m benchmarks.trust` computes them and writes a JSON file,
from which they are drawn.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor, nn

from evaluation.drawing import (
    COLOURS,
    GREY,
    TEXT,
    WIDTH,
    headline,
    hide_frame,
    listed,
    new_figure,
    percent_axis,
    show_image,
    style_chart,
    styled,
)
from evaluation.heatmaps import rank_correlation
from models import explain
from models.errors import InvalidValue
from models.stage import Network, eval_mode

PATCH = 4  # pixels: images are masked in patches of 4x4
STEPS = 16  # of a deletion curve
EXAMPLES = 3  # images whose heatmaps a Cascade keeps


# ---- randomised weights --------------------------------------------------------------------------


class Cascade(NamedTuple):
    """How heatmaps change while a network's layers become random, from the output to the input.

    Attributes:
        layers: 'none', then the layer that became random in each step.
        correlation: rank correlation of each image's heatmap with that of the trained network,
            (steps, N); 0 where a heatmap is blank.
        control: rank correlation of each image's heatmap with that of another image, both by the
            trained network, (N,).
        heatmaps: of the first images, (steps, examples, H, W) in [0, 1].
    """

    layers: list[str]
    correlation: np.ndarray
    control: np.ndarray
    heatmaps: np.ndarray

    def to_json(self) -> dict:
        """Return what `Cascade.from_json` reads; heatmaps are rounded to 1/255."""
        maps = np.round(255 * self.heatmaps).astype(int).tolist()
        correlation, control = (
            values.round(4).tolist() for values in (self.correlation, self.control)
        )
        return {
            "layers": self.layers,
            "correlation": correlation,
            "control": control,
            "heatmaps": maps,
        }

    @classmethod
    def from_json(cls, stored: dict) -> "Cascade":
        """Make a Cascade of what `to_json` returned."""
        names = ("correlation", "control", "heatmaps")
        correlation, control, maps = (np.array(stored[name], float) for name in names)
        return cls(stored["layers"], correlation, control, maps / 255)


@torch.no_grad()
def predicted_classes(model: nn.Module, images: Tensor) -> list[int]:
    """Return the class that a network predicts for each image (N, 3, S, S)."""
    with eval_mode(model):
        return model(images.to(next(model.parameters()).device)).argmax(1).tolist()


def children_from_output(model: nn.Module, images: Tensor) -> list[str]:
    """Name the children of a network that have weights, the one that computes last first.

    Args:
        model: the network.
        images: (N, 3, S, S), on its device.
    """
    called: list[str] = []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            child = name.partition(".")[0]
            if child and any(True for _ in module.parameters(recurse=False)):
                hook = module.register_forward_hook(lambda *_, child=child: called.append(child))
                hooks.enter_context(hook)
        model(images)
    return list(dict.fromkeys(reversed(called)))


def cascading_randomization(model: Network, images: Tensor) -> Cascade:
    """Make the layers of a network random one after the other, and compare the heatmaps.

    The heatmaps are of the last stage, for the class that the trained network predicts.

    Args:
        model: the trained network; a copy of it is changed.
        images: (N, 3, S, S), normalised, at least two.

    Raises:
        ValueError: if there are fewer than two images.
    """
    if len(images) < 2:
        raise InvalidValue(f"expected at least 2 images, got {len(images)}")
    changed, images = copy.deepcopy(model).cpu().eval(), images.cpu()
    classes = predicted_classes(changed, images)

    def heatmaps() -> np.ndarray:
        return explain.gradcam(changed, changed.stages()[-1].module, images, classes)

    trained = heatmaps()
    layers, steps = ["none"], [trained]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in children_from_output(changed, images[:1]):
            reset_weights(getattr(changed, name))
            layers.append(name)
            steps.append(heatmaps())
    correlation = np.stack([rank_correlation(trained, maps) for maps in steps])
    control = rank_correlation(trained, np.roll(trained, 1, axis=0))
    return Cascade(layers, correlation, control, np.stack([maps[:EXAMPLES] for maps in steps]))


def reset_weights(module: nn.Module) -> None:
    """Give all layers of a module PyTorch's initial weights: random but for BatchNorm's."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if reset:
            reset()


def half_width(values: pd.DataFrame) -> pd.Series:
    """Return half the width of the 95 % interval of each column's mean, by Student's t."""
    return cast(pd.Series, student_t.ppf(0.975, len(values) - 1) * values.sem())


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of values (N,) and half the width of its 95 % interval; 0 of one value."""
    half = half_width(pd.DataFrame(values)).iloc[0] if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def cascade_title(cascade: Cascade) -> str:
    """Say whether the heatmaps depend on what the network has learned.

    They do if the 95 % interval of the difference from the control, image by image, says so.
    """
    (end, half), (control, _) = interval(cascade.correlation[-1]), interval(cascade.control)
    lead, uncertainty = interval(cascade.control - cascade.correlation[-1])
    found = (
        f"rank correlation {end:.2f} ± {half:.2f} (95 % over images) with those"
        f" of one random network, {control:.2f} with those of other images"
    )
    if lead > uncertainty:
        return f"The heatmaps depend on what was learned: {found}"
    if lead >= -uncertainty:
        return f"Random networks' heatmaps are not measurably nearer than another image's: {found}"
    return f"Part of the heatmaps does not depend on what was learned: {found}"


@styled
def plot_cascade(cascade: Cascade, images: Sequence[np.ndarray], note: str = "") -> Figure:
    """Draw the rank correlation layer by layer, above it the heatmaps of a few images.

    Args:
        cascade: of `cascading_randomization`.
        images: of the heatmaps that it holds, RGB (H, W, 3) in [0, 1].
        note: a line under the title.
    """
    steps, examples = cascade.heatmaps.shape[:2]
    tile = WIDTH / (steps + 1)
    fig = new_figure(WIDTH, tile * examples + 4.2)
    heights = (tile * examples + 0.4, 3.4)
    above, below = fig.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = above.subplots(examples, steps + 1, squeeze=False)
    for axis in axes.flat:
        hide_frame(axis)
    for row, image in enumerate(images[:examples]):
        show_image(axes[row, 0], image)
        for step in range(steps):
            blended = explain.overlay(image, cascade.heatmaps[step, row], 0.6)
            show_image(axes[row, step + 1], blended)
    for axis, title in zip(axes[0], ["image", *step_names(cascade)], strict=True):
        axis.set_title(title, rotation=slant(cascade))
    draw_cascade(below.subplots(), cascade)
    shows = "Heatmaps of a network whose layers become random, above their rank correlation"
    headline(fig, cascade_title(cascade), shows, note)
    return fig


def step_names(cascade: Cascade) -> list[str]:
    """Name the steps: 'trained', then the layers that become random, each with a '+'."""
    return ["trained", *(f"+ {name}" for name in cascade.layers[1:])]


def slant(cascade: Cascade) -> float:
    """Return the angle of the steps' names in degrees: many slant, so that they do not overlap."""
    return 30 if len("".join(step_names(cascade))) > 80 else 0


def draw_cascade(axis: Axes, cascade: Cascade) -> None:
    """Draw the mean rank correlation of each step with its 95 % interval, and the control."""
    means, halves = zip(*(interval(values) for values in cascade.correlation), strict=True)
    steps = range(len(means))
    axis.errorbar(steps, means, halves, fmt="o-", capsize=3, label="randomised network")
    control, half = interval(cascade.control)
    axis.axhline(control, linestyle="--", color=GREY)
    axis.axhspan(control - half, control + half, color=GREY, alpha=0.15, linewidth=0)
    axis.annotate(
        "another image's heatmap",
        (len(means) - 1, control),
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    style_chart(axis)
    axis.set(ylabel="rank correlation\nwith the trained network", xticks=list(steps))
    axis.set_xticklabels(step_names(cascade), fontsize=TEXT, rotation=slant(cascade))
    axis.set_xlabel(f"layers that are random, from the output on ({len(cascade.control)} images)")
    axis.set_ylim(min(-0.1, min(means) - 0.1), 1.05)


# ---- deletion and insertion ---------------------------------------------------------------------


def patch_means(cams: np.ndarray) -> np.ndarray:
    """Average heatmaps over patches of 4x4 pixels: (N, S, S) -> (N, S/4 * S/4)."""
    count, side = len(cams), cams.shape[1] // PATCH
    return cams.reshape(count, side, PATCH, side, PATCH).mean((2, 4)).reshape(count, -1)


def mask_patches(images: Tensor, order: np.ndarray, fraction: float) -> Tensor:
    """Mask the first patches of images by 0, the mean colour of the training set.

    Args:
        images: (N, 3, S, S), normalised.
        order: (N, patches), for each image the indices of its patches, counted row by row, in the
            order in which they are masked.
        fraction: how many of the patches to mask, 0..1.

    Returns:
        (N, 3, S, S).
    """
    side = images.shape[2] // PATCH
    masked = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(masked, order[:, : round(fraction * order.shape[1])], True, axis=1)
    pixels = masked.reshape(-1, 1, side, side).repeat(PATCH, axis=2).repeat(PATCH, axis=3)
    return images.masked_fill(torch.from_numpy(pixels).to(images.device), 0)


@torch.no_grad()
def deletion_curves(
    model: nn.Module, images: Tensor, classes: Sequence[int], order: np.ndarray
) -> np.ndarray:
    """Compute the probability of each image's class with 0, 1/16 ... 16/16 of it masked.

    Args:
        model: the network.
        images: (N, 3, S, S), normalised.
        classes: N, one for each image.
        order: (N, patches), as in `mask_patches`.

    Returns:
        Probabilities (17, N).
    """
    device, index = next(model.parameters()).device, torch.tensor(classes)[:, None]
    curves = []
    with eval_mode(model):
        for step in range(STEPS + 1):
            logits = model(mask_patches(images, order, step / STEPS).to(device)).float().cpu()
            curves.append(logits.softmax(1).gather(1, index)[:, 0].numpy())
    return np.stack(curves)


def centre_first(side: int) -> np.ndarray:
    """Order the indices of side x side patches by their distance from the middle of the image."""
    offsets = np.arange(side) - (side - 1) / 2
    return np.argsort((offsets[:, None] ** 2 + offsets**2).ravel(), kind="stable")


def mask_orders(cams: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return, for each way to mask images, the order of their patches, (N, patches).

    Args:
        cams: the images' heatmaps, (N, S, S).
        seed: of the random order.
    """
    own = np.argsort(-patch_means(cams), axis=1, kind="stable")
    return {
        "heatmap": own,
        "another image's heatmap": np.roll(own, 1, axis=0),
        "centre first": np.broadcast_to(centre_first(cams.shape[1] // PATCH), own.shape),
        "random": np.random.default_rng(seed).permuted(own, axis=1),
    }


def deletion(model: Network, images: Tensor) -> pd.DataFrame:
    """Mask images step by step in four orders and record the predicted class's probability.

    Args:
        model: the network.
        images: (N, 3, S, S), normalised, at least two.

    Returns:
        A row for each fraction masked (17) and image (N), a column for each order: 'heatmap', what
        Grad-CAM of the last stage calls important first, and the controls "another image's
        heatmap", 'centre first' and 'random'.

    Raises:
        ValueError: if there are fewer than two images.
    """
    return masking_curves(model, images, "masked")


def insertion(model: Network, images: Tensor) -> pd.DataFrame:
    """Show masked images step by step in the orders of `deletion`, and record the same.

    Returns:
        As `deletion`, but a row for each fraction that is shown.
    """
    return masking_curves(model, images, "shown")


def masking_curves(model: Network, images: Tensor, part: str) -> pd.DataFrame:
    """Compute the curves of all orders; see `deletion`, of which this is the common part.

    The part whose fraction grows is 'masked' or 'shown'. What is shown last is masked first, so
    insertion is deletion in reverse.
    """
    if len(images) < 2:
        raise InvalidValue(f"expected at least 2 images, got {len(images)}")
    classes = predicted_classes(model, images)
    cams = explain.gradcam(model, model.stages()[-1].module, images, classes)
    way = 1 if part == "masked" else -1
    table = {
        name: deletion_curves(model, images, classes, order[:, ::way])[::way].ravel()
        for name, order in mask_orders(cams, seed=0).items()
    }
    fractions = np.arange(STEPS + 1) / STEPS
    rows = pd.MultiIndex.from_product([fractions, range(len(images))], names=[part, "image"])
    return pd.DataFrame(table, index=rows)


def curves_to_json(table: pd.DataFrame) -> dict:
    """Return a table of `deletion` or `insertion` as lists that JSON can hold."""
    return table.astype(float).round(5).reset_index().to_dict("list")  # float32 has no 0.12345


def curves_from_json(stored: dict) -> pd.DataFrame:
    """Make a table again of what `curves_to_json` returned."""
    table = pd.DataFrame(stored)
    return table.set_index(list(table.columns[:2]))


def deletion_areas(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the areas under the curves of deletion or insertion.

    In deletion a smaller area means that the confidence falls sooner, in insertion a larger one
    that it rises sooner.

    Args:
        table: of `deletion` or `insertion`.

    Returns:
        A row for each order. area: the mean over the images, 0..1, by the trapezoidal rule.
        difference: the mean of how much each image's area exceeds that of the first order; from,
        to: its 95 % interval.
    """
    areas = pd.DataFrame({name: image_areas(image_curves(table, name)) for name in table.columns})
    differences = areas.sub(areas.iloc[:, 0], axis=0)
    mean, half = differences.mean(), half_width(differences)
    return pd.DataFrame(
        {"area": areas.mean(), "difference": mean, "from": mean - half, "to": mean + half}
    )


def image_curves(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the curves of one order: a row for each fraction, a column for each image."""
    return pd.DataFrame(table[name].unstack("image"))


def image_areas(curves: pd.DataFrame) -> np.ndarray:
    """Integrate one curve per column over the index."""
    return np.trapezoid(curves.to_numpy(), curves.index.to_numpy(), axis=0)


def sort_controls(areas: pd.DataFrame, part: str) -> tuple[list[str], list[str]]:
    """Sort the controls by whether the heatmap's order is better than they are.

    It is better where the 95 % interval of the difference of the areas lies on the right side of 0.

    Args:
        areas: of `deletion_areas`; the first row is the heatmap's.
        part: what grows along the curves, 'masked' (a smaller area is better) or 'shown'.

    Returns:
        The controls that the heatmap beats, and the others.
    """
    controls = areas.iloc[1:]
    better = controls["from"] > 0 if part == "masked" else controls["to"] < 0
    return list(controls.index[better]), list(controls.index[~better])


def compared(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return `sort_controls` of a table of `deletion` or `insertion`."""
    return sort_controls(deletion_areas(table), str(table.index.names[0]))


def deletion_title(table: pd.DataFrame) -> str:
    """Say which controls the heatmap beats.

    Args:
        table: of `deletion` or `insertion`.
    """
    name = {"masked": "Deletion", "shown": "Insertion"}[str(table.index.names[0])]
    beaten, rest = compared(table)
    if not rest:
        return f"{name}: the heatmap beats every control"
    if not beaten:
        return f"{name}: the heatmap beats no control"
    return f"{name}: the heatmap beats {listed(beaten)}, but not {listed(rest)}"


def controls_title(tables: Sequence[pd.DataFrame]) -> str:
    """Say which controls the heatmap beats in the tables of `deletion` and of `insertion`."""
    if not any(compared(table)[1] for table in tables):
        return "Masked and shown, the heatmap beats every control by area"
    return ". ".join(deletion_title(table) for table in tables)


@styled
def plot_deletion(deleted: pd.DataFrame, inserted: pd.DataFrame, note: str = "") -> Figure:
    """Draw the mean curves with their 95 % intervals; the legends state the areas.

    Args:
        deleted: of `deletion`.
        inserted: of `insertion`.
        note: a last line of the title.
    """
    tables = [deleted, inserted]
    fig = new_figure(WIDTH, 6.6)
    axes = fig.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axis, one in zip(axes, tables, strict=True):
        draw_curves(axis, one)
    axes[0].set_ylabel("probability of the predicted class")
    title = f"{controls_title(tables)} (bands: 95 % intervals)"
    shows = "Curves of the confidence while an image is masked or shown in several orders"
    headline(fig, title, shows, note)
    return fig


def draw_curves(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the mean curve of each order with its 95 % interval, over the images."""
    areas = deletion_areas(table)["area"]
    for name, colour in zip(table.columns, COLOURS, strict=False):
        curves = image_curves(table, name)
        fractions = curves.index.to_numpy()
        mean, half = curves.mean(axis=1), half_width(curves.T)
        label = f"{name}, area {areas[name]:.3f}"
        axis.plot(fractions, mean, "o-", markersize=3, label=label, color=colour)
        axis.fill_between(fractions, mean - half, mean + half, alpha=0.15, color=colour)
    style_chart(axis)
    percent_axis(axis)
    percent_axis(axis, "x")
    name, count = table.index.names[0], table.index.get_level_values("image").nunique()
    kind = "deletion" if name == "masked" else "insertion"
    axis.set(xlabel=f"{name} part of the image", title=f"{kind}, {count} images", ylim=(0, 1))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
