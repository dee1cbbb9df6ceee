"""Errors are counted and sorted correctly."""

import torch

from dataload import CLASSES
from evaluation import errors
from evaluation.errors import Misclassified
from evaluation.predict import accuracy
from tests.conftest import wrong_predictions


def error(label: int, pred: int, prob: float = 0.5) -> Misclassified:
    return Misclassified(torch.zeros(3, 32, 32), label, pred, prob, torch.zeros(10))


def test_confused_pairs_are_counted_in_both_directions():
    wrong = [error(3, 5), error(5, 3), error(5, 3), error(0, 8), error(1, 9)]
    table = errors.most_confused(wrong, CLASSES, count=2)
    assert table.pair.tolist() == [
        "cat and dog",
        "airplane and ship",
    ] and table.images.tolist() == [3, 1]


def test_the_most_confident_errors_come_first():
    probs = [
        sample.prob for sample in errors.most_confident([error(0, 1, p) for p in (0.3, 0.9, 0.5)])
    ]
    assert probs == [0.9, 0.5, 0.3]


def test_accuracy_of_no_error_is_one(tiny_splits):
    assert len(errors.most_confused(wrong_predictions(*tiny_splits.test), CLASSES)) == 5
    assert errors.most_confused([], CLASSES).empty and accuracy(torch.eye(3), torch.arange(3)) == 1
