"""Grad-CAM is Grad-CAM, and opacity is opacity."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.explain import colorize, gradcam, overlay
from models.registry import build

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("ResNet18").eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def reference_gradcam(model, layer, image, target):
    """ReLU of the feature maps weighted by their mean gradients, enlarged, scaled to [0, 1]."""
    kept = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logit = model(image[None])[0, target]
    handle.remove()
    gradient = torch.autograd.grad(logit, kept[0])[0]
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True)).detach()
    cam = (cam - cam.min()) / (1e-7 + (cam - cam.min()).max())
    cam = F.interpolate(cam, (32, 32), mode="bilinear", align_corners=False)[0, 0].numpy()
    return (cam - cam.min()) / (1e-7 + (cam - cam.min()).max())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_of_fastnet_can_be_explained(stage):
    torch.manual_seed(0)
    model, image = build("FastNet").eval(), torch.rand(1, 3, 32, 32)
    cams = gradcam(model, model.stages()[stage].module, image.repeat(10, 1, 1, 1), list(range(10)))
    assert cams.shape == (10, 32, 32) and cams.min() >= 0 and cams.max() <= 1
    # A heatmap without evidence for its class is empty; some of ten classes have evidence, and not
    # all the same.
    assert (cams.max((1, 2)) > 0.9).sum() >= 2 and len({cam.tobytes() for cam in cams}) > 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradcam_agrees_with_a_second_implementation(model, images, stage):
    layer, classes = model.stages()[stage].module, [3, 0, 9]
    cams = gradcam(model, layer, images, classes)
    assert cams.shape == (3, 32, 32) and cams.min() >= 0 and cams.max() <= 1
    for cam, image, target in zip(cams, images, classes, strict=True):
        assert np.abs(cam - reference_gradcam(model, layer, image, target)).max() < 1e-3


def test_another_class_gives_another_heatmap(model, images):
    first, second = (gradcam(model, model.layer4, images, [label] * 3) for label in (0, 1))
    assert np.abs(first - second).max() > 0.1


def test_mode_gradients_and_hooks_are_left_as_they_were(images):
    model = build("CustomResNet").train()
    model.dropout.eval()
    model.ffconnectedlayer1.weight.grad = torch.ones(10, 512)
    model.ffconnectedlayer1.bias.requires_grad_(False)
    gradcam(model, model.stages()[-1].module, images, [1, 2, 3])
    assert model.training and model.preplayer1.training and not model.dropout.training
    assert torch.equal(model.ffconnectedlayer1.weight.grad, torch.ones(10, 512))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"ffconnectedlayer1.bias"}
    assert all(
        p.grad is None for name, p in model.named_parameters() if name != "ffconnectedlayer1.weight"
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_they_are_restored_after_a_failure_too(images):
    model = build("CustomResNet").train()
    with pytest.raises(ValueError, match="got 10"):
        gradcam(model, model.stages()[-1].module, images, [0, 10, 1])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_it_works_where_gradients_are_switched_off_and_under_autocast(model, images):
    expected = gradcam(model, model.layer3, images, [0, 1, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert np.allclose(gradcam(model, model.layer3, images, [0, 1, 2]), expected, atol=1e-3)


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 2, 3], [-1, 0, 0], [1.5, 0, 0]])
def test_wrong_classes_are_refused(model, images, classes):
    with pytest.raises(ValueError, match="expected a class"):
        gradcam(model, model.layer4, images, classes)


def test_a_layer_of_another_network_is_refused(model, images):
    with pytest.raises(ValueError, match="not in it"):
        gradcam(model, build("ResNet18").layer4, images, [0, 1, 2])


def test_what_has_no_heatmap_is_refused(model, images):
    with pytest.raises(ValueError, match=r"feature maps .* got Linear with outputs of shape \(3, "):
        gradcam(model, model.linear, images, [0, 1, 2])
    with pytest.raises(ValueError, match="at least one image"):
        gradcam(model, model.layer4, images[:0], [])
    with pytest.raises(ValueError, match="finite numbers only"):
        gradcam(model, model.layer4, images * float("nan"), [0, 1, 2])


def test_threads_that_share_a_network_get_their_own_heatmaps(model, images):
    jobs = [(model.layer2, images, [0, 1, 2]), (model.layer4, images.flip(0), [3, 4, 5])]
    alone = [gradcam(model, *job) for job in jobs]

    def work(which):
        maps = [gradcam(model, *jobs[which]) for _ in range(6)]
        return all(np.allclose(cams, alone[which], atol=1e-3) for cams in maps)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, [0, 1, 0, 1]))


def test_opacity_0_is_the_image_and_opacity_1_is_the_heatmap():
    rng = np.random.default_rng(0)
    image = 0.4 * rng.random((32, 32, 3))  # dark: a rescaled blend would brighten it
    cam = rng.random((32, 32))
    assert np.array_equal(overlay(image, cam, 0), image)
    assert np.array_equal(overlay(image, cam, 1), colorize(cam))
    assert np.allclose(overlay(image, cam, 0.25), 0.75 * image + 0.25 * colorize(cam))


def test_the_colours_become_lighter_from_nearly_black_to_pale_yellow():
    colours = colorize(np.linspace(0, 1, 20)[None])[0]
    brightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) > 0).all() and brightness[0] < 0.01 and brightness[-1] > 0.9


@pytest.mark.parametrize(
    ("image", "cam", "opacity"),
    [
        (np.zeros((32, 32)), np.zeros((32, 32)), 0.5),
        (np.zeros((32, 32, 3)), np.zeros((4, 4)), 0.5),
        (np.full((2, 2, 3), 255.0), np.zeros((2, 2)), 0.5),
        (np.zeros((2, 2, 3)), np.full((2, 2), np.nan), 0.5),
        (np.zeros((2, 2, 3)), np.zeros((2, 2)), 1.1),
        (np.zeros((2, 2, 3)), np.zeros((2, 2)), float("nan")),
    ],
)
def test_what_cannot_be_blended_is_refused(image, cam, opacity):
    with pytest.raises(ValueError, match="expected"):
        overlay(image, cam, opacity)
