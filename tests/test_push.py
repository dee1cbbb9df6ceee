"""What is pushed is what belongs to the Space, after a yes, and nothing without."""

import json
import shutil
from fnmatch import fnmatch

import httpx
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from tools.push import push_space
from utils import APP_FILES, space_files

BUNDLE_FILES = {
    "model.json",
    "model.safetensors",
    "confusion_matrix.png",
    "misclassified.json",
    "misclassified.png",
}
SOURCES = {
    f"models/{name}.py" for name in ("__init__", "bundle", "errors", "explain", "resnet", "stage")
}


class Recorder:
    """Stands in for huggingface_hub's HfApi and records its calls.

    present: the files of the Space, or the error that listing them raises.
    """

    def __init__(self, present=()):
        self.calls, self.present = [], present

    def list_repo_files(self, repo_id, *, repo_type):
        assert (repo_id, repo_type) == ("me/my-space", "space")
        if isinstance(self.present, Exception):
            raise self.present
        return list(self.present)

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options))


@pytest.fixture
def space(exported_space):
    return exported_space


def test_nothing_is_sent_without_a_yes(space, capsys):
    api = Recorder()
    for answer in ("", "n", "no", "maybe", "Yess"):
        assert push_space(space, "me/my-space", api, lambda _, answer=answer: answer) is None
    assert api.calls == [] and "Nothing was sent" in capsys.readouterr().out


def test_a_dry_run_shows_every_file_with_its_size_and_asks_nothing(space, capsys):
    api = Recorder()
    assert (
        push_space(space, "me/my-space", api, lambda _: pytest.fail("it asked"), dry_run=True)
        is None
    )
    told = capsys.readouterr().out
    sent = space_files(space, json.loads((space / "model.json").read_text()))
    for name in sent:
        assert f"{(space / name).stat().st_size:12,d}  {name}\n" in told
    assert set(sent) >= BUNDLE_FILES | SOURCES and api.calls == []
    assert f"{sum((space / name).stat().st_size for name in sent):,d}" in told
    assert "huggingface.co/spaces/me/my-space" in told and "deletes" not in told


def test_a_yes_creates_the_space_and_sends_the_allowed_files_only(exported_space, tmp_path, capsys):
    space = shutil.copytree(exported_space, tmp_path / "space")
    for name in (".env", "notes.txt", "models/extra.py", "models/notes.txt"):
        (space / name).write_text("private")
    (space / "models/__pycache__").mkdir(exist_ok=True)
    api = Recorder(
        RepositoryNotFoundError(
            "404", response=httpx.Response(404, request=httpx.Request("GET", "x:"))
        )
    )
    address = push_space(
        space, "me/my-space", api, lambda question: "y" if "Send" in question else "n"
    )
    told = capsys.readouterr().out
    assert address == "https://huggingface.co/spaces/me/my-space" and address in told
    assert "me/my-space is not there yet" in told
    (create, repo, how), (upload, _, options) = api.calls
    assert (create, upload, repo) == ("create", "upload", "me/my-space")
    assert how == {
        "repo_type": "space",
        "space_sdk": "gradio",
        "space_hardware": "zero-a10g",
        "exist_ok": True,
    }
    assert options["folder_path"] == space and options["repo_type"] == "space"
    sent = set(options["allow_patterns"])
    assert {name for name in sent if not name.startswith("examples/")} == (
        {*APP_FILES} | BUNDLE_FILES | SOURCES
    )
    assert len([name for name in sent if name.startswith("examples/")]) >= 10


def test_what_lies_there_from_before_is_named_and_deleted_in_the_same_commit(space, capsys):
    """The source of another network, the flat files of the older form, a name like a pattern."""
    old = ["models/fastnet.py", "resnet.py", "explain.py", "bundle.py", "examples/[1].png"]
    kept = [".gitattributes", "app.py", "models/resnet.py", "model.json"]
    kept += ["notes.md", "assets/logo.png", "main.py", "models/other/weights.bin"]  # their owner's
    api, asked = Recorder([*old, *kept]), []
    push_space(space, "me/my-space", api, dry_run=True)
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if "deletes" in line] == sorted(
        old
    ) and api.calls == []

    def ask(question):
        assert all(f"deletes  {name}" in capsys.readouterr().out for name in old[:1])
        asked.append(question)
        return "y"

    push_space(space, "me/my-space", api, ask)
    assert asked == ["Send them, and delete 5 there? [y/N] "]
    (_, _, options) = api.calls[-1]
    deleted = [
        name for name in [*old, *kept] if any(fnmatch(name, p) for p in options["delete_patterns"])
    ]
    assert sorted(deleted) == sorted(old) and [name for name, _, _ in api.calls] == [
        "create",
        "upload",
    ]


def test_without_a_network_a_dry_run_says_what_it_does_not_know_and_a_real_one_stops(space, capsys):
    api = Recorder(ConnectionError("no network"))
    assert push_space(space, "me/my-space", api, dry_run=True) is None
    told = capsys.readouterr().out
    assert (
        "What would be deleted there is not known: no network" in told
        and "model.safetensors" in told
    )
    with pytest.raises(ConnectionError):
        push_space(space, "me/my-space", api, lambda _: pytest.fail("it asked"))
    assert api.calls == []


@pytest.mark.parametrize(
    "name", ["my-space", "me/my/space", "https://huggingface.co/spaces/me/x", "", "me/ x"]
)
def test_a_name_that_is_no_space_is_refused(space, name):
    with pytest.raises(ValueError, match="user/name"):
        push_space(space, name, Recorder())


def test_a_space_whose_weights_were_changed_is_not_sent(space, tmp_path):
    copy = tmp_path / "space"
    shutil.copytree(space, copy)
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    api = Recorder()
    with pytest.raises(ValueError, match="sha256"):
        push_space(copy, "me/my-space", api, lambda _: "y")
    assert api.calls == []
