"""What is pushed is what belongs to the Space or to its weights, after a yes, else nothing."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
from huggingface_hub import ModelCard, SpaceCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from dataload import CLASSES
from models.bundle import load_bundle
from tests.conftest import PROJECT
from tools import push
from tools.model_card import eval_results
from tools.project import SPACE, read_results
from tools.push import push_model, push_space
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
    """Stands in for huggingface_hub's HfApi and records its calls, and what was sent to where.

    present: the files of the repository, or the error that listing them raises.
    """

    def __init__(self, present=()):
        self.calls, self.present, self.sent = [], present, {}

    def list_repo_files(self, repo_id, *, repo_type):
        assert (repo_id, repo_type) in (("me/my-space", "space"), ("me/my-model", "model"))
        if isinstance(self.present, Exception):
            raise self.present
        return list(self.present)

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options))
        folder = Path(options["folder_path"])
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        self.sent[options["repo_id"]] = {
            name: path.read_bytes() for name, path in files.items() if path.is_file()
        }


NOT_THERE = RepositoryNotFoundError(
    "404", response=httpx.Response(404, request=httpx.Request("GET", "x:"))
)


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
    sizes = {name: (space / name).stat().st_size for name in sent}
    sizes["README.md"] = len(push.space_readme(space, "me/my-space", "").encode())
    for name, size in sizes.items():
        assert f"{size:12,d}  {name}\n" in told
    assert set(sent) >= BUNDLE_FILES | SOURCES and api.calls == []
    assert f"{sum(sizes.values()):,d}" in told
    assert "huggingface.co/spaces/me/my-space" in told and "deletes" not in told


def test_a_yes_creates_the_space_and_sends_the_allowed_files_only(exported_space, tmp_path, capsys):
    space = shutil.copytree(exported_space, tmp_path / "space")
    private = (".env", "notes.txt", "models/extra.py", "models/notes.txt")
    private += ("examples/me.png", "examples/passwords.txt")
    for name in private:
        (space / name).write_text("private")
    (space / "examples/frog.png").unlink()
    (space / "examples/frog.png").symlink_to(space / ".env")
    (space / "models/__pycache__").mkdir(exist_ok=True)
    api = Recorder(NOT_THERE)
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
    assert options["repo_type"] == "space" and not Path(options["folder_path"]).exists()
    sent = api.sent["me/my-space"]
    assert {name for name in sent if not name.startswith("examples/")} == (
        {*APP_FILES} | BUNDLE_FILES | SOURCES
    )
    examples = {name.removeprefix("examples/") for name in sent if name.startswith("examples/")}
    pictures = {f"{name}.png" for name in CLASSES if name != "frog"}
    licences = {"LICENSE-CC-BY-SA-3.0.txt", "LICENSE-CC0-1.0.txt", "LICENSE-GPL-2.txt"}
    assert examples == pictures | licences | {"CREDITS.md"}
    for name in set(sent) - {"README.md"}:
        assert sent[name] == (space / name).read_bytes(), name


def test_what_lies_there_from_before_is_named_and_deleted_in_the_same_commit(space, capsys):
    """The source of another network, the flat files of the older form."""
    old = ["models/fastnet.py", "resnet.py", "explain.py", "bundle.py"]
    kept = [".gitattributes", "app.py", "models/resnet.py", "model.json"]
    kept += ["notes.md", "assets/logo.png", "models/mine.py", "examples/[1].png"]  # their owner's
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
    assert asked == ["Send them, and delete 4 there? [y/N] "]
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


# ---- the front matter of the Space ----


def front_matter(readme: bytes) -> dict:
    return SpaceCard(readme.decode()).data.to_dict()


@pytest.mark.parametrize("model_id", ["", "me/my-model"])
def test_the_pushed_readme_is_the_committed_one_with_what_depends_on_the_address(space, model_id):
    api = Recorder()
    push_space(space, "me/my-space", api, lambda _: "y", model_id=model_id)
    sent = api.sent["me/my-space"]
    here = "https://huggingface.co/spaces/me/my-space/resolve/main/"
    added = {"models": [model_id]} if model_id else {}
    front = front_matter(sent["README.md"])
    assert front.pop("thumbnail").removeprefix(here) in sent
    committed = (SPACE / "README.md").read_bytes()
    assert front == front_matter(committed) | added
    assert sent["README.md"].split(b"\n---\n", 1)[1] == committed.split(b"\n---\n", 1)[1]


def test_the_committed_front_matter_makes_the_space_findable_and_has_no_dead_link():
    front = front_matter((SPACE / "README.md").read_bytes())
    assert 10 < len(front["short_description"]) <= 60
    assert front["datasets"] == ["uoft-cs/cifar10"] and "image-classification" in front["tags"]
    assert not {"models", "thumbnail"} & set(front)  # they come with the address


# ---- the weights ----


@pytest.fixture(scope="module")
def pushed_model() -> Recorder:
    """The push of the committed weights to a repository that is not there yet."""
    api = Recorder(NOT_THERE)
    assert push_model(SPACE, "me/my-model", api, lambda _: "yes") == (
        "https://huggingface.co/me/my-model"
    )
    return api


@pytest.fixture(scope="module")
def card(pushed_model) -> ModelCard:
    return ModelCard(pushed_model.sent["me/my-model"]["README.md"].decode())


def measured_row() -> dict:
    rows = json.loads((PROJECT / "benchmarks/results/accuracy.json").read_text())
    wanted = ("resnet18-20", 45_000, None)
    (row,) = [r for r in rows if (r["recipe"], r["train_images"], r["without"]) == wanted]
    return row


def test_the_weights_are_sent_with_their_sources_and_a_card_to_a_model_repository(pushed_model):
    (create, repo, how), (upload, _, options) = pushed_model.calls
    assert (create, upload, repo) == ("create", "upload", "me/my-model")
    assert how == {"repo_type": "model", "exist_ok": True} and options["repo_type"] == "model"
    sent = pushed_model.sent["me/my-model"]
    assert set(sent) == BUNDLE_FILES | SOURCES | {"README.md"}
    for name in set(sent) - {"README.md"}:
        assert sent[name] == (SPACE / name).read_bytes(), name


def test_the_numbers_of_the_card_are_those_of_the_committed_results(card):
    results, row = read_results(PROJECT), measured_row()
    assert row["n"] == 1 and row["seeds"] == [results["seed"]]
    expected = {
        "Accuracy": results["test_acc"],
        "Accuracy with TTA": results["test_acc_tta"],
        "ECE": row["ece"],
    }
    found = card.data.eval_results
    assert {one.metric_name: one.metric_value for one in found} == expected
    assert {(one.dataset_type, one.dataset_split) for one in found} == {("uoft-cs/cifar10", "test")}
    rows = dict(re.findall(r"^\| (\w.*) \| ([\d.]+ %) \|$", card.text, re.M))
    assert rows == {name: f"{100 * value:.2f} %" for name, value in expected.items()}
    for said in ("n = 1", f"{results['parameters']:,}", f"{results['train_images']:,}"):
        assert said in card.text


def committed_meta(**changes) -> dict:
    meta = load_bundle(SPACE)[1]
    return meta | changes | {"training": meta["training"] | changes.get("training", {})}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["Accuracy", "Accuracy with TTA", "ECE"]),
        ({"test_acc_tta": None}, ["Accuracy", "ECE"]),
        ({"test_acc": 0.9441}, ["Accuracy", "Accuracy with TTA"]),
        ({"training": {"seed": 43}}, ["Accuracy", "Accuracy with TTA"]),
        ({"training": {"train_images": 50_000}}, ["Accuracy", "Accuracy with TTA"]),
        ({"training": {"recipe": "custom-10"}}, ["Accuracy", "Accuracy with TTA"]),
    ],
    ids=["all", "no TTA", "other accuracy", "other seed", "other images", "other recipe"],
)
def test_a_card_lists_only_what_was_measured_with_these_weights(changes, names):
    assert [one.metric_name for one in eval_results(committed_meta(**changes))] == names


@pytest.mark.parametrize("name", ["cat", "ship"])
def test_the_lines_of_the_card_classify_an_image_with_what_was_sent(
    pushed_model, card, tmp_path, name
):
    """In a process that knows the project no more than a reader's does."""
    for path, content in pushed_model.sent["me/my-model"].items():
        (tmp_path / "downloaded" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / path).write_bytes(content)
    shutil.copyfile(SPACE / f"examples/{name}.png", tmp_path / "cat.png")
    (lines,) = re.findall(r"^```python\n(.*?)^```$", card.text, re.M | re.S)
    download = (
        "import huggingface_hub\n"
        "huggingface_hub.snapshot_download = {'me/my-model': 'downloaded'}.__getitem__\n"
    )
    command = [sys.executable, "-c", download + lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, name), done.stderr
    statements = [n for n in lines.splitlines() if n and not n.startswith(("import ", "from "))]
    assert len(statements) == 5


def test_a_dry_run_shows_the_card_and_sends_nothing(capsys):
    (earlier,) = {"resnet.py", "fastnet.py"} - {load_bundle(SPACE)[1]["source"]}
    owners = [earlier, "examples/1.png", "models/deep/x.py"]
    api = Recorder([f"models/{earlier}", *owners])
    options = {"ask": lambda _: pytest.fail("it asked"), "dry_run": True}
    assert push_model(SPACE, "me/my-model", api, **options) is None
    told = capsys.readouterr().out
    assert "model-index:" in told and "model.safetensors\n" in told and api.calls == []
    assert re.findall(r"deletes +(.*)", told) == [f"models/{earlier}"]


def test_weights_that_were_changed_or_do_not_know_cifar10_are_not_sent(space, tmp_path):
    api, copy = Recorder(), shutil.copytree(SPACE, tmp_path / "space")
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="sha256"):
        push_model(copy, "me/my-model", api, lambda _: "y")
    with pytest.raises(ValueError, match="trained on CIFAR-10 .* got 'built-in sample"):
        push_model(space, "me/my-model", api, lambda _: "y")
    assert push_model(SPACE, "me/my-model", api, lambda _: "no") is None and api.calls == []


# ---- the command ----


@pytest.fixture
def command(monkeypatch):
    """Run the command with these arguments and answers, and return what was sent to where."""

    def run(*arguments, answers=()):
        api, left = Recorder(), list(answers)
        monkeypatch.setattr(sys, "argv", ["push", *arguments])
        monkeypatch.setattr(push, "HfApi", lambda: api)
        monkeypatch.setattr(push, "input", lambda _: left.pop(0), raising=False)
        push.main()
        assert left == []
        return api.sent

    return run


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError("401: log in", response=NOT_THERE.response),
        HfHubHTTPError.__base__("no connection"),  # of the library that it sends with
    ],
)
def test_what_hugging_face_refuses_is_told_without_a_traceback(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    monkeypatch.setattr(sys, "argv", ["push", "me/my-space"])
    monkeypatch.delitem(sys.modules, "tools.push")
    with pytest.raises(SystemExit, match=f"^{type(error).__name__}: {error}$"):
        runpy.run_module("tools.push", run_name="__main__")


def test_one_command_sends_the_weights_then_the_space_that_links_to_them(command):
    sent = command("me/my-space", "--model", "me/my-model", answers=["y", "y"])
    assert list(sent) == ["me/my-model", "me/my-space"]
    assert front_matter(sent["me/my-space"]["README.md"])["models"] == ["me/my-model"]
    assert list(command("--model", "me/my-model", "--yes")) == ["me/my-model"]


def test_a_space_does_not_link_to_weights_that_were_not_sent(command):
    sent = command("me/my-space", "--model", "me/my-model", answers=["n", "y"])
    assert list(sent) == ["me/my-space"]
    assert "models" not in front_matter(sent["me/my-space"]["README.md"])


def test_a_command_without_an_address_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command()
    assert "expected SPACE=user/name, MODEL=user/name or both" in capsys.readouterr().err
