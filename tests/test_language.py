"""The notebooks speak the field's language: its terms, and none of the home-made ones."""

import ast
import re

import nbformat
import pytest

from tests.conftest import PROJECT
from tools.project import NOTEBOOKS

# Home-made phrase -> the field's term, or plain English.
PHRASES = {
    r"six views|single view": "test-time augmentation (TTA), no TTA",
    r"(?<!expected )calibration error": "expected calibration error (ECE)",
    r"probability and accuracy are apart": "expected calibration error (ECE)",
    r"\bspoil|\bdisturb": "corrupt, corruption",
    r"\b(most|too|less) sure\b|\bsurest\b": "confident, overconfident, underconfident",
    r"right when it is so sure": "reliability diagram",
    r"spoke for the class|speaks? for the class": "evidence for the class",
    r"weighs each map": "weights each feature map by its mean gradient",
    r"list of all numbers|all the numbers of a": "recipe: a set of hyperparameters",
    r"\bwhat applies\b": "resolved settings",
    r"share the images": "split each batch",
    r"loses a square|painted over|\bcut out\b": "cutout masks a random square",
    r"without correlation|computed stem": "whitening layer (decorrelated outputs)",
    r"identity filters": "identity (Dirac) initialisation",
    r"fast biases": "larger learning rate for biases",
    r"parts that fit": "micro-batches, gradient accumulation",
    r"trick worth|leave it out": "ablation study",
    r"network of its own": "a separate throwaway model",
    r"jumps about": "fluctuates",
    r"\brightly\b": "correctly",
    r"taken for each other": "confused",
    r"taken away": "masked",
    r"answers? most strongly": "most activated",
    r"fills up and": "fault injection",
    r"was at hand": "no GPU was available",
    r"opacity means opacity": "alpha blending",
    r"\ball the same\b|mends either|\bas it is\b|\bin words\b|\bso it is\b": "plain English",
}
WORDS = 90  # of a markdown cell before a figure


def texts_of(name: str) -> list[str]:
    """The markdown and the code of a notebook's cells."""
    return [cell.source for cell in nbformat.read(PROJECT / name, as_version=4).cells]


def strings_of(path) -> list[str]:
    """The strings in a module that a reader may see, or read as documentation."""
    constants = [
        node.value
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Constant)
    ]
    return [value for value in constants if isinstance(value, str)]


def home_made(text: str) -> list[str]:
    """The home-made phrases in a text, each with what should stand there."""
    folded = " ".join(text.split())
    return [
        f"{match.group()!r}: {term}"
        for phrase, term in PHRASES.items()
        if (match := re.search(phrase, folded, re.I))
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_home_made_phrase_stands_in_a_notebook(name):
    assert [found for text in texts_of(name) for found in home_made(text)] == []


@pytest.mark.parametrize("path", sorted((PROJECT / "lesson").glob("*.py")), ids=lambda p: p.name)
def test_no_home_made_phrase_stands_in_what_the_lesson_says(path):
    assert [found for text in strings_of(path) for found in home_made(text)] == []


def test_a_home_made_phrase_is_seen_across_lines():
    assert home_made("Here the network is too\nsure.") and home_made("its calibration error")
    assert not home_made("the expected calibration error of a confident network")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_text_before_a_figure_is_short(name):
    cells = nbformat.read(PROJECT / name, as_version=4).cells
    for cell, after in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "markdown" and "show.figure" in after.source:
            words = re.sub(r"\]\([^)]*\)|^#.*$", " ", cell.source, flags=re.M).split()
            assert len(words) <= WORDS, (len(words), cell.source)


def test_every_chapter_asks_three_questions_with_folded_answers():
    cells = nbformat.read(PROJECT / NOTEBOOKS[0], as_version=4).cells
    quizzes = [cell.source for cell in cells if cell.source.startswith("**Check yourself**")]
    chapters = [
        cell for cell in cells if re.match(r"## (2|3|4|5|6|7|8|9|10|11|12)\. ", cell.source)
    ]
    assert len(quizzes) == len(chapters) == 11
    for quiz in quizzes:
        questions = re.findall(r"^\d\. .+\?$", quiz, re.M)
        assert len(questions) == quiz.count("<details><summary>Answer</summary>") == 3
