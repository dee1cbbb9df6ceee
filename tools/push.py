"""Push the Space to Hugging Face: `make push SPACE=user/name`, DRY_RUN=1 only says what changes."""

import argparse
import glob
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, SpaceHardware
from huggingface_hub.errors import RepositoryNotFoundError

from models.bundle import load_bundle
from models.errors import InvalidValue
from tools.project import SPACE
from training.console import forgive_output
from utils import space_files

ADDRESS = "https://huggingface.co/spaces/"
# Files that this version, or an earlier one with flat sources, may have sent.
SENT_BEFORE = re.compile(r"models/[^/]+\.py|examples/[^/]+|(bundle|explain|resnet|fastnet)\.py")


def files_to_delete(api: HfApi, repo_id: str, sent: list[str]) -> list[str]:
    """List the files of an earlier push that a Space no longer needs.

    Such a file is the source of another network. Files that no version of this project sends are
    their owner's and stay.

    Args:
        api: the client of Hugging Face.
        repo_id: 'user/name' of the Space.
        sent: the files that are sent this time.
    """
    try:
        present = api.list_repo_files(repo_id, repo_type="space")
    except RepositoryNotFoundError:
        print(f"{repo_id} is not there yet, or cannot be seen with this login.")
        return []
    return sorted(name for name in set(present) - set(sent) if SENT_BEFORE.fullmatch(name))


def print_files(space: Path, repo_id: str, sent: list[str]) -> None:
    """Print each file that is sent, with its size."""
    sizes = [(space / name).stat().st_size for name in sent]
    for size, name in zip(sizes, sent, strict=True):
        print(f"{size:12,d}  {name}")
    print(f"{sum(sizes):12,d}  bytes in {len(sent)} files, to {ADDRESS}{repo_id}")


def send(api: HfApi, repo_id: str, space: Path, sent: list[str], deleted: list[str]) -> None:
    """Create the Space if it is missing, then send and delete files in one commit."""
    api.create_repo(
        repo_id,
        repo_type="space",
        space_sdk="gradio",
        # Free accounts can create a Gradio Space on this hardware only; the app uses its CPU.
        space_hardware=SpaceHardware.ZERO_A10G,
        exist_ok=True,
    )
    api.upload_folder(
        repo_id=repo_id,
        repo_type="space",
        folder_path=space,
        commit_message="Export from the notebook",
        allow_patterns=[glob.escape(name) for name in sent],  # names, not patterns
        delete_patterns=[glob.escape(name) for name in deleted],
    )


def push_space(
    space: str | Path,
    repo_id: str,
    api: HfApi | None = None,
    ask: Callable[[str], str] = input,
    dry_run: bool = False,
) -> str | None:
    """Make a Space on Hugging Face equal to a folder: show the changes, ask, send and delete.

    Args:
        space: the folder.
        repo_id: 'user/name'. The Space is created if it is not there.
        api: the client, with the login of `hf auth login` by default.
        ask: gets the question and returns the answer; only 'y' or 'yes' sends.
        dry_run: only show. This needs no login; without a network it cannot say what would be
            deleted.

    Returns:
        The address of the Space, or None if nothing was sent.

    Raises:
        ValueError: for a repo_id of another form, and for a bundle with a wrong checksum.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise InvalidValue(f"expected the Space as user/name, got {repo_id!r}")
    space, api = Path(space), api or HfApi()
    _, meta = load_bundle(space)
    sent, deleted = space_files(space, meta), []
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
    deletion = f", and delete {len(deleted)} there" if deleted else ""
    if ask(f"Send them{deletion}? [y/N] ").strip().lower() not in ("y", "yes"):
        print("Nothing was sent.")
        return None
    send(api, repo_id, space, sent, deleted)
    print(f"Sent. It is built now, which takes some minutes: {ADDRESS}{repo_id}")
    return ADDRESS + repo_id


def main() -> None:
    """Parse the command line and push."""
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", metavar="user/name")
    parser.add_argument("--space", default=SPACE, type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    push_space(args.space, args.repo_id, dry_run=args.dry_run)


if __name__ == "__main__":
    main()
