"""Figures show what they say, all errors are found, an export is complete or changes nothing."""

import hashlib
import importlib.util
import json
import marshal
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from dataload import CIFAR10_MEAN, CIFAR10_STD, CLASSES, denormalize, make_loader, normalize
from evaluation import drawing
from evaluation.drawing import save_figure
from evaluation.errors import (
    Misclassified,
    class_accuracy,
    draw_tiles,
    plot_confusion,
    plot_misclassified,
)
from models import bundle, explain, registry
from models.bundle import load_bundle
from models.registry import build
from tests.conftest import PROJECT, space_meta, title_of, wrong_predictions
from tests.kill_export import kill_again_and_again
from tests.warm import WarmProcess
from training.whitening import whiten
from utils import (
    Plot,
    display_gradcam_output,
    export_to_space,
    get_misclassified_data,
    plot_metrics,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("CustomResNet").eval()


@pytest.fixture(scope="module")
def wrong(tiny_splits):
    return wrong_predictions(tiny_splits.test.images[:23], tiny_splits.test.labels[:23])


# ---- plots ----


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (5, (1, 5)), (6, (2, 5)), (7, (2, 5)), (20, (4, 5))]
)
def test_a_grid_has_room_for_any_number_of_samples(count, shape):
    images = [np.full((32, 32, 3), i, dtype=np.uint8) for i in range(count)]
    figure = Plot(images, [f"title {i}" for i in range(count)]).grid("all of them")
    assert len(figure.axes) == shape[0] * shape[1]
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [f"title {i}" for i in range(count)]
    assert all(
        np.array_equal(axis.images[0].get_array(), image)
        for axis, image in zip(drawn, images, strict=True)
    )


@pytest.mark.parametrize("count", [0, 21])
def test_a_grid_of_none_or_too_many_is_refused(count):
    with pytest.raises(ValueError, match=f"got {count}"):
        Plot([np.zeros((2, 2, 3))] * count, ["x"] * count)


def test_a_title_for_each_image_is_needed():
    with pytest.raises(ValueError, match="2 titles"):
        Plot([np.zeros((2, 2, 3))] * 2, ["x"])


def test_the_curves_hold_the_numbers_of_the_table(tmp_path):
    rows = pd.DataFrame(
        {
            "epoch": [0, 0, 0, 1, 1],
            "lr": [
                0.1,
                None,
                None,
                None,
                None,
            ],  # Lightning's rows: rates, validation and training apart
            "train_loss": [None, None, 2.0, None, 1.0],
            "train_acc": [None, None, 0.3, None, 0.6],
            "val_loss": [None, 1.8, None, 1.2, None],
            "val_acc": [None, 0.4, None, 0.7, None],
        }
    )
    rows.to_csv(tmp_path / "metrics.csv", index=False)
    figures = plot_metrics(tmp_path / "metrics.csv", note="a note")
    expected = [{"train": [2.0, 1.0], "val": [1.8, 1.2]}, {"train": [0.3, 0.6], "val": [0.4, 0.7]}]
    for figure, curves in zip(figures, expected, strict=True):
        axis = figure.axes[0]
        assert {line.get_label(): line.get_ydata().tolist() for line in axis.lines} == curves
        assert axis.lines[0].get_xdata().tolist() == [1, 2] and axis.get_xlabel() == "epoch"
        assert figure.get_suptitle().endswith("a note")
    assert "1.200 after 2 epochs, training loss 1.000" in title_of(figures[0])
    assert "70.0 % after 2 epochs, training accuracy 60.0 %" in title_of(figures[1])


def test_the_confusion_matrix_counts_every_image_once():
    labels = np.array([0, 0, 0, 1, 1, 2])
    image = torch.zeros(3, 32, 32)
    errors = [
        Misclassified(image, 0, 2, 0.9, torch.zeros(3)),
        Misclassified(image, 1, 0, 0.9, torch.zeros(3)),
    ]
    figure = plot_confusion(errors, labels, ["a", "b", "c"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    shown = [int(text) for text in texts if text.isdigit()]
    assert shown == [2, 0, 1, 1, 1, 0, 0, 0, 1]
    assert texts[9:] == ["66.7 %", "50.0 %", "100.0 %", "recall"]
    assert class_accuracy(errors, labels, ["a", "b", "c"]).round(3).to_dict() == {
        "a": 0.667,
        "b": 0.5,
        "c": 1.0,
    }


def test_a_saved_figure_is_small_enough_for_a_repository(tmp_path, wrong):
    save_figure(
        plot_misclassified(wrong, CLASSES, denormalize, 20), tmp_path / "new folder" / "results.png"
    )
    assert 0 < (tmp_path / "new folder" / "results.png").stat().st_size < 500_000


def test_figures_replace_older_ones_and_leave_others(tmp_path):
    drafts, target = tmp_path / "drafts", tmp_path / "images"
    drafts.mkdir(), target.mkdir()
    (
        (drafts / "new.png").write_text("new"),
        (target / "new.png").write_text("old"),
        (target / "other.png").write_text("x"),
    )
    drawing.copy_figures(drafts, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "new.png": "new",
        "other.png": "x",
    }


# ---- errors ----


@pytest.mark.numeric
def test_the_misclassified_images_are_those_of_a_loop_over_single_images(model, tiny_splits):
    model.train()
    loader = make_loader(tiny_splits.test, 16, num_workers=0, train=False)
    found = get_misclassified_data(model, "cpu", loader)
    assert model.training  # its mode is kept
    model.eval()
    expected = []
    for i in range(len(loader.dataset)):
        image, label = loader.dataset[i]
        with torch.no_grad():
            probs = model(image[None])[0].softmax(0)
        if int(probs.argmax()) != label:
            expected.append((image, label, int(probs.argmax()), float(probs.max())))
    assert len(found) == len(expected) > 10
    for ours, (image, label, pred, prob) in zip(found, expected, strict=True):
        assert torch.equal(ours.image, image) and (ours.label, ours.pred) == (label, pred)
        assert ours.prob == pytest.approx(prob, abs=1e-4) and float(
            ours.probs.sum()
        ) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_titles_say_the_true_class_the_predicted_class_and_the_probability(model, wrong, count):
    figure = plot_misclassified(wrong, CLASSES, denormalize, count, note="a note")
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert len(titles) == count and "a note" in figure.get_suptitle()
    assert titles[0] == "true: airplane\npredicted: automobile\n(50 %)"


@pytest.mark.parametrize("count", [1, 5, 6, 7, 10, 20])
def test_every_sample_has_its_two_heatmaps_below_it(model, wrong, count):
    layer = model.stages()[-1].module
    figure = display_gradcam_output(
        wrong, CLASSES, denormalize, model, [layer], number_of_samples=count
    )
    assert sum(bool(axis.images) for axis in figure.axes) == 3 * count
    titles = [axis.get_title() for axis in figure.axes]
    columns = min(5, count)
    assert "the predicted and the true class" in " ".join(figure.get_suptitle().split())
    given = display_gradcam_output(
        wrong, CLASSES, denormalize, model, [layer], [0] * count, number_of_samples=count
    )
    assert "the two classes" in " ".join(given.get_suptitle().split())
    assert titles[columns] == "evidence for automobile"
    assert titles[2 * columns] == "evidence for airplane"


@pytest.mark.numeric
def test_transparency_1_shows_the_image_and_0_the_heatmap_alone(model, wrong):
    layer = model.stages()[-1].module

    def panels(transparency, targets=None):
        figure = display_gradcam_output(
            wrong, CLASSES, denormalize, model, [layer], targets, 1, transparency
        )
        return [np.asarray(axis.images[0].get_array()) for axis in figure.axes[:3]]

    image, *blended = panels(1.0)
    assert all(np.abs(image - one).max() < 1e-5 for one in blended)
    cam = explain.gradcam(model, layer, wrong[0].image[None], [wrong[0].pred])[0]
    assert np.abs(panels(0.0)[1] - explain.colorize(cam)).max() < 1e-3
    true = explain.gradcam(model, layer, wrong[0].image[None], [wrong[0].label])[0]
    assert np.abs(panels(0.0)[2] - explain.colorize(true)).max() < 1e-3
    _, given, compared = panels(0.0, [wrong[0].label])
    assert np.abs(given - explain.colorize(true)).max() < 1e-3
    assert np.abs(compared - explain.colorize(cam)).max() < 1e-3


@pytest.mark.numeric
def test_heatmaps_of_several_layers_are_averaged_and_the_transparency_is_60_percent(model, wrong):
    layers = [stage.module for stage in model.stages()[-2:]]
    figure = display_gradcam_output(wrong, CLASSES, denormalize, model, layers, None, 1)
    image, blended = (np.asarray(axis.images[0].get_array()) for axis in figure.axes[:2])
    batch, pred = wrong[0].image[None], [wrong[0].pred]
    cam = sum(explain.gradcam(model, layer, batch, pred)[0] for layer in layers) / 2
    assert np.abs(blended - (0.6 * image + 0.4 * explain.colorize(cam))).max() < 1e-3


@pytest.mark.parametrize(("count", "available"), [(0, 23), (21, 23), (6, 5)])
def test_a_number_of_samples_that_is_not_there_is_refused(model, wrong, count, available):
    layers = [model.stages()[-1].module]
    with pytest.raises(ValueError, match=f"at most the {available} there are, got {count}"):
        display_gradcam_output(
            wrong[:available], CLASSES, denormalize, model, layers, number_of_samples=count
        )
    with pytest.raises(ValueError, match=f"got {count}"):
        plot_misclassified(wrong[:available], CLASSES, denormalize, count)


def test_missing_targets_and_layers_are_refused(model, wrong):
    with pytest.raises(ValueError, match="target for each of 3 samples, got 2"):
        display_gradcam_output(wrong, CLASSES, denormalize, model, [model.convblock3], [1, 2], 3)
    with pytest.raises(ValueError, match="at least one target layer"):
        display_gradcam_output(wrong, CLASSES, denormalize, model, [])
    with pytest.raises(ValueError, match="list of target layers, got a module, Sequential"):
        display_gradcam_output(wrong, CLASSES, denormalize, model, model.convblock3)


def test_a_wrong_transparency_and_too_few_names_of_classes_are_refused(model, wrong):
    layers = [model.convblock3]
    with pytest.raises(ValueError, match=r"a transparency from 0 to 1, got -0\.1"):
        display_gradcam_output(
            wrong, CLASSES, denormalize, model, layers, number_of_samples=1, transparency=-0.1
        )
    with pytest.raises(ValueError, match="names of 10 classes, got 9"):
        display_gradcam_output(wrong, CLASSES[:9], denormalize, model, layers, number_of_samples=1)


@pytest.mark.parametrize("changes", [{"image_size": None}, {"temperature": -1}, {"test_acc": 94}])
def test_a_description_that_the_app_would_refuse_is_named_and_nothing_written(
    tmp_path, model, wrong, changes
):
    (name,) = changes
    nothing = plot_confusion([], np.arange(10), CLASSES)
    meta = space_meta() | changes
    if not changes[name]:
        del meta[name]
    with pytest.raises(ValueError, match=rf"model\.json: {name}: "):
        export_to_space(tmp_path, model, meta, wrong, denormalize, nothing)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path, model, wrong):
    numbers = {"temperature": np.float32(0.5), "test_acc": torch.tensor(0.25)}
    nothing = plot_confusion([], np.arange(10), CLASSES)
    utils.write_bundle(tmp_path, model, space_meta() | numbers, wrong, denormalize, nothing)
    written = json.loads((tmp_path / "model.json").read_text())
    assert (written["temperature"], written["test_acc"]) == (0.5, 0.25)


# ---- export ----


def exported(folder, model, wrong, labels, **changes):
    confusion = plot_confusion(wrong, labels, CLASSES)
    return export_to_space(folder, model, space_meta() | changes, wrong, denormalize, confusion)


def test_everybody_may_read_the_weights(exported_space):
    assert (exported_space / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_the_bundle_is_complete_and_its_code_is_a_copy(exported_space):
    names = {path.name for path in exported_space.iterdir()}
    assert names >= {
        "app.py",
        "about.md",
        "README.md",
        "requirements.txt",
        "examples",
        "model.json",
        "model.safetensors",
        "models",
        "confusion_matrix.png",
        "misclassified.png",
        "misclassified.json",
    }
    assert not [name for name in names if name.startswith((".", "_"))]
    sources = {path.name: path.read_bytes() for path in (exported_space / "models").glob("*.py")}
    assert set(sources) == {
        "__init__.py",
        "bundle.py",
        "errors.py",
        "explain.py",
        "resnet.py",
        "stage.py",
    }
    assert all(
        (PROJECT / "models" / name).read_bytes() == content for name, content in sources.items()
    )


def test_every_file_of_the_bundle_has_a_checksum(exported_space):
    sums = json.loads((exported_space / "model.json").read_text())["sha256"]
    files = [
        path
        for path in exported_space.rglob("*")
        if path.is_file() and "examples" not in path.parts
    ]
    names = {
        path.relative_to(exported_space).as_posix()
        for path in files
        if "__pycache__" not in path.parts
    }
    assert set(sums["files"]) | {"model.json", "model.safetensors"} == names - {*utils.APP_FILES}


def test_model_json_describes_the_network(exported_space):
    meta = json.loads((exported_space / "model.json").read_text())
    assert (
        meta["architecture"] == "ResNet18"
        and meta["source"] == "resnet.py"
        and meta["classes"] == list(CLASSES)
    )
    assert meta["mean"] == list(CIFAR10_MEAN) and meta["std"] == list(CIFAR10_STD)
    assert meta["stages"] == [{"name": f"layer{i}", "size": 2 ** (6 - i)} for i in range(1, 5)]
    weights = hashlib.sha256((exported_space / "model.safetensors").read_bytes()).hexdigest()
    assert meta["sha256"]["weights"] == weights


@pytest.mark.numeric
def test_a_network_that_came_out_of_a_bundle_can_be_exported_again(
    tmp_path, exported_space, wrong, tiny_splits
):
    model, _ = load_bundle(exported_space)
    confusion = plot_confusion(wrong, tiny_splits.test.labels, CLASSES)
    export_to_space(tmp_path / "again", model, space_meta(), wrong, denormalize, confusion)
    again, _ = load_bundle(tmp_path / "again")
    assert torch.allclose(
        again(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)), atol=1e-4
    )


@pytest.mark.numeric
def test_a_network_of_another_kind_takes_the_place_of_the_old_one(
    tmp_path, model, wrong, tiny_splits
):
    exported(tmp_path, model, wrong, tiny_splits.test.labels)
    fast = build("FastNet").eval()
    whiten(fast.stem, normalize(tiny_splits.train.images))
    fast = fast.half().float()
    exported(tmp_path, fast, wrong, tiny_splits.test.labels)
    reloaded, meta = load_bundle(tmp_path)
    assert meta["source"] == "fastnet.py" and not (tmp_path / "models/resnet.py").exists()
    assert [stage["size"] for stage in meta["stages"]] == [31, 15, 7, 3]
    images = normalize(tiny_splits.test.images)
    assert torch.allclose(reloaded(images), fast(images), atol=1e-4)


def test_a_failed_export_leaves_the_old_bundle_as_it_was(
    tmp_path, model, wrong, tiny_splits, monkeypatch
):
    exported(tmp_path, model, wrong, tiny_splits.test.labels)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = build("FastNet")
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(ValueError, match="logits differ by nan"):
        exported(tmp_path, broken, wrong, tiny_splits.test.labels)
    with pytest.raises(ValueError, match="surprise: Extra inputs are not permitted"):
        exported(tmp_path, model, wrong, tiny_splits.test.labels, surprise=1)
    with monkeypatch.context() as patch:
        write, other = utils.write_weights, build("CustomResNet")
        nn.init.constant_(other.ffconnectedlayer1.bias, 9)
        patch.setattr(utils, "write_weights", lambda _, path: write(other, path))
        with pytest.raises(ValueError, match=r"logits differ by \d"):
            exported(tmp_path, model, wrong, tiny_splits.test.labels)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".export-*"))


def test_an_export_without_an_error_to_show_works_too(tmp_path, model, tiny_splits):
    exported(tmp_path, model, [], tiny_splits.test.labels)
    assert json.loads((tmp_path / "misclassified.json").read_text()) == []


@pytest.mark.numeric
def test_tiles_are_the_images_enlarged_three_times(wrong, tiny_splits):
    figure = np.asarray(draw_tiles(wrong, denormalize))
    assert figure.shape == (3 * 96, 10 * 96, 3)
    tile = figure[
        96 + 1 : 192 : 3, 2 * 96 + 1 : 3 * 96 : 3
    ]  # the twelfth: second row, third column
    assert np.array_equal(tile, tiny_splits.test.images[12])
    enlarged = np.asarray(
        Image.fromarray(tiny_splits.test.images[12]).resize((96, 96), Image.Resampling.NEAREST)
    )
    assert np.array_equal(figure[96:192, 192:288], enlarged)


def test_no_more_than_fifty_tiles_leave(tmp_path, model, wrong):
    assert draw_tiles([wrong[0]] * 60, denormalize).size == (960, 480)
    nothing = plot_confusion([], np.arange(10), CLASSES)
    utils.write_bundle(tmp_path, model, space_meta(), [wrong[0]] * 60, denormalize, nothing)
    assert len(json.loads((tmp_path / "misclassified.json").read_text())) == 50


# ---- bundle ----


@pytest.fixture
def space(exported_space, tmp_path) -> Path:
    """A copy of an exported Space that a test may change."""
    ignored = shutil.ignore_patterns("__pycache__", "examples")
    return shutil.copytree(exported_space, tmp_path / "space", ignore=ignored)


def tampered(folder, change):
    meta = json.loads((folder / "model.json").read_text())
    change(meta)
    (folder / "model.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(test_acc=0.99), "keys have the sha256"),
        (lambda meta: meta.pop("mean"), "mean: Field required"),
        (lambda meta: meta.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda meta: meta.update(sha256=None), "sha256: Input should be"),
        (
            lambda meta: meta.update(test_acc=True),
            "test_acc: Input should be a valid number, got True",
        ),
        (lambda meta: meta.update(image_size="32"), "image_size: Input should be a valid integer"),
        (lambda meta: meta.update(temperature=float("nan")), "temperature: Input should be"),
        (lambda meta: meta.update(test_acc=10**400), "test_acc: "),
        (
            lambda meta: meta["training"].update(seconds=False),
            "training.seconds: Input should be a valid number",
        ),
        (
            lambda meta: meta["classes"].append("cat"),
            "classes: Value error, expected different names",
        ),
        (
            lambda meta: meta["sha256"]["files"].pop("models/explain.py"),
            "a checksum of models/explain.py",
        ),
        (
            lambda meta: meta["sha256"]["files"].update({"models/../app.py": ""}),
            "got 'models/../app.py'",
        ),
        (lambda meta: meta["sha256"]["files"].update({"/etc/passwd": ""}), "got '/etc/passwd'"),
        (lambda meta: meta["sha256"]["files"].update({"app.py": ""}), "got 'app.py'"),
        (lambda meta: meta["sha256"].update(weights="0"), "weights have the sha256"),
    ],
)
def test_a_changed_description_is_refused(space, change, message):
    tampered(space, change)
    with pytest.raises(ValueError, match=message):
        load_bundle(space)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "[" * 100_000])
def test_a_new_bundle_that_a_power_cut_damaged_is_not_read_and_the_next_export_removes_it(
    space, content
):
    before = load_bundle(space)[1]
    ready = space / utils.bundle.READY
    ready.mkdir()
    if content is not None:
        (ready / "model.json").write_text(content)
    (ready / "model.safetensors").write_bytes(b"")
    assert load_bundle(space)[1] == before
    with pytest.raises(KeyError), utils.bundle.new_bundle(space):
        raise KeyError
    assert load_bundle(space)[1] == before and not ready.exists()
    ready.mkdir()
    (ready / "model.safetensors").write_bytes(b"")
    (space / "model.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):  # and not read again and again
        load_bundle(space)


def test_a_description_that_is_a_list_is_refused(space):
    (space / "model.json").write_text("[{}]")
    with pytest.raises(ValueError, match="all of it: Input should be"):
        load_bundle(space)
    (space / "model.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        load_bundle(space)


def test_a_renamed_key_is_refused_with_its_new_name(space):
    tampered(space, lambda meta: meta.update(unsure_below=meta.pop("confidence_threshold")))
    message = "unsure_below is now called confidence_threshold: export the Space again$"
    with pytest.raises(ValueError, match=message):
        load_bundle(space)


def test_changed_weights_another_architecture_and_a_foreign_source_are_refused(space):
    def signed(**changes):
        def change(meta):
            meta.update(changes)
            meta["sha256"]["keys"] = utils.bundle.sha256_of_keys(meta)

        return change

    meta = json.loads((space / "model.json").read_text())
    tampered(space, signed(stages=meta["stages"][:1]))
    with pytest.raises(ValueError, match="expected the stages"):
        load_bundle(space)
    tampered(space, signed(stages=meta["stages"]))
    tampered(space, signed(architecture="CustomResNet"))
    with pytest.raises(ValueError, match="not those of a CustomResNet"):
        load_bundle(space)
    tampered(space, signed(architecture="VGG"))
    with pytest.raises(ValueError, match="resnet.py has no network 'VGG'"):
        load_bundle(space)
    tampered(space, signed(source="../evil.py"))
    with pytest.raises(ValueError, match="source: String should match pattern"):
        load_bundle(space)
    tampered(space, signed(source="evil.py"))
    with pytest.raises(
        ValueError, match="expected a Python file of the bundle as source, got 'evil.py'"
    ):
        load_bundle(space)
    with (space / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    with pytest.raises(ValueError, match="weights have the sha256"):
        load_bundle(space)


# ---- sources ----


def seal(folder: Path, **changes: object) -> None:
    """Write the right checksums for what is in a folder now."""
    staged = folder.parent / "staged"
    staged.mkdir()
    meta = json.loads((folder / "model.json").read_text()) | changes
    for name in ("models", *utils.bundle.PICTURES, "model.safetensors"):
        (shutil.copytree if name == "models" else shutil.copyfile)(folder / name, staged / name)
    (folder / "model.json").write_text(json.dumps(utils.seal_bundle(staged, meta)))
    shutil.rmtree(staged)


@pytest.mark.parametrize(
    "name",
    [
        "models/resnet.py",
        "models/stage.py",
        "models/explain.py",
        "models/bundle.py",
        "models/__init__.py",
        "misclassified.png",
        "misclassified.json",
        "confusion_matrix.png",
    ],
)
def test_a_changed_file_is_refused_by_name_and_nothing_of_it_runs(space, name):
    mark = space / "it-ran"
    with (space / name).open("ab") as file:
        file.write(f"\nopen({str(mark)!r}, 'w')\n".encode())
    with pytest.raises(ValueError, match=rf"{name} has the sha256 \w+, expected \w+"):
        load_bundle(space)
    assert not mark.exists()


def test_the_app_refuses_a_changed_source_before_it_runs(space):
    with (space / "models/explain.py").open("a") as file:
        file.write("\nraise SystemExit('it ran')\n")
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=space, capture_output=True, text=True, timeout=600
    )
    assert (
        done.returncode
        and "models/explain.py has the sha256" in done.stderr
        and "it ran" not in done.stderr
    )


def test_no_compiled_older_source_runs_in_place_of_the_checked_one(space):
    cached = Path(importlib.util.cache_from_source(space / "models/resnet.py"))
    cached.parent.mkdir(exist_ok=True)
    evil = compile("raise SystemExit('it ran')", "resnet.py", "exec")
    content, status = (space / "models/resnet.py").read_bytes(), (space / "models/resnet.py").stat()
    head = importlib.util.MAGIC_NUMBER + bytes(4)
    sizes = int(status.st_mtime).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    cached.write_bytes(head + sizes + marshal.dumps(evil))
    load_bundle(space)


def test_another_python_file_in_the_folder_cannot_be_imported(space):
    (space / "models/extra.py").write_text("class ResNet18: ...")
    load_bundle(space)
    with (space / "models/resnet.py").open("a") as file:
        file.write("\nimport models.extra\n")
    seal(space)  # lists extra.py as well
    load_bundle(space)
    meta = json.loads((space / "model.json").read_text())
    del meta["sha256"]["files"]["models/extra.py"]
    (space / "model.json").write_text(json.dumps(meta))
    with pytest.raises(
        ValueError, match="resnet.py cannot be imported: No module named 'models.extra'"
    ):
        load_bundle(space)


def test_bundles_use_their_own_sources_and_the_project_keeps_its_own(space, exported_space):
    """Each of the two changes what `from models.stage import check_images` means in it."""
    before = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] == "models"
    }
    with (space / "models/stage.py").open("a") as file:
        file.write(
            "\n\ndef check_images(images, training):\n    raise ValueError('of the bundle')\n"
        )
    seal(space)
    with pytest.raises(ValueError, match="of the bundle"):
        load_bundle(space)
    images = torch.zeros(1, 3, 32, 32)
    assert load_bundle(exported_space)[0](images).shape == build("ResNet18").eval()(images).shape
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "models"}
    assert after == before


@pytest.mark.parametrize("name", ["resnet22.py", "Deeper.py", "my_net_2.py"])
def test_a_source_may_have_digits_and_capitals_in_its_name(space, name):
    (space / "models/resnet.py").rename(space / "models" / name)
    seal(space, source=name)
    assert type(load_bundle(space)[0]).__name__ == "ResNet18"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "misclassified.png", "models/resnet.py", "model.json"]
)
def test_a_git_lfs_pointer_is_named_with_the_way_to_the_file(space, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 22377956\n"
    (space / name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{name} is a Git-LFS pointer.*`git lfs pull`"):
        load_bundle(space)


def test_sources_can_be_refreshed_and_keep_everything_else(space, exported_space):
    with (space / "models/stage.py").open("a") as file:
        file.write("\n# an older comment\n")
    seal(space)
    utils.refresh_sources(space)
    assert (space / "models/stage.py").read_bytes() == (PROJECT / "models/stage.py").read_bytes()
    assert json.loads((space / "model.json").read_text()) == json.loads(
        (exported_space / "model.json").read_text()
    )


class Cell(nn.Module):
    """As defined in a notebook, or anywhere but in models/."""

    def __init__(self, num_classes: int = 10):
        super().__init__()


def test_a_network_that_is_not_in_models_is_refused_before_it_is_trained(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "Cell", Cell)
    with pytest.raises(
        ValueError,
        match="expected the class Cell at the top level of a file in .*models, got it from",
    ):
        build("Cell")


def test_a_network_without_stages_is_refused_before_it_is_trained(monkeypatch):
    monkeypatch.delattr("models.fastnet.FastNet.stages")
    with pytest.raises(
        ValueError, match=r"expected FastNet to name its stages .* got no method stages\(\)"
    ):
        build("FastNet")


@pytest.mark.parametrize(
    "line",
    [
        "from dataload import CLASSES",
        "import models.nothing",
        "from . import nothing",
        "from benchmarks.report import MARKS",
    ],
)
def test_a_source_that_needs_more_than_models_is_refused(tmp_path, line):
    folder = shutil.copytree(PROJECT / "models", tmp_path / "models")
    for name in ("dataload.py", "benchmarks/report.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (folder / "mine.py").write_text(f"def lazily():\n    {line}\n")
    with pytest.raises(ValueError, match="mine.py imports .*expected only files of"):
        registry.source_files(folder / "mine.py")


@pytest.mark.parametrize(
    "line",
    [
        "import models.fastnet",
        "from models import fastnet",
        "from . import fastnet",
        "from .fastnet import FastNet",
        "from models.fastnet import *",
    ],
)
def test_what_a_source_imports_of_models_travels_with_it(tmp_path, line):
    folder = shutil.copytree(PROJECT / "models", tmp_path / "models")
    (folder / "mine.py").write_text(f"import torch\n{line}\n")
    found = {path.name for path in registry.source_files(folder / "mine.py")}
    assert found == {
        "__init__.py",
        "bundle.py",
        "errors.py",
        "explain.py",
        "fastnet.py",
        "mine.py",
        "stage.py",
    }


def test_a_bundle_that_needs_the_project_is_refused(
    tmp_path, model, wrong, tiny_splits, monkeypatch
):
    """The project's process would find the module, the Space's does not."""
    monkeypatch.setattr(
        utils,
        "source_files",
        lambda path: [p for p in registry.source_files(path) if p.name != "stage.py"],
    )
    with pytest.raises(
        ValueError, match=r"does not work on its own: [\s\S]*No module named 'models.stage'"
    ):
        exported(tmp_path, model, wrong, tiny_splits.test.labels)
    assert list(tmp_path.iterdir()) == []


def test_the_app_that_is_loaded_is_the_one_exported_last(
    tmp_path, tmp_path_factory, monkeypatch, model, wrong, tiny_splits
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    exported(tmp_path, model, wrong, tiny_splits.test.labels)
    first = utils.load_app(tmp_path)
    exported(tmp_path, build("FastNet"), wrong, tiny_splits.test.labels)
    second = utils.load_app(tmp_path)
    assert [type(app.MODEL).__name__ for app in (first, second)] == ["CustomResNet", "FastNet"]
    assert second.answers.top_logit.__code__.co_filename == str(tmp_path / "models/explain.py")
    assert sys.modules["models.explain"] is explain and "app" not in sys.modules


# ---- killed ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forks")
@pytest.mark.parametrize("action", ["export", "publish"])
def test_killed_at_any_step_the_folder_has_the_old_bundle_or_the_new_one(tmp_path, action):
    """See kill_export.py. The whole of it takes a minute."""
    project = tmp_path / "project"
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (project / "runs/a/images").mkdir(parents=True)
    (project / "runs/a/images/loss_metrics.png").write_text("curve")
    (project / "runs/a/results.json").write_text('{"data": "CIFAR-10"}')
    (project / "runs/a/ERA_S12_Assignment.ipynb").write_text(json.dumps(notebook))
    ((old, new),) = WarmProcess(kill_again_and_again, project, action)
    assert old >= 4 and new > 10


def test_a_bundle_that_becomes_ready_while_somebody_looks_is_moved_whole(
    tmp_path, model, wrong, tiny_splits, monkeypatch
):
    for folder in ("space", "new"):
        exported(tmp_path / folder, model, wrong, tiny_splits.test.labels)
    space, ready = tmp_path / "space", tmp_path / "space" / bundle.READY

    def look(folder, found):
        if Path(folder) == ready and (tmp_path / "new").exists():
            (tmp_path / "new").rename(ready)
        return found

    walk, listed = os.walk, bundle.listed_files
    with monkeypatch.context() as patch:
        patch.setattr(bundle.os, "walk", lambda top, **kw: look(top, list(walk(top, **kw))))
        patch.setattr(bundle, "listed_files", lambda folder: look(folder, listed(folder)))
        bundle.finish_export(space)
    assert ready.exists()
    assert bundle.read_bundle(space) and not ready.exists()


def test_what_a_killed_export_left_is_swept_later(tmp_path, model, wrong, tiny_splits):
    for name, age in (("old", 2 * 3600), ("young", 60)):
        (tmp_path / f".export-{name}").mkdir()
        os.utime(tmp_path / f".export-{name}", times=(time.time() - age,) * 2)
    exported(tmp_path, model, wrong, tiny_splits.test.labels)
    assert [path.name for path in tmp_path.glob(".export-*")] == [".export-young"]


# Puts one bundle and another into a folder in turn until it is told to stop.
TURNS = """
import shutil, sys
from pathlib import Path
from models.bundle import bundle_files, new_bundle, read_bundle
space, stop, *bundles = map(Path, sys.argv[1:])
while not stop.exists():
    for bundle in bundles:
        with new_bundle(space) as folder:
            (folder / "models").mkdir()
            for name in bundle_files(read_bundle(bundle)[0]):
                shutil.copyfile(bundle / name, folder / name)
"""


def test_who_reads_while_a_bundle_is_replaced_gets_one_of_the_two(
    tmp_path, model, wrong, tiny_splits
):
    for arch, folder in (("CustomResNet", "first"), ("FastNet", "second")):
        exported(tmp_path / folder, build(arch), wrong, tiny_splits.test.labels)
    space = shutil.copytree(tmp_path / "first", tmp_path / "space")
    bundles = [tmp_path / "first", tmp_path / "second"]
    program = [sys.executable, "-c", TURNS, space, tmp_path / "stop", *bundles]
    child = subprocess.Popen(program, cwd=PROJECT)
    seen, until = set(), time.monotonic() + 600
    try:
        while time.monotonic() < until and child.poll() is None:
            time.sleep(0.01)  # leaves a small machine to the other process
            source = utils.bundle.read_bundle(space)[0]["source"]
            if source not in seen:
                seen.add(source)
                until = time.monotonic() + (3 if len(seen) == 2 else 600)  # it goes on for a while
    finally:
        (tmp_path / "stop").touch()
        assert child.wait(60) == 0
    assert seen == {"resnet.py", "fastnet.py"}
