"""The networks are those of the assignment, and describing them changes nothing."""

import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning.utilities.model_summary import ModelSummary

from models.bundle import load_bundle
from models.registry import NETWORKS, build
from models.resnet import model_summary
from tests.conftest import PROJECT
from training.classifier import LitClassifier

REFERENCE = Path(__file__).parent / "reference"
ARCHS = list(NETWORKS)


def folded(text: str) -> list[str]:
    """The lines that are not blank, each run of blanks as one."""
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(("arch", "count"), [("ResNet18", 11_173_962), ("CustomResNet", 6_575_370)])
def test_the_number_of_parameters_is_the_published_one(arch, count):
    assert sum(p.numel() for p in build(arch).parameters()) == count


def test_custom_resnet_adds_two_shortcuts_and_divides_its_logits_by_eight():
    net, images = build("CustomResNet").eval(), torch.rand(2, 3, 32, 32)
    x = net.convblock1(net.preplayer1(images))
    x = x + net.resblock2(net.resblock1(x))
    x = net.convblock3(net.convblock2(x))
    x = x + net.resblock4(net.resblock3(x))
    assert torch.allclose(net(images), net.ffconnectedlayer1(x.amax((2, 3))) / 8, atol=1e-5)


def test_resnet18_has_the_torchsummary_table_of_the_reference():
    assert folded(model_summary(build("ResNet18"))) == folded(
        (REFERENCE / "resnet18_torchsummary.txt").read_text()
    )


def rows(table: str) -> list[list[str]]:
    """Name, type and parameters of each row of a Lightning table."""
    cells = [
        [cell.strip() for cell in line.split("|")] for line in table.splitlines() if "|" in line
    ]
    return [row[1:4] for row in cells if row[0].isdigit()]


def test_custom_resnet_has_the_children_of_the_reference():
    expected = rows((REFERENCE / "custom_resnet_lightning.txt").read_text())
    # The first row, acc, is LitClassifier's.
    assert rows(model_summary(build("CustomResNet"))) == expected[1:]
    shown = rows(str(ModelSummary(LitClassifier(network="CustomResNet"), max_depth=2)))
    assert [row[0] for row in shown][:3] == ["acc", "model", "model.preplayer1"]
    assert [
        [row[0].removeprefix("model."), *row[1:]] for row in shown if row[0] != "model"
    ] == expected


def test_the_network_of_a_bundle_has_the_same_summary():
    network, meta = load_bundle(PROJECT / "space")
    assert model_summary(network) == model_summary(build(meta["architecture"]))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_summary_leaves_the_statistics_the_mode_and_the_random_state_alone(arch):
    model = build(arch).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    model_summary(model)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_any_size_gives_ten_logits_each(arch, batch):
    assert build(arch).eval()(torch.rand(batch, 3, 32, 32)).shape == (batch, 10)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 64, 64), (1, 32, 32, 3)])
def test_images_of_another_shape_are_refused_by_name(arch, shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        build(arch)(torch.rand(shape))


def test_an_unknown_network_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="'VGG'.*ResNet18, CustomResNet"):
        build("VGG")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_gets_a_gradient(arch):
    model = build(arch)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert len(learned) > 5 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


@pytest.mark.parametrize("arch", ARCHS)
def test_images_of_24_pixels_are_for_training_only(arch):
    model = build(arch).train()
    assert model(torch.rand(2, 3, 24, 24)).shape == (2, 10)
    with pytest.raises(ValueError, match=re.escape("got (2, 3, 24, 24)")):
        model.eval()(torch.rand(2, 3, 24, 24))


@pytest.mark.numeric
@pytest.mark.parametrize("arch", ARCHS)
def test_each_stage_has_the_map_size_it_states_and_nothing_later_changes_it(arch):
    model, kept, copies = build(arch).eval(), {}, {}

    def keep(name):
        def hook(_module, _inputs, output):
            kept[name], copies[name] = output, output.clone()

        return hook

    for stage in model.stages():
        stage.module.register_forward_hook(keep(stage.name))
    model(torch.rand(2, 3, 32, 32))
    for stage in model.stages():
        assert kept[stage.name].shape[2:] == (stage.size, stage.size)
        # An in-place operation would have changed it.
        assert torch.equal(kept[stage.name], copies[stage.name])


@pytest.mark.numeric
def test_the_last_stage_of_custom_resnet_is_the_residual_sum():
    model, seen = build("CustomResNet").eval(), {}
    for name, module in [
        ("in", model.convblock3),
        ("branch", model.resblock4),
        ("sum", model.stages()[-1].module),
    ]:
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    model(torch.rand(2, 3, 32, 32))
    assert torch.allclose(seen["sum"], seen["in"] + seen["branch"], atol=1e-5)


def test_the_default_stage_of_resnet18_is_after_the_residual_sum():
    model = build("ResNet18")
    assert model.stages()[-1].module is model.layer4  # whose last block ends with relu(F(x) + x)
