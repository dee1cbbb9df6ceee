"""Push the Space to Hugging Face: `make push SPACE=user/name`, or with DRY_RUN=1 only say what would be sent."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from machine import forgive_output
from models.bundle import load_bundle
from utils import APP_FILES

SPACE = Path(__file__).resolve().parent / "space"
ADDRESS = "https://huggingface.co/spaces/"
# What belongs to the app and what the export writes; anything else that lies in the folder stays at home.
BUNDLE_FILES = {
    "model.json", "model.safetensors", "bundle.py", "explain.py", "confusion_matrix.png", "misclassified.json",
    "misclassified.png",
}  # fmt: skip
EXAMPLES = (".png", ".md", ".txt")


def files_to_send(space: Path, source: str) -> list[Path]:
    """The files of a Space that are sent. source: the network's file, as model.json names it."""
    allowed = APP_FILES | BUNDLE_FILES | {source}
    examples = [path for path in (space / "examples").glob("*") if path.suffix in EXAMPLES]
    return sorted([path for path in space.iterdir() if path.name in allowed and path.is_file()] + examples)


def push_space(
    space: str | Path, repo_id: str, api: object = None, ask: Callable[[str], str] = input, dry_run: bool = False
) -> str | None:
    """Show what will be sent, ask, create the Space if it is not there, send. Returns its address, or None.

    repo_id: 'user/name'. api: huggingface_hub's HfApi, with the login of `hf auth login`, or what behaves like it.
    ask: gets the question, returns the answer; nothing but 'y' or 'yes' sends. dry_run: only show.
    Raises ValueError for another form of repo_id, and for a bundle whose checksums are wrong.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"expected the Space as user/name, got {repo_id!r}")
    space = Path(space)
    _, meta = load_bundle(space)
    files = files_to_send(space, meta["source"])
    for path in files:
        print(f"{path.stat().st_size:12,d}  {path.relative_to(space)}")
    print(f"{sum(path.stat().st_size for path in files):12,d}  bytes in {len(files)} files, to {ADDRESS}{repo_id}")
    if dry_run:
        return None
    if ask("Send them? [y/N] ").strip().lower() not in ("y", "yes"):
        print("Nothing was sent.")
        return None
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    # Free accounts can create a Gradio Space on this hardware only; the app uses the CPU beside it.
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", space_hardware="zero-a10g", exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, repo_type="space", folder_path=space, commit_message="Export from the notebook",
        allow_patterns=[str(path.relative_to(space)) for path in files],
    )  # fmt: skip
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
