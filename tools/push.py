"""Push the Space to Hugging Face.

`make push SPACE=user/name`, or with DRY_RUN=1 only say what would change.
"""

import argparse
import glob
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from models.bundle import bundle_files, load_bundle
from models.errors import InvalidValue
from training.console import forgive_output
from utils import APP_FILES

SPACE = Path(__file__).resolve().parent.parent / "space"
ADDRESS = "https://huggingface.co/spaces/"
# What this version or an earlier one, whose sources lay flat in the folder, may have sent.
SENT_BEFORE = re.compile(r"models/[^/]+\.py|examples/[^/]+|(bundle|explain|resnet|fastnet)\.py")
EXAMPLES = (".png", ".md", ".txt")


def files_to_send(space: Path, meta: dict) -> list[str]:
    """List what belongs to the app and its bundle, relative to the folder; anything else stays at home.

    meta: what model.json says.
    """
    examples = [path for path in (space / "examples").glob("*") if path.suffix in EXAMPLES]
    files = [space / name for name in (*APP_FILES, *bundle_files(meta))] + examples
    return sorted(path.relative_to(space).as_posix() for path in files if path.is_file())


def files_to_delete(api: HfApi, repo_id: str, sent: list[str]) -> list[str]:
    """List what an earlier push has left in a Space, such as the source of another network.

    Files that no version of this project sends are kept: they are their owner's.
    """
    try:
        there = api.list_repo_files(repo_id, repo_type="space")
    except RepositoryNotFoundError:
        print(f"{repo_id} is not there yet, or cannot be seen with this login.")
        return []
    return sorted(name for name in set(there) - set(sent) if SENT_BEFORE.fullmatch(name))


def print_files(space: Path, repo_id: str, sent: list[str]) -> None:
    """Print each file that is sent, with its size."""
    sizes = [(space / name).stat().st_size for name in sent]
    for size, name in zip(sizes, sent, strict=True):
        print(f"{size:12,d}  {name}")
    print(f"{sum(sizes):12,d}  bytes in {len(sent)} files, to {ADDRESS}{repo_id}")


def push_space(
    space: str | Path,
    repo_id: str,
    api: HfApi | None = None,
    ask: Callable[[str], str] = input,
    dry_run: bool = False,
) -> str | None:
    """Make a Space on Hugging Face equal to a folder: show what changes there, ask, send and delete.

    Args:
        space: the folder.
        repo_id: 'user/name'. The Space is created if it is not there.
        api: with the login of `hf auth login`, or what behaves like it.
        ask: gets the question, returns the answer; nothing but 'y' or 'yes' sends.
        dry_run: only show. This needs no login, and without a network it cannot say what would be deleted.

    Returns:
        The address of the Space, or None if nothing was sent.

    Raises:
        ValueError: for another form of repo_id, and for a bundle with a wrong checksum.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise InvalidValue(f"expected the Space as user/name, got {repo_id!r}")
    space, api = Path(space), api or HfApi()
    _, meta = load_bundle(space)
    sent, deleted = files_to_send(space, meta), []
    print_files(space, repo_id, sent)
    try:
        deleted = files_to_delete(api, repo_id, sent)
    except Exception as error:  # no network, no answer, a login that has expired
        if not dry_run:
            raise
        print(f"What would be deleted there is not known: {error}")
    for name in deleted:
        print(f"     deletes  {name}")
    if dry_run:
        return None
    question = (
        f"Send them, and delete {len(deleted)} there? [y/N] " if deleted else "Send them? [y/N] "
    )
    if ask(question).strip().lower() not in ("y", "yes"):
        print("Nothing was sent.")
        return None
    # Free accounts can create a Gradio Space on this hardware only; the app uses the CPU beside it.
    api.create_repo(
        repo_id, repo_type="space", space_sdk="gradio", space_hardware="zero-a10g", exist_ok=True
    )
    api.upload_folder(  # one commit; both lists are patterns, so what is special in a pattern is escaped
        repo_id=repo_id,
        repo_type="space",
        folder_path=space,
        commit_message="Export from the notebook",
        allow_patterns=[glob.escape(name) for name in sent],
        delete_patterns=[glob.escape(name) for name in deleted],
    )
    print(f"Sent. It is built now, which takes some minutes: {ADDRESS}{repo_id}")
    return ADDRESS + repo_id


def main() -> None:
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", metavar="user/name")
    parser.add_argument("--space", default=SPACE, type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    push_space(args.space, args.repo_id, dry_run=args.dry_run)


if __name__ == "__main__":
    main()
