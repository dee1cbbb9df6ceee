"""`make faults` counts what it says: injected, survived, and lost between before and after."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import Fault, fault_lines

PROJECT = Path(__file__).resolve().parent.parent

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_a_loss(faults, number):
    faults("half of it is lost", before=10, after=10 - 2 * number, unit="epochs")

def test_that_fails(faults):
    assert 1 == 2
    faults("never told", 1)

def test_that_fails_later(faults):
    faults("told too early", 4)
    raise OSError

@pytest.fixture
def broken():
    raise OSError

def test_that_cannot_begin(faults, broken):
    faults("never told", 1)

def test_that_is_skipped(faults):
    pytest.skip("not here")
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, list[str]]:
    """What a run of these tests prints: the row of each fault, by its name."""
    folder: Path = tmp_path_factory.mktemp("faults")
    (folder / "test_small.py").write_text(TESTS)
    names = "faults, pytest_runtest_makereport, pytest_terminal_summary"
    (folder / "conftest.py").write_text(f"from tests.faults import {names}")
    environment = {
        "FAULTS": "long",
        "PYTHONPATH": str(PROJECT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment
    )
    found = re.findall(r"^(\S.*?) +(\d+) +(\d+)  (.*)$", done.stdout, re.M)
    return {name: numbers for name, *numbers in found}


def test_what_was_there_before_and_is_not_there_after_is_lost(table):
    assert table["half of it is lost"] == ["3", "3", "6 of 30 epochs"]


@pytest.mark.parametrize("name", ["test_that_fails", "test_that_cannot_begin"])
def test_a_fault_whose_test_fails_is_listed_as_not_survived(table, name):
    assert table[f"({name})"] == ["1", "0", "not measured"]
    assert "never told" not in table


def test_a_fault_that_was_told_before_the_test_failed_is_not_survived(table):
    assert table["told too early"] == ["4", "0", "not measured"]


def test_a_skipped_test_injects_nothing(table):
    assert len(table) == 4


def test_the_lines_count_what_was_not_measured_as_unknown():
    header, line = fault_lines({"no memory": Fault(injected=2, survived=1)})
    assert header.split() == ["fault", "injected", "survived", "lost"]
    assert line.split() == ["no", "memory", "2", "1", "not", "measured"]
