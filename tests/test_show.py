"""What cells show: code as its module has it, figures with a text for those who cannot see them."""

import base64

import pytest

from evaluation.drawing import new_chart
from lesson import show
from models import resnet
from training.classifier import LitClassifier


@pytest.fixture
def shown(monkeypatch) -> list:
    """The data and metadata of what is displayed."""
    found = []
    monkeypatch.setattr(
        show, "display", lambda data, metadata=None, raw=False: found.append((data, metadata))
    )
    return found


def test_code_is_printed_from_its_module_without_docstrings(shown):
    show.source(resnet.BasicBlock, LitClassifier.training_step)
    block, step = (data["text/plain"] for data, _ in shown)
    assert block.startswith("class BasicBlock(nn.Module):\n")
    assert "self.shortcut(x))" in block and "Args:" not in block and '"""' not in block
    assert step.startswith("def training_step(self, batch") and "F.cross_entropy" in step
    assert "[`models/resnet.py`](models/resnet.py), line " in shown[0][0]["text/markdown"]
    compile(block, "block", "exec")


def test_a_docstring_alone_goes_and_other_strings_stay():
    def documented():
        """Goes."""
        return "stays"

    assert show.code_of(documented).splitlines() == ["def documented():", '    return "stays"']


def test_a_figure_is_saved_and_shown_with_its_label_as_alternative_text(shown, tmp_path):
    fig, axis = new_chart(10.5, 3)
    fig.set_label("A line that rises from 0 to 1.")
    show.figure(fig, tmp_path / "images/line.png")
    ((data, metadata),) = shown
    assert base64.b64decode(data["image/png"]) == (tmp_path / "images/line.png").read_bytes()
    assert metadata["image/png"] == {"alt": "A line that rises from 0 to 1.", "width": 840}
    assert data["text/plain"] == "A line that rises from 0 to 1."
    fig.set_label("")
    fig.suptitle("A title")
    show.figure(fig)
    assert shown[1][1]["image/png"]["alt"] == "A title"


def test_text_is_markdown(monkeypatch):
    found = []
    monkeypatch.setattr(show, "display", found.append)
    show.text("**bold**")
    assert found[0].data == "**bold**"
