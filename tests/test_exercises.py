"""Every check of an exercise fails on the unsolved cell and passes with the solution that the notebook gives."""

import re

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import exercises
from evaluation import accuracy, fit_temperature
from models import resnet
from tests.conftest import PROJECT

CELLS = {cell.id: cell.source for cell in nbformat.read(PROJECT / "ERA_S12_Assignment.ipynb", as_version=4).cells}
NUMBERS = [int(name.removeprefix("exercise-")) for name in CELLS if name.startswith("exercise-")]


@pytest.fixture
def namespace() -> dict:
    """What the cells before the exercises leave."""
    generator = torch.Generator().manual_seed(0)
    true_logits = 2 * torch.randn(5000, 10, generator=generator)
    labels = torch.multinomial(true_logits.softmax(1), 1, generator=generator).flatten()
    logits = true_logits / 2  # of a network that is not sure enough
    return {
        "exercises": exercises, "resnet": resnet, "F": F, "accuracy": accuracy, "val_logits": logits,
        "val_labels": labels, "temperature": fit_temperature(logits, labels),
    }  # fmt: skip


def test_there_are_five_with_a_solution_each():
    assert NUMBERS == [1, 2, 3, 4, 5] and all(f"solution-{number}" in CELLS for number in NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_unsolved_cell_is_told_what_is_missing(number, namespace, capsys):
    exec(CELLS[f"exercise-{number}"], namespace)
    assert re.fullmatch(r"Not yet: .{15,}\.\n", capsys.readouterr().out)


@pytest.mark.numeric
@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_is_right(number, namespace, capsys):
    exec(CELLS[f"exercise-{number}"], namespace)
    exec(CELLS[f"solution-{number}"], namespace)
    assert capsys.readouterr().out.endswith("Right.\n")


@pytest.mark.numeric
def test_answers_that_are_nearly_right_are_told_why_not(capsys, namespace):
    import albumentations as A

    def wrong_way(image, colours, opacity):
        return opacity * image + (1 - opacity) * colours

    def without_relu(maps, gradients):
        return (gradients.mean((1, 2))[:, None, None] * maps).sum(0)

    class OtherSize(resnet.ResNet18):
        def stages(self):
            return [*super().stages(), resnet.Stage("layer5", self.layer4, 2)]

    for check, answer, words in (
        (exercises.opacity, wrong_way, "at opacity 0 "),
        (exercises.opacity, lambda *_: np.zeros((32, 32)), "shape"),
        (exercises.grey, A.ToGray(p=1), "200 of 200"),
        (exercises.grey, A.InvertImg(p=0.5), "neither grey nor unchanged"),
        (exercises.grad_cam, without_relu, "negative"),
        (exercises.grad_cam, lambda maps, gradients: maps, "shape"),
        (exercises.grad_cam, lambda maps, gradients: maps[0], "other values"),
        (exercises.grad_cam, lambda maps: maps, "TypeError"),
        (exercises.stage, OtherSize, "its output is not so"),
    ):
        assert not check(answer) and words in capsys.readouterr().out
    assert not exercises.temperature(9.0, namespace["val_logits"], namespace["val_labels"])
    assert re.search(r"at 9.0 the network is \d+\.\d% sure on average", capsys.readouterr().out)
