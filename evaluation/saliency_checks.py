"""Can you trust a Grad-CAM map? Two checks that a map which explains the network should pass.

Randomised weights (Adebayo et al. 2018, arXiv:1810.03292): a network that has learned nothing must
give other maps. If it gives the same, the maps show the picture or the architecture, not what was
learned. Deletion (Petsiuk et al. 2018, arXiv:1806.07421): masking what a heatmap calls important
must cost the network its confidence sooner than masking other places: random ones, but also the
centre, where things usually are, and what the heatmap of another image calls important. A heatmap
that is no better than these two says nothing about this image.
"""

import copy
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import rgb, with_note
from evaluation.errors import Misclassified
from models import explain
from models.errors import InvalidValue

CELL = 4  # pixels: images are masked in squares of 4x4
STEPS = 16  # of a deletion curve


# ---- randomised weights --------------------------------------------------------------------------


def randomize_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the network, on the CPU, that has learned nothing.

    Every layer with new random weights.
    """
    copied = copy.deepcopy(model).cpu().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return copied


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation, -1..1, of each pair of maps (N, H, W).

    0 where a map is empty, all of one value.
    """
    ranks = [pd.DataFrame(maps.reshape(len(maps), -1)).rank(axis=1) for maps in (first, second)]
    return ranks[0].corrwith(ranks[1], axis=1).fillna(0).to_numpy()


def plot_randomized(
    model: nn.Module,
    data: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    note: str = "",
) -> tuple[Figure, float]:
    """Each image, its Grad-CAM map of the last stage for the predicted class, and that of an untrained network.

    Returns the figure and the mean similarity of the two maps.
    """
    images, classes = (
        torch.stack([sample.image for sample in data]),
        [sample.pred for sample in data],
    )
    maps = [
        explain.gradcam(network, network.stages()[-1].module, images, classes)
        for network in (model, randomize_weights(model))
    ]
    fig, axes = plt.subplots(
        3, len(data), figsize=(1.5 * len(data), 5), squeeze=False, layout="constrained"
    )
    for column, sample in enumerate(data):
        picture = rgb(sample.image, inv_normalize)
        for axis, cam in zip(
            axes[:, column], (None, maps[0][column], maps[1][column]), strict=True
        ):
            axis.imshow(
                picture if cam is None else explain.overlay(picture, cam, 0.6),
                interpolation="nearest",
            )
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "trained", "random weights"), strict=True):
        axis.set_ylabel(name)
    fig.suptitle(with_note("Grad-CAM of the trained network and of one with random weights", note))
    plt.close(fig)
    return fig, float(rank_correlation(*maps).mean())


# ---- deletion ------------------------------------------------------------------------------------


def cell_means(maps: np.ndarray) -> np.ndarray:
    """The mean of a heatmap in each square of 4x4 pixels: (N, S, S) -> (N, S/4 * S/4)."""
    count, side = len(maps), maps.shape[1] // CELL
    return maps.reshape(count, side, CELL, side, CELL).mean((2, 4)).reshape(count, -1)


def mask_patches(images: Tensor, order: np.ndarray, fraction: float) -> Tensor:
    """Mask the first `fraction` of the squares of images by 0, the mean colour.

    Args:
        images: (N, 3, S, S), normalised.
        order: (N, squares), for each image the numbers of its squares, counted row by row, in the
            order they are masked.
    """
    side = images.shape[2] // CELL
    gone = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(gone, order[:, : round(fraction * order.shape[1])], True, axis=1)
    mask = torch.from_numpy(
        gone.reshape(-1, 1, side, side).repeat(CELL, axis=2).repeat(CELL, axis=3)
    )
    return images.masked_fill(mask.to(images.device), 0)


@torch.no_grad()
def deletion_curves(
    model: nn.Module, images: Tensor, classes: Sequence[int], order: np.ndarray
) -> np.ndarray:
    """Return the probability of each image's class, (17, N), with 0, 1/16 ... 16/16 masked."""
    device, index = next(model.parameters()).device, torch.tensor(classes)[:, None]
    curves = []
    for step in range(STEPS + 1):
        logits = model.eval()(mask_patches(images, order, step / STEPS).to(device)).float().cpu()
        curves.append(logits.softmax(1).gather(1, index)[:, 0].numpy())
    return np.stack(curves)


def centre_first(side: int) -> np.ndarray:
    """The numbers of side x side squares, those nearest to the middle of the image first."""
    offsets = np.arange(side) - (side - 1) / 2
    return np.argsort((offsets[:, None] ** 2 + offsets**2).ravel(), kind="stable")


def mask_orders(cams: np.ndarray, draws: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Return, for each way to mask images, the orders (N, squares) that are averaged over.

    Args:
        cams: the images' heatmaps, (N, S, S).
        draws: how many other images' heatmaps and how many random orders.
    """
    own = np.argsort(-cell_means(cams), axis=1, kind="stable")
    generator = np.random.default_rng(seed)
    return {
        "heatmap": [own],
        "another image's heatmap": [np.roll(own, shift, axis=0) for shift in range(1, draws + 1)],
        "centre first": [np.broadcast_to(centre_first(cams.shape[1] // CELL), own.shape)],
        "random": [generator.permuted(own, axis=1) for _ in range(draws)],
    }


def deletion(model: nn.Module, images: Tensor, draws: int = 1, seed: int = 0) -> pd.DataFrame:
    """Mask images bit by bit in four orders and follow the probability of the predicted class.

    Args:
        images: (N, 3, S, S), normalised.
        draws: how many other images' heatmaps, and how many random orders, to average over; less
            than N.

    Returns:
        A row for each fraction masked (17) and image (N), a column for each order: 'heatmap', what
        Grad-CAM of the last stage calls important first, and the controls "another image's
        heatmap", 'centre first' and 'random'.

    Raises:
        ValueError: there are not enough images to give each the heatmaps of others.
    """
    if not 1 <= draws < len(images):
        raise InvalidValue(
            f"expected 1 <= draws < {len(images)}, the number of images, got {draws}"
        )
    with torch.no_grad():
        classes = model.eval()(images.to(next(model.parameters()).device)).argmax(1).tolist()
    cams = explain.gradcam(model, model.stages()[-1].module, images, classes)
    table = {
        name: np.mean([deletion_curves(model, images, classes, o) for o in orders], axis=0).ravel()
        for name, orders in mask_orders(cams, draws, seed).items()
    }
    fractions = np.arange(STEPS + 1) / STEPS
    rows = pd.MultiIndex.from_product([fractions, range(len(images))], names=["masked", "image"])
    return pd.DataFrame(table, index=rows)


def deletion_areas(table: pd.DataFrame) -> pd.DataFrame:
    """The areas under the curves of `deletion`: the smaller, the sooner the confidence is lost.

    Returns:
        A row for each order. area: the mean over the images, 0..1, by trapezoids. more: by how much
        it is above that of the first order, image by image; from, to: the 95 % interval of more.
    """
    curves = table.unstack("image")
    each = pd.Series(np.trapezoid(curves, curves.index, axis=0), curves.columns)
    by_image = each.unstack(0)[table.columns]
    more = by_image.sub(by_image.iloc[:, 0], axis=0)
    half = 1.96 * more.sem()
    mean = more.mean()
    return pd.DataFrame(
        {"area": by_image.mean(), "more": mean, "from": mean - half, "to": mean + half}
    )


def plot_deletion(table: pd.DataFrame, note: str = "") -> Figure:
    """Draw the mean curves of `deletion` with their 95 % intervals; the title says the areas."""
    by_fraction = table.groupby("masked")
    mean, half = by_fraction.mean(), 1.96 * by_fraction.sem()
    fig, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in table:
        axis.plot(mean.index, mean[name], "o-", markersize=3, label=name)
        axis.fill_between(mean.index, mean[name] - half[name], mean[name] + half[name], alpha=0.15)
    axis.set(
        xlabel="fraction of the image masked",
        ylabel="probability of the predicted class",
        ylim=(0, 1),
    )
    found = deletion_areas(table).area
    said = ", ".join(f"{name} {area:.3f}" for name, area in found.items())
    axis.set_title(with_note(f"Areas under the curves:\n{said}", note), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    plt.close(fig)
    return fig
