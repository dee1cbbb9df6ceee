"""Grad-CAM heatmaps of one stage of a network, and their overlay on an image.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weights each feature map of a stage by the mean
gradient of the class's logit with respect to it, adds the feature maps up and keeps what is
positive. Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063) uses only positive gradients,
weighted so that small objects count as well. LayerCAM (Jiang et al. 2021) weights each cell by its
own gradient, which suits the high-resolution feature maps of early stages.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import matplotlib
import numpy as np
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM
from torch import Tensor, nn

from models.errors import InvalidValue
from models.stage import eval_mode

METHODS = {"GradCAM": GradCAM, "GradCAM++": GradCAMPlusPlus, "LayerCAM": LayerCAM}
# Held while grad-cam's hooks are in a network: they would record other threads' forward passes.
LOCK = threading.Lock()


Target = Callable[[Tensor], Tensor]  # an image's logits (num_classes,) -> the one to explain


def logit_of(target: int) -> Target:
    """Return a function that picks one class's logit from those of an image."""

    def pick(logits: Tensor) -> Tensor:
        if target not in range(len(logits)):  # grad-cam would swallow the IndexError
            raise InvalidValue(f"expected a class from 0 to {len(logits) - 1}, got {target}")
        return logits[target]

    return pick


def top_logit(rank: int) -> Target:
    """Return a function that picks the logit of a top class; 0 stands for the most probable one."""
    return lambda logits: logits[logits.argsort(descending=True)[rank]]


@contextlib.contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the weights within the block; those they had before are kept."""
    gradients = {param: (param.requires_grad, param.grad) for param in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for param, (requires_grad, grad) in gradients.items():
            param.requires_grad_(requires_grad).grad = grad


def gradcam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: list[int], method: str = "GradCAM"
) -> np.ndarray:
    """Compute one Grad-CAM heatmap per image; the network's modes and gradients are restored.

    Args:
        model: the network.
        layer: the module of model whose output is explained.
        images: normalised, (N, 3, H, W).
        classes: N classes to explain, one for each image.
        method: a key of METHODS.

    Returns:
        Heatmaps (N, H, W) in [0, 1], each scaled to its own minimum and maximum.

    Raises:
        ValueError: if the method is unknown, layer is not part of the network, the number of
            classes is not the number of images, a class is no output of the network, the layer's
            output is no feature maps, or the images are none or hold what is no finite number.
    """
    if len(classes) != len(images):
        raise InvalidValue(f"expected a class for each of {len(images)} images, got {len(classes)}")
    targets = [[logit_of(label)] for label in classes]
    return np.concatenate(classify_and_explain(model, layer, images, targets, method)[1])


def classify_and_explain(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    targets: list[list[Target]],
    method: str = "GradCAM",
) -> tuple[Tensor, list[np.ndarray]]:
    """Classify images and compute heatmaps of several classes of each in one forward pass.

    What precedes the layer is computed once for each image, and no gradient of it at all.

    Args:
        model: the network. Its modes and gradients are restored.
        layer: the module of model whose output is explained.
        images: normalised, (N, 3, H, W).
        targets: for each image what is to be explained, one logit or more.
        method: a key of METHODS.

    Returns:
        Logits (N, num_classes), and for each image its heatmaps (number of its targets, H, W) in
        [0, 1], each scaled to its own minimum and maximum.

    Raises:
        ValueError: as gradcam does.
    """
    if method not in METHODS:
        raise InvalidValue(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    if not any(module is layer for module in model.modules()):
        raise InvalidValue(
            f"expected a layer of the network, got {type(layer).__name__}, which is not in it"
        )
    if not len(images) or not images.isfinite().all():
        raise InvalidValue("expected at least one image, and finite numbers only")
    counts = torch.tensor([len(of_image) for of_image in targets])
    ends = counts.cumsum(0)

    def branch(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        """Return the layer's output once for each target, as where gradients begin."""
        if output.ndim != 4:
            got = f"{type(layer).__name__} with outputs of shape {tuple(output.shape)}"
            raise InvalidValue(f"expected a layer with feature maps (N, C, h, w), got {got}")
        copies = counts.to(output.device)
        return output.detach().repeat_interleave(copies, dim=0).requires_grad_()

    with (
        LOCK,
        eval_mode(model),
        frozen_weights(model),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),  # grad-cam cannot take bfloat16
        layer.register_forward_hook(branch),
        METHODS[method](model, [layer]) as cam,
    ):
        cams = cam(images.detach().float(), list(itertools.chain(*targets)))
        firsts = (ends - counts).to(cam.outputs.device)
        return cam.outputs.detach()[firsts], np.split(cams, ends.tolist()[:-1])


def colorize(cam: np.ndarray) -> np.ndarray:
    """Return the colours of a heatmap.

    Args:
        cam: the heatmap, (H, W) in [0, 1].

    Returns:
        RGB (H, W, 3) in [0, 1]: from black for 0 over purple and orange to pale yellow for 1, in
        steps that look equal (Matplotlib's inferno).
    """
    return matplotlib.colormaps["inferno"](cam)[..., :3]


def overlay(image: np.ndarray, cam: np.ndarray, opacity: float) -> np.ndarray:
    """Blend a heatmap over an image (alpha blending).

    Args:
        image: RGB (H, W, 3) in [0, 1].
        cam: the heatmap, (H, W) in [0, 1].
        opacity: of the heatmap: 0 gives the image unchanged, 1 the heatmap alone.

    Returns:
        RGB (H, W, 3) in [0, 1]. Unlike grad-cam's show_cam_on_image, the blend is not divided by
        its maximum.

    Raises:
        ValueError: if shapes do not fit or values are outside [0, 1].
    """
    if image.ndim != 3 or image.shape[2] != 3 or cam.shape != image.shape[:2]:
        raise InvalidValue(
            f"expected an image (H, W, 3) and a heatmap (H, W), got {image.shape} and {cam.shape}"
        )
    for name, values in (("image", image), ("heatmap", cam), ("opacity", np.float64(opacity))):
        if not (np.min(values) >= 0 and np.max(values) <= 1):
            raise InvalidValue(
                f"expected values from 0 to 1, got {name} {np.min(values)} to {np.max(values)}"
            )
    return (1 - opacity) * image + opacity * colorize(cam)
