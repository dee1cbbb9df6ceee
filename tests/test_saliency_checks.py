"""The two saliency checks would notice a heatmap that explains nothing."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dataload import denormalize
from evaluation import saliency_checks
from models.registry import build
from tests.conftest import wrong_predictions


class UpperLeft(nn.Module):
    """Confident of class 1 as far as the upper left 8x8 pixels are bright; it has one stage."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def stages(self):
        from models.resnet import Stage

        return [Stage("conv", self.conv, 32)]

    def forward(self, images):
        score = self.conv(images)[:, 0, :8, :8].mean((1, 2))
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.numeric
@pytest.mark.parametrize("arch", ["ResNet18", "FastNet"])
def test_the_randomized_copy_has_learned_nothing_and_is_the_same_each_time(arch):
    model = build(arch).eval()
    with torch.no_grad():  # as if it had been trained
        for values in model.state_dict().values():
            values.add_(1)
    other, again = (saliency_checks.randomize_weights(model) for _ in range(2))
    changed = {
        name: not torch.equal(values, model.state_dict()[name])
        for name, values in other.state_dict().items()
    }
    assert all(changed.values()), [name for name in changed if not changed[name]]
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True)
    )
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    saliency_checks.randomize_weights(model)
    assert torch.equal(
        torch.random.get_rng_state(), before
    )  # and leaves the caller's random numbers alone


@pytest.mark.numeric
def test_the_similarity_of_two_heatmaps_is_a_rank_correlation():
    ramp = np.arange(16.0).reshape(1, 4, 4)
    maps = np.concatenate([ramp, ramp, ramp])
    others = np.concatenate([ramp**2, -ramp, np.zeros((1, 4, 4))])
    assert saliency_checks.rank_correlation(maps, others) == pytest.approx([1, -1, 0])


@pytest.mark.numeric
def test_the_randomised_figure_has_both_heatmaps_of_each_image(tiny_splits):
    data = wrong_predictions(*tiny_splits.test)[:3]
    model = build("CustomResNet").eval()
    fig, alike = saliency_checks.plot_randomized(model, data, denormalize)
    assert len(fig.axes) == 9 and -1 <= alike < 0.99
    trained, randomized = (np.asarray(fig.axes[i].images[0].get_array()) for i in (3, 6))
    assert not np.array_equal(trained, randomized)


def test_masked_patches_are_grey_and_as_many_as_said():
    images = torch.ones(2, 3, 32, 32)
    order = np.stack([np.arange(64), np.arange(64)[::-1]])
    half = saliency_checks.mask_patches(images, order, 0.5)
    assert half[0, :, :16].abs().sum() == 0 and (half[0, :, 16:] == 1).all()
    assert half[1, :, 16:].abs().sum() == 0 and (half[1, :, :16] == 1).all()
    assert torch.equal(saliency_checks.mask_patches(images, order, 0), images)
    assert saliency_checks.mask_patches(images, order, 1).abs().sum() == 0


@pytest.mark.numeric
def test_the_mean_of_a_patch():
    maps = np.zeros((1, 32, 32))
    maps[0, 4:8, 8:12] = 3  # the second row of patches, the third in it
    means = saliency_checks.patch_means(maps)
    assert means.shape == (1, 64) and means[0, 8 + 2] == 3 and means.sum() == 3


def test_the_centre_comes_first_and_the_corners_last():
    order = saliency_checks.centre_first(8).tolist()
    assert sorted(order) == list(range(64))
    assert set(order[:4]) == {27, 28, 35, 36} and set(order[-4:]) == {0, 7, 56, 63}
    assert saliency_checks.centre_first(3).tolist() == [4, 1, 3, 5, 7, 0, 2, 6, 8]


def marked(places: list[tuple[int, int]]) -> np.ndarray:
    """Heatmaps (N, 32, 32), each with one patch of 4x4 pixels, at its row and column of patches."""
    maps = np.zeros((len(places), 32, 32))
    for one, (row, column) in zip(maps, places, strict=True):
        one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return maps


def test_every_control_masks_all_patches_and_begins_where_it_says():
    orders = saliency_checks.mask_orders(marked([(0, 0), (0, 1), (1, 0)]), draws=2, seed=0)
    assert list(orders) == ["heatmap", "another image's heatmap", "centre first", "random"]
    assert {name: len(found) for name, found in orders.items()} == dict(
        zip(orders, (1, 2, 1, 2), strict=True)
    )
    assert all(
        (np.sort(o, axis=1) == np.arange(64)).all() for found in orders.values() for o in found
    )
    assert orders["heatmap"][0][:, 0].tolist() == [0, 1, 8]
    assert [o[:, 0].tolist() for o in orders["another image's heatmap"]] == [[8, 0, 1], [1, 8, 0]]
    assert orders["centre first"][0][:, 0].tolist() == [27, 27, 27]
    assert not np.array_equal(*orders["random"])


@pytest.fixture(scope="module")
def corner_table() -> pd.DataFrame:
    """Only four patches matter to this network.

    Its first stage is the image, so the heatmap finds the bright ones.
    """
    images = torch.zeros(6, 3, 32, 32)
    images[:5, :, :8, :8] = 4
    images[5, :, 24:, 24:] = 4  # the network is not confident here, its heatmap is elsewhere
    return saliency_checks.deletion(UpperLeft().eval(), images, draws=1)


@pytest.mark.numeric
def test_masking_in_the_right_order_costs_the_confidence_sooner(corner_table):
    table = corner_table.drop(index=5, level="image")
    mean = table.groupby("masked").mean()
    assert mean.index[0] == 0 and mean.index[-1] == 1 and len(mean) == 17 and len(table) == 17 * 5
    ends = mean.iloc[[0, -1]].to_numpy()  # nothing and everything: no matter the order
    assert np.ptp(ends, axis=1).max() < 1e-6
    assert mean["heatmap"].iloc[1] == pytest.approx(0.5, abs=1e-5)
    for control in ("centre first", "random"):
        assert (
            saliency_checks.deletion_areas(table).area["heatmap"]
            < saliency_checks.deletion_areas(table).area[control] - 0.1
        )


@pytest.mark.numeric
def test_the_heatmap_of_another_image_is_of_another_image(corner_table):
    """The first image is masked by the last one's heatmap, in the other corner.

    The second by the first one's.
    """
    first = corner_table.xs(1 / 16, level="masked")
    assert first["another image's heatmap"].iloc[0] > 0.99 and first["heatmap"].iloc[0] < 0.51
    assert first["another image's heatmap"].iloc[1] == pytest.approx(
        first["heatmap"].iloc[1], abs=1e-5
    )


@pytest.mark.parametrize("draws", [0, 3])
def test_too_few_images_for_the_heatmaps_of_others_are_refused(draws):
    with pytest.raises(ValueError, match=f"1 <= draws < 3, the number of images, got {draws}"):
        saliency_checks.deletion(UpperLeft().eval(), torch.zeros(3, 3, 32, 32), draws=draws)


@pytest.fixture
def triangles() -> pd.DataFrame:
    """Two images: by the first order their areas are 0.5 and 0.25, by the second 0.75 and 0.25."""
    rows = pd.MultiIndex.from_product([[0, 0.5, 1], [0, 1]], names=["masked", "image"])
    first, second = [1, 0.5, 0.5, 0.25, 0, 0], [1, 0.5, 1, 0.25, 0, 0]
    return pd.DataFrame({"heatmap": first, "random": second}, index=rows)


@pytest.mark.numeric
def test_the_areas_of_triangles_and_the_interval_of_their_difference(triangles):
    found = saliency_checks.deletion_areas(triangles)
    assert found.area.tolist() == pytest.approx([(0.5 + 0.25) / 2, (0.75 + 0.25) / 2])
    # Differences 0.25 and 0: their deviation is 0.25 / sqrt(2), the error of their mean 0.125.
    wanted = [0.125, 0.125 - 1.96 * 0.125, 0.125 + 1.96 * 0.125]
    assert found.loc["random", ["difference", "from", "to"]].tolist() == pytest.approx(wanted)
    assert found.loc["heatmap", ["difference", "from", "to"]].tolist() == [0, 0, 0]


def test_the_figure_has_a_curve_for_each_order_and_its_title_says_the_areas(triangles):
    (axis,) = saliency_checks.plot_deletion(triangles, "a note").axes
    assert [line.get_label() for line in axis.lines] == ["heatmap", "random"]
    assert axis.lines[1].get_ydata().tolist() == [0.75, 0.625, 0]
    assert "heatmap 0.375, random 0.500" in axis.get_title() and "a note" in axis.get_title()
    assert len(axis.collections) == 2  # the intervals
