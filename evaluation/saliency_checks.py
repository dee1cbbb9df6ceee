"""Two checks that a heatmap must pass to explain a network (saliency checks).

Randomised weights (Adebayo et al. 2018, arXiv:1810.03292): a network that has learned nothing must
give other heatmaps. If it gives the same ones, they show the image or the architecture instead of
what was learned. Deletion (Petsiuk et al. 2018, arXiv:1806.07421): masking what a heatmap calls
important must lower the network's confidence sooner than masking other places. The controls are
random places, but also the centre of the image, where objects usually are, and the heatmap of
another image. A heatmap that is no better than the latter two says nothing about its image.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import new_chart, new_image_grid, rgb, show_image, with_note
from evaluation.errors import Misclassified
from models import explain
from models.errors import InvalidValue
from models.stage import Network

PATCH = 4  # pixels: images are masked in patches of 4x4
STEPS = 16  # of a deletion curve


# ---- randomised weights --------------------------------------------------------------------------


def randomize_weights(model: Network, seed: int = 0) -> Network:
    """Return a copy of a network, on the CPU, in which every layer has new random weights."""
    copied = copy.deepcopy(model).cpu().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset:
                reset()
    return copied


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute Spearman's rank correlation of each pair of heatmaps.

    Args:
        first: (N, H, W).
        second: (N, H, W).

    Returns:
        (N,), -1..1; 0 where all values of a heatmap are equal.
    """
    ranks = [pd.DataFrame(maps.reshape(len(maps), -1)).rank(axis=1) for maps in (first, second)]
    return ranks[0].corrwith(ranks[1], axis=1).fillna(0).to_numpy()


def plot_randomized(
    model: Network,
    data: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    note: str = "",
) -> tuple[Figure, float]:
    """Draw the heatmaps of a network beside those of the same network with random weights.

    The heatmaps are of the last stage and for the class that the trained network predicts.

    Args:
        model: the trained network.
        data: the images.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        note: a line under the title.

    Returns:
        The figure and the mean rank correlation of the two heatmaps of an image.
    """
    images = torch.stack([sample.image for sample in data])
    trained, randomized = (
        explain.gradcam(net, net.stages()[-1].module, images, [sample.pred for sample in data])
        for net in (model, randomize_weights(model))
    )
    fig, axes = new_image_grid(3, len(data), 1.5 * len(data), 5, frames=True)
    for column, sample in enumerate(data):
        image = rgb(sample.image, inv_normalize)
        show_image(axes[0, column], image)
        for row, cams in enumerate((trained, randomized), 1):
            show_image(axes[row, column], explain.overlay(image, cams[column], 0.6))
    for axis, name in zip(axes[:, 0], ("image", "trained", "random weights"), strict=True):
        axis.set_ylabel(name)
    fig.suptitle(with_note("Grad-CAM of the trained network and of one with random weights", note))
    return fig, float(rank_correlation(trained, randomized).mean())


# ---- deletion ------------------------------------------------------------------------------------


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
    for step in range(STEPS + 1):
        logits = model.eval()(mask_patches(images, order, step / STEPS).to(device)).float().cpu()
        curves.append(logits.softmax(1).gather(1, index)[:, 0].numpy())
    return np.stack(curves)


def centre_first(side: int) -> np.ndarray:
    """Order the indices of side x side patches by their distance from the middle of the image."""
    offsets = np.arange(side) - (side - 1) / 2
    return np.argsort((offsets[:, None] ** 2 + offsets**2).ravel(), kind="stable")


def mask_orders(cams: np.ndarray, draws: int, seed: int) -> dict[str, list[np.ndarray]]:
    """List, for each way to mask images, the orders (N, patches) that are averaged over.

    Args:
        cams: the images' heatmaps, (N, S, S).
        draws: how many other images' heatmaps and how many random orders.
        seed: of the random orders.
    """
    own = np.argsort(-patch_means(cams), axis=1, kind="stable")
    generator = np.random.default_rng(seed)
    return {
        "heatmap": [own],
        "another image's heatmap": [np.roll(own, shift, axis=0) for shift in range(1, draws + 1)],
        "centre first": [np.broadcast_to(centre_first(cams.shape[1] // PATCH), own.shape)],
        "random": [generator.permuted(own, axis=1) for _ in range(draws)],
    }


def deletion(model: Network, images: Tensor, draws: int = 1, seed: int = 0) -> pd.DataFrame:
    """Mask images step by step in four orders and record the predicted class's probability.

    Args:
        model: the network.
        images: (N, 3, S, S), normalised.
        draws: how many other images' heatmaps, and how many random orders, to average over; less
            than N.
        seed: of the random orders.

    Returns:
        A row for each fraction masked (17) and image (N), a column for each order: 'heatmap', what
        Grad-CAM of the last stage calls important first, and the controls "another image's
        heatmap", 'centre first' and 'random'.

    Raises:
        ValueError: if there are not enough images to give each the heatmaps of others.
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
    """Compute the areas under deletion curves: the smaller, the sooner the confidence falls.

    Args:
        table: of `deletion`.

    Returns:
        A row for each order. area: the mean over the images, 0..1, by the trapezoidal rule.
        difference: the mean of how much each image's area exceeds that of the first order; from,
        to: its 95 % interval.
    """
    areas = pd.DataFrame({name: image_areas(image_curves(table, name)) for name in table.columns})
    differences = areas.sub(areas.iloc[:, 0], axis=0)
    mean, half = differences.mean(), 1.96 * differences.sem()
    return pd.DataFrame(
        {"area": areas.mean(), "difference": mean, "from": mean - half, "to": mean + half}
    )


def image_curves(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the curves of one order: a row for each fraction masked, a column for each image."""
    return pd.DataFrame(table[name].unstack("image"))


def image_areas(curves: pd.DataFrame) -> np.ndarray:
    """Integrate one curve per column over the index."""
    return np.trapezoid(curves.to_numpy(), curves.index.to_numpy(), axis=0)


def plot_deletion(table: pd.DataFrame, note: str = "") -> Figure:
    """Draw the mean deletion curves with their 95 % intervals; the title states the areas.

    Args:
        table: of `deletion`.
        note: a last line of the title.
    """
    fig, axis = new_chart(7, 4.2)
    for name in table.columns:
        curves = image_curves(table, name)
        fractions = curves.index.to_numpy()
        mean, half = curves.mean(axis=1), 1.96 * curves.sem(axis=1)
        axis.plot(fractions, mean, "o-", markersize=3, label=name)
        axis.fill_between(fractions, mean - half, mean + half, alpha=0.15)
    axis.set(xlabel="fraction of the image masked", ylabel="probability of the predicted class")
    axis.set_ylim(0, 1)
    areas = deletion_areas(table)["area"]
    listed = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
    axis.set_title(with_note(f"Areas under the curves:\n{listed}", note), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    return fig
