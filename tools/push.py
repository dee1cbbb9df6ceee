"""Push to Hugging Face: the Space, `make push SPACE=user/name`, and its weights, MODEL=user/name.

DRY_RUN=1 only shows what would be sent.
"""

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceHardware
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from models.bundle import bundle_files, load_bundle
from models.errors import EXPLAINED, InvalidValue
from tools.model_card import model_card
from tools.project import SPACE
from training.console import forgive_output
from utils import space_files

THUMBNAIL = "misclassified.png"  # twice as wide as high, as previews of links are


@dataclass(frozen=True)
class Kind:
    """A kind of repository that is pushed to.

    Attributes:
        name: what Hugging Face calls it.
        address: what stands before user/name.
        sent_before: a pattern of the files that are deleted unless they are sent.
        sent: the message after a push, before the address.
        options: further arguments of HfApi.create_repo.
    """

    name: str
    address: str
    sent_before: str
    sent: str
    options: dict = field(default_factory=dict)


SPACE_KIND = Kind(
    "space",
    "https://huggingface.co/spaces/",
    r"(models/)?(resnet|fastnet)\.py|(bundle|explain)\.py",  # once flat sources
    "Sent. It is built now, which takes some minutes",
    # Free accounts can create a Gradio Space on this hardware only; the app uses its CPU.
    {"space_sdk": "gradio", "space_hardware": SpaceHardware.ZERO_A10G},
)
MODEL_KIND = Kind("model", "https://huggingface.co/", r"models/(resnet|fastnet)\.py", "Sent")

# ---- any repository ------------------------------------------------------------------------------


def check_repo_id(repo_id: str, kind: Kind) -> None:
    """Raise ValueError for a name of another form than user/name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise InvalidValue(f"expected the {kind.name} as user/name, got {repo_id!r}")


def files_to_delete(api: HfApi, kind: Kind, repo_id: str, sent: list[str]) -> list[str]:
    """List the files of an earlier push that a repository no longer needs.

    Such a file is the source of another network of this project. All others are their owner's and
    stay.

    Args:
        api: the client of Hugging Face.
        kind: of the repository.
        repo_id: its 'user/name'.
        sent: the files that are sent this time.
    """
    try:
        present = api.list_repo_files(repo_id, repo_type=kind.name)
    except RepositoryNotFoundError:
        print(f"{repo_id} is not there yet, or cannot be seen with this login.")
        return []
    return sorted(n for n in set(present) - set(sent) if re.fullmatch(kind.sent_before, n))


def print_files(folder: Path, address: str, sent: list[str]) -> None:
    """Print each file that is sent, with its size."""
    sizes = [(folder / name).stat().st_size for name in sent]
    for size, name in zip(sizes, sent, strict=True):
        print(f"{size:12,d}  {name}")
    print(f"{sum(sizes):12,d}  bytes in {len(sent)} files, to {address}")


@contextlib.contextmanager
def copy_with_readme(folder: Path, names: list[str], readme: str) -> Iterator[Path]:
    """Yield a temporary copy of some files of a folder, with another README.md."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)
        (copy / "README.md").write_text(readme, encoding="utf-8", newline="")
        yield copy


def send(api: HfApi, kind: Kind, repo_id: str, folder: Path, deleted: list[str]) -> None:
    """Create the repository if it is missing, then send and delete files in one commit."""
    api.create_repo(repo_id, repo_type=kind.name, exist_ok=True, **kind.options)
    api.upload_folder(
        repo_id=repo_id,
        repo_type=kind.name,
        folder_path=folder,
        commit_message="Export from the notebook",
        delete_patterns=deleted,
    )


def push_folder(
    kind: Kind, repo_id: str, folder: Path, api: HfApi, ask: Callable[[str], str], dry_run: bool
) -> str | None:
    """Send a folder to a repository, delete what an earlier push left there: show, ask, do.

    Args:
        kind: of the repository.
        repo_id: its 'user/name'. It is created if it is not there.
        folder: all its files are sent.
        api: the client of Hugging Face.
        ask: gets the question and returns the answer; only 'y' or 'yes' sends.
        dry_run: only show. This needs no login; without a network it cannot say what would be
            deleted.

    Returns:
        The address of the repository, or None if nothing was sent.
    """
    sent = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    deleted, address = [], kind.address + repo_id
    print_files(folder, address, sent)
    try:
        deleted = files_to_delete(api, kind, repo_id, sent)
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
    send(api, kind, repo_id, folder, deleted)
    print(f"{kind.sent}: {address}")
    return address


# ---- the Space and its weights -------------------------------------------------------------------


def space_readme(space: Path, repo_id: str, model_id: str) -> str:
    """Complete the front matter of a Space's README with what depends on where it is pushed.

    Args:
        space: the folder.
        repo_id: 'user/name' of the Space, whose own picture becomes its thumbnail.
        model_id: 'user/name' of the repository that holds the weights, or ''.
    """
    card = SpaceCard((space / "README.md").read_bytes().decode())
    card.data["thumbnail"] = f"{SPACE_KIND.address}{repo_id}/resolve/main/{THUMBNAIL}"
    if model_id:
        card.data["models"] = [model_id]
    return str(card)


def push_space(
    space: str | Path,
    repo_id: str,
    api: HfApi | None = None,
    ask: Callable[[str], str] = input,
    dry_run: bool = False,
    model_id: str = "",
) -> str | None:
    """Send a Space to Hugging Face, delete what an earlier push left there: show, ask, do.

    Args:
        space: the folder; files that are none of the app's and the bundle's stay here.
        repo_id: 'user/name'. The Space is created if it is not there.
        api: the client, with the login of `hf auth login` by default.
        ask: gets the question and returns the answer; only 'y' or 'yes' sends.
        dry_run: only show. This needs no login; without a network it cannot say what would be
            deleted.
        model_id: 'user/name' of a repository with the weights, which the Space then links to.

    Returns:
        The address of the Space, or None if nothing was sent.

    Raises:
        ValueError: for a repo_id of another form, and for a bundle with a wrong checksum.
    """
    check_repo_id(repo_id, SPACE_KIND)
    space = Path(space)
    _, meta = load_bundle(space)
    readme = space_readme(space, repo_id, model_id)
    with copy_with_readme(space, space_files(space, meta), readme) as copy:
        return push_folder(SPACE_KIND, repo_id, copy, api or HfApi(), ask, dry_run)


def push_model(
    space: str | Path,
    repo_id: str,
    api: HfApi | None = None,
    ask: Callable[[str], str] = input,
    dry_run: bool = False,
) -> str | None:
    """Make a model repository on Hugging Face hold the bundle of a Space and a model card.

    All files of the bundle are sent: `load_bundle` wants each that model.json names.

    Arguments and return value are those of `push_space`; a dry run also shows the card.

    Raises:
        ValueError: for a repo_id of another form, for a bundle with a wrong checksum, and for a
            network that was not trained on CIFAR-10.
    """
    check_repo_id(repo_id, MODEL_KIND)
    space = Path(space)
    model, meta = load_bundle(space)
    card = str(model_card(model, meta, repo_id))
    if dry_run:
        print(card)
    with copy_with_readme(space, bundle_files(meta), card) as copy:
        return push_folder(MODEL_KIND, repo_id, copy, api or HfApi(), ask, dry_run)


def main() -> None:
    """Parse the command line and push, the weights first: the Space links to them."""
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", metavar="user/name", nargs="?", help="the Space")
    parser.add_argument("--model", metavar="user/name", help="the repository of the weights")
    parser.add_argument("--space", default=SPACE, type=Path, help="the folder")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--yes", action="store_true", help="send without asking")
    args = parser.parse_args()
    if not (args.repo_id or args.model):
        parser.error("expected SPACE=user/name, MODEL=user/name or both")
    options = {"ask": (lambda _: "yes") if args.yes else input, "dry_run": args.dry_run}
    is_there = args.model and (push_model(args.space, args.model, **options) or args.dry_run)
    if args.repo_id:
        model_id = args.model if is_there else ""
        push_space(args.space, args.repo_id, model_id=model_id, **options)


if __name__ == "__main__":
    try:
        main()
    # HfHubHTTPError: no login, no right. Its bases are those of a failed connection, too.
    except (*EXPLAINED, *HfHubHTTPError.__bases__) as error:  # pyright: ignore[reportGeneralTypeIssues]
        sys.exit(f"{type(error).__name__}: {error}")
