"""Can you trust a Grad-CAM map? Two checks that a map which explains the network should pass.

Randomised weights (Adebayo et al. 2018, arXiv:1810.03292): a network that has learned nothing must give other maps. If
it gives the same, the maps show the picture or the architecture, not what was learned.
Deletion (Petsiuk et al. 2018, arXiv:1806.07421): what a map calls important, taken away first, must cost the network
its confidence sooner than the same area taken away at random.
"""

import copy
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from models import explain
from utils import Misclassified, rgb, with_note

CELL = 4  # pixels: images are taken away in squares of 4x4
STEPS = 16  # of a deletion curve


# ---- randomised weights ---------------------------------------------------------------------------------------------


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the network, on the CPU, that has learned nothing: every layer with new random weights."""
    copied = copy.deepcopy(model).cpu().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return copied


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation, -1..1, of each pair of maps (N, H, W); 0 where a map is empty, all of one value."""
    ranks = [pd.DataFrame(maps.reshape(len(maps), -1)).rank(axis=1) for maps in (first, second)]
    return ranks[0].corrwith(ranks[1], axis=1).fillna(0).to_numpy()


def plot_randomised(
    model: nn.Module, data: Sequence[Misclassified], inv_normalize: Callable[[Tensor], Tensor], note: str = ""
) -> tuple[Figure, float]:
    """Each image, its Grad-CAM map of the last stage for the predicted class, and that of an untrained network.

    Returns the figure and the mean similarity of the two maps.
    """
    images, classes = torch.stack([sample.image for sample in data]), [sample.pred for sample in data]
    maps = [
        explain.gradcam(network, network.stages()[-1].module, images, classes) for network in (model, untrained(model))
    ]
    fig, axes = plt.subplots(3, len(data), figsize=(1.5 * len(data), 5), squeeze=False, layout="constrained")
    for column, sample in enumerate(data):
        picture = rgb(sample.image, inv_normalize)
        for axis, cam in zip(axes[:, column], (None, maps[0][column], maps[1][column]), strict=True):
            axis.imshow(picture if cam is None else explain.overlay(picture, cam, 0.6), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "trained", "random weights"), strict=True):
        axis.set_ylabel(name)
    fig.suptitle(with_note("Grad-CAM of the trained network and of one with random weights", note))
    plt.close(fig)
    return fig, float(similarity(*maps).mean())


# ---- deletion -------------------------------------------------------------------------------------------------------


def cell_means(maps: np.ndarray) -> np.ndarray:
    """The mean of a map in each square of 4x4 pixels: (N, S, S) -> (N, S/4 * S/4)."""
    count, side = len(maps), maps.shape[1] // CELL
    return maps.reshape(count, side, CELL, side, CELL).mean((2, 4)).reshape(count, -1)


def delete(images: Tensor, order: np.ndarray, fraction: float) -> Tensor:
    """Images (N, 3, S, S), normalised, with the first `fraction` of their squares grey, the mean colour.

    order: (N, squares), for each image the numbers of its squares, row by row, in the order they are taken away.
    """
    side = images.shape[2] // CELL
    gone = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(gone, order[:, : round(fraction * order.shape[1])], True, axis=1)
    mask = torch.from_numpy(gone.reshape(-1, 1, side, side).repeat(CELL, axis=2).repeat(CELL, axis=3))
    return images.masked_fill(mask.to(images.device), 0)


@torch.no_grad()
def deletion_curve(model: nn.Module, images: Tensor, classes: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Mean probability of each image's class when 0, 1/16, ... 16/16 of its squares are taken away: (17,)."""
    device, index = next(model.parameters()).device, torch.tensor(classes)[:, None]
    curve = []
    for step in range(STEPS + 1):
        logits = model.eval()(delete(images, order, step / STEPS).to(device)).float().cpu()
        curve.append(float(logits.softmax(1).gather(1, index).mean()))
    return np.array(curve)


def deletion(model: nn.Module, images: Tensor, draws: int = 3, seed: int = 0) -> pd.DataFrame:
    """Deletion curves of normalised images (N, 3, S, S) for the class that the network predicts.

    Rows: the fraction taken away. Columns: 'by the map', the squares that Grad-CAM of the last stage calls most
    important first; 'at random', the mean of some random orders.
    """
    with torch.no_grad():
        classes = model.eval()(images.to(next(model.parameters()).device)).argmax(1).tolist()
    cams = explain.gradcam(model, model.stages()[-1].module, images, classes)
    by_map = np.argsort(-cell_means(cams), axis=1, kind="stable")
    chance = np.random.default_rng(seed)
    random = [deletion_curve(model, images, classes, chance.permuted(by_map, axis=1)) for _ in range(draws)]
    table = {"by the map": deletion_curve(model, images, classes, by_map), "at random": np.mean(random, axis=0)}
    return pd.DataFrame(table, index=pd.Index(np.arange(STEPS + 1) / STEPS, name="taken away"))


def plot_deletion(table: pd.DataFrame, note: str = "") -> Figure:
    """The table of `deletion` as curves; the title tells the areas under them."""
    fig, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, curve in table.items():
        axis.plot(curve.index, curve, "o-", markersize=3, label=f"{name}: area {area(curve):.3f}")
    axis.set(xlabel="fraction of the image taken away", ylabel="probability of the predicted class", ylim=(0, 1))
    axis.set_title(note)
    axis.grid(alpha=0.3)
    axis.legend()
    plt.close(fig)
    return fig


def area(curve: pd.Series) -> float:
    """The area under a deletion curve, 0..1, by trapezoids: the smaller, the sooner the confidence was lost."""
    return float(np.trapezoid(curve.to_numpy(), curve.index.to_numpy()))
