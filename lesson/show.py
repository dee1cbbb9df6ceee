"""What the notebooks' cells show: text with computed numbers, figures, code from its module."""

import ast
import base64
import html
import inspect
import textwrap
from pathlib import Path

from IPython.display import Markdown, display
from matplotlib.figure import Figure

from evaluation.drawing import alt_text, save_figure
from training.files import PROJECT, scratch_folder

PIXELS_PER_INCH = 80  # on a page; a file has more, for screens with small pixels


def text(markdown: str) -> None:
    """Show a text that the cell has computed.

    Args:
        markdown: of one or more paragraphs.
    """
    display(Markdown(markdown))


def figure(fig: Figure, path: Path | None = None) -> None:
    """Save a figure and show the file, with the text that describes it to those who cannot see it.

    Args:
        fig: the figure; its label is the alternative text, its title if there is no label.
        path: of the PNG file; None: a temporary one.
    """
    path = path or scratch_folder() / "shown.png"
    save_figure(fig, path)
    alt = alt_text(fig) or fig.get_suptitle() or "A figure"
    picture(path, alt, round(PIXELS_PER_INCH * fig.get_figwidth()))


def picture(path: str | Path, alt: str, width: int = 840) -> None:
    """Show a picture file.

    Args:
        path: of a PNG or GIF file. A GIF becomes HTML: pages that are made from notebooks do not
            show an output of type image/gif.
        alt: what it shows, for those who cannot see it.
        width: on the page, pixels.
    """
    content = base64.b64encode(Path(path).read_bytes()).decode()
    if Path(path).suffix == ".gif":
        described = f'alt="{html.escape(alt)}" width="{width}"'
        image = f'<img src="data:image/gif;base64,{content}" {described}>'
        display({"text/html": image, "text/plain": alt}, raw=True)
    else:
        metadata = {"image/png": {"alt": alt, "width": width}}
        display({"image/png": content, "text/plain": alt}, metadata=metadata, raw=True)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines, from 1, that hold docstrings."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds)]
    documented = [
        first
        for first in firsts
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    ]
    return {n for first in documented for n in range(first.lineno, (first.end_lineno or 0) + 1)}


def code_of(part: object) -> str:
    """Return the code of a class or a function as its module has it, without docstrings."""
    code = textwrap.dedent(inspect.getsource(part))  # pyright: ignore[reportArgumentType]
    dropped = docstring_lines(ast.parse(code))
    lines = [line for n, line in enumerate(code.splitlines(), 1) if n not in dropped]
    return "\n".join(lines).strip("\n")


def source(*parts: object) -> None:
    """Show the code of classes and functions, each below the place where it is written.

    Args:
        parts: classes, functions or methods of the project. Their docstrings are left out.
    """
    for part in parts:
        path = Path(inspect.getfile(part)).resolve()  # pyright: ignore[reportArgumentType]
        line = inspect.getsourcelines(part)[1]  # pyright: ignore[reportArgumentType]
        name, code = path.relative_to(PROJECT).as_posix(), code_of(part)
        markdown = f"[`{name}`]({name}), line {line}\n\n```python\n{code}\n```"
        display({"text/markdown": markdown, "text/plain": code}, raw=True)
