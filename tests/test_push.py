"""What is pushed is what belongs to the Space, after a yes, and nothing without."""

import pytest

from push import BUNDLE_FILES, files_to_send, push_space
from utils import APP_FILES


class Recorder:
    """Stands in for huggingface_hub's HfApi and keeps what it was told."""

    def __init__(self):
        self.calls = []

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


def test_a_dry_run_shows_every_file_with_its_size_and_needs_no_login(space, capsys):
    assert push_space(space, "me/my-space", None, lambda _: pytest.fail("it asked"), dry_run=True) is None
    told = capsys.readouterr().out
    for name in ("app.py", "model.safetensors", "resnet.py", "model.json"):
        assert f"{(space / name).stat().st_size:12,d}  {name}" in told
    total = sum(path.stat().st_size for path in files_to_send(space, "resnet.py"))
    assert f"{total:,d}" in told and "huggingface.co/spaces/me/my-space" in told


def test_a_yes_creates_the_space_and_sends_the_allowed_files_only(space, tmp_path, capsys):
    secret = space / ".env"
    secret.write_text("TOKEN=1")
    (space / "notes.txt").write_text("private")
    try:
        api = Recorder()
        address = push_space(space, "me/my-space", api, lambda question: "y" if "Send" in question else "n")
    finally:
        secret.unlink()
        (space / "notes.txt").unlink()
    assert address == "https://huggingface.co/spaces/me/my-space" and address in capsys.readouterr().out
    (create, repo, how), (upload, _, options) = api.calls
    assert (create, upload, repo) == ("create", "upload", "me/my-space")
    assert how == {"repo_type": "space", "space_sdk": "gradio", "space_hardware": "zero-a10g", "exist_ok": True}
    assert options["folder_path"] == space and options["repo_type"] == "space"
    sent = set(options["allow_patterns"])
    assert {"app.py", "README.md", "requirements.txt", ".gitattributes", "resnet.py"} | BUNDLE_FILES <= sent
    assert {name for name in sent if "/" not in name} <= APP_FILES | BUNDLE_FILES | {"resnet.py"}
    assert {name.split("/")[0] for name in sent if "/" in name} == {"examples"}


@pytest.mark.parametrize("name", ["my-space", "me/my/space", "https://huggingface.co/spaces/me/x", "", "me/ x"])
def test_a_name_that_is_no_space_is_refused(space, name):
    with pytest.raises(ValueError, match="user/name"):
        push_space(space, name, Recorder())


def test_a_space_whose_weights_were_changed_is_not_sent(space, tmp_path):
    import shutil

    copy = tmp_path / "space"
    shutil.copytree(space, copy)
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    api = Recorder()
    with pytest.raises(ValueError, match="sha256"):
        push_space(copy, "me/my-space", api, lambda _: "y")
    assert api.calls == []
