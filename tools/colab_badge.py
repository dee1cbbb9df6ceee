"""Make the Colab badge and REPO_URL name this copy of the project: `python -m tools.colab_badge`.

Both are taken from the git remote `origin`, so the badge of a fork opens the fork. Where there is
no remote on GitHub there is no badge, and a line of the README says what to do.
"""

import re
import shutil
import subprocess
from pathlib import Path

import nbformat

from tools.project import NOTEBOOK, NOTEBOOKS, PROJECT

MARK = "<!-- colab -->\n"  # the line that follows is replaced
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{}/blob/main/{})"
)
NO_BADGE = (
    "For a badge here that opens your copy on Colab, run `.venv/bin/python -m tools.colab_badge`."
)


def github_repository(project: Path = PROJECT) -> str | None:
    """Return 'owner/name' of the git remote `origin`, or None if it is not on GitHub."""
    if not shutil.which("git"):
        return None
    command = ["git", "remote", "get-url", "origin"]
    url = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout.strip()
    # https://github.com/owner/name.git, git@github.com:owner/name.git, ssh://git@github.com/...
    match = re.search(r"(?:^|[/@])github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", url)
    return match[1] if match else None


def set_badge(project: Path = PROJECT) -> str | None:
    """Write the badge into README.md and the lesson, and the address into all notebooks.

    The address stands in their first code cell, which fetches the project on Colab.

    Args:
        project: its folder, a git checkout.

    Returns:
        'owner/name' of the repository on GitHub, or None if there is none.

    Raises:
        ValueError: if one of the files has no place for it.
    """
    repository = github_repository(project)
    badge = address = ""
    if repository:
        badge, address = BADGE.format(repository, NOTEBOOK), f"https://github.com/{repository}"
    readme = project / "README.md"
    page = readme.read_text(encoding="utf-8")
    page = replace_one(MARK + ".*", MARK + (badge or NO_BADGE), page)
    notebooks = {name: nbformat.read(project / name, as_version=4) for name in NOTEBOOKS}
    first = notebooks[NOTEBOOK].cells[0]
    first.source = replace_one(MARK + ".*", MARK + badge, first.source)
    for notebook in notebooks.values():
        setup = notebook.cells[1]
        setup.source = replace_one(r'^REPO_URL = ".*?"', f'REPO_URL = "{address}"', setup.source)
    readme.write_text(page, encoding="utf-8")
    for name, notebook in notebooks.items():
        nbformat.write(notebook, project / name)
    return repository


def replace_one(pattern: str, text: str, source: str) -> str:
    """Replace the only match of a pattern; raise ValueError if there is not exactly one."""
    replaced, count = re.subn(pattern, lambda _: text, source, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"expected one place for {text!r}, got {count}")
    return replaced


def main() -> None:
    """Set the badge and print what it opens."""
    repository = set_badge()
    told = (
        f"opens https://github.com/{repository}" if repository else "is left out: no GitHub remote"
    )
    print(f"The Colab badge {told}.")


if __name__ == "__main__":
    main()
