"""What all figures of heatmaps share: their colour bar, and how alike two heatmaps are."""

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from evaluation.drawing import TEXT
from models import explain


def draw_colour_bar(fig: Figure, axes: np.ndarray) -> None:
    """Draw a bar that explains a heatmap's colours, below the axes."""
    colours = explain.colorize(np.linspace(0, 1, 256)[None])[0]
    mappable = ScalarMappable(cmap=ListedColormap(colours))
    bar = fig.colorbar(
        mappable, ax=axes, location="bottom", aspect=60, shrink=0.6, pad=0.01, fraction=0.03
    )
    bar.set_ticks([0, 1], labels=["least evidence", "most evidence in the image"])
    bar.ax.tick_params(labelsize=TEXT, length=0)


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
