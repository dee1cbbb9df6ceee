"""Two networks that differ in their shortcuts only; runs continue; titles are what was measured."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import learned_when, shortcuts
from dataload import CLASSES, Images
from training.classifier import LitClassifier
from training.hardware import one_thread
from training.recipes import RECIPES
from training.runs import build_datamodule

SETTINGS = {"depth": 8, "images": 64, "pixels": 8, "epochs": 2, "batch_size": 32}


@pytest.fixture
def parts(tiny_splits) -> tuple[Images, Images]:
    return shortcuts.shrink(tiny_splits.train, 64, 8), shortcuts.shrink(tiny_splits.val, 32, 8)


def losses(path, kind=True) -> list[float]:
    runs = json.loads(path.read_text())["runs"]
    (run,) = (run for run in runs if run["shortcuts"] == kind)
    return run["train_loss"]


# ---- with and without shortcuts ----


def test_the_deep_network_has_56_layers_and_shortcuts_without_parameters():
    nets = [shortcuts.build_network(56, kind) for kind in (True, False)]
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [853_018, 853_018]  # 0.85 million in the paper's table 6
    weighted = (torch.nn.Conv2d, torch.nn.Linear)
    assert sum(isinstance(m, weighted) for m in nets[0].modules()) == 56
    with pytest.raises(ValueError, match="got 57"):
        shortcuts.build_network(57, True)


@pytest.mark.numeric
def test_a_block_without_weights_is_the_identity_with_a_shortcut_only():
    x = torch.rand(2, 4, 6, 6)
    for kind, wanted in ((True, x), (False, torch.zeros_like(x))):
        block = shortcuts.Block(4, 4, 1, kind).eval()
        torch.nn.init.zeros_(block.conv2.weight)
        torch.testing.assert_close(block(x), wanted)
    block = shortcuts.Block(4, 8, 2, True).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x)[:, :4], x[:, :, ::2, ::2])
    assert (block(x)[:, 4:] == 0).all()


def test_images_are_shrunk_by_averaging():
    images = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    small = shortcuts.shrink(Images(images, np.array([3])), 1, 16)
    assert small.images.shape == (1, 16, 16, 3)
    assert small.images[0, 0, 0, 0] == round(images[0, :2, :2, 0].mean())


@pytest.mark.numeric
@one_thread()
def test_an_interrupted_run_continues_and_writes_each_epoch(parts, tmp_path):
    whole = shortcuts.Store(SETTINGS, tmp_path / "whole.json", tmp_path / "whole")
    shortcuts.train_network(SETTINGS, True, 0, parts, whole)
    store = shortcuts.Store(SETTINGS, tmp_path / "parts.json", tmp_path / "parts")
    written, keep = [], store.keep

    def killed_after_one(*arguments):
        keep(*arguments)
        written.append(losses(tmp_path / "parts.json"))
        if len(written) == 1:
            raise KeyboardInterrupt

    store.keep = killed_after_one
    with pytest.raises(KeyboardInterrupt):
        shortcuts.train_network(SETTINGS, True, 0, parts, store)
    shortcuts.train_network(SETTINGS, True, 0, parts, store)
    assert [len(found) for found in written] == [1, 2]
    assert losses(tmp_path / "parts.json") == pytest.approx(
        losses(tmp_path / "whole.json"), rel=1e-4
    )


def found_with(*kinds: bool, epochs: int = 2) -> dict:
    runs = [
        {
            "shortcuts": kind,
            "seed": 0,
            "train_loss": [2.3, 1.0],
            "val_acc": [0.1, 0.2],
            "seconds": [1, 1],
        }
        for kind in kinds
    ]
    return {
        "layers": 8,
        "images": 64,
        "pixels": 8,
        "epochs": epochs,
        "batch_size": 32,
        "runs": runs,
    }


def test_the_figure_says_how_small_the_experiment_was():
    title = shortcuts.plot(found_with(True, False)).get_suptitle()
    assert "64 training images of 8x8 pixels, 2 epochs" in title and "45,000" in title


def test_unfinished_runs_are_not_drawn():
    assert shortcuts.is_complete(found_with(True, False))
    assert not shortcuts.is_complete(None) and not shortcuts.is_complete(found_with(True, True))
    assert not shortcuts.is_complete(found_with(True, False, epochs=3))


def test_other_settings_replace_the_results(parts, tmp_path):
    rows = [{"train_loss": 1.0, "val_acc": 0.5, "seconds": 1.0}]
    path = tmp_path / "found.json"
    for settings in (SETTINGS, SETTINGS, SETTINGS | {"epochs": 1}):
        for seed in (0, 1):
            shortcuts.Store(settings, path, tmp_path).write(True, seed, rows)
    found = shortcuts.read(path)
    assert found["layers"] == 8 and found["epochs"] == 1
    assert [run["seed"] for run in found["runs"]] == [0, 1]


# ---- what it learned when ----


class Trainer:
    current_epoch = 0


def test_epochs_are_recorded_once_each_however_often_a_run_continues(tiny_splits, tmp_path):
    path = tmp_path / "found.json"
    images = learned_when.chosen_images(tiny_splits.val)
    assert [CLASSES[tiny_splits.val.labels[i]] for i in images] == list(learned_when.SHOWN)
    labels = [int(tiny_splits.val.labels[i]) for i in images]
    metadata = {"recipe": "a", "seed": 1, "images": images, "labels": labels}
    recorder = learned_when.Recorder(path, metadata, tiny_splits.val)
    module, trainer = LitClassifier(network="FastNet"), Trainer()
    recorder.on_train_start(trainer, module)
    for epoch in (0, 1, 1):  # the second one is repeated: its checkpoint was lost
        trainer.current_epoch = epoch
        recorder.on_train_epoch_end(trainer, module)
    found = learned_when.read(path)
    assert [seen["epoch"] for seen in found["epochs"]] == [0, 1, 2]
    assert np.shape(found["epochs"][0]["heatmaps"]) == (6, 32, 32)
    assert sum(found["epochs"][0]["probabilities"][0]) == pytest.approx(1, abs=0.01)
    assert path.read_text().count("\n") == 5  # a line for each epoch
    assert learned_when.epochs_of(found, metadata | {"recipe": "b"}) == []


def test_a_recorded_run_that_is_interrupted_keeps_what_it_recorded(
    tiny_splits, tmp_path, monkeypatch
):
    recipe = replace(RECIPES["fastnet-2"], batch_size=32, micro_batch=0)
    data = build_datamodule(recipe, tiny_splits, 0, fast=True)
    metadata = learned_when.metadata_of("fastnet-2", data)
    arguments = (recipe, tmp_path / "runs", tmp_path / "found.json", data, metadata)

    def interrupt(_, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learned_when.Recorder, "on_train_epoch_start", interrupt)
        learned_when.record_run(*arguments)
    before = learned_when.epochs_of(learned_when.read(tmp_path / "found.json"), metadata)
    assert [seen["epoch"] for seen in before] == [0, 1]
    learned_when.record_run(*arguments)
    after = learned_when.epochs_of(learned_when.read(tmp_path / "found.json"), metadata)
    assert after[:2] == before and [seen["epoch"] for seen in after] == [0, 1, 2]


def test_an_interrupted_recording_leaves_the_one_before(tiny_splits, tmp_path, monkeypatch):
    monkeypatch.setattr(learned_when, "load_splits", lambda *_: tiny_splits)
    folder, found = ["--root", str(tmp_path)], ["--results", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["learned_when", *folder, *found])
    before = json.dumps(recorded("cat", "ship"))
    (tmp_path / "found.json").write_text(before)

    def record_run(_, root, results, *__):
        assert root == tmp_path
        results.write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(learned_when, "record_run", record_run)
    with pytest.raises(KeyboardInterrupt):
        learned_when.main()
    assert (tmp_path / "found.json").read_text() == before


def recorded(*answers: str) -> dict:
    """Epochs in which all images get the same answer."""
    labels, maps = [CLASSES.index(name) for name in learned_when.SHOWN], np.zeros((6, 32, 32))
    epochs = [
        {
            "epoch": epoch,
            "probabilities": [[float(name == answer) for name in CLASSES]] * 6,
            "heatmaps": maps.tolist(),
        }
        for epoch, answer in enumerate(answers)
    ]
    how = {"recipe": "fastnet-2", "train_images": 100, "images": [0, 1, 2, 3, 4, 5]}
    return how | {"classes": CLASSES, "labels": labels, "epochs": epochs}


def test_an_image_is_learned_where_it_stays_correct():
    found = recorded("cat", "ship", "cat", "cat")
    assert learned_when.learned_after(found) == dict.fromkeys(learned_when.SHOWN) | {"cat": 2}
    told = learned_when.finding(found)
    assert told.startswith("Correct from epoch 2 on: cat; wrong at the end: airplane")
    assert "None of the 6" in learned_when.finding(recorded("frog"))


def test_the_strip_and_the_animation_are_written(tiny_splits, tmp_path):
    strip, animation = tmp_path / "a.png", tmp_path / "a.gif"
    learned_when.draw(recorded("cat", "ship"), tiny_splits.val, strip, animation)
    with Image.open(animation) as picture:
        assert picture.n_frames == 2
    assert 0 < animation.stat().st_size < 500_000 and strip.stat().st_size > 0
