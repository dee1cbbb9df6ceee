"""Checks of the notebook's exercises.

Each says whether an answer is right, or what is still missing.

A check returns True or False and prints a sentence; an answer that raises an error is an answer
that is not right yet.
"""

import functools
from collections.abc import Callable

import albumentations as A
import numpy as np
import torch
from torch import Tensor, nn

from evaluation.predict import accuracy
from models import explain


def check(function: Callable[..., str]) -> Callable[..., bool]:
    """Make a check of a function that returns what is wrong, or '' if nothing is."""

    @functools.wraps(function)
    def checked(answer: object, *given: object) -> bool:
        try:
            wrong = (
                "there is no answer in the cell." if answer is None else function(answer, *given)
            )
        except Exception as problem:  # whatever the reader's code raises belongs in the sentence
            wrong = f"your code raised {type(problem).__name__}: {problem}."
        print(f"Not yet: {wrong}" if wrong else "Right.")
        return not wrong

    return checked


@check
def opacity(blend: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> str:
    """blend(image, colours, opacity).

    Image and colours (H, W, 3) in [0, 1] -> the picture at that opacity.
    """
    rng = np.random.default_rng(0)
    image, cam = rng.random((32, 32, 3)), rng.random((32, 32))
    for value in (0, 0.25, 0.4, 1):
        got, wanted = (
            np.asarray(blend(image, explain.colorize(cam), value)),
            explain.overlay(image, cam, value),
        )
        if got.shape != wanted.shape:
            return f"expected a picture of shape {wanted.shape}, got {got.shape}."
        if np.abs(got - wanted).max() > 1e-6:
            return f"at opacity {value} a pixel is {got[0, 0].round(2)}, expected {wanted[0, 0].round(2)}."
    return ""


@check
def temperature(value: float, logits: Tensor, labels: Tensor) -> str:
    """value: the temperature at which the network is, on average, as sure as it is right, to half a percent."""
    if not float(value) > 0:
        return f"a temperature is greater than 0, got {value}."
    sure, right = float((logits / value).softmax(1).amax(1).mean()), accuracy(logits, labels)
    if abs(sure - right) > 0.005:
        return f"at {value} the network is {sure:.1%} sure on average, and right in {right:.1%}."
    return ""


@check
def grey(transform: A.BasicTransform) -> str:
    """transform: of Albumentations, makes half of the images grey and leaves the others as they are."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    drawn = [A.Compose([transform], seed=seed)(image=image)["image"] for seed in range(200)]
    greys = sum(bool((picture == picture[..., :1]).all()) for picture in drawn)
    same = sum(np.array_equal(picture, image) for picture in drawn)
    if greys + same < 200:
        return f"{200 - greys - same} of 200 pictures are neither grey nor unchanged."
    return "" if 70 <= greys <= 130 else f"{greys} of 200 pictures are grey, expected about 100."


@check
def grad_cam(by_hand: Callable[[Tensor, Tensor], Tensor]) -> str:
    """by_hand(maps, gradients).

    Both (K, H, W), of one image -> ReLU(sum over k of mean(gradients_k) * maps_k).
    """
    maps, gradients = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    total = sum(float(gradients[k].mean()) * maps[k] for k in range(6))
    got = by_hand(maps, gradients)
    if not isinstance(got, Tensor):
        return f"expected a tensor, got {type(got).__name__}."
    if got.shape != (4, 4):
        return f"expected a map of shape (4, 4), got {tuple(got.shape)}."
    if torch.allclose(got, total, atol=1e-5):
        return "negative values are left in the map; what speaks against the class does not count."
    return (
        ""
        if torch.allclose(got, total.relu(), atol=1e-5)
        else "the map has other values than the formula gives."
    )


@check
def stage(kind: type[nn.Module]) -> str:
    """kind: the class of a ResNet18 with a fifth stage of its own, whose map is 2x2, its stages' last."""
    network = kind(10)  # as the training and the Space make it
    images, sizes = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    stages = network.stages()
    for named in stages:
        named.module.register_forward_hook(
            lambda _m, _i, output, name=named.name: sizes.update({name: output.shape})
        )
    logits = network.eval()(images)
    if logits.shape != (2, 10):
        return f"expected logits of shape (2, 10), got {tuple(logits.shape)}."
    if [named.size for named in stages] != [32, 16, 8, 4, 2]:
        return f"expected stages of sizes 32, 16, 8, 4, 2, got {[named.size for named in stages]}."
    for named in stages:
        if sizes.get(named.name, (0, 0, 0))[2] != named.size:
            return f"{named.name} says it has a map of {named.size}x{named.size}, and its output is not so."
    cams = explain.gradcam(network, stages[-1].module, images, [0, 1])
    return (
        ""
        if cams.shape == (2, 32, 32)
        else f"Grad-CAM of the new stage has the shape {cams.shape}."
    )
