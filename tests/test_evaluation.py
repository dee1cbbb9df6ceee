"""TTA averages six versions of an image; the temperature makes confidence agree with accuracy."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.calibration import (
    confidence_threshold,
    expected_calibration_error,
    fit_temperature,
    plot_reliability,
    reliability_bins,
    reliability_title,
)
from evaluation.predict import accuracy, predict, tta_logits

pytestmark = pytest.mark.numeric


class Corner(nn.Module):
    """Logits of an image: the four values in its upper left corner.

    What they are shows which view it was.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, :2, :2].flatten(1)


def test_tta_mirrors_shifts_by_a_pixel_and_weights_the_six_views():
    image = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = np.zeros(4)
    for weight, view in ((0.5, image), (0.25, padded[:, :8, :8]), (0.25, padded[:, 2:, 2:])):
        for mirrored in (view, view[:, :, ::-1]):
            expected += weight / 2 * mirrored[0, :2, :2].flatten()
    assert np.allclose(tta_logits(Corner(), torch.from_numpy(image)[None])[0], expected, atol=1e-6)


def test_predict_gives_logits_in_the_loader_s_order_and_leaves_the_mode_alone():
    model, images = Corner().train(), torch.rand(7, 3, 8, 8)
    batches = [(images[:4], torch.arange(4)), (images[4:], torch.arange(4, 7))]
    logits, labels = predict(model, "cpu", batches)
    assert (
        torch.allclose(logits, model(images))
        and labels.tolist() == list(range(7))
        and model.training
    )
    assert torch.allclose(predict(model, "cpu", batches, tta=True)[0], tta_logits(model, images))


def test_predict_computes_in_fp32_on_a_gpu_too(monkeypatch):
    """Where TF32 is on by default; it is on again afterwards."""
    allowed, answer = [], Corner.forward

    def forward(self, images):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return answer(self, images)

    monkeypatch.setattr(Corner, "forward", forward)
    predict(Corner(), "cpu", [(torch.rand(4, 3, 8, 8), torch.arange(4))])
    assert allowed == [False] and torch.backends.cudnn.allow_tf32


def test_accuracy_is_a_fraction():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    true_logits = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(true_logits.softmax(1), 1, generator=generator).flatten()
    assert fit_temperature(temperature * true_logits, labels) == pytest.approx(
        temperature, rel=0.03
    )
    assert expected_calibration_error(temperature * true_logits, labels, temperature) < 0.02
    if temperature != 1:
        assert expected_calibration_error(temperature * true_logits, labels) > 0.05


def test_the_calibration_error_of_four_answers_by_hand():
    """Confidences 0.9, 0.9 (one of two correct) and 0.6, 0.6 (both correct), two classes.

    (2 * 0.4 + 2 * 0.4) / 4.
    """
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    assert expected_calibration_error(logits, torch.tensor([0, 1, 0, 0])) == pytest.approx(
        0.4, abs=1e-6
    )


def test_answers_of_one_bin_balance_each_other():
    confidence = torch.full((10,), 0.7)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    assert expected_calibration_error(logits, torch.tensor([0] * 7 + [1] * 3)) == pytest.approx(
        0, abs=1e-6
    )


def test_a_twentieth_of_the_images_lies_below_the_confidence_threshold():
    logits = 3 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    threshold = confidence_threshold(logits, 0.7, 0.05)
    assert int(((logits / 0.7).softmax(1).max(1).values < threshold).sum()) == 50


def test_the_bins_of_four_answers_by_hand():
    """Confidences 0.9, 0.9 (one correct) and 0.65, 0.65 (both correct).

    Bins 14 and 10 of 15, counted from 1.
    """
    confidence = torch.tensor([0.9, 0.9, 0.65, 0.65])
    sums = reliability_bins(
        torch.stack([confidence, 1 - confidence], 1).log(), torch.tensor([0, 1, 0, 0])
    )
    filled = {
        bin + 1: tuple(float(values[bin]) for values in sums)
        for bin in range(15)
        if sums.total[bin]
    }
    assert list(filled) == [10, 14]
    assert filled[10] == pytest.approx((1.3, 2, 2)) and filled[14] == pytest.approx((1.8, 1, 2))


def test_bars_of_the_reliability_diagram_are_the_accuracies_of_the_bins():
    confidence = torch.tensor([0.9, 0.9, 0.65, 0.65])
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    fig = plot_reliability(logits, torch.tensor([0, 1, 0, 0]), 0.5, "a note")
    before, after, counts, _ = fig.axes
    bars, gaps = (
        {round(bar.get_x() + bar.get_width() / 2, 3): bar for bar in container}
        for container in before.containers
    )
    heights = {place: bar.get_height() for place, bar in bars.items()}
    assert heights == pytest.approx({round(9.5 / 15, 3): 1, round(13.5 / 15, 3): 0.5})
    gap = gaps[round(13.5 / 15, 3)]  # from the accuracy of 0.5 to the confidence of 0.9
    assert (gap.get_y(), gap.get_height()) == pytest.approx((0.5, 0.4))
    assert [bar.get_height() for bar in counts.patches if bar.get_height()] == [2, 2]
    assert "37.50 %" in before.get_title() and "temperature 0.50" in after.get_title()
    assert fig.get_suptitle().endswith("a note")


@pytest.mark.parametrize(
    ("confidence", "temperature", "says"),
    [
        (0.9, 2.0, ("overconfident by 20.0 percentage points", "lowers the ECE: 20.00 % before")),
        (0.9, 0.5, ("overconfident", "does not lower the ECE")),
        (0.6, 0.5, ("underconfident by 10.0 percentage points", "lowers the ECE: 10.00 % before")),
    ],
)
def test_the_title_says_whether_the_network_is_overconfident(confidence, temperature, says):
    """Seven of ten answers are correct, all of them given with the same confidence."""
    probs = torch.tensor([[confidence, 1 - confidence]] * 10)
    title = reliability_title(probs.log(), torch.tensor([0] * 7 + [1] * 3), temperature)
    assert all(text in title for text in says), title


@pytest.mark.parametrize("fails", [False, True])
def test_predicting_leaves_every_module_in_its_own_mode(fails):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Dropout())
    model.train()[1].eval()  # a frozen BatchNorm in a network that trains
    batches = [(torch.zeros(2, 3, 2, 2), torch.zeros(2)), (torch.zeros(2, 3, 9, 9), torch.zeros(2))]
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        predict(model, "cpu", batches if fails else batches[:1])
    assert [module.training for module in model.modules()] == [True, True, False, True]
