"""A run learns, can be interrupted, and is neither repeated nor mixed up with another."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

import training.__main__
import training.classifier
import training.optimizer
from dataload import Augmentation, CIFAR10DataModule, normalize
from models import registry
from models.bundle import sha256
from models.errors import Interrupted, ProjectError
from models.fastnet import FastNet
from models.registry import build
from tests.conftest import CUDA_IS_TOO_OLD, PROJECT
from training import hardware, progress, recipes, results, runs
from training.budget import smaller_budget
from training.checkpoints import load_checkpoint, newest_checkpoint, sidecar
from training.classifier import LitClassifier
from training.console import format_duration
from training.history import read_metrics
from training.lightning_output import quiet_lightning
from training.options import RunOptions
from training.progress import LiveCurves, Progress, Workload
from training.range_test import range_test
from training.recipes import RANGES, RECIPES, Recipe, choose_recipe, multiply_adds
from training.run_folder import same_weights
from training.runs import build_datamodule, train
from training.schedule import one_cycle_factor
from training.whitening import whiten

RECIPE = Recipe("FastNet", epochs=3, batch_size=32, max_lr=0.01, bias_lr=1.0, muon_lr=0.1)
OPTIONS = RunOptions(seed=1, precision="32-true")


@pytest.fixture
def data(tiny_splits) -> CIFAR10DataModule:
    return CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_splits):
    """A finished run of three epochs: (its folder's root, the run)."""
    root = tmp_path_factory.mktemp("checkpoints")
    data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)
    return root, train(RECIPE, data, root, OPTIONS)


# ---- what Lightning prints ----


def test_of_lightning_s_messages_errors_and_unused_gpus_are_shown():
    logger, messages = logging.getLogger("pytorch_lightning.utilities.rank_zero"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    with warnings.catch_warnings():
        quiet_lightning()
    logger.addHandler(handler)
    try:
        logger.info("GPU available: True (cuda), used: True")
        logger.info("Trainer will use only 1 of 4 GPUs because it is running inside a notebook.")
        logger.error("it is broken")
    finally:
        logger.removeHandler(handler)
    assert messages == [
        "Trainer will use only 1 of 4 GPUs because it is running inside a notebook.",
        "it is broken",
    ]


# Imports what the project is built on, and then the project.
IMPORT = """
import logging, warnings
import albumentations, cv2, filelock, matplotlib.pyplot, pandas, pydantic, pytorch_lightning, tqdm
import torch.utils.flop_counter, torchmetrics.classification, torchsummary

def state():
    loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict)]
    ours = [logger for logger in loggers if "lightning" in logger.name]
    return warnings.filters[:], [(logger.name, logger.level, logger.filters[:]) for logger in ours]

before = state()
import training.__main__, training.range_test, training.runs
assert state() == before, (before, state())
"""


def test_importing_the_training_modules_silences_nothing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Whether the kernel may back a tensor of 32 MB with large pages.
ASKS_FOR_LARGE_PAGES = """
import torch
tensor = torch.ones(1 << 23)
print(any("hg" in line.split() for line in open("/proc/self/smaps") if line[:8] == "VmFlags:"))
"""


@pytest.mark.parametrize("module", ["dataload", "training.runs", "evaluation.predict"])
def test_training_asks_for_memory_in_large_pages(module):
    """Whichever part of the project is imported first."""

    def asks(script: str, **environment: str) -> bool:
        command = [sys.executable, "-c", script + ASKS_FOR_LARGE_PAGES]
        environ = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, env=environ | environment, cwd=PROJECT, capture_output=True)
        return done.stdout.split()[-1:] == [b"True"]

    if not asks("", THP_MEM_ALLOC_ENABLE="1"):
        pytest.skip("this system has no large pages, or does not tell")
    assert asks(f"import {module}") and not asks("")


# ---- recipes and schedule ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"warmup": 1.5}, "warmup from 0 to 1, got 1.5"),
        ({"low_res": -0.1}, "low_res"),
        ({"network": "VGG"}, "unknown network 'VGG'"),
        (
            {"batch_size": 100, "micro_batch": 30},
            "batch_size of 100 is no multiple of the micro_batch 30",
        ),
        ({"epochs": 2.5}, "expected epochs from 1 to 10000, a whole number, got 2.5"),
        ({"epochs": True}, "expected epochs .*got True"),
        ({"max_lr": "0.1"}, "expected max_lr from 0 to .*got '0.1'"),
        ({"max_lr": None}, "max_lr"),
        ({"padding": 32}, "expected padding from 0 to 31"),
        ({"cutout": 33}, "expected cutout from 0 to 32"),
        ({"network": ["ResNet18"]}, "unknown network"),
        ({"fixed_bn_scale": 1}, "expected fixed_bn_scale True or False, got 1"),
        ({"momentum": 1.5}, "momentum from 0 to 1, got 1.5"),
        *(
            ({name: value}, f"expected {name} from")
            for name in RANGES
            for value in (float("nan"), float("inf"), -1)
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


def test_the_recipe_is_chosen_by_network_or_name():
    assert choose_recipe("ResNet18")[0] == "resnet18-20"
    assert choose_recipe("CustomResNet", "", epochs=3, batch_size=256)[1].epochs == 3
    assert (
        choose_recipe("ResNet18", batch_size=64)[1].micro_batch == 0
    )  # smaller than the recipe's part of a batch
    with pytest.raises(ValueError, match="recipe for ResNet18 .*got 'custom-10'"):
        choose_recipe("ResNet18", "custom-10")
    with pytest.raises(ValueError, match="unknown network 'VGG'"):
        choose_recipe("VGG")


def test_a_network_without_a_recipe_is_refused(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "Deeper", registry.NETWORKS["ResNet18"])
    with pytest.raises(ValueError, match="recipe for Deeper .there is none in RECIPES., got ''"):
        choose_recipe("Deeper")


def test_counting_multiply_adds_moves_no_random_number():
    multiply_adds.cache_clear()
    state = torch.get_rng_state()
    multiply_adds("FastNet")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fixed", [False, True])
def test_batchnorm_s_scales_learn_unless_the_recipe_fixes_them(fixed):
    classifier = LitClassifier(network="ResNet18", fixed_bn_scale=fixed, bias_lr=1.0)
    norms = [m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    groups = training.optimizer.parameter_groups(classifier.model, classifier.recipe)
    learned = {id(p) for group in groups for p in group["params"]}
    assert len(norms) == 20  # one behind each of 17 + 3 convolutions
    assert all((id(norm.weight) in learned) != fixed for norm in norms)
    assert all(id(norm.bias) in learned for norm in norms)


@pytest.mark.parametrize("arch", ["ResNet18", "CustomResNet", "FastNet"])
def test_half_of_any_batch_size_is_accepted_as_the_advice_says(arch):
    for batch_size in [*range(2, 520), 1000, 1999, 2000, 50_000]:
        recipe = choose_recipe(arch, batch_size=batch_size // 2)[1]
        parts, rest = divmod(recipe.batch_size, recipe.micro_batch or recipe.batch_size)
        assert rest == 0 and (
            parts == 1 or 32 <= recipe.micro_batch <= choose_recipe(arch)[1].micro_batch
        )
    assert choose_recipe("ResNet18", batch_size=192)[1].micro_batch == 96
    assert choose_recipe("ResNet18", batch_size=256)[1].micro_batch == 128
    assert choose_recipe("ResNet18", batch_size=383)[1].micro_batch == 0  # a prime


@pytest.mark.numeric
def test_the_one_cycle_factor_goes_from_0_over_1_back_to_0():
    assert [one_cycle_factor(x, 0.2) for x in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    assert [one_cycle_factor(x, 0) for x in (0, 0.5, 1)] == [
        1,
        0.5,
        0,
    ]  # no warm-up: it begins at the peak
    assert [one_cycle_factor(x, 1) for x in (0, 0.5, 1, 1.1)] == [
        0,
        0.5,
        1,
        1,
    ]  # nothing else: it only rises


@pytest.mark.parametrize("warmup", [0, 1, 1.0])
@pytest.mark.parametrize("low_res", [0, 1])
def test_the_ends_of_the_ranges_train(data, tmp_path, warmup, low_res):
    ends = {"warmup": warmup, "low_res": low_res, "padding": 31, "cutout": 32}
    recipe = dataclasses.replace(RECIPE, network="FastNet", epochs=2, **ends)
    run = train(recipe, data, tmp_path, OPTIONS)
    rates = pd.read_csv(run.metrics_csv).dropna(subset="lr_step").lr_step.tolist()
    assert rates == sorted(rates, reverse=not warmup) and len(set(rates)) == 4


# ---- steps ----


def recording(patch: pytest.MonkeyPatch) -> list[tuple]:
    """Record the shapes of the images that FastNet is trained on from now on."""
    shapes, forward = [], FastNet.forward

    def recorded(self, images):
        if self.training:
            shapes.append(tuple(images.shape))
        return forward(self, images)

    patch.setattr(FastNet, "forward", recorded)
    return shapes


def trained_on(splits, tmp_path, fast=False, **changes) -> tuple[results.Run, list]:
    """A run of FastNet with a small batch, and the shapes of the images that it was trained on."""
    settings = {
        "epochs": 2,
        "batch_size": 32,
        "micro_batch": 8,
        "bias_lr": 1,
        "max_lr": 0.01,
        "muon_lr": 0.1,
    }
    recipe = dataclasses.replace(RECIPES["fastnet-7"], **settings | changes)
    with pytest.MonkeyPatch.context() as patch:
        shapes = recording(patch)
        run = train(
            recipe,
            build_datamodule(recipe, splits, 0, fast),
            tmp_path,
            RunOptions(seed=0, precision="32-true"),
        )
    return run, shapes


def test_micro_batches_make_one_step_and_the_start_is_at_low_resolution(tiny_splits, tmp_path):
    run, shapes = trained_on(tiny_splits, tmp_path, low_res=0.5)
    assert shapes == [(8, 3, 24, 24)] * 8 + [(8, 3, 32, 32)] * 8  # 64 images an epoch
    steps = pd.read_csv(run.metrics_csv).groupby("epoch").step.max()
    assert steps.tolist() == [1, 3]  # of the optimiser, two an epoch, counted from 0


def test_micro_batches_together_weigh_as_much_in_batchnorm_as_the_batch():
    classifier = LitClassifier(network="FastNet", bn_momentum=0.4)
    classifier.trainer = SimpleNamespace(
        accumulate_grad_batches=4, datamodule=CIFAR10DataModule(), max_epochs=1
    )
    classifier.trainer.reload_dataloaders_every_n_epochs = 0  # of a single epoch, either will do
    classifier.on_fit_start()
    norms = [m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 1
    assert [1 - (1 - m.momentum) ** 4 for m in norms] == pytest.approx([0.4] * len(norms))


def test_a_trainer_that_would_not_train_as_meant_is_refused(tiny_splits):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    classifier, data = LitClassifier(network="FastNet"), CIFAR10DataModule(splits=tiny_splits)
    with pytest.raises(ValueError, match=r"reload_dataloaders_every_n_epochs=1.*got 0"):
        pl.Trainer(accelerator="cpu", max_epochs=2, **quiet).fit(classifier, datamodule=data)
    with pytest.raises(ValueError, match=r"datamodule=CIFAR10DataModule.*got loaders"):
        loaders = data.val_dataloader(), data.val_dataloader()
        pl.Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(classifier, *loaders)


@pytest.mark.numeric
@pytest.mark.parametrize("fast", [False, True])
def test_fastnet_learns_with_either_loader_and_its_stem_stays(tiny_splits, tmp_path, fast):
    run, _ = trained_on(tiny_splits, tmp_path, fast, epochs=6)
    table = pd.read_csv(run.metrics_csv).groupby("epoch").mean()
    assert (
        table.train_loss.iloc[-1] < 0.9 * table.train_loss.iloc[0]
        and table.train_acc.iloc[-1] > 0.4
    )
    fresh = FastNet()
    whiten(fresh.stem, normalize(tiny_splits.train.images))
    assert torch.allclose(run.model.stem.weight, fresh.stem.weight, rtol=1e-2, atol=1e-3)


def test_a_loader_s_batch_that_does_not_divide_the_recipe_s_is_refused(tiny_splits, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    data = CIFAR10DataModule(batch_size=24, num_workers=0, splits=tiny_splits)
    with pytest.raises(ValueError, match="batch of 32 cannot be made of loader batches of 24"):
        train(recipe, data, tmp_path, OPTIONS)


def test_a_loss_that_is_no_number_stops_and_the_last_checkpoint_stays(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_losses(patch, 5, last=5)  # of 2 batches of training and 1 of validation in an epoch
        with pytest.raises(
            FloatingPointError, match=r"loss is nan at step 4, epoch 2.*learning rate of 0\.0"
        ):
            train(RECIPE, data, tmp_path, OPTIONS)
    (folder,) = tmp_path.glob("FastNet-*")
    assert newest_checkpoint(folder).name == "epoch000.ckpt"
    assert (
        train(RECIPE, data, tmp_path, OPTIONS).metadata["epochs"] == 3
    )  # and it goes on from there


def test_the_validation_loss_has_smoothed_labels_as_that_of_training_has(monkeypatch):
    classifier, logged = LitClassifier(network="FastNet", label_smoothing=0.3).eval(), {}
    monkeypatch.setattr(classifier, "log_means", lambda metrics, *_, **__: logged.update(metrics))
    classifier.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad():
        classifier.validation_step((images, labels), 0)
    # By definition: 0.7 of the cross-entropy, and 0.3 of its mean over all classes.
    minus_log = -classifier(images).detach().log_softmax(1)
    wanted = 0.7 * minus_log[labels, labels].mean() + 0.3 * minus_log.mean()
    assert float(logged["val_loss"]) == pytest.approx(float(wanted))


def test_lightning_s_validate_and_test_return_loss_and_accuracy(data, tmp_path):
    trainer = pl.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), enable_progress_bar=False)
    classifier = LitClassifier(network="FastNet")
    (validated,) = trainer.validate(classifier, datamodule=data, verbose=False)
    (tested,) = trainer.test(classifier, datamodule=data, verbose=False)
    assert set(validated) == {"val_loss", "val_acc"} and set(tested) == {"test_loss", "test_acc"}


def test_the_first_of_several_bad_losses_is_named_by_its_step(monkeypatch):
    """As on a GPU, where they are looked at when the epoch ends.

    Ten batches, two to a step, the fifth is bad.
    """
    classifier = LitClassifier(network="FastNet")
    monkeypatch.setattr(classifier, "logged_rate", lambda: 0.4)  # of the last step
    classifier.rates = {100: 0.1, 101: 0.1, 102: 0.2, 103: 0.3}  # by the steps before each
    state = {
        "is_last_batch": True,
        "global_step": 104,
        "current_epoch": 6,
        "accumulate_grad_batches": 2,
    }
    classifier.trainer = type("Trainer", (), state)()
    values = [1.0, 1.0, 1.0, 1.0, float("inf"), float("nan"), 1.0, 1.0, 1.0, 1.0]
    classifier.history = [(torch.tensor(value), torch.tensor(1), 2) for value in values]
    with pytest.raises(
        FloatingPointError, match="loss is inf at step 103, epoch 7, with a learning rate of 0.2;"
    ):
        classifier.check_finite()


def test_a_compiled_run_compiles_the_network_and_keeps_its_names(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    run = train(
        dataclasses.replace(RECIPE, epochs=1),
        data,
        tmp_path,
        dataclasses.replace(OPTIONS, compiled=True),
    )
    assert asked == ["FastNet"] and run.metadata["epochs"] == 1


@pytest.mark.numeric
def test_an_epoch_s_metrics_weigh_each_image_alike(monkeypatch):
    classifier, logged = LitClassifier(network="FastNet"), {}
    monkeypatch.setattr(classifier, "logged_rate", lambda: 0.1)
    monkeypatch.setattr(classifier, "log_dict", lambda values, **_: logged.update(values))
    classifier.history = [
        (torch.tensor(1.0), torch.tensor(3), 6),
        (torch.tensor(4.0), torch.tensor(0), 2),
    ]
    classifier.log_epoch()
    assert logged["train_loss"] == pytest.approx(14 / 8) and logged["train_acc"] == pytest.approx(
        3 / 8
    )
    assert logged["lr"] == 0.1 and classifier.history == []


@pytest.mark.parametrize(("filters", "rate"), [(True, 0.24), (False, 0.5)])
def test_the_logged_rate_is_muon_s_or_where_it_trains_nothing_the_last_group_s(filters, rate):
    classifier = LitClassifier(network="FastNet", muon_lr=0.24, bias_lr=9.0, max_lr=0.5)
    convolution = torch.nn.Conv2d(8, 8, 3 if filters else 1)
    optimizer = training.optimizer.make_optimizer(
        torch.nn.Sequential(convolution, torch.nn.Linear(8, 8)), classifier.recipe, False
    )
    classifier.trainer = SimpleNamespace(optimizers=[optimizer])
    assert classifier.logged_rate() == rate


# ---- budget ----


def test_a_slow_machine_is_offered_what_was_measured_and_fits(tmp_path, monkeypatch):
    measured = tmp_path / "measured.json"
    monkeypatch.setattr(recipes, "MEASURED", measured)
    rows = [
        {
            "network": "FastNet",
            "recipe": "fastnet-7",
            "epochs": 8,
            "val_single": 0.93,
            "single": 0.95,
        },
        {
            "network": "FastNet",
            "recipe": "fastnet-4",
            "epochs": 4,
            "val_single": 0.94,
            "single": 0.91,
        },
        {
            "network": "FastNet",
            "recipe": "fastnet-2",
            "epochs": 2,
            "val_single": 0.85,
            "single": 0.84,
        },
        {
            "network": "FastNet",
            "recipe": "fastnet-2",
            "epochs": 2,
            "single": 0.99,
        },  # was not validated
        {"network": "FastNet", "recipe": "of-old", "epochs": 2, "val_single": 0.99, "single": 0.99},
    ]
    measured.write_text(json.dumps([row | {"train_images": 45_000} for row in rows]))
    offer = smaller_budget("ResNet18", 2)  # 2 epochs of it are 9.4 of FastNet
    assert (
        '"fastnet-4"' in offer
        and "validation accuracy of about 94.0%" in offer
        and "20 minutes" in offer
    )
    assert '"fastnet-2"' in smaller_budget("FastNet", 3)
    assert "EPOCHS = 1 would take less" in smaller_budget("FastNet", 1.9)
    measured.unlink()
    assert "EPOCHS = 1 would take more" in smaller_budget("FastNet", 0.4)


@pytest.mark.parametrize("network", ["ResNet18", "CustomResNet", "FastNet"])
@pytest.mark.parametrize("epochs", [0.1, 1, 3, 9, 40])
def test_what_is_offered_is_a_choice_that_settings_take(network, epochs):
    offer = smaller_budget(network, epochs)
    if "ARCH" in offer:
        _, arch, _, recipe, *_ = offer.split('"')
        assert choose_recipe(arch, recipe)[1].network == arch
    else:
        assert (
            choose_recipe(network, "", int(offer.split("EPOCHS = ")[1].split()[0]))[1].epochs >= 1
        )


@pytest.mark.parametrize("content", ["", "{", "[1]", "[{}]", "null", '{"network": 1}'])
def test_a_damaged_measurement_is_none(tmp_path, monkeypatch, content):
    monkeypatch.setattr(recipes, "MEASURED", tmp_path / "measured.json")
    recipes.MEASURED.write_text(content)
    assert "EPOCHS = 3 would take less" in smaller_budget("FastNet", 3.5)


def test_a_network_of_the_reader_s_own_is_advised_too(monkeypatch):
    class Deeper(registry.NETWORKS["ResNet18"]):
        def __init__(self, num_classes):  # without a default
            super().__init__(num_classes)

    monkeypatch.setitem(registry.NETWORKS, "Deeper", Deeper)
    assert "would take" in smaller_budget("Deeper", 5)
    multiply_adds.cache_clear()


def test_the_multiply_adds_are_those_of_the_papers():
    counted = [multiply_adds(name) for name in ("ResNet18", "CustomResNet", "FastNet")]
    assert counted == [555, 379, 105]  # millions; kuangliu's net has 0.56 G, by ptflops


def test_low_resolution_counts_as_less_work_and_validation_as_a_forward_pass():
    assert Workload(1, 10, 0, 0).left(0) == 10
    assert Workload(1, 10, 10, 0).left(0) == pytest.approx(10 * 9 / 16)
    assert Workload(1, 12, 10, 0).left(0, 8) == pytest.approx(2 * 9 / 16 + 2)
    assert Workload(2, 10, 0, 3).left(0) == pytest.approx(22) and Workload(2, 10, 0, 3).left(
        1
    ) == pytest.approx(11)


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


def simulated_progress(monkeypatch, capsys, low_res=0.4, epochs=4, batches=180, slower_from=99):
    """What Progress prints while a simulated machine trains, and how many seconds that takes.

    A batch takes 1 s at full resolution, 9/16 s at low, a third of that in validation, 3 s at the
    start; checkpoint and log 4 s. From the epoch `slower_from` on, everything takes twice as long.
    """
    made_up, validation = Clock(), 5000
    monkeypatch.setattr("training.progress.time", made_up)
    images = SimpleNamespace(val=SimpleNamespace(labels=range(validation)))
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=0,
        max_epochs=epochs,
        num_training_batches=batches,
        callback_metrics={},
        global_step=0,
        logger=None,
        datamodule=SimpleNamespace(splits=images, batch_size=250),
    )
    recipe = SimpleNamespace(low_res=low_res, network="FastNet", epochs=epochs)
    module = SimpleNamespace(device=torch.device("cpu"), rates={}, recipe=recipe)
    progress = Progress(pd.DataFrame({"epoch": []}))
    monkeypatch.setattr("training.progress.write_epoch", lambda *_: None)
    monkeypatch.setattr("training.progress.epoch_line", lambda *_: "epoch")
    monkeypatch.setattr(LiveCurves, "add", lambda *_: None)
    progress.on_train_start(trainer, module)
    for epoch in range(epochs):
        trainer.current_epoch, pace = epoch, 2 if epoch >= slower_from else 1
        for index in range(batches):
            small = epoch * batches + index < low_res * epochs * batches
            made_up.now += pace * (3 if epoch == 0 and index < 3 else 9 / 16 if small else 1)
            progress.on_train_batch_end(trainer, module, None, None, index)
        made_up.now += pace * validation / 250 / 3
        progress.on_train_epoch_end(trainer, module)
        made_up.now += 4
    return capsys.readouterr().out.splitlines(), made_up.now - 1000


def seconds(line: str) -> float:
    """'about 42 s for 1 epochs' -> 42, also in minutes."""
    number, unit = line.removeprefix("now ").split()[1:3]
    return float(number) * {"s": 1, "min": 60}[unit]


@pytest.mark.parametrize("low_res", [0, 0.4, 1])
@pytest.mark.parametrize(("epochs", "batches"), [(1, 100), (4, 180), (8, 180)])
def test_the_estimate_holds_everything_from_the_start_to_the_end(
    monkeypatch, capsys, low_res, epochs, batches
):
    lines, took = simulated_progress(monkeypatch, capsys, low_res, epochs, batches)
    (said,) = [line for line in lines if line.startswith(("about", "now about"))]
    assert seconds(said) == pytest.approx(took, rel=0.15)
    assert said.endswith("for 1 epoch" if epochs == 1 else f"for {epochs} epochs")


def test_the_estimate_is_corrected_where_the_machine_becomes_slower(monkeypatch, capsys):
    lines, took = simulated_progress(monkeypatch, capsys, slower_from=1, epochs=6)
    first, *later = [line for line in lines if "about" in line]
    assert (
        seconds(first) < 0.8 * took
        and later
        and all(line.startswith("now about") for line in later)
    )
    assert seconds(later[-1]) == pytest.approx(took, rel=0.15)


def test_advice_never_ends_a_run(monkeypatch, capsys):
    lines, _ = simulated_progress(monkeypatch, capsys, epochs=20)
    assert "This machine needs more than 20 minutes" in lines[1]
    monkeypatch.setattr("training.progress.smaller_budget", lambda *_: 1 / 0)
    assert (
        len(simulated_progress(monkeypatch, capsys, epochs=20)[0]) == 21
    )  # a line for each epoch, and the estimate


def test_an_epoch_of_a_few_batches_ends_without_an_estimate(monkeypatch, capsys):
    lines, _ = simulated_progress(monkeypatch, capsys, epochs=1, batches=2)
    assert lines == ["epoch"] and format_duration(0) == "0 s"


# ---- device ----


@pytest.fixture
def apple_gpu(monkeypatch):
    """A Mac, as torch would see it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    tested = hardware.mps_trains_correctly
    tested.cache_clear()
    yield
    tested.cache_clear()


def test_the_self_test_agrees_with_itself_and_moves_no_random_number():
    state = torch.get_rng_state()
    assert hardware.steps_agree("cpu", "cpu")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 4, 5, 6, 7])
def test_the_self_test_sees_one_wrong_result(monkeypatch, wrong):
    right = hardware.training_step

    def second_is_wrong(device):
        values = right("cpu")
        if device == "mps":
            values[wrong] = values[wrong] * 1.01
        return values

    monkeypatch.setattr(hardware, "training_step", second_is_wrong)
    assert not hardware.steps_agree("cpu", "mps")


@pytest.mark.parametrize("result", [float("nan"), float("inf")])
def test_a_result_that_is_no_number_disagrees(monkeypatch, result):
    right = hardware.training_step
    monkeypatch.setattr(
        hardware,
        "training_step",
        lambda device: [v if device == "cpu" else v * result for v in right("cpu")],
    )
    assert not hardware.steps_agree("cpu", "mps")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AssertionError, TypeError])
def test_a_device_on_which_the_step_fails_disagrees(monkeypatch, error):
    right = hardware.training_step

    def fails(device):
        if device == "mps":
            raise error("view size is not compatible")
        return right(device)

    monkeypatch.setattr(hardware, "training_step", fails)
    assert not hardware.steps_agree("cpu", "mps")


def test_an_apple_gpu_that_computes_otherwise_is_left_alone_and_that_is_said_once(
    apple_gpu, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        hardware, "PROJECT", tmp_path
    )  # where the self-test's process finds nothing
    for _ in range(3):
        assert hardware.choose_device().type == "cpu"
    assert capsys.readouterr().out.count("Apple GPU") == 1
    assert "CPU" in hardware.hardware() and "bf16-mixed" in hardware.possible_precisions()


def test_the_self_test_of_an_apple_gpu_runs_in_a_process_of_its_own(apple_gpu, monkeypatch):
    """Here with the CPU in the place of that GPU."""
    run = subprocess.run

    def on_the_cpu(command: list[str], **options):
        return run([part.replace("'mps'", "'cpu'") for part in command], **options)

    monkeypatch.setattr(hardware.subprocess, "run", on_the_cpu)
    assert hardware.choose_device().type == "mps"


@pytest.mark.parametrize(
    ("capability", "known", "device"),
    [
        ((7, 0), ["sm_75", "sm_120"], "cpu"),
        ((7, 5), ["sm_75", "sm_120"], "cuda"),
        ((12, 1), ["sm_75", "sm_120"], "cuda"),
        ((11, 0), ["gfx900", "gfx90a", "gfx1100"], "cuda"),  # of AMD
    ],
)
def test_a_gpu_older_than_torch_s_code_is_left_alone_and_that_is_said_once(
    monkeypatch, capsys, capability, known, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: known)
    monkeypatch.setattr(hardware, "cuda_is_too_old", CUDA_IS_TOO_OLD)
    CUDA_IS_TOO_OLD.cache_clear()
    assert [hardware.choose_device().type for _ in range(2)] == [device] * 2
    said = capsys.readouterr().out.count("no code for Tesla V100: the CPU trains")
    assert said == (device == "cpu")


def test_an_apple_gpu_that_agrees_is_used_in_fp32(apple_gpu, monkeypatch):
    monkeypatch.setattr(hardware, "mps_trains_correctly", lambda: True)
    assert hardware.choose_device().type == "mps" and hardware.choose_precision() == "32-true"
    assert hardware.hardware().startswith("Apple GPU") and hardware.possible_precisions() == [
        "32-true"
    ]
    with pytest.raises(ProjectError, match="Apple GPU .* has .32-true., got 'bf16-mixed'"):
        hardware.check_precision("bf16-mixed")


@pytest.mark.parametrize(
    ("device", "methods", "workers"),
    [
        ("cuda", ["fork", "spawn"], 2),
        ("cuda", ["spawn"], 0),
        ("mps", ["spawn", "fork"], 0),
        ("cpu", ["fork", "spawn"], 0),
    ],
)
def test_images_are_loaded_by_other_processes_only_where_these_start_at_once(
    monkeypatch, tiny_splits, device, methods, workers
):
    monkeypatch.setattr(runs, "choose_device", lambda: torch.device(device))
    monkeypatch.setattr(runs.multiprocessing, "get_all_start_methods", lambda: methods)
    assert runs.build_datamodule(RECIPE, tiny_splits, 0).num_workers == workers


def test_the_trainer_takes_the_device_that_was_chosen(monkeypatch, apple_gpu, data, tmp_path):
    given = []

    def trainer(**settings):
        given.append(settings["accelerator"])
        raise InterruptedError

    monkeypatch.setattr(runs.pl, "Trainer", trainer)
    for right, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(hardware, "mps_trains_correctly", lambda right=right: right)
        root = tmp_path / device
        for start in (
            partial(train, RECIPE, data, root, OPTIONS),
            partial(range_test, RECIPE, data),
        ):
            with pytest.raises(InterruptedError):
                start()
            assert given[-1] == device


# ---- precision ----


def test_a_precision_that_the_machine_lacks_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="precision that .* has .*got '16-mixed'"):
        train(RECIPE, data, tmp_path, RunOptions(precision="16-mixed"))
    assert not any(tmp_path.iterdir())


def test_bf16_is_chosen_on_a_cpu_only_if_it_is_native_right_and_faster(monkeypatch):
    exact, rounded, wrong = torch.ones(4), torch.ones(4) + 0.002, torch.ones(4) + 0.1

    def chosen(native, slow, fast, output):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(
            hardware,
            "conv_seconds",
            lambda _images, _conv, bf16: (output, fast) if bf16 else (exact, slow),
        )
        hardware.cpu_bf16_is_faster.cache_clear()
        return hardware.choose_precision()

    assert chosen(True, 2.0, 1.0, rounded) == "bf16-mixed"
    assert chosen(False, 2.0, 1.0, rounded) == "32-true"
    assert chosen(True, 1.0, 2.0, rounded) == "32-true"
    assert chosen(True, 2.0, 1.0, wrong) == "32-true"
    hardware.cpu_bf16_is_faster.cache_clear()


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_trains_in_bf16_only_if_that_is_not_emulated(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert hardware.choose_precision() == precision


@pytest.mark.numeric
def test_the_self_test_compares_real_convolutions():
    images, conv = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3)
    (exact, seconds), (rounded, _) = (
        hardware.conv_seconds(images, conv, bf16) for bf16 in (False, True)
    )
    assert torch.allclose(exact, conv(images), atol=1e-5) and seconds > 0
    assert 0 < (rounded - exact).abs().max() < 0.05


def test_the_self_test_does_not_mind_what_else_the_machine_does(monkeypatch):
    """It measures CPU time, not waiting, and of one thread, which waits for no other."""
    images, conv, threads = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3), []
    conv.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    assert hardware.conv_seconds(images, conv, False)[1] < 0.4

    def timed(_images, _conv, bf16):
        threads.append(torch.get_num_threads())
        return torch.ones(4), 1.0 - bf16 / 2

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(hardware, "conv_seconds", timed)
    hardware.cpu_bf16_is_faster.cache_clear()
    with hardware.one_thread():  # gives the number of threads back, whatever happens
        torch.set_num_threads(2)
        assert hardware.cpu_bf16_is_faster()
        assert set(threads) == {1} and torch.get_num_threads() == 2
    hardware.cpu_bf16_is_faster.cache_clear()


# ---- range test ----


@pytest.mark.numeric
def test_the_range_test_takes_ever_larger_steps_on_a_network_of_its_own(
    data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("FastNet", epochs=3, batch_size=32, max_lr=0.05)
    seen, step = [], training.optimizer.MuonWithSGD.step
    monkeypatch.setattr(
        training.optimizer.MuonWithSGD,
        "step",
        lambda self, *a, **k: (seen.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    table = range_test(recipe, data, seed=1, steps=7, precision="32-true")
    assert len(table) == 7 and list(table.columns) == ["factor", "loss"]
    assert table.factor.tolist() == pytest.approx([10 ** (3 * i / 6 - 2) for i in range(7)])
    assert seen == pytest.approx((0.05 * table.factor).tolist())
    assert table.loss.iloc[0] == pytest.approx(2.3, abs=0.7)  # of a network that knows nothing
    assert not list(tmp_path.iterdir())  # leaves nothing behind


def test_a_rate_that_fp16_has_skipped_comes_again_in_the_range_test(data, monkeypatch):
    """The optimiser calls its hook after each step that was not skipped: here, all but one."""
    note, calls = LitClassifier.note_step, []
    monkeypatch.setattr(
        LitClassifier, "note_step", lambda self, *_: calls.append(0) or calls[1:] and note(self)
    )
    table = range_test(RECIPE, data, steps=4, precision="32-true")
    wanted = [10 ** (step - 2) for step in (0, 0, 1, 2)]
    assert table.factor.tolist() == pytest.approx(wanted)


def break_losses(monkeypatch, first: int, last: float = float("inf")) -> None:
    """From the first call to the last, counted from 1, cross-entropies are no numbers."""
    right, calls = torch.nn.functional.cross_entropy, []

    def loss(*arguments, **options):
        calls.append(0)
        is_broken = first <= len(calls) <= last
        return right(*arguments, **options) * (float("nan") if is_broken else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)


def test_the_range_test_ends_where_the_loss_is_no_number(data, monkeypatch):
    break_losses(monkeypatch, 4)
    assert len(range_test(RECIPE, data, steps=7, precision="32-true")) == 3


def test_a_range_test_that_is_stopped_says_so_in_one_line(data, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.range_test.RangeTest.training_step", stopped)
    with pytest.raises(Interrupted, match="the range test was interrupted"):
        range_test(RECIPE, data, steps=7, precision="32-true")


def test_the_range_test_leaves_out_a_step_that_it_has_not_finished(tiny_splits, monkeypatch):
    """Of four micro-batches of the second step, one has a loss."""
    break_losses(monkeypatch, 6)
    recipe = dataclasses.replace(RECIPES["fastnet-7"], batch_size=32, micro_batch=8)
    table = range_test(
        recipe, build_datamodule(recipe, tiny_splits, 0), steps=3, precision="32-true"
    )
    assert len(table) == 1


def test_the_loaders_augment_as_the_recipe_says(tiny_splits):
    data = build_datamodule(RECIPES["resnet18-20"], tiny_splits, 7)
    assert (data.augmentation, data.seed) == (Augmentation(padding=4, cutout=12), 7)
    data = build_datamodule(RECIPES["fastnet-7"], tiny_splits, 7, fast=True)
    assert data.augmentation == Augmentation(padding=2, cutout=0)


def test_the_range_test_looks_at_small_images_where_the_training_begins_with_them(
    tiny_splits, monkeypatch
):
    shapes = recording(monkeypatch)
    recipe = dataclasses.replace(RECIPES["fastnet-7"], batch_size=32, micro_batch=8)
    table = range_test(
        recipe, build_datamodule(recipe, tiny_splits, 0), steps=3, precision="32-true"
    )
    assert len(table) == 3 and shapes == [(8, 3, 24, 24)] * 12  # four micro-batches a step


# ---- curves that grow ----


def test_the_curves_hold_the_epochs_before_an_interruption_too():
    earlier = pd.DataFrame(
        {
            "epoch": [0, 0],
            "train_loss": [2.0, None],
            "val_loss": [None, 1.8],
            "train_acc": [0.3, None],
        }
    )
    curves, shown = LiveCurves(earlier), []
    curves.add(
        {"epoch": 1, "train_loss": 1.5, "val_loss": 1.6, "train_acc": 0.5}
    )  # outside a notebook: nothing to show
    curves.handle = type(
        "Handle", (), {"update": lambda self, value, raw=False: shown.append(value)}
    )()
    curves.add({"epoch": 2, "train_loss": 1.2, "val_loss": 1.4, "train_acc": 0.6})
    loss, accuracy = shown[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1.5, 1.2], [1.8, 1.6, 1.4]]
    assert [list(line.get_xdata()) for line in accuracy.lines] == [
        [1, 2, 3]
    ]  # no validation, no curve
    curves.close()
    assert shown[1] == {"text/plain": ""}


# ---- runs ----


def test_every_epoch_logs_its_four_metrics_and_the_learning_rate(finished):
    table = pd.read_csv(finished[1].metrics_csv).groupby("epoch").mean()
    assert {"train_loss", "train_acc", "val_loss", "val_acc", "seconds"} <= set(table.columns)
    assert (
        not table[["train_loss", "train_acc", "val_loss", "val_acc"]].isna().any(axis=None)
        and len(table) == 3
    )


@pytest.mark.numeric
def test_the_learning_rate_of_every_step_is_logged(finished):
    rates = pd.read_csv(finished[1].metrics_csv).dropna(subset="lr_step")
    assert rates.step.tolist() == [0, 1, 2, 3, 4, 5] and rates.epoch.tolist() == [0, 0, 1, 1, 2, 2]
    assert rates.lr_step.tolist() == pytest.approx(
        [RECIPE.muon_lr * one_cycle_factor((step + 0.5) / 6, 0.2) for step in range(6)]
    )


@pytest.mark.numeric
def test_the_logged_accuracy_is_that_of_the_network(finished, data):
    _, run = finished
    right = total = 0
    for images, labels in data.val_dataloader():
        right += int((run.model(images).argmax(1) == labels).sum())
        total += len(labels)
    assert run.metadata["val_acc"] == pytest.approx(
        right / total, abs=0.1
    )  # fp16 weights may tip a few images of 32


def test_the_two_last_checkpoints_are_kept_each_with_its_checksum(finished):
    folder = finished[1].metrics_csv.parent
    assert {p.name for p in folder.glob("*.ckpt")} == {
        "epoch001.ckpt",
        "epoch002.ckpt",
    }
    assert {p.name for p in folder.glob("*.sha256")} == {
        f"{p.name}.sha256" for p in folder.glob("*.ckpt")
    }


def test_a_finished_run_is_loaded_and_says_so(finished, data, capsys, monkeypatch):
    root, run = finished
    monkeypatch.setattr(runs, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    again = train(RECIPE, data, root, OPTIONS)
    printed = capsys.readouterr().out
    assert "loaded the finished run" in printed and printed.count("| train loss") == 3
    assert same_weights(again.model, run.model) and again.metadata == run.metadata


def test_an_interrupted_run_goes_on_to_the_same_weights_and_metrics(
    finished, data, tmp_path, capsys, monkeypatch
):
    class Progress(progress.Progress):
        def on_train_epoch_start(self, trainer, module):
            super().on_train_epoch_start(trainer, module)
            if trainer.current_epoch == 2:
                raise RuntimeError("the power failed")

    Progress.__qualname__ = "Progress"  # the key under which a checkpoint keeps a callback's state
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Progress", Progress)
        with pytest.raises(RuntimeError, match="power"):
            train(RECIPE, data, tmp_path, OPTIONS)
    run = train(RECIPE, data, tmp_path, OPTIONS)
    assert "continuing the interrupted run" in capsys.readouterr().out
    assert same_weights(run.model, finished[1].model)
    columns = ["epoch", "step", "train_loss", "val_acc"]
    ours, whole = (
        pd.read_csv(r.metrics_csv)[columns].dropna(how="all") for r in (run, finished[1])
    )
    pd.testing.assert_frame_equal(
        ours.groupby("epoch").mean(), whole.groupby("epoch").mean(), check_exact=False, rtol=1e-6
    )
    assert run.metadata["seconds"] == pytest.approx(
        pd.read_csv(run.metrics_csv).seconds.sum(), abs=0.1
    )  # all epochs'


def test_a_network_with_dropout_goes_on_as_if_it_had_not_been_interrupted(
    data, tmp_path, monkeypatch
):
    forward, dropout = FastNet.forward, torch.nn.functional.dropout

    def dropping(self, images):
        return forward(self, dropout(images, 0.2, self.training))

    class PowerFailure(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise RuntimeError("the power failed")

    monkeypatch.setattr(FastNet, "forward", dropping)
    recipe = dataclasses.replace(RECIPE, epochs=2)
    whole = train(recipe, data, tmp_path / "whole", OPTIONS)
    with pytest.raises(RuntimeError, match="power"):
        train(recipe, data, tmp_path / "parts", OPTIONS, [PowerFailure()])
    assert same_weights(train(recipe, data, tmp_path / "parts", OPTIONS).model, whole.model)


def test_fresh_trains_anew_and_keeps_the_old_run_aside(finished, data, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    train(recipe, data, tmp_path, OPTIONS)
    train(recipe, data, tmp_path, dataclasses.replace(OPTIONS, fresh=True))
    assert (
        len(list(tmp_path.glob("FastNet-1-*"))) == 2 and len(list(tmp_path.glob("*-before-*"))) == 1
    )


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    for name in ("epoch000.ckpt", "epoch001.ckpt", "epoch002.ckpt"):
        (tmp_path / name).write_bytes(name.encode())
        sidecar(tmp_path / name).write_text(sha256(tmp_path / name))
    assert newest_checkpoint(tmp_path).name == "epoch002.ckpt"
    (tmp_path / "epoch002.ckpt").write_bytes(b"epoch")  # cut off
    sidecar(tmp_path / "epoch001.ckpt").unlink()  # never finished
    assert newest_checkpoint(tmp_path).name == "epoch000.ckpt"
    assert "epoch002.ckpt is incomplete or damaged" in capsys.readouterr().out
    (tmp_path / "epoch000.ckpt").unlink()
    assert newest_checkpoint(tmp_path) is None


def test_weights_are_the_same_only_if_all_their_values_are():
    first, second = FastNet(), FastNet()
    second.load_state_dict(first.state_dict())
    assert same_weights(first, second)
    second.head.weight.data[0, 0] += 1
    assert not same_weights(first, second)


def test_a_checkpoint_of_another_network_is_refused(finished):
    path = newest_checkpoint(finished[1].metrics_csv.parent)
    with pytest.raises(ValueError, match="holds a FastNet, expected a ResNet18"):
        load_checkpoint(path, "ResNet18")


def test_the_weights_are_already_rounded_as_the_bundle_stores_them(finished):
    for value in finished[1].model.state_dict().values():
        assert not value.is_floating_point() or torch.equal(value, value.half().float())


def test_metrics_of_several_starts_become_one_table(tmp_path):
    for version, rows in (
        ("version_0", [(0, 9, 1.0), (1, 12, 7.0)]),
        ("version_1", [(1, 19, 2.0), (2, 29, 3.0)]),
    ):
        (tmp_path / version).mkdir()
        pd.DataFrame(rows, columns=["epoch", "step", "train_loss"]).to_csv(
            tmp_path / version / "metrics.csv", index=False
        )
    assert read_metrics(tmp_path).train_loss.tolist() == [1.0, 2.0, 3.0]


def test_the_metadata_say_what_was_trained_where(finished):
    metadata = json.loads((finished[1].metrics_csv.parent / "finished.json").read_text())
    assert metadata["epochs"] == 3 and metadata["train_images"] == 64 and metadata["seed"] == 1
    assert (
        metadata["data"] == "built-in sample, not CIFAR-10" and metadata["precision"] == "32-true"
    )
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.numeric
def test_channels_last_gives_the_same_logits():
    torch.manual_seed(0)
    classifier, plain = LitClassifier(network="ResNet18").eval(), build("ResNet18").eval()
    plain.load_state_dict(classifier.model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(classifier(images), plain(images), atol=1e-4)


def test_a_training_of_the_stored_network_is_refused(monkeypatch):
    monkeypatch.setenv("ERA_TRAIN", "stored")
    monkeypatch.setattr("sys.argv", ["training"])
    with pytest.raises(ValueError, match="expected TRAIN=yes for a training, got stored"):
        training.__main__.main()
