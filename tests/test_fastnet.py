"""FastNet begins as its design says; Muon is Muon where it should be, and SGD everywhere else."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

from models.fastnet import FastNet, Group, PooledConv, dirac_conv
from models.registry import build
from training import whitening
from training.classifier import LitClassifier
from training.optimizer import MuonWithSGD, make_optimizer, orthogonalize, parameter_groups
from training.recipes import RECIPES, Recipe

pytestmark = pytest.mark.numeric


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth random images, as photographs are: neighbouring pixels and colours go together."""
    noise = torch.randn(64, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise + noise.mean(1, keepdim=True), 5, stride=1) * 5


# ---- network ----


def test_the_size_is_that_of_the_airbench_family():
    """By hand: convolutions 24-64-64-256-256-256-256, stem, biases and scales, head."""
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    stem, batch_norms, head = 12 * 24 + 24, 2 * (2 * 64 + 4 * 256), 2560
    found = sum(p.numel() for p in FastNet().parameters())
    assert found == convolutions + stem + batch_norms + head


def test_the_forward_pass_is_stem_groups_maximum_and_head(images):
    net = FastNet().eval()
    maps = net.group3(net.group2(net.group1(nn.functional.gelu(net.stem(images[:2, :, :32, :32])))))
    wanted = maps.flatten(2).max(2).values @ net.head.weight.T
    assert torch.allclose(net(images[:2, :, :32, :32]), wanted, atol=1e-5)


def test_an_image_takes_105_million_multiply_adds():
    model, counts = FastNet().eval(), []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, _, out: counts.append(
                    layer.weight.numel() * out.shape[2] * out.shape[3]
                )
            )
    model(torch.rand(1, 3, 32, 32))
    assert (sum(counts) + 2560) / 1e6 == pytest.approx(105.3, abs=0.1)


def test_the_first_layer_decorrelates_the_images_it_was_made_from(images, monkeypatch):
    layer, count = FastNet().whitening_layer(), 12  # values of a patch
    monkeypatch.setattr(whitening, "PART", 50)  # of 64 images: two uneven parts
    whitening.whiten(layer, images)
    with torch.no_grad():
        out = nn.functional.conv2d(images, layer.weight).transpose(0, 1).flatten(1)
    assert torch.allclose(out[:count], -out[count:], atol=1e-4)
    second = out[:count] @ out[:count].T / out.shape[1]
    assert (second - torch.diag(second.diag())).abs().max() < 1e-3
    # 1 in directions with much variance, less where 5e-4 weighs against it, never more.
    assert second.diag().max() <= 1.001 and second.diag()[0] > 0.99
    assert not layer.weight.requires_grad


def test_a_new_convolution_passes_its_input_on():
    conv, x = dirac_conv(8, 20), torch.rand(2, 8, 5, 5)
    assert torch.allclose(conv(x)[:, :8], x, atol=1e-5) and conv(x).shape == (2, 20, 5, 5)


@pytest.mark.parametrize("size", [(5, 5), (31, 31), (6, 6), (4, 7)])
def test_a_pooled_convolution_leaves_out_only_what_the_pooling_does(size):
    """Its outputs are those of torch's whole convolution, and so are both gradients."""
    whole, pool = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.MaxPool2d(2)
    ours = PooledConv(4, 6, 3, padding=1, bias=False)
    ours.weight = nn.Parameter(whole.weight.detach().clone())
    images = torch.randn(2, 4, *size)
    assert ours(images).shape == (2, 6, *(side // 2 * 2 for side in size))
    pairs = []
    for conv in (whole, ours):
        x = images.clone().requires_grad_()
        out = pool(conv(x))
        out.square().sum().backward()
        pairs.append((out, x.grad, conv.weight.grad))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.network == "FastNet"])
def test_the_scale_of_batchnorm_is_one_and_stays(name):
    for module in LitClassifier(**asdict(RECIPES[name])).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (
                (module.weight == 1).all()
                and not module.weight.requires_grad
                and module.bias.requires_grad
            )


def test_pooling_comes_before_the_first_normalisation():
    names = [type(layer).__name__ for layer in Group(3, 4)]
    assert names == [
        "PooledConv",
        "MaxPool2d",
        "BatchNorm2d",
        "GELU",
        "Conv2d",
        "BatchNorm2d",
        "GELU",
    ]


# ---- Muon ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (30, 30)])
def test_orthogonalize_comes_near_the_nearest_orthogonal_matrix(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix, steps=5, dtype=dtype)
    assert found.dtype == torch.float32
    singular = torch.linalg.svdvals(found)
    assert singular.max() < 1.3 and singular.median() > 0.65
    assert torch.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4, 3, 3), (8,))
    )


def test_without_muon_groups_it_is_torch_s_sgd_with_nesterov_momentum():
    ours, torchs = parameters(), parameters()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    pairs = [
        (MuonWithSGD(ours, **settings), ours),
        (torch.optim.SGD(torchs, nesterov=True, **settings), torchs),
    ]
    for step in range(5):
        for optimizer, (filters, bias) in pairs:
            optimizer.zero_grad()
            ((filters * (step + 1)).sin().sum() + (bias**2).sum()).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, torchs, strict=True))


def test_a_muon_step_turns_every_direction_of_the_filters_alike():
    filters, _ = parameters()
    before = (
        filters.detach() * 8**0.5 / filters.detach().norm()
    )  # their length is set to sqrt(out_channels) first
    optimizer = MuonWithSGD([{"params": [filters], "muon": True, "momentum": 0.6}], lr=0.1)
    scales = torch.logspace(0, -2, 8).view(
        8, 1, 1, 1
    )  # a gradient that is 100 times smaller for the last filter
    filters.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)) * scales
    optimizer.step()
    moved = torch.linalg.svdvals((before - filters.detach()).flatten(1)) / 0.1
    assert (
        moved.max() < 1.3 and moved.min() > 0.25
    )  # of the gradient they are two hundred times apart
    assert (
        torch.linalg.svdvals(filters.grad.flatten(1)).max()
        > 50 * torch.linalg.svdvals(filters.grad.flatten(1)).min()
    )


def test_muon_refuses_what_is_no_filter_bank():
    with pytest.raises(ValueError, match=r"4-D filters.*\(8,\)"):
        MuonWithSGD([{"params": [parameters()[1]], "muon": True}], lr=0.1)


def test_a_muon_that_was_saved_goes_on_as_if_nothing_had_happened():
    filters, _ = parameters()
    optimizer = MuonWithSGD([{"params": [filters], "muon": True}], lr=0.1)
    filters.grad = torch.ones_like(filters)
    optimizer.step()
    twin = nn.Parameter(filters.detach().clone())
    other = MuonWithSGD([{"params": [twin], "muon": True}], lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, o in ((filters, optimizer), (twin, other)):
        p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
        o.step()
    assert torch.equal(filters, twin)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_that_learns_is_in_exactly_one_group(name):
    recipe = RECIPES[name]
    model = build(recipe.network)
    groups = parameter_groups(model, recipe)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    filters = [p for group in groups if group.get("muon") for p in group["params"]]
    by_hand = [p for n, p in model.named_parameters() if p.shape[2:] == (3, 3) and p.shape[1] > 3]
    assert len(filters) == (len(by_hand) if recipe.muon_lr else 0)


def test_each_group_has_its_own_momentum_and_the_same_decay_per_step():
    rates = {"max_lr": 0.02, "bias_lr": 2.0, "muon_lr": 0.1}
    recipe = Recipe("FastNet", momentum=0.8, weight_decay=0.5, **rates)
    filters, *by_sgd = make_optimizer(build("FastNet"), recipe, bf16=False).param_groups
    assert [group["momentum"] for group in (filters, *by_sgd)] == [0.6, 0.8, 0.8]
    decays = [group["lr"] * group["weight_decay"] for group in by_sgd]
    assert decays == pytest.approx([0.01, 0.01])
