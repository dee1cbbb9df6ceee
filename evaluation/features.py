"""What the layers of a network respond to."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import rgb, with_note


def plot_filters(model: nn.Module, note: str = "") -> Figure:
    """The filters of the network's first convolution as small colour pictures, each scaled to its own range."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    filters = first.weight.detach().cpu()  # (out, 3, k, k)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    pictures = ((filters - low) / (high - low).clamp(min=1e-8)).permute(0, 2, 3, 1).numpy()
    columns = 16
    rows = -(-len(pictures) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(8.5, 0.55 * rows + 0.5), squeeze=False, layout="constrained"
    )
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
    """What each stage makes of one normalised image (3, 32, 32).

    Name -> (channels, side, side), on the CPU.
    """
    outputs, mode = {}, model.training
    handles = [
        stage.module.register_forward_hook(
            lambda _module, _inputs, output, name=stage.name: outputs.__setitem__(
                name, output[0].float().cpu()
            )
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
    model: nn.Module,
    image: Tensor,
    inv_normalize: Callable[[Tensor], Tensor],
    channels: int = 8,
    note: str = "",
) -> Figure:
    """One image (3, 32, 32), normalised, and for each stage the channels that answer to it most strongly."""
    outputs = stage_outputs(model, image)
    fig, axes = plt.subplots(
        len(outputs),
        channels + 1,
        figsize=(1.05 * (channels + 1), 1.2 * len(outputs)),
        layout="constrained",
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
    fig.suptitle(
        with_note("The channels that answer most strongly, each scaled to its own range", note)
    )
    plt.close(fig)
    return fig
