"""The figures of filters, receptive fields and stages show what the network computes."""

import numpy as np
import pytest
import torch
from torch import nn

from dataload import denormalize, normalize
from evaluation import features
from models.registry import build
from models.stage import Network, Stage
from training.whitening import whiten

NETWORKS = ["ResNet18", "CustomResNet", "FastNet"]


@pytest.mark.numeric
def test_the_whitening_filters_are_drawn_with_their_share_of_the_variance():
    """Patches of smooth images differ most in brightness, so the first filter is of one colour."""
    model, generator = build("FastNet"), torch.Generator().manual_seed(0)
    images = torch.randn(200, 1, 1, 1, generator=generator).expand(200, 3, 32, 32)
    whiten(model.stem, images + 0.1 * torch.randn(200, 3, 32, 32, generator=generator))
    fig = features.plot_filters(model.stem.weight, "a note")
    titles = [axis.get_title() for axis in fig.axes]
    assert len(titles) == 12 and float(titles[0][:-2]) > 98 and "a note" in fig.get_suptitle()
    first = fig.axes[0].images[0].get_array()
    assert np.ptp(first) < 0.05 and "the first of 12 directions" in " ".join(
        fig.get_suptitle().split()
    )


@pytest.mark.numeric
def test_shares_of_variance_are_those_of_the_patches(tiny_splits):
    images, network = normalize(tiny_splits.train.images[:20]), build("FastNet")
    whiten(network.stem, images)
    found = features.whitening_shares(network.stem.weight[:12])
    windows = np.lib.stride_tricks.sliding_window_view(images.numpy(), (2, 2), (2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12).astype(float)
    variances = np.linalg.eigvalsh(patches.T @ patches)[::-1]
    assert found == pytest.approx(variances / variances.sum(), abs=1e-6)
    assert features.filters_title(np.array([0.8, 0.2])).startswith("80 % of the variance")


def test_the_receptive_fields_of_resnet18_by_hand():
    """3x3 stem: 3. Four 3x3 convolutions add 2 pixels each times the jump before them."""
    sizes = {
        name: field.size for name, field in features.receptive_fields(build("ResNet18")).items()
    }
    layer1 = 3 + 4 * 2
    layer2 = layer1 + 2 + 3 * 2 * 2
    layer3 = layer2 + 2 * 2 + 3 * 2 * 4
    layer4 = layer3 + 2 * 4 + 3 * 2 * 8
    assert sizes == {"layer1": layer1, "layer2": layer2, "layer3": layer3, "layer4": layer4}


@pytest.mark.numeric
@pytest.mark.parametrize("arch", NETWORKS)
def test_receptive_fields_are_where_a_missing_number_arrives(arch):
    """A row of pixels that is no number makes exactly those cells none that depend on it."""
    torch.manual_seed(0)
    model = build(arch).eval()
    fields = features.receptive_fields(model)
    model.double()  # in fp64 no convolution computes neighbours together
    rows = torch.zeros(32, 3, 32, 32, dtype=torch.double)
    for row in range(32):
        rows[row, :, row] = torch.nan
    for name, maps in features.stage_outputs(model, rows).items():
        cell = maps.shape[2] // 2
        reached = maps[:, :, cell].isnan().flatten(1).any(1).nonzero().flatten().tolist()
        first, end = fields[name].of_cell(cell)
        assert reached == list(range(max(first, 0), min(end, 32))), name


class SideBranch(Network):
    """Average pooling, a dilated convolution, and a strided layer beside a longer way."""

    def __init__(self, branch: str):
        super().__init__()
        self.way = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.Conv2d(3, 3, 3, 2, 1)
        )
        self.add_module(branch, nn.Conv2d(3, 3, 4, 4))
        self.branch, self.end = branch, nn.Identity()

    def stages(self):
        return [Stage("end", self.end, 8)]

    def forward(self, images):
        return self.end(self.way(images) + getattr(self, self.branch)(images)).mean((2, 3))


def test_receptive_fields_of_a_student_s_network_by_hand():
    """2 pixels pooled; 4 cells of 2 pixels further by dilation; 2 further by the last layer."""
    field = features.receptive_fields(SideBranch("shortcut"))["end"]
    assert field == features.ReceptiveField(2 + 4 * 2 + 2 * 2, 4, -2 * 2 - 1 * 2)
    with pytest.raises(ValueError, match="cells of end to be 4 pixels apart, got 16: name a block"):
        features.receptive_fields(SideBranch("skip"))


@pytest.mark.parametrize("arch", NETWORKS)
def test_stage_outputs_have_the_size_that_each_stage_names_and_no_hook_stays(arch):
    model = build(arch).train()
    outputs = features.stage_outputs(model, torch.randn(1, 3, 32, 32))
    features.receptive_fields(model)
    assert [(name, maps.shape[2]) for name, maps in outputs.items()] == [
        (s.name, s.size) for s in model.stages()
    ]
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.numeric
def test_top_patches_are_those_of_a_search_over_all_images(tiny_splits):
    torch.manual_seed(0)
    model, images = build("FastNet").eval(), normalize(tiny_splits.test.images[:12])
    found = features.top_patches(model, images)
    for name, maps in features.stage_outputs(model, images).items():
        most = maps.amax((2, 3))
        channel = 3
        best = most[:, channel].argsort(descending=True)[:5]
        assert found[name].images[channel].tolist() == best.tolist()
        row, column = found[name].cells[channel, 0]
        assert maps[best[0], channel, row, column] == most[best[0], channel]


def test_too_few_images_for_top_patches_are_refused(tiny_splits):
    with pytest.raises(ValueError, match="at least 5 images, got 4"):
        features.top_patches(build("FastNet"), normalize(tiny_splits.test.images[:4]))


def test_a_patch_is_the_field_of_its_cell_and_grey_outside_the_image():
    image = np.arange(32 * 32 * 3, dtype=float).reshape(32, 32, 3)
    field = features.ReceptiveField(size=5, jump=2, start=-1)
    assert np.array_equal(features.cut_patch(image, field, (3, 4)), image[5:10, 7:12])
    corner = features.cut_patch(image, field, (0, 0))
    assert (corner[0] == features.OUTSIDE).all() and np.array_equal(corner[1:, 1:], image[:4, :4])
    assert features.cut_patch(image, features.ReceptiveField(40, 8, -16), (0, 0)) is image


@pytest.mark.numeric
def test_the_stages_figure_has_five_patches_of_each_channel_and_a_finding(tiny_splits):
    model, images = build("FastNet").eval(), normalize(tiny_splits.test.images[:12])
    fig = features.plot_stages(model, images, tiny_splits.test.labels, denormalize, "a note")
    assert sum(bool(axis.images) for axis in fig.axes) == 4 * 2 * 5
    assert "of a single class" in fig.get_suptitle() and "a note" in fig.get_suptitle()


def test_the_share_of_channels_whose_patches_are_of_one_class():
    def patches(*images: list[int]) -> features.TopPatches:
        return features.TopPatches(np.array(images), np.zeros(1), np.zeros(1))

    found = {"early": patches([0, 1, 2, 3, 4], [0, 0, 0, 0, 4]), "late": patches([0, 1, 0, 1, 0])}
    labels = np.array([7, 7, 1, 2, 3])
    title = features.stages_title(found, labels)
    assert title.startswith("In early, 0 % of the channels") and title.endswith(
        "respond most to 5 images of a single class; in late, 100 % (drawn: 2 of each stage)"
    )
