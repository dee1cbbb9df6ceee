"""The figures of filters and stages show what the network computes."""

import numpy as np
import pytest
import torch

from dataload import denormalize, normalize
from evaluation import features
from models.registry import build


@pytest.mark.parametrize(
    ("arch", "filters"), [("ResNet18", 64), ("CustomResNet", 64), ("FastNet", 24)]
)
def test_every_filter_of_the_first_layer_is_drawn(arch, filters):
    fig = features.plot_filters(build(arch))
    assert sum(bool(axis.images) for axis in fig.axes) == filters


@pytest.mark.parametrize("arch", ["ResNet18", "CustomResNet", "FastNet"])
def test_stage_outputs_have_the_size_that_each_stage_names_and_no_hook_stays(arch):
    model = build(arch).train()
    outputs = features.stage_outputs(model, torch.randn(3, 32, 32))
    assert [(name, maps.shape[1]) for name, maps in outputs.items()] == [
        (s.name, s.size) for s in model.stages()
    ]
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.numeric
def test_the_channels_that_are_drawn_are_the_most_activated(tiny_splits):
    model, image = build("CustomResNet").eval(), normalize(tiny_splits.test.images[:1])[0]
    fig = features.plot_stages(model, image, denormalize, channels=4)
    strengths = features.stage_outputs(model, image)["resblock4"].abs().mean((1, 2)).numpy()
    titles = [int(axis.get_title()) for axis in fig.axes[-4:]]
    assert len(set(titles)) == 4 and strengths[titles] == pytest.approx(
        np.sort(strengths)[:-5:-1], rel=1e-4
    )
