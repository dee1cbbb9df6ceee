"""Errors are counted and sorted correctly."""

import numpy as np
import pytest
import torch

from dataload import CLASSES, make_loader
from evaluation import errors
from evaluation.drawing import format_confidence
from evaluation.errors import Misclassified
from evaluation.predict import accuracy
from tests.conftest import wrong_predictions


def error(label: int, pred: int, prob: float = 0.5) -> Misclassified:
    return Misclassified(torch.zeros(3, 32, 32), label, pred, prob, torch.zeros(10))


def test_confused_pairs_are_counted_in_both_directions():
    wrong = [error(3, 5), error(5, 3), error(5, 3), error(0, 8)]
    table = errors.most_confused(wrong, CLASSES)
    assert table.pair.tolist() == ["cat and dog", "airplane and ship"]
    assert table.images.tolist() == [3, 1]


def test_the_most_confident_errors_come_first():
    probs = [
        sample.prob for sample in errors.most_confident([error(0, 1, p) for p in (0.3, 0.9, 0.5)])
    ]
    assert probs == [0.9, 0.5, 0.3]


def test_accuracy_of_no_error_is_one(tiny_splits):
    assert len(errors.most_confused(wrong_predictions(*tiny_splits.test), CLASSES)) == 5
    assert errors.most_confused([], CLASSES).empty and accuracy(torch.eye(3), torch.arange(3)) == 1


LABELS = np.arange(1000) % 10


@pytest.mark.parametrize(
    ("wrong", "title"),
    [
        ([], "No errors: all 1,000 test images are classified correctly"),
        (
            [error(3, 5), error(5, 3), error(4, 7), error(0, 2)],
            "Cats and dogs are confused most: 2 of 4 errors."
            " 25 % of the errors confuse an animal with a vehicle",
        ),
        (
            [error(3, 5), error(5, 3), error(4, 7), error(7, 4)],
            "Cats and dogs are among the most confused: 2 of 4 errors."
            " 0 % of the errors confuse an animal with a vehicle",
        ),
        (
            [error(4, 7)],
            "Deer and horses are confused most: 1 of 1 error."
            " 0 % of the errors confuse an animal with a vehicle",
        ),
    ],
)
def test_the_confusion_matrix_s_title_counts_the_errors(wrong, title):
    assert errors.confusion_title(wrong, LABELS, CLASSES) == title


def test_the_confusion_matrix_puts_vehicles_before_animals():
    axis = errors.plot_confusion([error(3, 5), error(0, 2)], LABELS, CLASSES).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:4] == list(errors.VEHICLES) and names[4:] == list(errors.ANIMALS)
    shown = np.array([int(t.get_text()) for t in axis.texts[:100]]).reshape(10, 10)
    assert shown[names.index("cat"), names.index("dog")] == 1
    assert shown[names.index("airplane"), names.index("bird")] == 1 and shown.sum() == 1000
    assert {"vehicles", "animals", "99.0 %"} <= {text.get_text() for text in axis.texts}


def test_the_title_of_errors_says_how_confident_they_are():
    title = errors.errors_title([error(0, 1, 0.5), error(0, 1, 0.9996)])
    assert title == "2 misclassified test images, predicted with 50 % to >99 % confidence"
    assert "all predicted with 50 %" in errors.errors_title([error(0, 1), error(0, 1)])
    assert errors.errors_title([error(0, 1)]).startswith("A misclassified test image")


def test_half_of_the_chosen_errors_are_the_most_confident_and_none_comes_twice():
    found = [error(0, 1, prob) for prob in (0.3, 0.9, 0.5, 0.8, 0.4)]
    assert [e.prob for e in errors.choose_errors(found, 4)] == [0.9, 0.8, 0.3, 0.5]
    assert len(errors.choose_errors(found, 10)) == 5 and errors.choose_errors([], 4) == []


def test_correct_examples_are_the_first_of_each_class(tiny_splits):
    loader = make_loader(tiny_splits.test, 16, num_workers=0, train=False)
    labels = torch.from_numpy(tiny_splits.test.labels)
    logits = torch.eye(10)[labels] * 5
    logits[0] = logits[1]  # the first airplane is misclassified: the next one is shown, last
    found = errors.get_correct_data(loader, (logits, labels), 20)
    assert [sample.label for sample in found] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert all(sample.label == sample.pred for sample in found)
    assert torch.equal(found[-1].image, loader.dataset[10][0])
    assert len(errors.get_correct_data(loader, (logits, labels), 3)) == 3


@pytest.mark.numeric
def test_the_temperature_divides_the_logits_of_an_error(tiny_splits):
    loader = make_loader(tiny_splits.test, 16, 0, train=False)
    labels = torch.from_numpy(tiny_splits.test.labels)
    logits = 4 * torch.nn.functional.one_hot((labels + 1) % 10, 10).float()
    (first, *_) = errors.get_misclassified_data(None, "cpu", loader, 2, (logits, labels))
    assert first.prob == pytest.approx(np.exp(2) / (np.exp(2) + 9))


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_zero_is_refused(tiny_splits, temperature):
    loader = make_loader(tiny_splits.test, 16, 0, train=False)
    labels = torch.from_numpy(tiny_splits.test.labels)
    logits = torch.nn.functional.one_hot((labels + 1) % 10, 10).float()
    with pytest.raises(ValueError, match=f"temperature above 0, got .* and {temperature}"):
        errors.get_misclassified_data(None, "cpu", loader, temperature, (logits, labels))
    with pytest.raises(ValueError, match="expected finite logits"):
        errors.get_misclassified_data(None, "cpu", loader, 1, (logits * float("nan"), labels))


@pytest.mark.parametrize(
    ("probability", "told"), [(0.336, "34 %"), (0.994, "99 %"), (0.9996, ">99 %"), (1.0, ">99 %")]
)
def test_no_confidence_is_said_to_be_all_of_it(probability, told):
    assert format_confidence(probability) == told
