"""The Colab badge of a copy on GitHub opens that copy, and without one there is no badge."""

import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from tests.conftest import PROJECT
from tools.colab_badge import NO_BADGE, set_badge
from tools.project import NOTEBOOK, NOTEBOOKS

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
FILES = ("README.md", *NOTEBOOKS)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A scratch repository with the README and the notebooks."""
    for name in FILES:
        shutil.copyfile(PROJECT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def remote(folder: Path, url: str) -> None:
    subprocess.run(["git", "remote", "add", "origin", url], cwd=folder, check=True)


def texts(folder: Path) -> tuple[str, str, set[str]]:
    """README.md, the first cell of the lesson, and the first code cells of all notebooks."""
    cells = {name: nbformat.read(folder / name, as_version=4).cells for name in NOTEBOOKS}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    return readme, cells[NOTEBOOK][0].source, {found[1].source for found in cells.values()}


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/some-one/my.fork.git",
        "https://github.com/some-one/my.fork",
        "https://token@github.com/some-one/my.fork/",
        "git@github.com:some-one/my.fork.git",
        "ssh://git@github.com/some-one/my.fork.git",
    ],
)
def test_the_badge_opens_the_repository_of_the_remote(repository, url):
    remote(repository, url)
    assert set_badge(repository) == "some-one/my.fork"
    readme, first, setups = texts(repository)
    target = f"https://colab.research.google.com/github/some-one/my.fork/blob/main/{NOTEBOOK}"
    assert f"({target})" in readme and f"({target})" in first and NO_BADGE not in readme + first
    (setup,) = setups  # the same in all
    assert 'REPO_URL = "https://github.com/some-one/my.fork"\n' in setup


@pytest.mark.parametrize("url", ["", "https://gitlab.com/a/b.git", "https://notgithub.com/a/b"])
def test_without_a_remote_on_github_there_is_no_badge(repository, url):
    remote(repository, "https://github.com/some-one/my.fork")
    set_badge(repository)
    subprocess.run(["git", "remote", "remove", "origin"], cwd=repository, check=True)
    if url:
        remote(repository, url)
    assert set_badge(repository) is None
    readme, first, setups = texts(repository)
    assert NO_BADGE in readme and "colab-badge.svg" not in readme + first
    (setup,) = setups
    assert 'REPO_URL = ""\n' in setup


def test_the_rest_of_the_files_stays(repository):
    before = [(repository / name).read_text() for name in FILES]
    remote(repository, "https://github.com/some-one/my.fork")
    set_badge(repository)
    subprocess.run(["git", "remote", "remove", "origin"], cwd=repository, check=True)
    set_badge(repository)
    assert before == [(repository / name).read_text() for name in FILES]


def test_a_file_without_a_place_for_it_is_refused_and_nothing_is_written(repository):
    (repository / "README.md").write_text("no mark")
    with pytest.raises(ValueError, match="expected one place .* got 0"):
        set_badge(repository)
    assert (repository / "README.md").read_text() == "no mark"
