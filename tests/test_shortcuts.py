"""Two networks that differ in their shortcuts only; what one learned when; true titles."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import learned_when, shortcuts
from dataload import CLASSES, Images
from training.recipes import RECIPES

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


def test_runs_are_stored_as_they_end_and_not_trained_again(tiny_splits, tmp_path, monkeypatch):
    monkeypatch.setattr(shortcuts, "load_splits", lambda *_: tiny_splits)
    path, trained = tmp_path / "found.json", []
    train = shortcuts.train_network

    def interrupted_in_the_second(settings, kind, seed, parts):
        trained.append((seed, kind))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(settings, kind, seed, parts)

    monkeypatch.setattr(shortcuts, "train_network", interrupted_in_the_second)
    small = ["--depth", "8", "--images", "64", "--pixels", "8", "--epochs", "2"]
    files = ["--results", str(path), "--figure", str(tmp_path / "figure.png")]
    monkeypatch.setattr(sys, "argv", ["shortcuts", *small, *files, "--seeds", "0", "1"])
    with pytest.raises(KeyboardInterrupt):
        shortcuts.main()
    before = shortcuts.read(path)
    assert before["layers"] == 8 and not shortcuts.is_complete(before)
    shortcuts.main()
    assert trained == [(0, True), (0, False), (0, False), (1, True), (1, False)]
    found = shortcuts.read(path)
    assert [(run["shortcuts"], run["seed"]) for run in found["runs"]] == [
        (True, 0),
        (True, 1),
        (False, 0),
        (False, 1),
    ]
    assert found["runs"][0] == before["runs"][0] and shortcuts.is_complete(found)
    assert all(len(run["val_acc"]) == 2 for run in found["runs"])
    settings = {key: found[key] for key in found if key != "runs"}
    assert shortcuts.finished_runs(settings, path) == found["runs"]
    assert shortcuts.finished_runs(settings | {"epochs": 3}, path) == []


def found_with(*kinds: bool) -> dict:
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
        "epochs": 2,
        "batch_size": 32,
        "runs": runs,
    }


def test_the_figure_says_how_small_the_experiment_was():
    title = shortcuts.plot(found_with(True, False)).get_suptitle()
    assert "64 training images of 8x8 pixels, 2 epochs" in title and "45,000" in title


def test_runs_of_one_network_alone_are_not_drawn():
    assert shortcuts.is_complete(found_with(True, False))
    assert not shortcuts.is_complete(None) and not shortcuts.is_complete(found_with(True, True))


# ---- what it learned when ----


@pytest.fixture
def record(tiny_splits, tmp_path, monkeypatch):
    """A function that runs the command on few images and returns the path of its results."""
    monkeypatch.setattr(learned_when, "load_splits", lambda *_: tiny_splits)
    small = replace(RECIPES["fastnet-2"], batch_size=32, micro_batch=0)
    monkeypatch.setitem(learned_when.RECIPES, "fastnet-2", small)
    path = tmp_path / "found.json"

    def run():
        monkeypatch.setattr(sys, "argv", ["learned_when", "fastnet-2", "--results", str(path)])
        learned_when.main()
        return path

    return run


def test_the_network_is_recorded_before_the_training_and_after_each_epoch(tiny_splits, record):
    path = record()
    found = learned_when.read(path)
    assert [seen["epoch"] for seen in found["epochs"]] == [0, 1, 2]
    shown = [CLASSES[tiny_splits.val.labels[i]] for i in found["images"]]
    assert shown == [CLASSES[label] for label in found["labels"]] == list(learned_when.SHOWN)
    assert np.shape(found["epochs"][0]["heatmaps"]) == (6, 32, 32)
    chances = np.array([seen["probabilities"] for seen in found["epochs"]])
    assert chances.sum(2) == pytest.approx(1, abs=0.01)
    assert (chances[0] != chances[1]).any() and (chances[1] != chances[2]).any()
    assert path.read_text().count("\n") == 5  # a line for each epoch
    assert path.with_suffix(".png").exists() and path.with_suffix(".gif").exists()


def test_an_interrupted_recording_leaves_the_one_before(tmp_path, record, monkeypatch):
    (tmp_path / "found.json").write_text("the one before")

    def interrupt(_, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(learned_when.Recorder, "on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record()
    assert (tmp_path / "found.json").read_text() == "the one before"


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
