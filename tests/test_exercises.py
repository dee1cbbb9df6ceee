"""Each check of an exercise fails on the unsolved cell and passes with the solution."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import albumentations as A
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradio_client import Client, handle_file

from dataload import CLASSES
from evaluation.calibration import fit_temperature
from evaluation.predict import accuracy
from lesson import exercises
from models import resnet
from tests.conftest import PROJECT
from tests.test_architecture import FLOW
from tests.test_space import serve

CELLS = {
    cell.id: cell.source
    for name in ("ERA_S12_Assignment.ipynb", "solutions.ipynb")
    for cell in nbformat.read(PROJECT / name, as_version=4).cells
    if re.match(r"ex-\d|exercise-|solution-", cell.id)
}
NUMBERS = [int(name.removeprefix("exercise-")) for name in CELLS if name.startswith("exercise-")]


@pytest.fixture
def namespace() -> dict:
    """What the cells before the exercises leave."""
    generator = torch.Generator().manual_seed(0)
    true_logits = 2 * torch.randn(5000, 10, generator=generator)
    labels = torch.multinomial(true_logits.softmax(1), 1, generator=generator).flatten()
    logits = true_logits / 2  # of an underconfident network
    return {
        "exercises": exercises,
        "resnet": resnet,
        "A": A,
        "F": F,
        "fit_temperature": fit_temperature,
        "accuracy": accuracy,
        "val_logits": logits,
        "val_labels": labels,
        "temperature": fit_temperature(logits, labels),
    }


def test_there_are_seven_with_a_solution_each():
    assert NUMBERS == [1, 2, 3, 4, 5, 6, 7] and all(
        f"solution-{number}" in CELLS for number in NUMBERS
    )


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
    def wrong_way(image, colours, opacity):
        return opacity * image + (1 - opacity) * colours

    def without_relu(maps, gradients):
        return (gradients.mean((1, 2))[:, None, None] * maps).sum(0)

    def without_shortcut(block, x):
        return F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))

    def without_batchnorm(block, x):
        return F.relu(block.conv2(F.relu(block.conv1(x))) + block.shortcut(x))

    class OtherSize(resnet.ResNet18):
        def stages(self):
            return [*super().stages(), resnet.Stage("layer5", self.layer4, 2)]

    black = A.RandomBrightnessContrast((-1, -1), (0, 0), p=0.5)
    for check, answer, words in (
        (exercises.opacity, wrong_way, "at opacity 0 "),
        (exercises.opacity, lambda *_: np.zeros((32, 32)), "shape"),
        (exercises.opacity, lambda image, *_: image * np.nan, "expected"),
        (exercises.grey, A.ToGray(p=1), "1000 of 1000"),
        (exercises.grey, A.ToGray(p=0.4), "expected about 500"),
        (exercises.grey, black, "neither grey nor unchanged"),
        (exercises.grey, A.InvertImg(p=0.5), "neither grey nor unchanged"),
        (exercises.grad_cam, without_relu, "negative"),
        (exercises.grad_cam, lambda maps, gradients: maps, "shape"),
        (exercises.grad_cam, lambda maps, gradients: maps[0], "other values"),
        (exercises.grad_cam, lambda maps: maps, "TypeError"),
        (exercises.residual, without_shortcut, "the shortcut is missing"),
        (exercises.residual, without_batchnorm, "the values differ"),
        (exercises.residual, lambda block, x: x[:1], "expected a tensor of shape (2, 8, 4, 4)"),
        (exercises.residual, lambda block, x: block(x) + 1, "the values differ"),
        (exercises.halving, resnet.stage(512, 512, 1), "got (2, 512, 4, 4)"),
        (exercises.halving, torch.nn.MaxPool2d(2), "no residual block"),
        (exercises.stage, OtherSize, "but the shape of its output is"),
    ):
        assert not check(answer) and words in capsys.readouterr().out
    assert not exercises.temperature(9.0, namespace["val_logits"], namespace["val_labels"])
    assert re.search(
        r"at 9.0 the network is \d+\.\d% confident on average", capsys.readouterr().out
    )


def test_the_new_stage_needs_a_residual_block(namespace, capsys):
    block, pool = "resnet.stage(512, 512, stride=2)", "resnet.nn.MaxPool2d(2)"
    exec(CELLS["solution-7"].replace(block, pool), namespace)
    assert "no residual block in layer5" in capsys.readouterr().out


@pytest.mark.numeric
def test_an_answer_may_work_in_place():
    def blended(image, colours, opacity):
        image *= 1 - opacity
        image += opacity * colours
        return image

    def block_in_place(block, x):
        shortcut = block.shortcut(x)
        shortcut += block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        return F.relu(shortcut)

    assert exercises.opacity(blended) and exercises.residual(block_in_place)


# ---- exercise 7, all the way ----

# What *Run all* does with the settings ARCH="Deeper", on a few images: train, export.
RUN = """
from dataclasses import replace
from dataload import CIFAR10DataModule, CLASSES, Images, Splits, denormalize, sample_splits
from evaluation.errors import plot_confusion
from tests.conftest import space_meta, wrong_predictions
from training import settings
from training.runs import train
from utils import export_to_space

s = settings.resolve(settings.SWITCHES)
parts = zip(sample_splits("space/examples")[:3], (64, 20, 20))
few = [Images(part.images[:count], part.labels[:count]) for part, count in parts]
recipe = replace(s.recipe, epochs=1, batch_size=32, micro_batch=0)
data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=Splits(*few, "a few"))
run = train(recipe, data, "checkpoints")
wrong = wrong_predictions(few[2].images[:3], few[2].labels[:3])
confusion = plot_confusion(wrong, few[2].labels, CLASSES)
export_to_space("out/space", run.model, space_meta(), wrong, denormalize, confusion)
"""


def insert(path: Path, place: str, text: str) -> None:
    """Write a text behind the only place where the other one stands."""
    before, after = path.read_text(encoding="utf-8").split(place)
    path.write_text(before + place + text + after, encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with exercise 7 done as its text says, with the given solution."""
    folder = tmp_path_factory.mktemp("copy")
    for name in (*FLOW, "space", "tests"):  # a reader may keep anything else beside them
        if (PROJECT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
        else:
            shutil.copyfile(PROJECT / f"{name}.py", folder / f"{name}.py")
    said = dict(enumerate(re.findall(r"`([^`\n]+)`", CELLS["ex-7"])))
    _, file, imports, more, registry, line, entry, _, recipes, recipe, _, arch, *_ = said.values()
    assert (file, registry, recipes, arch) == (
        "models/deeper.py",
        "models/registry.py",
        "training/recipes.py",
        'ARCH = "Deeper"',
    )
    kind = CELLS["solution-7"].split("\nexercises.")[0]
    (folder / file).write_text(f"{imports}\n{more}\n\n\n{kind}", encoding="utf-8")
    insert(folder / registry, "from models.fastnet import FastNet\n", f"{line}\n")
    insert(folder / registry, '"FastNet": FastNet', f", {entry}")
    insert(folder / recipes, "RECIPES = {\n", f"    {recipe},\n")
    return folder


@pytest.fixture(scope="module")
def own_space(project) -> Path:
    """The Space of the network of exercise 7, trained for an epoch."""
    environment = os.environ | {"ERA_ARCH": "Deeper", "PYTHONPATH": str(project)}
    environment.pop("SMOKE_TEST", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return project / "out/space"


def test_a_network_of_the_reader_s_own_becomes_a_space_that_starts_alone(
    own_space, project, tmp_path
):
    space = shutil.move(own_space, tmp_path / "space")
    shutil.rmtree(project)  # nothing of it is left
    assert {path.name for path in (space / "models").glob("*.py")} == {
        "__init__.py",
        "bundle.py",
        "deeper.py",
        "errors.py",
        "explain.py",
        "resnet.py",
        "stage.py",
    }
    with serve(space, tmp_path) as address:
        client = Client(address, verbose=False, download_files=tmp_path)
        picture = handle_file(space / "examples/cat.png")
        assert client.predict(picture, 3, api_name="/classify")[1]["label"] in CLASSES
        maps = client.predict(picture, True, 2, "layer5", "GradCAM", 0.4, api_name="/explain")
        assert len(maps) == 2
