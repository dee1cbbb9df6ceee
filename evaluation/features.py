"""What the layers of a network respond to."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from evaluation.drawing import new_image_grid, rgb, show_image, with_note
from models.stage import Network, eval_mode

FILTER_COLUMNS = 16


def plot_filters(model: nn.Module, note: str = "") -> Figure:
    """Draw the filters of the first convolution as colour images, each scaled to its own range.

    Args:
        model: the network; its first convolution has three input channels.
        note: a line under the title.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    filters = first.weight.detach().cpu()  # (out, 3, k, k)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    images = ((filters - low) / (high - low).clamp(min=1e-8)).permute(0, 2, 3, 1).numpy()
    rows = -(-len(images) // FILTER_COLUMNS)
    fig, axes = new_image_grid(rows, FILTER_COLUMNS, 8.5, 0.55 * rows + 0.5)
    for axis, image in zip(axes.flat, images, strict=False):
        show_image(axis, image)
    size = "x".join(str(side) for side in first.kernel_size)
    fig.suptitle(with_note(f"The first layer: {len(filters)} filters of {size} pixels", note))
    return fig


@torch.no_grad()
def stage_outputs(model: Network, image: Tensor) -> dict[str, Tensor]:
    """Compute the feature maps of each stage for one image; the network keeps its mode.

    Args:
        model: the network.
        image: normalised (3, 32, 32).

    Returns:
        Name of the stage -> (channels, side, side), on the CPU.
    """
    outputs = {}

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: outputs.update({name: output[0].float().cpu()})

    handles = [stage.module.register_forward_hook(recorder(stage.name)) for stage in model.stages()]
    try:
        with eval_mode(model):
            model(image[None].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def plot_stages(
    model: Network,
    image: Tensor,
    inv_normalize: Callable[[Tensor], Tensor],
    channels: int = 8,
    note: str = "",
) -> Figure:
    """Draw an image and, for each stage, the channels that it activates most.

    Args:
        model: the network.
        image: normalised (3, 32, 32).
        inv_normalize: normalised (3, H, W) -> [0, 1].
        channels: how many of each stage.
        note: a line under the title.
    """
    outputs = stage_outputs(model, image)
    rows, columns = len(outputs), channels + 1
    fig, axes = new_image_grid(rows, columns, 1.05 * columns, 1.2 * rows, frames=True)
    for row, (name, maps) in zip(axes, outputs.items(), strict=True):
        most_activated = maps.abs().mean((1, 2)).topk(channels).indices
        show_image(row[0], rgb(image, inv_normalize))
        row[0].set_ylabel(f"{name}\n{maps.shape[1]}x{maps.shape[2]}", fontsize=9)
        for axis, channel in zip(row[1:], most_activated.tolist(), strict=True):
            axis.imshow(maps[channel].numpy(), cmap="viridis", interpolation="nearest")
            axis.set_title(str(channel), fontsize=7)
    fig.suptitle(with_note("The most activated channels, each scaled to its own range", note))
    return fig
