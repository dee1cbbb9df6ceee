"""Checks of the notebook's exercises.

A check prints whether an answer is right or what is still missing, and returns True or False. An
answer that raises an error is not right yet.
"""

import functools
from collections.abc import Callable

import albumentations as A
import numpy as np
import torch
from torch import Tensor, nn

from evaluation.features import stage_outputs
from evaluation.predict import accuracy
from models import explain, resnet
from models.stage import Network


def check(function: Callable[..., str]) -> Callable[..., bool]:
    """Turn a function that returns what is wrong, or '', into a check."""

    @functools.wraps(function)
    def checked(answer: object, *arguments: object) -> bool:
        try:
            missing = "there is no answer in the cell." if answer is None else ""
            wrong = missing or function(answer, *arguments)
        except Exception as problem:  # whatever the reader's code raises belongs in the sentence
            wrong = f"your code raised {type(problem).__name__}: {problem}."
        print(f"Not yet: {wrong}" if wrong else "Right.")
        return not wrong

    return checked


@check
def opacity(blend: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> str:
    """Check a function that blends colours over an image.

    Args:
        blend: takes an image and colours, both (H, W, 3) in [0, 1], and an opacity; returns
            (H, W, 3).
    """
    rng = np.random.default_rng(0)
    image, cam = rng.random((32, 32, 3)), rng.random((32, 32))
    for value in (0, 0.25, 0.4, 1):
        got = blend(image.copy(), explain.colorize(cam), value)  # an answer may work in place
        if got is None:
            return "your function returns nothing."
        got = np.asarray(got)
        wanted = explain.overlay(image, cam, value)
        if got.shape != wanted.shape:
            return f"expected a picture of shape {wanted.shape}, got {got.shape}."
        if not np.allclose(got, wanted, atol=1e-6):  # nor may it be NaN
            return (
                f"at opacity {value} a pixel is {got[0, 0].round(2)},"
                f" expected {wanted[0, 0].round(2)}."
            )
    return ""


@check
def temperature(value: float, logits: Tensor, labels: Tensor) -> str:
    """Check a temperature: mean confidence and accuracy have to agree within 0.5 percentage points.

    Args:
        value: the temperature, which divides the logits.
        logits: (N, num_classes).
        labels: (N,).
    """
    if not float(value) > 0:
        return f"a temperature is greater than 0, got {value}."
    confidence = float((logits / value).softmax(1).amax(1).mean())
    correct = accuracy(logits, labels)
    if abs(confidence - correct) > 0.005:
        return (
            f"at {value} the network is {confidence:.1%} confident on average,"
            f" and its accuracy is {correct:.1%}."
        )
    return ""


@check
def grey(transform: A.BasicTransform) -> str:
    """Check a transform that makes half of the images grey and leaves the others unchanged."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    augment = A.Compose([transform], seed=0)
    drawn = [augment(image=image)["image"] for _ in range(1000)]
    greys = sum(bool((got == got[..., :1]).all()) and np.ptp(got) > 0 for got in drawn)
    same = sum(np.array_equal(got, image) for got in drawn)
    if greys + same < 1000:
        return f"{1000 - greys - same} of 1000 pictures are neither grey nor unchanged."
    return "" if 440 <= greys <= 560 else f"{greys} of 1000 pictures are grey, expected about 500."


@check
def grad_cam(by_hand: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check a function that computes ReLU(sum over k of mean(gradients_k) * maps_k).

    Args:
        by_hand: takes feature maps and gradients, both (K, H, W), of one image; returns (H, W).
    """
    maps, gradients = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    weighted = [float(gradients[k].mean()) * maps[k] for k in range(6)]
    total = functools.reduce(torch.add, weighted)
    got = by_hand(maps, gradients)
    if not isinstance(got, Tensor):
        return f"expected a tensor, got {type(got).__name__}."
    if got.shape != (4, 4):
        return f"expected a heatmap of shape (4, 4), got {tuple(got.shape)}."
    if torch.allclose(got, total, atol=1e-5):
        return "negative values are left in the heatmap; evidence against the class does not count."
    right = torch.allclose(got, total.relu(), atol=1e-5)
    return "" if right else "the heatmap has other values than the formula gives."


@check
def residual(forward: Callable[[resnet.BasicBlock, Tensor], Tensor]) -> str:
    """Check a function that computes what a residual block returns.

    Args:
        forward: takes a block, with its conv1, bn1, conv2, bn2 and shortcut, and a feature map;
            returns relu(F(x) + shortcut(x)).
    """
    generator = torch.Generator().manual_seed(0)
    for stride in (1, 2):
        block = resnet.BasicBlock(8, 8, stride)
        x = torch.randn(2, 8, 4, 4, generator=generator)
        with torch.no_grad():
            block(x)  # BatchNorm needs statistics: in evaluation, a new one returns what it gets
            block.eval()
            got, wanted = forward(block, x.clone()), block(x)
            plain = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            return (
                f"expected a tensor of shape {tuple(wanted.shape)} with stride {stride}, got"
                f" {tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__}."
            )
        if torch.allclose(got, plain, atol=1e-5):
            return "the shortcut is missing: this is the plain block."
        if not torch.allclose(got, wanted, atol=1e-5):
            return f"with stride {stride} the values differ from those of BasicBlock."
    return ""


@check
def halving(module: nn.Module) -> str:
    """Check a stage that halves the 4x4 feature map of ResNet18 and keeps its 512 channels."""
    maps = torch.randn(2, 512, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shape = tuple(module.eval()(maps).shape)
    if shape != (2, 512, 2, 2):
        return f"expected feature maps of shape (2, 512, 2, 2), got {shape}."
    return "" if has_block(module) else "the shape is right, but there is no residual block in it."


def has_block(module: nn.Module) -> bool:
    """Say whether there is a residual block in a module."""
    return any(isinstance(part, resnet.BasicBlock) for part in module.modules())


@check
def stage(kind: type[Network]) -> str:
    """Check the class of a ResNet18 with a fifth stage, whose feature map is 2x2."""
    network = kind(10)  # as the training and the Space build it
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stages, logits = network.stages(), network.eval()(images)
    if logits.shape != (2, 10):
        return f"expected logits of shape (2, 10), got {tuple(logits.shape)}."
    if [named.size for named in stages] != [32, 16, 8, 4, 2]:
        return f"expected stages of sizes 32, 16, 8, 4, 2, got {[named.size for named in stages]}."
    outputs = stage_outputs(network, images)
    for named in stages:
        shape = tuple(outputs[named.name].shape) if named.name in outputs else ()
        if shape[2:] != (named.size, named.size):
            return (
                f"{named.name} names a feature map of {named.size}x{named.size},"
                f" but the shape of its output is {shape}."
            )
    if not has_block(stages[-1].module):
        return f"there is no residual block in {stages[-1].name}."
    cams = explain.gradcam(network, stages[-1].module, images, [0, 1])
    right = cams.shape == (2, 32, 32)
    return "" if right else f"Grad-CAM of the new stage has the shape {cams.shape}."
