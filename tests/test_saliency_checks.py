"""The two saliency checks would notice a heatmap that explains nothing."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dataload import normalize
from evaluation import saliency_checks
from models.registry import build


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
def test_reset_weights_leave_nothing_of_what_was_learned(arch):
    model = build(arch).eval()
    with torch.no_grad():  # as if it had been trained
        for values in model.state_dict().values():
            values.add_(1)
    trained = {name: values.clone() for name, values in model.state_dict().items()}
    saliency_checks.reset_weights(model)
    changed = {
        name: not torch.equal(values, trained[name]) for name, values in model.state_dict().items()
    }
    assert all(changed.values()), [name for name in changed if not changed[name]]


@pytest.mark.numeric
def test_the_similarity_of_two_heatmaps_is_a_rank_correlation():
    ramp = np.arange(16.0).reshape(1, 4, 4)
    maps = np.concatenate([ramp, ramp, ramp])
    others = np.concatenate([ramp**2, -ramp, np.zeros((1, 4, 4))])
    assert saliency_checks.rank_correlation(maps, others) == pytest.approx([1, -1, 0])


@pytest.fixture(scope="module")
def cascade(tiny_splits) -> saliency_checks.Cascade:
    torch.manual_seed(0)
    model = build("FastNet").train()
    images = normalize(tiny_splits.test.images[:5])
    before = {name: values.clone() for name, values in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    found, again = (saliency_checks.cascading_randomization(model, images) for _ in range(2))
    assert found.correlation == pytest.approx(again.correlation, abs=1e-4)  # the same each time
    assert torch.equal(torch.random.get_rng_state(), drawn)  # no random number of the caller's
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    return found


@pytest.mark.numeric
def test_layers_become_random_from_the_output_to_the_input(cascade):
    assert cascade.layers == ["none", "head", "group3", "group2", "group1", "stem"]
    assert cascade.correlation.shape == (6, 5) and cascade.heatmaps.shape == (6, 3, 32, 32)
    assert cascade.correlation[0] == pytest.approx(1) and cascade.correlation[-1].mean() < 0.9
    assert cascade.control.shape == (5,)


def test_the_order_is_that_in_which_a_network_computes_not_in_which_it_was_written():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.pool = nn.Linear(2, 2), nn.Flatten()
            self.first = nn.ModuleList([nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 32)])

        def forward(self, images):
            return self.last(self.pool(self.first[1](self.first[0](images))))

    assert saliency_checks.children_from_output(Backwards(), torch.zeros(1, 3, 32, 32)) == [
        "last",
        "first",
    ]


@pytest.mark.numeric
def test_a_cascade_survives_json(cascade):
    again = saliency_checks.Cascade.from_json(json.loads(json.dumps(cascade.to_json())))
    assert again.layers == cascade.layers
    assert again.correlation == pytest.approx(cascade.correlation, abs=1e-4)
    assert again.heatmaps == pytest.approx(cascade.heatmaps, abs=1 / 255)


@pytest.mark.numeric
def test_the_cascade_s_figure_has_a_heatmap_of_each_step_and_the_means(cascade, tiny_splits):
    images = list(tiny_splits.test.images[:3] / 255)
    *panels, axis = saliency_checks.plot_cascade(cascade, images, "a note").axes
    assert len(panels) == 3 * 7 and all(panel.images for panel in panels)
    means = axis.containers[0].lines[0].get_ydata()
    assert means == pytest.approx(cascade.correlation.mean(1))


def test_a_network_s_own_parameter_is_no_layer():
    model = UpperLeft()
    model.scale = nn.Parameter(torch.ones(()))
    found = saliency_checks.cascading_randomization(model, torch.randn(2, 3, 32, 32))
    assert found.layers == ["none", "conv"]


@pytest.mark.parametrize(("arch", "angle"), [("ResNet18", 0), ("CustomResNet", 30)])
def test_names_of_layers_that_would_overlap_are_slant(arch, angle):
    layers = [
        "none",
        *(name for name, child in build(arch).named_children() if [*child.parameters()]),
    ]
    found = saliency_checks.Cascade(layers, np.zeros((1, 2)), np.zeros(2), np.zeros((1, 2, 2, 2)))
    assert saliency_checks.slant(found) == angle


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (0.1, "depend on what was learned"),
        (0.37, "not measurably nearer"),  # the difference is 0.03 ± 1.98 * 0.2 / 10
        (0.8, "Part of the"),
    ],
)
def test_the_cascade_s_title_compares_the_end_with_another_image_s_heatmap(end, says):
    spread = np.tile([-0.1, 0.1], 50)
    correlation = np.stack([np.ones(100), end + spread])
    found = saliency_checks.Cascade(["none", "conv"], correlation, 0.4 - spread, np.zeros(1))
    title = saliency_checks.cascade_title(found)
    assert says in title and f"{end:.2f} ± 0.02" in title and "0.40" in title


def test_one_image_is_too_few_to_compare_it_with_another():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        saliency_checks.cascading_randomization(UpperLeft(), torch.zeros(1, 3, 32, 32))


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
    cams = marked([(0, 0), (0, 1), (1, 0)])
    orders = saliency_checks.mask_orders(cams, seed=0)
    assert list(orders) == ["heatmap", "another image's heatmap", "centre first", "random"]
    assert all((np.sort(order, axis=1) == np.arange(64)).all() for order in orders.values())
    assert orders["heatmap"][:, 0].tolist() == [0, 1, 8]
    assert orders["another image's heatmap"][:, 0].tolist() == [8, 0, 1]
    assert orders["centre first"][:, 0].tolist() == [27, 27, 27]
    other = saliency_checks.mask_orders(cams, seed=1)
    assert not np.array_equal(orders["random"], other["random"])


@pytest.fixture(scope="module")
def corner_table() -> pd.DataFrame:
    """Only four patches matter to this network.

    Its first stage is the image, so the heatmap finds the bright ones.
    """
    images = torch.zeros(6, 3, 32, 32)
    images[:5, :, :8, :8] = 4
    images[5, :, 24:, 24:] = 4  # the network is not confident here, its heatmap is elsewhere
    return saliency_checks.deletion(UpperLeft().eval(), images)


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


def test_too_few_images_for_the_heatmap_of_another_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        saliency_checks.deletion(UpperLeft().eval(), torch.zeros(1, 3, 32, 32))


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
    # Student's t of one degree of freedom is Cauchy's distribution: its quantile is a tangent.
    half = math.tan(0.475 * math.pi) * 0.125
    wanted = [0.125, 0.125 - half, 0.125 + half]
    assert found.loc["random", ["difference", "from", "to"]].tolist() == pytest.approx(wanted)
    assert found.loc["heatmap", ["difference", "from", "to"]].tolist() == [0, 0, 0]


def test_the_figure_has_a_curve_for_each_order_and_its_legend_says_the_areas(triangles):
    shown = triangles.copy()
    shown.index = shown.index.set_names(["shown", "image"])
    fig = saliency_checks.plot_deletion(triangles, shown, "a note")
    masked, inserted = fig.axes
    labels = [line.get_label() for line in masked.lines]
    assert labels == ["heatmap, area 0.375", "random, area 0.500"]
    assert masked.lines[1].get_ydata().tolist() == [0.75, 0.625, 0]
    assert len(masked.collections) == 2  # the intervals
    assert "2 images" in masked.get_title() and "insertion" in inserted.get_title()
    assert fig.get_suptitle().endswith("a note")


def areas_table(index: str, **areas: float) -> pd.DataFrame:
    """Curves of 20 images whose areas are nearly as said, by order."""
    rows = pd.MultiIndex.from_product([[0, 1], range(20)], names=[index, "image"])
    noise = np.tile(np.tile([-0.01, 0.01], 10), 2)
    return pd.DataFrame(
        {name: area + noise * i for i, (name, area) in enumerate(areas.items())}, index=rows
    )


@pytest.mark.parametrize(
    ("areas", "deletion", "insertion"),
    [
        ((0.3, 0.5, 0.5), "beats every control", "beats no control"),
        ((0.5, 0.3, 0.3), "beats no control", "beats every control"),
        ((0.4, 0.3, 0.5), "beats b, but not a", "beats a, but not b"),
        ((0.4, 0.4, 0.5), "beats b, but not a", "beats no control"),
    ],
)
def test_the_title_says_which_controls_the_heatmap_beats(areas, deletion, insertion):
    """Masked sooner, the area is smaller; shown sooner, it is larger; a draw beats nothing."""
    named = dict(zip(("heatmap", "a", "b"), areas, strict=True))
    titles = [
        saliency_checks.deletion_title(areas_table(index, **named)) for index in ("masked", "shown")
    ]
    assert titles == [f"Deletion: the heatmap {deletion}", f"Insertion: the heatmap {insertion}"]


@pytest.mark.numeric
def test_insertion_shows_first_what_deletion_masks_first():
    images = torch.zeros(6, 3, 32, 32)
    images[:, :, :8, :8] = 4
    images[5, :, :8, :8], images[5, :, 24:, 24:] = 0, 4
    table = saliency_checks.insertion(UpperLeft().eval(), images).drop(index=5, level="image")
    assert table.index.names == ["shown", "image"]
    mean = table.groupby("shown").mean()
    assert mean["heatmap"].iloc[0] == pytest.approx(0.5, abs=1e-5)
    assert mean["heatmap"].iloc[1] == pytest.approx(mean["heatmap"].iloc[-1], abs=1e-5)
    assert (mean["centre first"] <= mean["heatmap"] + 1e-6).all()
    again = saliency_checks.curves_from_json(
        json.loads(json.dumps(saliency_checks.curves_to_json(table)))
    )
    assert again.index.names == ["shown", "image"]
    assert again.to_numpy() == pytest.approx(table.to_numpy(), abs=1e-5)
