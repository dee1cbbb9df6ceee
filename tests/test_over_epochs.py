"""What is drawn over the epochs is what the stored numbers say."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import trust
from dataload import CLASSES, denormalize, normalize
from evaluation import calibration, drawing, errors, over_epochs, robustness, saliency_checks
from evaluation.over_epochs import Learned
from lesson import schematics
from models import explain
from models.registry import build
from tests.conftest import title_of, wrong_predictions


def runs(with_shortcuts: list[float], without: list[float]) -> dict:
    """Runs of two epochs that end with these training losses."""
    ends = [(True, loss) for loss in with_shortcuts] + [(False, loss) for loss in without]
    return {
        "layers": 56,
        "runs": [
            {"shortcuts": kind, "seed": i, "train_loss": [2.0, loss], "val_acc": [0.3, 1 - loss]}
            for i, (kind, loss) in enumerate(ends)
        ],
    }


@pytest.mark.parametrize(
    ("with_shortcuts", "without", "title"),
    [
        ([0.1, 0.2], [0.4, 0.5], "56 layers learn better with shortcuts in every run"),
        ([0.4, 0.5], [0.1, 0.2], "56 layers learn better without shortcuts in every run"),
        ([0.1, 0.4], [0.2, 0.3], "The runs of 56 layers with and without shortcuts overlap"),
    ],
)
def test_the_title_says_whether_shortcuts_help(with_shortcuts, without, title):
    found = over_epochs.shortcuts_title(runs(with_shortcuts, without))
    numbers = [f"{np.mean(ends):.2f}" for ends in (with_shortcuts, without)]
    assert found.startswith(title) and found.endswith(
        f"training loss {numbers[0]} with shortcuts, {numbers[1]} without (n = 2)"
    )


def test_the_curves_are_the_runs_and_their_means():
    fig = over_epochs.plot_shortcuts(runs([0.1, 0.2], [0.4, 0.6]), "a note")
    loss, acc = fig.axes
    drawn = [line.get_ydata().tolist() for line in loss.lines]
    assert drawn[:2] == [[2.0, 0.1], [2.0, 0.2]] and drawn[2] == pytest.approx([2.0, 0.15])
    assert acc.lines[-1].get_ydata() == pytest.approx([0.3, 0.5])
    assert {text.get_text() for text in acc.texts} == {
        "with shortcuts\n85.0 %",
        "without shortcuts\n50.0 %",
    }


@pytest.mark.parametrize("data", [runs([0.1], []), runs([], [0.1])])
def test_runs_of_one_kind_only_are_refused(data):
    with pytest.raises(ValueError, match="of both kinds, got"):
        over_epochs.plot_shortcuts(data)


def learned(correct: list[list[bool]]) -> Learned:
    """Two images of class 2 over some epochs, each classified correctly or as class 0."""
    entries = []
    for epoch, row in enumerate(correct, 1):
        probs = np.full((len(row), 10), 0.05)
        probs[range(len(row)), [2 if right else 0 for right in row]] = 0.55
        maps = np.zeros((len(row), 32, 32), int)
        entries.append({"epoch": epoch, "probabilities": probs.tolist(), "heatmaps": maps.tolist()})
    count = len(correct[0])
    data = {"classes": list(CLASSES), "labels": [2] * count, "epochs": entries}
    return Learned(data, np.full((count, 32, 32, 3), 0.5))


def test_the_title_counts_the_images_that_are_classified_correctly():
    better = learned([[False, False], [True, False], [True, True]])
    assert better.title() == (
        "0 of 2 images are classified correctly after epoch 1, 2 after epoch 3"
    )
    assert better.title(1) == "After epoch 2: 1 of 2 images correct"
    same = learned([[True, False], [False, True]])
    assert same.title() == "1 of 2 images are classified correctly after epoch 1 and after epoch 2"
    with pytest.raises(ValueError, match="expected 2 images, got 1"):
        data = {"classes": [], "labels": [0, 1], "epochs": []}
        Learned(data, np.zeros((1, 32, 32, 3)))


def test_the_strip_shows_the_first_and_the_last_epoch_with_their_predictions():
    fig = over_epochs.plot_learned(learned([[False, True]] * 9 + [[True, True]]), "a note")
    axes = np.array(fig.axes).reshape(2, 7)
    assert [axis.get_title() for axis in axes[0, [0, 1, -1]]] == [
        "true class",
        "epoch 1",
        "epoch 10",
    ]
    assert [axis.get_xlabel() for axis in axes[0, [0, 1, -1]]] == [
        "bird",
        "airplane 55 %",
        "bird 55 %",
    ]
    assert axes[0, 1].xaxis.label.get_color() != axes[0, -1].xaxis.label.get_color()


def test_of_many_epochs_some_are_chosen_evenly():
    assert over_epochs.some_of(3, 6) == [0, 1, 2]
    assert over_epochs.some_of(11, 6) == [0, 2, 4, 6, 8, 10]


def test_the_gif_has_a_frame_for_each_epoch_and_is_small(tmp_path):
    over_epochs.save_gif(learned([[False, True], [True, True]]), tmp_path / "new" / "a.gif")
    data = (tmp_path / "new" / "a.gif").read_bytes()
    picture = Image.open(io.BytesIO(data))
    assert picture.n_frames == 2 and picture.width == 840 and len(data) < over_epochs.GIF_BYTES
    assert picture.info["loop"] == 0


@pytest.mark.numeric
def test_a_snapshot_holds_probabilities_and_heatmaps_of_the_network(tiny_splits):
    model, images = build("FastNet").train(), normalize(tiny_splits.val.images[:2])
    found = over_epochs.epoch_snapshot(model, images, [0, 1])
    assert model.training
    with torch.no_grad():
        probs = model.eval()(images).softmax(1).numpy()
    assert np.array(found["probabilities"]) == pytest.approx(probs, abs=1e-4)
    cams = explain.gradcam(model, model.stages()[-1].module, images, [0, 1])
    assert np.array(found["heatmaps"]) == pytest.approx(255 * cams, abs=1)


# ---- what all figures share ----


def test_labels_move_apart_and_keep_their_order_and_mean():
    placed = drawing.spread([0.5, 0.1, 0.52], 0.2)
    assert placed[1] < placed[0] < placed[2]
    assert np.diff(np.sort(placed)).min() >= 0.2 - 1e-9
    assert placed.mean() == pytest.approx(np.mean([0.5, 0.1, 0.52]))
    assert drawing.spread([0.1, 0.9], 0.2).tolist() == [0.1, 0.9]


@pytest.mark.parametrize("noisy", [False, True])
def test_a_file_is_1680_pixels_wide_describes_itself_and_is_small(noisy):
    fig, axis = drawing.new_chart(drawing.WIDTH, 6)
    if noisy:
        axis.imshow(np.random.default_rng(0).random((300, 500, 3)), aspect="auto")
    drawing.headline(fig, "A finding", "A chart", "a note")
    data = drawing.png_bytes(fig)
    picture = Image.open(io.BytesIO(data))
    assert picture.width == 1680 and picture.text["Description"] == "A chart. A finding. a note"
    assert len(data) < (3_000_000 if noisy else 500_000)
    assert (picture.mode == "P") == noisy
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert title_of(fig) == "A finding a note"


def test_no_text_is_smaller_than_12_pixels_where_a_figure_is_shown_840_pixels_wide(tiny_splits):
    images, labels = tiny_splits.test.first(20)
    wrong, stored = wrong_predictions(images, labels), trust.read()
    figures = [
        errors.plot_confusion(wrong, labels, CLASSES),
        errors.plot_misclassified(wrong, CLASSES, denormalize),
        calibration.plot_reliability(torch.randn(20, 10), torch.from_numpy(labels), 0.7),
        robustness.plot_robustness(stored["robustness"], images[0], stored["predictions"]),
        saliency_checks.plot_cascade(stored["cascade"], images[:4] / 255),
        saliency_checks.plot_deletion(stored["deletion"], stored["insertion"]),
        schematics.plot_residual_block(),
        schematics.plot_orthogonalization(torch.randn(16, 16)),
        over_epochs.plot_shortcuts(runs([0.1], [0.4])),
        over_epochs.plot_learned(learned([[True, True]])),
        over_epochs.draw_frame(learned([[True, True]]), 0),
    ]
    for fig in figures:
        fig.draw_without_rendering()
        points = 840 / 72 / fig.get_figwidth()
        sizes = {
            text.get_fontsize() * points
            for text in fig.findobj(lambda a: hasattr(a, "get_fontsize"))
            if text.get_text()
        }
        assert min(sizes) >= 12, sizes


def test_a_title_is_not_broken_before_a_percent_sign():
    for filler in range(70, 90):  # wherever the line ends
        fig = drawing.new_figure(10.5, 2)
        drawing.headline(fig, f"{'x' * filler} 35 % of them", "A chart")
        assert "35 %" in fig.get_suptitle()
