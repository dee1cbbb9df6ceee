"""Where a network looked: Grad-CAM maps of one stage, and an overlay whose opacity means opacity.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs each channel of a stage's map by the mean
gradient of the class's logit with respect to it, adds the channels up and keeps what is positive.
Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063) takes only positive gradients, weighed so
that small things count as well; LayerCAM (Jiang et al. 2021) weighs each cell by its own gradient,
which suits the fine maps of early stages.
"""

import threading
from collections.abc import Callable

import numpy as np
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM
from torch import Tensor, nn

from models.errors import InvalidValue

METHODS = {"GradCAM": GradCAM, "GradCAM++": GradCAMPlusPlus, "LayerCAM": LayerCAM}
LOCK = (
    threading.Lock()
)  # grad-cam hooks the network: whatever runs it meanwhile would end in the maps


def logit_of(target: int) -> Callable[[Tensor], Tensor]:
    """A function that picks the logit of class `target` from the logits (num_classes,) of one image."""

    def pick(logits: Tensor) -> Tensor:
        if not 0 <= target < len(logits):  # grad-cam would swallow the IndexError
            raise InvalidValue(f"expected a class from 0 to {len(logits) - 1}, got {target}")
        return logits[target]

    return pick


def gradcam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: list[int], method: str = "GradCAM"
) -> np.ndarray:
    """Grad-CAM maps (N, H, W) in [0, 1], of the size of the images; each is scaled to its own minimum and maximum.

    layer: the module of model whose output is explained. images: normalised (N, 3, H, W).
    classes: the class to explain, one for each image. method: a key of METHODS. Raises ValueError if there are more or
    fewer classes, if one is no output of the network, if layer is not part of it, or if the method is unknown. The
    network's modes and gradients are left as they were.
    """
    if method not in METHODS:
        raise InvalidValue(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    if len(classes) != len(images):
        raise InvalidValue(f"expected a class for each of {len(images)} images, got {len(classes)}")
    if not any(module is layer for module in model.modules()):
        raise InvalidValue(
            f"expected a layer of the network, got {type(layer).__name__}, which is not in it"
        )
    with LOCK:
        modes = {module: module.training for module in model.modules()}
        parameters = {
            parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()
        }
        try:
            model.eval().requires_grad_(
                False
            )  # only the maps' gradients are needed, not the weights'
            # fp32 whatever the surroundings: grad-cam cannot take bfloat16 maps.
            with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
                with METHODS[method](model, [layer]) as cam:
                    inputs = images.detach().float().requires_grad_()
                    return cam(inputs, [logit_of(target) for target in classes])
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, (requires_grad, grad) in parameters.items():
                parameter.requires_grad_(requires_grad).grad = grad


def colorize(cam: np.ndarray) -> np.ndarray:
    """Colours of a map: (H, W) in [0, 1] -> RGB (H, W, 3) in [0, 1], blue for 0 over green to red for 1."""
    return np.stack([np.clip(1.5 - np.abs(4 * cam - peak), 0, 1) for peak in (3, 2, 1)], axis=-1)


def overlay(image: np.ndarray, cam: np.ndarray, opacity: float) -> np.ndarray:
    """Blend the colours of a map over an image.

    image: RGB (H, W, 3) in [0, 1]. cam: (H, W) in [0, 1]. opacity: from 0, the image unchanged, to
    1, the map alone. Returns RGB (H, W, 3) in [0, 1]; unlike grad-cam's show_cam_on_image it is not
    rescaled by its maximum. Raises ValueError if shapes or ranges do not fit.
    """
    if image.ndim != 3 or image.shape[2] != 3 or cam.shape != image.shape[:2]:
        raise InvalidValue(
            f"expected an image (H, W, 3) and a map (H, W), got {image.shape} and {cam.shape}"
        )
    for name, values in (("image", image), ("map", cam), ("opacity", np.float64(opacity))):
        if not (np.min(values) >= 0 and np.max(values) <= 1):
            raise InvalidValue(
                f"expected values from 0 to 1, got {name} {np.min(values)} to {np.max(values)}"
            )
    return (1 - opacity) * image + opacity * colorize(cam)
