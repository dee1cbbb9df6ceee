"""What a trained network can and cannot do: what it confuses, how sure it may be, what disturbs it, what it sees.

Every drawing function takes data and returns a Figure.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dataload import Images, make_loader
from evaluation import BINS, accuracy, calibration_error, predict, reliability
from models.errors import InvalidValue
from models.lit import Recipe, triangle
from utils import Misclassified, read_table, rgb, with_note


def lower_contrast(image: np.ndarray, part: float, **_: object) -> np.ndarray:
    """Blend an image (H, W, 3), uint8, with its own mean colour: `part`, 0..1, of the mean.

    As in CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261): the image stays as bright.
    """
    mean = image.mean((0, 1))
    return np.uint8(np.round(mean + (1 - part) * (image - mean)))


# Five ways to corrupt a picture, each in three strengths. A range of one value is that value.
CORRUPTIONS: dict[str, Callable[[float], A.BasicTransform]] = {
    "noise": lambda s: A.GaussNoise(std_range=(s, s), p=1),
    "blur": lambda s: A.GaussianBlur(blur_limit=0, sigma_limit=(s, s), p=1),
    "JPEG": lambda s: A.ImageCompression(quality_range=(round(s), round(s)), p=1),
    # What albumentations calls contrast multiplies each value: that is less light.
    "dark": lambda s: A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=(-s, -s), p=1),
    "contrast": lambda s: A.Lambda(image=functools.partial(lower_contrast, part=s)),
}
STRENGTHS = {
    "noise": (0.04, 0.08, 0.16),  # standard deviation, of values in 0..1
    "blur": (0.6, 1.0, 1.6),  # standard deviation, pixels
    "JPEG": (50, 25, 10),  # quality
    "dark": (0.4, 0.6, 0.8),  # how much of the light is taken away
    "contrast": (0.4, 0.6, 0.8),  # how much of the distance to the mean colour is taken away
}

# ---- errors and confidence ------------------------------------------------------------------------------------------


def most_confused(misclassified: Sequence[Misclassified], classes: Sequence[str], count: int = 5) -> pd.DataFrame:
    """The pairs of classes that are taken for each other most often, in either direction: columns pair, images."""
    pairs = [" and ".join(sorted((classes[sample.label], classes[sample.pred]))) for sample in misclassified]
    counts = pd.Series(pairs, dtype=str).value_counts(sort=False)
    table = counts.rename_axis("pair").reset_index(name="images")
    return table.sort_values(["images", "pair"], ascending=[False, True], ignore_index=True).head(count)


def most_confident(misclassified: Sequence[Misclassified]) -> list[Misclassified]:
    """The same errors, the surest first."""
    return sorted(misclassified, key=lambda sample: -sample.prob)


def plot_reliability(logits: Tensor, labels: Tensor, temperature: float, note: str = "") -> Figure:
    """Accuracy against confidence, before and after the temperature; bars on the diagonal would be perfect.

    logits: (N, classes). labels: (N,). The darker a bar, the more images are in it.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 4), sharey=True, layout="constrained")
    for axis, name, value in zip(axes, ("before", "after"), (1.0, temperature), strict=True):
        _, right, count = reliability(logits, labels, value)
        filled = count > 0
        middle = (np.arange(BINS) + 0.5) / BINS
        shade = plt.get_cmap("Blues")(0.3 + 0.7 * (count / count.max()).sqrt().numpy())
        axis.bar(middle[filled], (right[filled] / count[filled]).numpy(), 0.9 / BINS, color=shade[filled.numpy()])
        axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        error = calibration_error(logits, labels, value)
        axis.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{name}: temperature {value:.2f}, error {error:.2%}"
        )
    axes[0].set_ylabel("accuracy (fraction)")
    fig.suptitle(with_note("How often the network is right when it is so sure", note))
    plt.close(fig)
    return fig


# ---- corruptions ----------------------------------------------------------------------------------------------------


def corrupt(images: np.ndarray, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """Corrupt images, always in the same way.

    Args:
        images: (N, 32, 32, 3), uint8.
        name: a key of CORRUPTIONS.
        strength: 1 to 3; 0 leaves the images alone.

    Raises:
        ValueError: there is no such corruption or strength.
    """
    if name not in CORRUPTIONS or strength not in (0, 1, 2, 3):
        names = ", ".join(CORRUPTIONS)
        raise InvalidValue(f"expected one of {names} and a strength of 0 to 3, got {name!r}, {strength}")
    if strength == 0:
        return images
    transform = A.Compose([CORRUPTIONS[name](STRENGTHS[name][strength - 1])], seed=seed, strict=True)
    return np.stack([transform(image=image)["image"] for image in images])


def robustness(model: nn.Module, device: str, part: Images) -> pd.DataFrame:
    """Accuracy (fraction) on these images: a row for each strength, 0 to 3, a column for each corruption."""

    def score(name: str, strength: int) -> float:
        corrupted = Images(corrupt(part.images, name, strength), part.labels)
        return accuracy(*predict(model, device, make_loader(corrupted, 250, 0, train=False)))

    clean = score("noise", 0)
    columns = {name: [clean, *(score(name, strength) for strength in (1, 2, 3))] for name in CORRUPTIONS}
    return pd.DataFrame(columns).rename_axis("strength")


def plot_robustness(table: pd.DataFrame, image: np.ndarray, note: str = "") -> Figure:
    """Draw the table of `robustness`, above it an image, uint8 (32, 32, 3), in all strengths."""
    fig = plt.figure(figsize=(8.5, 8.2), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = above.subplots(4, len(table.columns))
    for column, name in enumerate(table.columns):
        for strength, axis in enumerate(axes[:, column]):
            axis.imshow(corrupt(image[None], name, strength)[0], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(name, fontsize=9)
    for axis, label in zip(axes[:, 0], ("clean", "strength 1", "strength 2", "strength 3"), strict=True):
        axis.set_ylabel(label)
    axis = below.subplots()
    for name, values in table.items():
        axis.plot(table.index, values, "o-", markersize=4, label=name)
    axis.set(xlabel="strength (0: clean)", ylabel="accuracy (fraction)", xticks=table.index, ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(ncols=len(table.columns), fontsize=8)
    fig.suptitle(with_note("Accuracy on corrupted test images", note))
    plt.close(fig)
    return fig


# ---- inside the network ---------------------------------------------------------------------------------------------


def plot_filters(model: nn.Module, note: str = "") -> Figure:
    """The filters of the network's first convolution as small colour pictures, each scaled to its own range."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    filters = first.weight.detach().cpu()  # (out, 3, k, k)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    pictures = ((filters - low) / (high - low).clamp(min=1e-8)).permute(0, 2, 3, 1).numpy()
    columns = 16
    rows = -(-len(pictures) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(8.5, 0.55 * rows + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture, interpolation="nearest")
    size = "x".join(str(side) for side in first.kernel_size)
    fig.suptitle(with_note(f"The first layer: {len(filters)} filters of {size} pixels", note))
    plt.close(fig)
    return fig


@torch.no_grad()
def stage_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each stage makes of one normalised image (3, 32, 32): name -> (channels, side, side), on the CPU."""
    outputs, mode = {}, model.training
    handles = [
        stage.module.register_forward_hook(
            lambda _module, _inputs, output, name=stage.name: outputs.__setitem__(name, output[0].float().cpu())
        )
        for stage in model.stages()
    ]
    try:
        model.eval()(image[None].to(next(model.parameters()).device))
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return outputs


def plot_stages(
    model: nn.Module, image: Tensor, inv_normalize: Callable[[Tensor], Tensor], channels: int = 8, note: str = ""
) -> Figure:
    """One image (3, 32, 32), normalised, and for each stage the channels that answer to it most strongly."""
    outputs = stage_outputs(model, image)
    fig, axes = plt.subplots(
        len(outputs), channels + 1, figsize=(1.05 * (channels + 1), 1.2 * len(outputs)), layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, (name, maps) in zip(axes, outputs.items(), strict=True):
        strongest = maps.abs().mean((1, 2)).topk(channels).indices
        row[0].imshow(rgb(image, inv_normalize), interpolation="nearest")
        row[0].set_ylabel(f"{name}\n{maps.shape[1]}x{maps.shape[2]}", fontsize=9)
        for axis, channel in zip(row[1:], strongest.tolist(), strict=True):
            axis.imshow(maps[channel].numpy(), cmap="viridis", interpolation="nearest")
            axis.set_title(channel, fontsize=7)
    fig.suptitle(with_note("The channels that answer most strongly, each scaled to its own range", note))
    plt.close(fig)
    return fig


# ---- learning rate --------------------------------------------------------------------------------------------------


def plot_schedule(metrics_csv: str | Path, recipe: Recipe, note: str = "") -> tuple[Figure | None, float, float]:
    """The learning rate of every step, from the log; of SGD or, if it is used, of Muon.

    metrics_csv: the table of a run, column lr_step. Returns the figure, the largest rate in the log, and the largest
    that the recipe asks for in so many steps, a little below its peak; None and NaN where the log holds no rates.
    """
    table, peak = read_table(metrics_csv), recipe.muon_lr or recipe.max_lr
    if "lr_step" not in table:
        return None, float("nan"), float("nan")
    rates = table["lr_step"].dropna().to_numpy()
    fig, axis = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    axis.plot(np.arange(1, len(rates) + 1) * recipe.epochs / len(rates), rates)
    axis.set(xlabel="epoch", ylabel=f"learning rate ({'Muon' if recipe.muon_lr else 'SGD'})", title=note)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    plt.close(fig)
    wanted = peak * max(triangle((step + 0.5) / len(rates), recipe.warmup) for step in range(len(rates)))
    return fig, float(rates.max()), wanted


def plot_range_test(table: pd.DataFrame, note: str = "") -> Figure:
    """The loss of `training.range_test` against the learning rate, as a multiple of the recipe's peak."""
    fig, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    axis.semilogx(table.factor, table.loss, ".", alpha=0.4, label="of each step")
    axis.semilogx(table.factor, table.loss.ewm(span=5).mean(), "-", label="smoothed")
    axis.axvline(1, linestyle="--", color="grey", label="the recipe's peak")
    axis.set(xlabel="learning rate / the recipe's peak", ylabel="training loss", title=note)
    axis.grid(alpha=0.3)
    axis.legend()
    plt.close(fig)
    return fig
