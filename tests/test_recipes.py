"""Recipes fit their networks; training, evaluation and export keep to one device."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataload import (
    CLASSES,
    Augmentation,
    CIFAR10DataModule,
    FastDataModule,
    denormalize,
    normalize,
)
from evaluation.errors import get_misclassified_data, plot_confusion
from evaluation.features import stage_outputs
from evaluation.gradcam import display_gradcam_output
from evaluation.predict import predict
from lesson.explorers import MY_PICTURE, ErrorExplorer
from lesson.schematics import plot_batchnorm, plot_orthogonalization
from models.explain import gradcam
from models.registry import NETWORKS, build
from models.stage import Network
from tests.conftest import space_meta
from tests.stand_in import CPU, GPU, StandIn, StandInGenerator, mark
from training.classifier import LitClassifier
from training.optimizer import make_optimizer
from training.recipe_check import check_rates, check_recipe
from training.recipes import RECIPES, Recipe
from training.runs import train
from training.settings import SWITCHES, resolve
from utils import export_to_space

RECIPE = Recipe("FastNet", epochs=2, batch_size=16, max_lr=0.02, bias_lr=1.0, muon_lr=0.1)
KINDS = [CIFAR10DataModule, FastDataModule]


@pytest.fixture
def gpu(monkeypatch) -> Iterator[str]:
    """The name of the stand-in device, in a test that computes on it."""
    from_numpy = torch.from_numpy  # which a mode does not see
    monkeypatch.setattr(torch, "from_numpy", lambda array: mark(from_numpy(array), CPU))
    monkeypatch.setattr(torch, "Generator", StandInGenerator)
    with StandIn():
        yield "cuda:0"


# ---- the stand-in itself -------------------------------------------------------------------------


def test_the_stand_in_refuses_to_mix_what_was_moved_with_what_was_not(gpu):
    here, there = torch.ones(3), torch.ones(3).to(gpu)
    assert here.device == CPU and there.device == GPU and (there * 2).device == GPU
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([there, here])
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    assert (there * torch.tensor(2.0)).sum().item() == 6  # without dimensions they may mix
    assert (here + there.cpu()).device == CPU


# ---- a run on it ---------------------------------------------------------------------------------


def data_on(device: str, kind: type[CIFAR10DataModule], splits) -> CIFAR10DataModule:
    """Loaders as a trainer on a device has them; they only mirror, the same images everywhere."""
    data = kind(
        batch_size=16, num_workers=0, seed=1, splits=splits, augmentation=Augmentation(0, 0)
    )
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        current_epoch=0, global_rank=0, world_size=1, strategy=strategy, accumulate_grad_batches=1
    )
    return data


def network(name: str = "FastNet") -> torch.nn.Module:
    torch.manual_seed(0)
    return build(name)


def losses_of_an_epoch(device: str, kind: type[CIFAR10DataModule], splits, monkeypatch) -> Tensor:
    """Train an epoch on a device, as Lightning does it; return its loss and the head's size."""
    torch.manual_seed(0)
    data, lit = data_on(device, kind, splits), LitClassifier(**vars(RECIPE)).to(device)
    logged, optimizer = {}, make_optimizer(lit.model, RECIPE, bf16=False)
    trainer = SimpleNamespace(**vars(data.trainer), datamodule=data, optimizers=[optimizer])
    trainer.estimated_stepping_batches, trainer.is_last_batch = 8, False
    monkeypatch.setattr(LitClassifier, "trainer", trainer)
    monkeypatch.setattr(LitClassifier, "global_step", 3)
    monkeypatch.setattr(LitClassifier, "log_means", lambda _, metrics, __: logged.update(metrics))
    batches = list(data.train_dataloader())
    for index, (images, labels) in enumerate(batches):
        trainer.is_last_batch = index == len(batches) - 1
        loss = lit.training_step((images.to(device), labels.to(device)), index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    where = {value.device for value in (*lit.state_dict().values(), logged["train_loss"])}
    where |= {value.device for state in optimizer.state.values() for value in state.values()}
    assert where == {torch.device(device)}
    return torch.stack([logged["train_loss"].cpu(), lit.model.head.weight.cpu().square().sum()])


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_on_the_device_is_an_epoch_on_the_cpu(gpu, kind, tiny_splits, monkeypatch):
    here, there = (
        losses_of_an_epoch(device, kind, tiny_splits, monkeypatch) for device in ("cpu", gpu)
    )
    assert torch.allclose(here, there, rtol=1e-4)


def test_the_fast_loader_s_images_are_made_on_the_device(gpu, tiny_splits):
    (images, labels), *_ = data_on(gpu, FastDataModule, tiny_splits).train_dataloader()
    assert images.device == GPU and labels.device == GPU
    (wanted, _), *_ = data_on("cpu", FastDataModule, tiny_splits).train_dataloader()
    assert torch.equal(images.cpu(), wanted)


@pytest.mark.numeric
@pytest.mark.parametrize("tta", [False, True])
def test_predictions_come_back_to_the_cpu(gpu, tiny_splits, tta):
    loader = data_on("cpu", CIFAR10DataModule, tiny_splits).test_dataloader()
    (here, _), (there, labels) = (
        predict(network(), device, loader, tta) for device in ("cpu", gpu)
    )
    assert there.device == labels.device == CPU and torch.allclose(here, there, atol=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("arch", ["FastNet", "ResNet18"])
def test_heatmaps_and_feature_maps_of_a_network_on_the_device_are_those_of_the_cpu(
    gpu, tiny_splits, arch
):
    images, found = normalize(tiny_splits.test.images[:2]), []
    for device in ("cpu", gpu):
        model = network(arch).to(device)
        cams = [gradcam(model, stage.module, images, [3, 5]) for stage in model.stages()]
        found.append([*cams, *(maps.numpy() for maps in stage_outputs(model, images).values())])
    assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(*found, strict=True))


def upload(image: np.ndarray) -> list[dict]:
    """What a FileUpload of ipywidgets 8 holds."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return [{"content": file.getvalue()}]


def test_the_explorer_draws_errors_and_uploads_with_a_network_on_the_device(gpu, tiny_splits):
    model, test = network().to(gpu), tiny_splits.test
    explorer = ErrorExplorer(model, test, torch.rand(40, 10), CLASSES)
    assert explorer.picture.value and not explorer.message.value
    values = {name: control.value for name, control in explorer.controls.items()}
    values |= {"source": MY_PICTURE, "upload": upload(test.images[0])}
    assert isinstance(explorer.figure(**values), Figure)


def test_errors_figures_and_the_export_of_a_network_on_the_device(gpu, tiny_splits, tmp_path: Path):
    model = network().to(gpu)
    loader = data_on("cpu", CIFAR10DataModule, tiny_splits).test_dataloader()
    wrong = get_misclassified_data(model, gpu, loader)
    plot_batchnorm(model, normalize(tiny_splits.test.images[:2]).to(gpu))
    plot_orthogonalization(model.head.weight)
    layers = [model.stages()[-1].module]
    figure = display_gradcam_output(wrong, CLASSES, denormalize, model, layers, None, 2)
    assert isinstance(figure, Figure)
    confusion = plot_confusion(wrong, tiny_splits.test.labels, CLASSES)
    export_to_space(tmp_path / "space", model, space_meta(), wrong, denormalize, confusion)
    assert (tmp_path / "space/model.json").exists()


# ---- recipes that do not fit ---------------------------------------------------------------------


class Flat(Network):
    """A network of a reader's own: no filters of 3x3, no biases, images of 32x32 only."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, 4, bias=False)
        self.head = torch.nn.Linear(8 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).flatten(1))


def flat_recipe(monkeypatch, **changes) -> Recipe:
    """A recipe for Flat, which is registered during the test."""
    monkeypatch.setitem(NETWORKS, "Flat", Flat)
    for module in ("recipe_check", "runs"):
        monkeypatch.setattr(f"training.{module}.build", lambda _: Flat())  # it is in no file
    return Recipe("Flat", **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("muon_lr", 0.1, "expected muon_lr 0 for Flat, .*no 3x3 filters .* got 0.1"),
        ("bias_lr", 2.0, "expected bias_lr 0 for Flat, .*no biases, got 2.0"),
        ("low_res", 0.4, "expected low_res 0 for Flat, .*no images of 24x24 pixels .* got 0.4"),
    ],
)
@pytest.mark.usefixtures("plain_environment")
def test_a_trick_that_does_not_fit_the_network_is_refused_with_the_settings(
    monkeypatch, name, value, message
):
    recipe = flat_recipe(monkeypatch, **{name: value})
    monkeypatch.setitem(RECIPES, "flat", recipe)
    with pytest.raises(ValueError, match=message):
        resolve(SWITCHES | {"ARCH": "Flat", "RECIPE": "flat"})
    check_recipe(Recipe("Flat"))


def test_the_rate_of_biases_is_not_taken_for_muon_s():
    """A network with filters for Muon, and no biases; both rates are equal."""
    filters = torch.nn.Conv2d(8, 8, 3, bias=False)
    with pytest.raises(ValueError, match="expected bias_lr 0 for FastNet, .*no biases, got 0.1"):
        check_rates(filters, Recipe("FastNet", muon_lr=0.1, bias_lr=0.1))


@pytest.mark.parametrize("name", ["muon_lr", "bias_lr"])
def test_a_rate_without_parameters_is_refused_before_a_run_begins(
    monkeypatch, tmp_path, tiny_splits, name
):
    recipe = flat_recipe(monkeypatch, **{name: 0.1})
    with pytest.raises(ValueError, match=f"expected {name} 0 for Flat"):
        train(recipe, data_on("cpu", FastDataModule, tiny_splits), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_network(name):
    state = torch.get_rng_state()
    check_recipe(RECIPES[name])
    assert torch.equal(torch.get_rng_state(), state)
