"""Each control of an explorer changes its figure; few of them run the network."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dataload import CLASSES, denormalize, normalize
from lesson import explorers, label_hunt
from models.registry import build
from tests.conftest import wrong_predictions


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("FastNet").eval()


@pytest.fixture(scope="module")
def logits(model, tiny_splits) -> torch.Tensor:
    """The network's, with every second image made correct."""
    with torch.no_grad():
        logits = model(normalize(tiny_splits.test.images))
    logits[::2] += 9 * torch.nn.functional.one_hot(
        torch.from_numpy(tiny_splits.test.labels[::2]), 10
    )
    return logits


@pytest.fixture
def explorer(model, tiny_splits, logits) -> explorers.ErrorExplorer:
    explorer = explorers.ErrorExplorer(model, tiny_splits.test, logits, CLASSES)
    explorer.controls["heatmaps"].value = True
    return explorer


@pytest.fixture(scope="module")
def shared(model, tiny_splits, logits) -> explorers.ErrorExplorer:
    """An explorer of two images, whose controls each test leaves as they were."""
    explorer = explorers.ErrorExplorer(model, tiny_splits.test, logits, CLASSES)
    explorer.controls["count"].value = 2
    explorer.controls["order"].value = "most confident first"
    explorer.controls["heatmaps"].value = True
    return explorer


def titles(explorer: explorers.Explorer) -> list[str]:
    """What stands above the first row of the figure."""
    fig = explorer.draw(**{name: control.value for name, control in explorer.controls.items()})
    return [axis.get_title() for axis in fig.axes if "predicted" in axis.get_title()]


def png(explorer: explorers.Explorer) -> bytes:
    """The picture that the explorer shows."""
    content = bytes(explorer.picture.value)
    assert content.startswith(b"\x89PNG")
    return content


def picture_file(colour: str = "red", size: tuple[int, int] = (80, 50)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


# ---- augmentation ----


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("shift", 0),
        ("mirror", False),
        ("cutout", 0),
        ("rotate", 40),
        ("brightness", 0.5),
        ("draws", 5),
        ("seed", 3),
    ],
)
def test_each_control_of_the_augmentation_changes_the_figure(tiny_splits, control, value):
    explorer = explorers.explore_augmentation(
        tiny_splits.train.images[:4], tiny_splits.train.labels[:4]
    )

    def drawn() -> list[np.ndarray]:
        fig = explorer.draw(**{name: one.value for name, one in explorer.controls.items()})
        return [axis.images[0].get_array() for axis in fig.axes if axis.images]

    before, shown = drawn(), png(explorer)
    explorer.controls[control].value = value
    assert len(before) != len(drawn()) or not np.array_equal(before, drawn())
    assert png(explorer) != shown


def test_transforms_of_strength_0_are_left_out():
    assert explorers.build_transforms(0, False, 0, 0, 0.0) == []
    names = [type(t).__name__ for t in explorers.build_transforms(0, True, 0, 20, 0.0)]
    assert names == ["HorizontalFlip", "Rotate"]


def test_cutout_covers_as_much_as_the_control_says():
    (transform,) = explorers.build_transforms(0, False, 10, 0, 0.0)
    white = np.full((32, 32, 3), 255, np.uint8)
    covered = {int((transform(image=white)["image"] != 255).all(-1).sum()) for _ in range(40)}
    assert covered == {0, 100}


# ---- errors ----


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("source", "test images"),
        ("order", "least confident first"),
        ("first", 4),
        ("count", 3),
        ("heatmaps", False),
        ("stage", "group1"),
        ("method", "LayerCAM"),
        ("opacity", 1.0),
    ],
)
def test_each_control_of_the_errors_changes_the_figure(shared, control, value):
    widget, before = shared.controls[control], png(shared)
    kept, widget.value = widget.value, value
    after = png(shared)
    widget.value = kept
    assert after != before == png(shared)


def test_filters_show_only_what_fits(explorer, logits, tiny_splits):
    preds = logits.argmax(1).numpy()
    label, pred = next(
        (t, p) for t, p in zip(tiny_splits.test.labels, preds, strict=True) if t != p
    )
    explorer.controls["true"].value, explorer.controls["predicted"].value = (
        CLASSES[label],
        CLASSES[pred],
    )
    explorer.controls["count"].value = 20
    expected = int(((tiny_splits.test.labels == label) & (preds == pred)).sum())
    found = titles(explorer)
    assert len(found) == expected
    assert all(
        title.startswith(f"true: {CLASSES[label]}\npredicted: {CLASSES[pred]}") for title in found
    )


@pytest.mark.numeric
def test_the_filter_by_predicted_class_is_one(explorer, logits):
    preds = logits.argmax(1).numpy()
    for label in range(10):
        found = explorer.select("test images", "any class", CLASSES[label], explorers.ORDERS[0])
        assert found == np.flatnonzero(preds == label).tolist()


@pytest.mark.numeric
def test_errors_are_errors_and_sorted_as_asked(explorer, logits, tiny_splits):
    preds, probs = logits.argmax(1).numpy(), logits.softmax(1).amax(1).numpy()
    wrong = np.flatnonzero(preds != tiny_splits.test.labels)
    assert (
        explorer.select("errors", "any class", "any class", explorers.ORDERS[0]) == wrong.tolist()
    )
    most_confident = explorer.select("errors", "any class", "any class", "most confident first")
    assert (np.diff(probs[most_confident]) <= 0).all() and sorted(most_confident) == wrong.tolist()
    least = explorer.select("test images", "any class", "any class", "least confident first")
    assert (np.diff(probs[least]) >= 0).all() and len(least) == 40


def test_the_heatmaps_are_for_the_predicted_and_the_true_class(explorer, logits, tiny_splits):
    fig = explorer.draw(**{name: control.value for name, control in explorer.controls.items()})
    first = int(explorer.select("errors", "any class", "any class", explorers.ORDERS[0])[0])
    shown = [axis.get_title() for axis in fig.axes[::5]]  # five columns: the first of each row
    assert shown[1:] == [
        f"for {CLASSES[logits[first].argmax()]}",
        f"for {CLASSES[tiny_splits.test.labels[first]]}",
    ]


def test_moving_the_opacity_does_not_run_the_network(explorer, model, monkeypatch):
    before = png(explorer)
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("the network ran"))
    explorer.controls["opacity"].value = 0.9
    assert png(explorer) != before


@pytest.mark.numeric
@pytest.mark.parametrize("version", [7, 8])
def test_an_uploaded_picture_is_shown_with_its_classes(explorer, version):
    content = picture_file()
    file = {"name": "my.png", "type": "image/png", "content": content}
    value = {"my.png": file} if version == 7 else ({**file, "content": memoryview(content)},)
    assert explorers.read_upload(value).shape == (32, 32, 3)
    assert (explorers.read_upload(value) == (255, 0, 0)).all()
    shown = explorer.classify_upload(value)
    assert shown.label is None and float(shown.probs.sum()) == pytest.approx(1)


def test_what_is_transparent_in_an_uploaded_picture_is_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, "PNG")
    assert (explorers.read_upload([{"content": buffer.getvalue()}]) == 255).all()


def test_16_bits_of_grey_in_an_uploaded_picture_become_8():
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 100 * 256 + 7, np.uint16)).save(buffer, "PNG")
    assert (explorers.read_upload([{"content": buffer.getvalue()}]) == 100).all()


def test_no_picture_and_a_broken_one_give_a_message(explorer):
    explorer.controls["source"].value = "my picture"
    assert "Upload a picture" in explorer.message.value and not explorer.picture.value
    with pytest.raises(ValueError, match="not a picture"):
        explorers.read_upload([{"content": b"no picture"}])
    explorer.controls["source"].value = "errors"
    assert explorer.message.value == "" and png(explorer)


def test_nothing_that_fits_gives_a_message(explorer):
    explorer.controls["first"].value = 40
    assert "No image fits" in explorer.message.value


def test_a_network_without_an_error_can_be_explored_too(model, tiny_splits):
    correct = torch.nn.functional.one_hot(torch.from_numpy(tiny_splits.test.labels), 10).float()
    explorer = explorers.ErrorExplorer(model, tiny_splits.test, 9 * correct, CLASSES)
    assert "No image fits" in explorer.message.value
    explorer.controls["source"].value = "test images"
    assert png(explorer)


# ---- the label hunt ----


@pytest.fixture
def hunt(tiny_splits) -> label_hunt.LabelHunt:
    wrong = wrong_predictions(tiny_splits.test.images[:20], tiny_splits.test.labels[:20])
    return label_hunt.LabelHunt(wrong, CLASSES, denormalize)


def test_the_hunt_shows_the_twelve_most_confident_errors_one_at_a_time(hunt):
    probs = [sample.prob for sample in hunt.samples]
    assert len(probs) == 12 and probs == sorted(probs, reverse=True) and probs[0] > 0.87
    first = png(hunt)
    hunt.buttons[0].click()
    assert png(hunt) != first and "Image 2 of 12" in hunt.message.value


def test_each_button_counts_its_verdict_and_the_tally_comes_at_the_end(hunt):
    for index in [0, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0]:
        assert "verdicts" not in hunt.message.value
        hunt.buttons[index].click()
    verdicts = "network wrong 7, label wrong 2, both fair 3."
    assert f"12 of 12 images: {verdicts}" in hunt.message.value
    assert all(button.disabled for button in hunt.buttons)
    hunt.judge("label wrong")  # nothing is left to judge
    assert len(hunt.verdicts) == 12


def test_the_study_s_figures_are_named():
    told = label_hunt.study()
    assert all(found in told for found in ("275", "54", "20 %", "accept 17", "for 18"))
    assert "not a random sample" in told


def test_a_hunt_without_errors_says_so():
    hunt = label_hunt.LabelHunt([], CLASSES, denormalize)
    assert "nothing to judge" in hunt.message.value and hunt.still() == b""


# ---- stored notebooks ----


def test_a_stored_notebook_holds_a_picture_of_each(explorer, hunt, tiny_splits, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, metadata, raw: shown.append((data, metadata))
    )
    augmentation = explorers.explore_augmentation(
        tiny_splits.train.images[:2], tiny_splits.train.labels[:2]
    )
    for panel in (augmentation, explorer, hunt):
        panel._ipython_display_()
    for (data, metadata), panel in zip(shown, (augmentation, explorer, hunt), strict=True):
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"]["alt"] == data["text/plain"] == panel.alt
        view = data["application/vnd.jupyter.widget-view+json"]
        assert view["model_id"] == panel.panel.model_id and len(panel.alt) > 20
