"""The two checks of a map would notice a map that explains nothing."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import trust
from dataload import denormalize
from models.registry import build
from tests.conftest import wrong_predictions


class UpperLeft(nn.Module):
    """Class 1 as sure as the upper left 8x8 pixels are bright; one stage, the image itself."""

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


@pytest.mark.parametrize("arch", ["ResNet18", "FastNet"])
def test_the_untrained_copy_has_learned_nothing_and_is_the_same_each_time(arch):
    model = build(arch).eval()
    with torch.no_grad():  # as if it had been trained
        for values in model.state_dict().values():
            values.add_(1)
    other, again = trust.untrained(model), trust.untrained(model)
    changed = {name: not torch.equal(values, model.state_dict()[name]) for name, values in other.state_dict().items()}
    assert all(changed.values()), [name for name in changed if not changed[name]]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    trust.untrained(model)
    assert torch.equal(torch.random.get_rng_state(), before)  # and leaves the caller's random numbers alone


def test_similarity_is_a_rank_correlation():
    ramp = np.arange(16.0).reshape(1, 4, 4)
    maps = np.concatenate([ramp, ramp, ramp])
    others = np.concatenate([ramp**2, -ramp, np.zeros((1, 4, 4))])
    assert trust.similarity(maps, others) == pytest.approx([1, -1, 0])


def test_the_randomised_figure_has_both_maps_of_each_image(tiny_splits):
    data = wrong_predictions(*tiny_splits.test)[:3]
    model = build("CustomResNet").eval()
    fig, alike = trust.plot_randomised(model, data, denormalize)
    assert len(fig.axes) == 9 and -1 <= alike < 0.99
    trained, untrained = (np.asarray(fig.axes[i].images[0].get_array()) for i in (3, 6))
    assert not np.array_equal(trained, untrained)


def test_deleted_squares_are_grey_and_as_many_as_said():
    images = torch.ones(2, 3, 32, 32)
    order = np.stack([np.arange(64), np.arange(64)[::-1]])
    half = trust.delete(images, order, 0.5)
    assert half[0, :, :16].abs().sum() == 0 and (half[0, :, 16:] == 1).all()
    assert half[1, :, 16:].abs().sum() == 0 and (half[1, :, :16] == 1).all()
    assert torch.equal(trust.delete(images, order, 0), images) and trust.delete(images, order, 1).abs().sum() == 0


def test_the_mean_of_a_cell():
    maps = np.zeros((1, 32, 32))
    maps[0, 4:8, 8:12] = 3  # the second row of squares, the third in it
    means = trust.cell_means(maps)
    assert means.shape == (1, 64) and means[0, 8 + 2] == 3 and means.sum() == 3


def test_deletion_in_the_right_order_costs_the_confidence_sooner():
    """Only four squares matter to this network; its first stage is the image, so the map finds the bright ones."""
    images = torch.zeros(6, 3, 32, 32)
    images[:, :, :8, :8] = 4
    table = trust.deletion(UpperLeft().eval(), images, draws=5)
    assert table.index[0] == 0 and table.index[-1] == 1 and len(table) == 17
    assert table.iloc[0].nunique() == 1 and table.iloc[-1].nunique() == 1  # nothing and everything: no matter the order
    assert table["by the map"].iloc[1] == pytest.approx(0.5) and table["at random"].iloc[1] > 0.9
    assert trust.area(table["by the map"]) < trust.area(table["at random"]) - 0.1


def test_the_area_of_a_triangle_is_a_half():
    assert trust.area(pd.Series([1.0, 0.5, 0.0], index=[0, 0.5, 1])) == 0.5
    assert (
        "area 0.500"
        in trust.plot_deletion(pd.DataFrame({"by the map": [1.0, 0.5, 0.0]}, index=[0, 0.5, 1]))
        .axes[0]
        .get_legend()
        .get_texts()[0]
        .get_text()
    )
