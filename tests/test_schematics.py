"""What the drawings that explain say is computed, and true of the network that is shown."""

import copy

import numpy as np
import pytest
import torch

from dataload import CLASSES, denormalize, normalize
from evaluation import drawing
from lesson import schematics
from models import explain
from models.registry import build
from models.resnet import BasicBlock


@pytest.fixture(scope="module")
def images(tiny_splits) -> torch.Tensor:
    return normalize(tiny_splits.train.images[:16])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("FastNet").eval()


def test_the_drawn_block_has_the_layers_of_the_block_in_their_order():
    names = {"Conv2d": "conv 3x3", "BatchNorm2d": "BatchNorm"}
    block = BasicBlock(8, 8, 1)
    layers = [block.conv1, block.bn1, block.conv2, block.bn2]
    drawn = [name for name in schematics.LAYERS if name != "ReLU"]
    assert drawn == [names[type(layer).__name__] for layer in layers]
    assert schematics.LAYERS.index("ReLU") == 2  # behind the first BatchNorm, as in forward
    plain, residual = schematics.plot_residual_block().axes
    texts = [[text.get_text() for text in axis.texts] for axis in (plain, residual)]
    assert "+" in texts[1] and "+" not in texts[0]
    assert all(text.count("ReLU") == 2 and text.count("conv 3x3") == 2 for text in texts)


@pytest.mark.parametrize(
    ("sizes", "title"),
    [
        (
            {"a": 11, "b": 25, "c": 53},
            "A middle cell depends on 11x11 pixels in a, 25x25 pixels in b;"
            " from c on, the whole image",
        ),
        ({"a": 11}, "A middle cell depends on 11x11 pixels in a"),
        ({"a": 40, "b": 60}, "A middle cell depends on the whole image in every stage from a"),
    ],
)
def test_the_title_says_what_a_cell_of_each_stage_sees(sizes, title):
    assert schematics.receptive_title(sizes, 32) == title


@pytest.mark.numeric
def test_the_receptive_field_is_marked_in_the_image(images):
    model = build("ResNet18")
    fig = schematics.plot_receptive_field(model, images[0], denormalize, "a note")
    first = fig.axes[0]
    (square,) = first.patches
    assert square.get_width() == 11 and first.get_title() == "layer1\n11x11 pixels"
    shown, picture = first.images[0].get_array(), drawing.rgb(images[0], denormalize)
    left = int(square.get_x() + 0.5)
    inside = np.s_[left : left + 11, left : left + 11]
    assert np.array_equal(shown[inside], picture[inside])
    assert np.allclose(shown[0, 0], 0.3 * picture[0, 0] + 0.7)
    assert "from layer3 on" in " ".join(fig.get_suptitle().split())


@pytest.mark.numeric
def test_maps_times_weights_give_the_heatmap_of_grad_cam(model, images):
    parts = schematics.gradcam_parts(model, images[0], 3)
    cam = explain.gradcam(model, model.stages()[-1].module, images[:1], [3])[0]
    assert parts.maps.shape[0] == len(parts.weights) == 256
    enlarged = torch.from_numpy(schematics.scaled(parts.heatmap()))[None, None]
    ours = torch.nn.functional.interpolate(enlarged, (32, 32), mode="bilinear")[0, 0].numpy()
    assert np.corrcoef(ours.ravel(), cam.ravel())[0, 1] > 0.98
    assert all(param.grad is None for param in model.parameters())
    total = np.tensordot(parts.weights, parts.maps, 1).sum()
    assert parts.contributions().sum() == pytest.approx(total, rel=1e-3, abs=1e-6)


@pytest.mark.numeric
def test_the_drawn_feature_maps_are_those_that_add_most(model, images):
    parts = schematics.gradcam_parts(model, images[0], 3)
    fig = schematics.plot_gradcam_recipe(model, images[0], 3, CLASSES, denormalize, "a note")
    most = np.argsort(-parts.contributions())[:4]
    first, *rest = (f"{parts.weights[i]:.3f} x\nmap {i}" for i in most)
    titles = [axis.get_title() for axis in fig.axes[1:5]]
    assert titles == [first, *(f"+ {other}" for other in rest)]
    assert "252 others" in fig.axes[5].get_title()


def test_the_title_says_what_part_of_the_evidence_is_shown():
    maps, weights = np.ones((4, 1, 1)), np.array([3.0, 1.0, 1.0, -9.0])
    title = schematics.gradcam_recipe_title(schematics.GradCamParts(maps, weights), 1, "cat")
    assert "the 1 maps that add most, of 4, hold 60 % of the evidence for cat" in title


@pytest.mark.numeric
def test_batchnorm_makes_means_0_and_deviations_1_and_the_network_stays(images):
    model = build("ResNet18").eval()
    before, normalized, after = schematics.batchnorm_values(model, images)
    copied = copy.deepcopy(model).train()
    first = copied.layer1[0].conv1(copied.bn1(copied.conv1(images)).relu())
    expected = first.transpose(0, 1).flatten(1).detach().numpy()
    assert before == pytest.approx(expected, abs=1e-4) and len(after) == 64
    assert after.mean(1) == pytest.approx(0, abs=1e-3)
    assert after.std(1) == pytest.approx(1, abs=1e-2)
    assert normalized == pytest.approx(after, abs=1e-3)  # the scales are 1, the biases 0
    assert not model.training and float(model.bn1.running_mean.abs().sum()) == 0
    fig = schematics.plot_batchnorm(model, images, "a note")
    assert " all 1 a note" in " ".join(fig.get_suptitle().split())
    assert [len(axis.patches) for axis in fig.axes] == [4, 4, 4]
    with pytest.raises(ValueError, match="with two BatchNorms, got Linear with 0"):
        schematics.batchnorm_values(torch.nn.Linear(2, 2), images)


def test_the_title_says_where_a_trained_batchnorm_puts_its_channels():
    before, after = np.array([[0.0, 2.0], [4.0, 4.5]]), np.array([[-0.5, 0.5], [1.0, 2.5]])
    title = schematics.batchnorm_title(before, after)
    assert "0.25 to 1.00 all 1, its learned scales make them 0.50 to 0.75" in title


@pytest.mark.numeric
def test_singular_values_are_drawn_before_and_after_orthogonalisation():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(20, 20))
    v, _ = torch.linalg.qr(torch.randn(40, 20))
    values = torch.tensor([4.0, 2.0] + [0.4] * 18)
    fig = schematics.plot_orthogonalization(u @ values.diag() @ v.T, "a note")
    before, after = fig.axes[1].lines[:2]
    assert before.get_ydata() == pytest.approx([1, 0.5] + [0.1] * 18, abs=1e-5)
    assert min(after.get_ydata()) > 0.5 and max(after.get_ydata()) < 1.3
    assert fig.get_suptitle().endswith("a note")


def test_muon_s_title_counts_directions_and_singular_values():
    """Squares 1, 0.25 and 0.01: the first two of three hold more than 90 % of their sum."""
    before = np.array([1, 0.5, 0.1])
    title = schematics.muon_title(before, np.array([1.1, 0.9, 0.7]))
    assert title.startswith("2 of 3 directions hold 90 %") and "all of its 3" in title
    title = schematics.muon_title(np.array([1, 0.1]), np.array([1.1, 0.2]))
    assert title.startswith("1 of 2 direction holds") and " 1 of its 2" in title
