"""The Space stands alone, refuses in words, reads any picture and tells what the network saw."""

import asyncio
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio.state_holder import SessionState
from gradio_client import Client, handle_file
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from dataload import CLASSES, normalize
from models import explain as explain_source
from models.bundle import load_bundle
from tests.conftest import PROJECT
from tests.served import (
    PROCESSES,
    copy_space,
    export_other,
    files_of,
    is_sentence,
    serve,
    wait_until,
)
from utils import imports_from_folder, load_app

ANY, STAGE, METHOD = "any class", "layer4", "GradCAM"
NOT_A_PICTURE = "not a picture that can be read"
NO_MISTAKES = "No misclassified images are stored with this network."
NO_LONGER_THERE = "This picture is no longer there, please upload it again."
# A new connection for each request: a server may close one that waits, just when it is used again.
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


# ---- the app, imported and served from a folder of its own ---------------------------------------


@pytest.fixture(scope="module")
def folder(exported_space, tmp_path_factory) -> Path:
    return copy_space(exported_space, tmp_path_factory.mktemp("alone") / "space")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The app as a person starts it."""
    with serve(folder, tmp_path_factory.mktemp("uploads"), new=True) as address:
        yield address


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Client:
    return Client(server, verbose=False, download_files=tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def app(folder, tmp_path_factory):
    """Import the folder's module app into this process, with the project itself out of reach."""
    out_of_reach = (PROJECT, PROJECT / "tests")
    path = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() not in out_of_reach)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", path)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("imported")))
        yield load_app(folder)


@pytest.fixture(autouse=True)
def uploads(tmp_path, monkeypatch):
    """What the imported app takes for its folder of uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def noise(uploads) -> tuple[np.ndarray, dict]:
    """An image of random pixels, and the same as an uploaded picture."""
    pixels = np.random.default_rng(7).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(uploads / "noise.png")
    return pixels, {"path": str(uploads / "noise.png")}


def raw(server: str, endpoint: str, body: str) -> str:
    """What the server answers to a body as it stands, without a client that would correct it."""
    url, headers = f"{server}/gradio_api/call/{endpoint}", {"content-type": "application/json"}
    event = HTTP.post(url, content=body, headers=headers).json()["event_id"]
    return HTTP.get(f"{url}/{event}").text


def format_error(error: BaseException) -> str:
    """Return an error's message, which is neither a traceback nor Gradio's general one."""
    text = str(error)
    assert (
        text and "Traceback" not in text and "show_error" not in text and "preprocess" not in text
    ), text
    return text


def test_a_session_keeps_nothing_of_a_sent_picture(app, noise):
    sent = base64.b64encode(Path(noise[1]["path"]).read_bytes()).decode()
    classify = next(fn for fn in app.demo.fns.values() if fn.api_name == "classify")
    inputs, state = [{"url": f"data:image/png;base64,{sent}"}, 3], SessionState(app.demo)
    picture, _ = asyncio.run(app.demo.preprocess_data(classify, inputs, state))
    assert sent in picture["url"] and sent not in repr(state.config_values)


# ---- alone ---------------------------------------------------------------------------------------


def test_importing_the_app_needs_only_its_folder_and_starts_nothing(folder):
    script = (
        "import json, sys, threading; import app; "
        "files = [getattr(m, '__file__', None) or '' for m in list(sys.modules.values())]; "
        "state = [app.demo.is_running, type(app.demo).__name__, app.demo.analytics_enabled]; "
        "print(json.dumps([files, sorted(sys.modules), *state]))"
    )
    environment = {
        name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ
    }
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files, modules, running, kind, statistics = json.loads(done.stdout.splitlines()[-1])
    ours = [Path(file) for file in files if file and Path(file).is_relative_to(PROJECT)]
    assert not [file for file in ours if not {"site-packages", "lib"} & set(file.parts)]
    assert not {
        "pytorch_lightning",
        "albumentations",
        "dataload",
        "models.registry",
        "utils",
    } & set(modules)
    assert kind == "Blocks" and not running and not statistics
    assert (
        sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before
    )  # leaves no litter


def test_a_gradio_without_descriptions_of_pictures_is_not_given_any(app, monkeypatch):
    """As Colab's: Gradio 6.24."""
    assert app.described("a picture") == {"alt_text": "a picture"}
    monkeypatch.setattr(app.gr, "Image", lambda value=None, label=None: None)
    assert app.described("a picture") == {}


def test_a_picture_is_classified_through_the_api(client, folder):
    saw, label, remark = client.predict(
        handle_file(folder / "examples" / "cat.png"), 10, api_name="/classify"
    )
    assert [entry["label"] for entry in label["confidences"]] != [] and label["label"] in CLASSES
    assert sorted(entry["label"] for entry in label["confidences"]) == sorted(CLASSES)
    assert abs(sum(entry["confidence"] for entry in label["confidences"]) - 1) < 1e-4
    assert Image.open(saw).size == (256, 256) and "32x32" in remark


# ---- the network's view --------------------------------------------------------------------------


def test_the_app_prepares_an_image_exactly_as_the_network_was_tested(app, noise):
    pixels, picture = noise
    assert np.array_equal(app.answers.preprocess(picture, 32), pixels)
    inputs = []
    with app.MODEL.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        app.answers.classify(picture, 3)
    assert float((inputs[0] - normalize(pixels[None])).abs().max()) < 1e-5


@pytest.mark.numeric
def test_probabilities_are_those_of_the_network(app, exported_space, noise):
    pixels, picture = noise
    model, _ = load_bundle(exported_space)
    probs = model(normalize(pixels[None]))[0].softmax(0).detach()
    saw, label, _ = app.answers.classify(picture, 3)
    assert np.array_equal(np.asarray(saw)[::8, ::8], pixels)
    assert all(abs(prob - float(probs[CLASSES.index(name)])) < 1e-4 for name, prob in label.items())
    likeliest = probs.topk(3).values.numpy()
    assert np.abs(list(label.values()) - likeliest).max() < 1e-4  # in the same order


@pytest.mark.numeric
def test_temperature_and_confidence_threshold_come_from_the_bundle(app, noise, monkeypatch):
    _, cold, confident = app.answers.classify(noise[1], 10)
    monkeypatch.setitem(app.META, "temperature", 5.0)
    monkeypatch.setitem(app.META, "confidence_threshold", 0.999)
    _, warm, unsure = app.answers.classify(noise[1], 1)
    assert max(warm.values()) < max(cold.values())
    assert "unsure" in unsure and "unsure" not in confident


def colours_of(cam: np.ndarray) -> np.ndarray:
    """The colours of a heatmap (32, 32) in [0, 1], enlarged: 0 to 255, (256, 256, 3), unrounded."""
    wide = np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR))
    return 255 * explain_source.colorize(np.clip(wide, 0, 1))


@pytest.mark.numeric
def test_a_heatmap_alone_is_drawn_in_its_colours(app):
    """Rounded by the app: on another CPU a value may end on the other side of a half."""
    black = np.zeros((32, 32, 3), np.uint8)
    for seed in range(50):
        cam = np.random.default_rng(seed).random((32, 32), dtype=np.float32)
        assert np.abs(np.float32(app.answers.draw(black, cam, 1)) - colours_of(cam)).max() <= 1


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_opacity_goes_from_the_picture_to_the_heatmap(app, noise, stage):
    pixels, picture = noise
    enlarged = pixels.repeat(8, axis=0).repeat(8, axis=1)
    gallery, seen = app.answers.explain(picture, True, 3, stage, METHOD, 0)
    panels = seen.panels
    assert len(gallery) == 3 and all(np.array_equal(shown, enlarged) for shown, _ in gallery)
    for (shown, _), (_, cam, _) in zip(app.answers.blend(panels, 1), panels, strict=True):
        assert np.abs(np.float32(shown) - colours_of(cam)).max() <= 1
    half, full = (np.float32(app.answers.blend(panels, opacity)[0][0]) for opacity in (0.5, 1))
    assert np.abs(half - (enlarged + full) / 2).max() <= 1


@pytest.mark.numeric
def test_each_map_is_for_its_class_and_named_after_it(app, noise):
    gallery, seen = app.answers.explain(noise[1], True, 10, STAGE, METHOD, 0.4)
    panels = seen.panels
    top_k = list(app.answers.classify(noise[1], 10)[1])
    assert [caption.split()[0] for _, caption in gallery] == top_k
    assert np.abs(panels[0][1] - panels[1][1]).max() > 0.01


@pytest.mark.numeric
@pytest.mark.parametrize("method", explain_source.METHODS)
def test_the_chosen_method_draws_the_heatmap(app, noise, method):
    panels = app.answers.explain(noise[1], True, 2, "layer2", method, 1)[1].panels
    model, classes = app.MODEL, [CLASSES.index(caption.split()[0]) for *_, caption in panels]
    images = normalize(noise[0][None]).repeat(2, 1, 1, 1)
    with explain_source.METHODS[method](model, [model.layer2]) as cam:
        expected = cam(images, [explain_source.logit_of(label) for label in classes])
    assert np.abs(np.stack([panel[1] for panel in panels]) - expected).max() < 1e-4


def test_the_methods_are_those_that_they_are_called():
    names = {name: method.__name__ for name, method in explain_source.METHODS.items()}
    assert names == {"GradCAM": "GradCAM", "GradCAM++": "GradCAMPlusPlus", "LayerCAM": "LayerCAM"}


def test_another_opacity_does_not_run_the_network_again(app, noise, monkeypatch):
    answers, way = app.answers, (STAGE, METHOD)
    *_, seen = answers.answer(None, noise[1], 3, True, 2, *way, 0.4)
    *_, wrong_seen = answers.filtered(None, True, 2, answers.ANY, answers.ANY, True, *way, 0.4)
    monkeypatch.setattr(answers, "NETWORK", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(answers, "look", lambda *_: pytest.fail("it ran"))
    assert answers.answer(seen, noise[1], 3, True, 2, *way, 0.9)[-1] is seen
    again = answers.filtered(wrong_seen, True, 2, answers.ANY, answers.ANY, True, *way, 0.9)
    assert again[-1] is wrong_seen


def test_grad_cam_can_be_switched_off(app, noise):
    """What the page remembers of a picture stays."""
    assert app.answers.explain(noise[1], False, 3, STAGE, METHOD, 0.4) == ([], gr.skip())


def test_a_picture_that_is_refused_leaves_no_other_s_answer_nor_refusal(app, noise):
    answers, options = app.answers, (3, True, 2, STAGE, METHOD, 0.4)
    *_, seen = answers.answer(None, noise[1], *options)
    *_, seen = answers.answer(seen, as_data(HUGE_PICTURE), *options)
    saw, classes, remark, panels, seen = answers.answer(seen, as_data(b"no picture"), *options)
    assert (saw, classes, panels) == (None, None, []) and "not a picture" in remark
    with pytest.raises(gr.Error, match="not a picture"):
        answers.answer(seen, as_data(b"no picture"), *options)
    assert answers.answer(seen, noise[1], *options)[1]
    *shown, seen = answers.answer(None, as_data(b"no picture"), *options)  # the last is forgotten
    assert shown[:2] == [None, None] and "not a picture" in shown[2] and not shown[3] and not seen


def test_the_example_buttons_give_gradio_s_copies(app):
    """It refuses other files where the app lies outside the working directory."""
    buttons = {button._id for button in app.examples}
    clicks = [event.fn for event in app.demo.fns.values() if event.targets[0][0] in buttons]
    assert {click() for click in clicks} == app.image.keep_in_cache and len(clicks) == 10


# ---- misclassified images ------------------------------------------------------------------------


def test_misclassified_images_are_pixel_exact_and_most_confident_first(app, tiny_splits):
    gallery, remark, _ = app.answers.misclassified(True, 23, ANY, ANY, False, STAGE, METHOD, 0.4)
    assert len(gallery) == 23 and "23 of 23" in remark
    for place, (shown, caption) in enumerate(gallery):
        index = 22 - place  # the probabilities rise with the index
        assert np.array_equal(np.asarray(shown)[::8, ::8], tiny_splits.test.images[index])
        label = int(tiny_splits.test.labels[index])
        assert caption.startswith(f"{CLASSES[label]}, predicted as {CLASSES[(label + 1) % 10]}")


@pytest.mark.numeric
def test_misclassified_images_come_with_two_maps_each(app):
    gallery, _, (_, panels) = app.answers.misclassified(
        True, 5, ANY, ANY, True, "layer3", METHOD, 1
    )
    assert len(gallery) == 15
    for image, predicted, true in zip(panels[::3], panels[1::3], panels[2::3], strict=True):
        names = image[2].split(" (")[0].split(", predicted as ")
        assert true[2].startswith(f"why {names[0]} (true)")
        assert predicted[2].startswith(f"why {names[1]} (predicted)")
        wanted = [CLASSES.index(name) for name in (names[1], names[0])]
        batch = normalize(image[0][None]).repeat(2, 1, 1, 1)
        cams = explain_source.gradcam(app.MODEL, app.MODEL.layer3, batch, wanted)
        assert image[1] is None and np.abs(np.stack([predicted[1], true[1]]) - cams).max() < 1e-4
    assert any(
        not np.array_equal(a[1], b[1]) for a, b in zip(panels[1::3], panels[2::3], strict=True)
    )


def test_misclassified_images_can_be_filtered_and_hidden(app):
    gallery, remark, _ = app.answers.misclassified(True, 23, "cat", ANY, False, STAGE, METHOD, 0.4)
    assert len(gallery) in (2, 3) and all(
        caption.startswith("cat, predicted as deer") for _, caption in gallery
    )
    assert f"of {len(gallery)} " in remark
    assert app.answers.misclassified(True, 23, ANY, "deer", False, STAGE, METHOD, 0.4)[1] == remark
    assert app.answers.misclassified(True, 23, "cat", "truck", False, STAGE, METHOD, 0.4)[0] == []
    assert app.answers.misclassified(False, 23, ANY, ANY, True, STAGE, METHOD, 0.4)[:2] == ([], "")


# ---- other bundles -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "mistakes"), [(CLASSES, 0), (("cat", "dog"), 1)], ids=["ten, 0", "two, 1"]
)
def test_a_bundle_with_few_mistakes_or_classes_is_served(
    tmp_path, tmp_path_factory, classes, mistakes
):
    folder = export_other(tmp_path_factory.getbasetemp(), tuple(classes), mistakes)
    with serve(folder, tmp_path) as server:
        parts = HTTP.get(f"{server}/config").json()["components"]
        ranges = [part["props"] for part in parts if part["type"] == "slider"]
        assert len(ranges) == 5 and all(one["minimum"] < one["maximum"] for one in ranges)
        assert all(one["minimum"] <= one["value"] <= one["maximum"] for one in ranges)
        client = Client(server, verbose=False, download_files=tmp_path / "answers")
        gallery, remark = client.predict(
            True, 1, ANY, ANY, False, STAGE, METHOD, 0.4, api_name="/misclassified"
        )
        assert len(gallery) == mistakes
        assert remark == (NO_MISTAKES if not mistakes else "Showing 1 of 1 stored images that fit.")
        picture = handle_file(folder / "examples" / "cat.png")
        label = client.predict(picture, len(classes), api_name="/classify")[1]
        assert sorted(entry["label"] for entry in label["confidences"]) == sorted(classes)
        with pytest.raises(
            Exception, match=f"Top classes: a number from 1 to {len(classes)}, please"
        ):
            client.predict(picture, len(classes) + 1, api_name="/classify")
        maps = client.predict(picture, True, len(classes), STAGE, METHOD, 1, api_name="/explain")
        empty = [
            one["caption"].split()[0]
            for one in maps
            if np.ptp(Image.open(one["image"]), axis=(0, 1)).max() == 0
        ]
        said = [one["caption"].split(": ")[1] for one in maps if ": " in one["caption"]]
        assert said == [f"no evidence found for {name}" for name in empty] and classes[-1] in empty


@pytest.mark.numeric
def test_a_map_of_a_mistake_for_which_nothing_speaks_says_so_too(app, monkeypatch):
    empty = np.zeros((2, 32, 32), np.float32)
    monkeypatch.setattr(app.answers, "NETWORK", lambda _, items, __: [(None, empty)] * len(items))
    gallery, *_ = app.answers.misclassified(True, 1, ANY, ANY, True, STAGE, METHOD, 0.4)
    captions = [caption for _, caption in gallery]
    names = captions[0].split(" (")[0].split(", predicted as ")
    assert captions[1:] == [
        f"why {names[1]} (predicted): no evidence found for {names[1]}",
        f"why {names[0]} (true): no evidence found for {names[0]}",
    ]


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(1, 1), (2.7, 3), (10, 10)])
def test_as_many_classes_as_asked_for_and_never_more_than_ten(app, noise, value, shown):
    assert len(app.answers.classify(noise[1], value)[1]) == shown


BAD_NUMBERS = [0, 11, -1, None, "abc", True]
BAD_OPACITIES = [-0.1, 1.1, None, "abc", True]
BAD_CHOICES = ["layer5", "__class__", 0, None, ["layer1"]]
BAD_FLAGS = ["false", 0, None]
BAD_CALLS = [
    *(
        ("classify", ["picture", v], "Top classes: a number from 1 to 10")
        for v in [*BAD_NUMBERS, 50]
    ),
    *(
        (
            "explain",
            ["picture", True, v, STAGE, METHOD, 0.4],
            "Number of heatmaps: a number from 1 to 10",
        )
        for v in BAD_NUMBERS
    ),
    *(
        ("explain", ["picture", True, 2, v, METHOD, 0.4], "Stage: one of layer1, layer2")
        for v in BAD_CHOICES
    ),
    *(
        ("explain", ["picture", True, 2, STAGE, METHOD, v], "Opacity: a number from 0 to 1")
        for v in BAD_OPACITIES
    ),
    *(
        ("explain", ["picture", True, 2, STAGE, v, 0.4], "Method: one of GradCAM, ")
        for v in ["ScoreCAM", None, 1]
    ),
    *(
        ("misclassified", [True, 2, ANY, ANY, True, STAGE, v, 0.4], "Method: one of GradCAM, ")
        for v in ["", "gradcam"]
    ),
    *(
        ("misclassified", [True, v, ANY, ANY, False, STAGE, METHOD, 0.4], "a number from 1 to 23")
        for v in [0, 24, None, True]
    ),
    *(
        ("misclassified", [True, 2, v, ANY, False, STAGE, METHOD, 0.4], "True class: one of")
        for v in ["cow", None, 3]
    ),
    *(
        ("misclassified", [True, 2, ANY, v, False, STAGE, METHOD, 0.4], "Predicted class: one of")
        for v in ["cow", ["cat"]]
    ),
    *(
        ("misclassified", [True, 2, ANY, ANY, True, v, METHOD, 0.4], "Stage: one of")
        for v in ["layer5", None]
    ),
    *(
        ("misclassified", [True, 2, ANY, ANY, False, STAGE, METHOD, v], "Opacity: a number")
        for v in [7, "abc"]
    ),
    *(
        ("explain", ["picture", v, 2, STAGE, METHOD, 0.4], "Show Grad-CAM: true or false")
        for v in BAD_FLAGS
    ),
    *(
        (
            "misclassified",
            [v, 2, ANY, ANY, False, STAGE, METHOD, 0.4],
            "Show misclassified images: true or false",
        )
        for v in BAD_FLAGS
    ),
    *(
        (
            "misclassified",
            [True, 2, ANY, ANY, v, STAGE, METHOD, 0.4],
            "With Grad-CAM: true or false",
        )
        for v in BAD_FLAGS
    ),
    ("classify", [None, 3], "Upload a picture"),
    ("explain", [None, True, 2, STAGE, METHOD, 0.4], "Upload a picture"),
]


@pytest.mark.parametrize(("endpoint", "values", "words"), BAD_CALLS, ids=repr)
def test_a_wrong_value_is_refused_in_words_through_the_api(client, folder, endpoint, values, words):
    picture = handle_file(folder / "examples" / "cat.png")
    with pytest.raises(Exception, match=words) as caught:
        client.predict(*(picture if v == "picture" else v for v in values), api_name=f"/{endpoint}")
    format_error(caught.value)


@pytest.mark.parametrize("value", ["NaN", "1e400", "-Infinity"])
def test_a_number_that_no_client_would_send_is_refused_in_words(server, folder, value):
    with (folder / "examples" / "cat.png").open("rb") as file:
        path = HTTP.post(f"{server}/gradio_api/upload", files={"files": file}).json()[0]
    answer = raw(server, "classify", f'{{"data": [{{"path": {json.dumps(path)}}}, {value}]}}')
    assert "event: error" in answer and "Top classes: a number from 1 to 10" in answer


ARGUMENTS = {  # each endpoint with right values; "picture" stands for an uploaded one
    "classify": ["picture", 3],
    "explain": ["picture", True, 2, STAGE, METHOD, 0.4],
    "misclassified": [True, 2, ANY, ANY, False, STAGE, METHOD, 0.4],
}
OF_ANY_TYPE = [None, True, -1.5, 99, "", "x", [], [[1]], {}, {"path": 5}, {"a": {"b": []}}]


def upload(server: str, folder: Path) -> dict:
    """A picture as a program uploads it: an example, and a byte that makes it another file."""
    content = (folder / "examples" / "cat.png").read_bytes() + b"."
    path = HTTP.post(f"{server}/gradio_api/upload", files={"files": ("cat.png", content)}).json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


PLACES = [(name, place) for name, values in ARGUMENTS.items() for place in range(len(values))]


@pytest.mark.parametrize(("endpoint", "place"), PLACES)
def test_every_argument_of_every_wrong_type_gets_a_sentence(server, folder, endpoint, place):
    right = [
        upload(server, folder) if value == "picture" else value for value in ARGUMENTS[endpoint]
    ]
    for value in OF_ANY_TYPE:
        if isinstance(value, bool) and isinstance(right[place], bool):
            continue  # which is right
        answer = raw(
            server, endpoint, json.dumps({"data": [*right[:place], value, *right[place + 1 :]]})
        )
        assert is_sentence(answer), (value, answer)


@pytest.mark.parametrize("endpoint", ARGUMENTS)
def test_arguments_that_are_missing_get_a_sentence(server, endpoint):
    for count in (0, 1):
        answer = raw(server, endpoint, json.dumps({"data": ARGUMENTS[endpoint][:count]}))
        assert is_sentence(answer) and "Use via API" in answer, answer


# ---- pictures ------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size: tuple[int, int], *colours: str) -> Image.Image:
    """Upright stripes of these colours, equally wide."""
    image = Image.new("RGB", size)
    for i, colour in enumerate(colours):
        image.paste(
            colour, (i * size[0] // len(colours), 0, (i + 1) * size[0] // len(colours), size[1])
        )
    return image


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 40, 20))  # the upper half is the red that is transparent
    return image


SHORT, LONG, RATIONAL, SIGNED_SHORT, SIGNED_RATIONAL = 3, 4, 5, 8, 10  # types of EXIF's values


def exif(*entries: tuple[int, int, bytes]) -> bytes:
    """Return malformed EXIF. entries: tag, type, one value as little-endian bytes."""
    table, values = struct.pack("<H", len(entries)), b""
    for tag, kind, value in entries:
        place = 8 + 2 + 12 * len(entries) + 4 + len(values)
        table += struct.pack("<HHI", tag, kind, 1) + (
            value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", place)
        )
        values += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + table + bytes(4) + values


SIDEWAYS = (0x0112, SHORT, b"\x06\0")  # turn it clockwise
MINUS_ONE, BY_ZERO = b"\xff\xff", struct.pack("<iI", -1, 0)
GPS = (0x8825, LONG, struct.pack("<I", 8 + 2 + 2 * 12 + 4))  # what follows is its table
ALTITUDE = struct.pack(
    "<HHHIII", 1, 6, SIGNED_RATIONAL, 1, 8 + 2 + 2 * 12 + 4 + 18, 0
) + struct.pack("<ii", -5, 1)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="six"/></x:xmpmeta>'

UPSIDE_DOWN = XMP.replace(b"six", b"3")


def sideways(kind: str, **options) -> bytes:
    return encoded(halves((64, 64), "black", "white"), kind, **options)


def photo(exif: bytes = b"", **options) -> bytes:
    """A JPEG with black to the left and white to the right."""
    return sideways("JPEG", quality=100, exif=exif, **options)


def upright_photo(kind: str = "JPEG", **options) -> bytes:
    """Black on top, white below."""
    return encoded(halves((64, 64), "black", "white").rotate(-90), kind, **options)


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG, whose checksum is right or as given."""
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def with_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A PNG, black on top, with a chunk before its pixels, whose checksum is right or as given."""
    png, start = upright_photo("PNG"), 8 + 25  # behind its signature and header
    return png[:start] + chunk(name, content, checksum) + png[start:]


def with_texts(count: int, length: int) -> bytes:
    """A PNG with so many compressed texts."""
    texts = PngImagePlugin.PngInfo()
    for i in range(count):
        texts.add_text(f"text {i}", "a" * length, zip=True)
    return upright_photo("PNG", pnginfo=texts)


def floats(low: float, high: float, *others: float) -> bytes:
    """A TIFF of floats: low on top, high below, and in its first corner the others."""
    values = np.full((40, 40), high, np.float32)
    values[:20] = low
    values[0, : len(others)] = others
    return encoded(Image.fromarray(values), "TIFF")


def swapped_profile() -> bytes:
    """A colour profile in which red is the blue of sRGB, and blue its red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert profile.count(b"rXYZ") == profile.count(b"bXYZ") == 1
    places = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    swapped = bytearray(profile)
    for place, name in zip(places, (b"bXYZ", b"rXYZ"), strict=True):
        swapped[place : place + 4] = name
    return bytes(swapped)


SWAPPED = swapped_profile()


def profiled(kind: str, mode: str = "RGB", profile: bytes = SWAPPED, **options) -> bytes:
    """A red picture of 40x40 with a colour profile."""
    picture = Image.new("RGBA", (40, 40), "red").convert(mode)
    return encoded(picture, kind, icc_profile=profile, **options)


ONE_GREY = Image.new("L", (64, 64), 128)
GIF = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
GIF_OF_TWO = encoded(GIF[0], "GIF", save_all=True, append_images=GIF[1:])
RGB16_ROWS = 40 * (b"\0" + 40 * struct.pack(">HHH", 32896, 0, 65535))
RGB16 = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(RGB16_ROWS))
    + chunk(b"IEND", b"")
)
GREY16 = {value: Image.fromarray(np.full((40, 40), value, np.uint16)) for value in (200, 32896)}
RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)
WHITE, GREY, BLACK = (255,) * 3, (127,) * 3, (0,) * 3
PICTURES = {  # name of the file, its bytes, colour of what is seen: at the top, at the bottom
    "one pixel": ("p.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), RED, RED),
    "5000x1": ("p.png", encoded(halves((5000, 1), "red", "blue", "red"), "PNG"), BLUE, BLUE),
    "middle square": (
        "p.bmp",
        encoded(halves((96, 32), "red", "green", "red"), "BMP"),
        GREEN,
        GREEN,
    ),
    "grey": ("p.png", encoded(Image.new("L", (40, 40), 77), "PNG"), (77,) * 3, (77,) * 3),
    "bilevel": ("p.png", encoded(Image.new("1", (40, 40), 1), "PNG"), WHITE, WHITE),
    "16-bit grey": ("p.png", encoded(GREY16[32896], "PNG"), GREY, GREY),
    "16-bit dark grey": ("p.png", encoded(GREY16[200], "PNG"), BLACK, BLACK),
    "float TIFF": (
        "p.tif",
        encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"),
        GREY,
        GREY,
    ),
    "NaN TIFF": (
        "p.tif",
        encoded(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"),
        BLACK,
        BLACK,
    ),
    "transparent": (
        "p.png",
        encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG"),
        WHITE,
        WHITE,
    ),
    "half transparent": (
        "p.webp",
        encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "WEBP"),
        GREY,
        GREY,
    ),
    "grey with alpha": ("p.png", encoded(Image.new("LA", (40, 40), (9, 0)), "PNG"), WHITE, WHITE),
    "transparent palette": (
        "p.png",
        encoded(palette_with_hole(), "PNG", transparency=0),
        WHITE,
        BLUE,
    ),
    "CMYK": (
        "p.jpg",
        encoded(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG", quality=100),
        RED,
        RED,
    ),
    "EXIF-rotated": ("p.jpg", photo(exif(SIDEWAYS)), BLACK, WHITE),
    "EXIF, a rational -1/0": (
        "p.jpg",
        photo(exif(SIDEWAYS, (0x9204, SIGNED_RATIONAL, BY_ZERO))),
        BLACK,
        WHITE,
    ),
    "EXIF, a resolution of -1/0": (
        "p.jpg",
        photo(exif(SIDEWAYS, (0x011A, SIGNED_RATIONAL, BY_ZERO))),
        BLACK,
        WHITE,
    ),
    "EXIF, a negative unit": (
        "p.jpg",
        photo(exif(SIDEWAYS, (0x0128, SIGNED_SHORT, MINUS_ONE))),
        BLACK,
        WHITE,
    ),
    "EXIF, a negative width": (
        "p.jpg",
        photo(exif(SIDEWAYS, (0x0100, SIGNED_SHORT, MINUS_ONE))),
        BLACK,
        WHITE,
    ),
    "EXIF, below the sea": ("p.jpg", photo(exif(SIDEWAYS, GPS) + ALTITUDE), BLACK, WHITE),
    "EXIF, a table nowhere": (
        "p.jpg",
        photo(exif(SIDEWAYS, (0x8769, LONG, b"\xff" * 4))),
        BLACK,
        WHITE,
    ),
    "EXIF, no more than a head": ("p.jpg", upright_photo(exif=b"Exif\0\0II*\0"), BLACK, WHITE),
    "EXIF of garbage": (
        "p.jpg",
        upright_photo(exif=b"Exif\0\0" + b"\xff\0garbage" * 99),
        BLACK,
        WHITE,
    ),
    "EXIF orientation 0": (
        "p.jpg",
        upright_photo(exif=exif((0x0112, SHORT, b"\0\0"))),
        BLACK,
        WHITE,
    ),
    "EXIF orientation 9": (
        "p.jpg",
        upright_photo(exif=exif((0x0112, SHORT, b"\x09\0"))),
        BLACK,
        WHITE,
    ),
    "EXIF orientation 65535": (
        "p.jpg",
        upright_photo(exif=exif((0x0112, SHORT, MINUS_ONE))),
        BLACK,
        WHITE,
    ),
    "EXIF orientation 'six'": (
        "p.jpg",
        upright_photo(exif=exif((0x0112, 2, b"six\0"))),
        BLACK,
        WHITE,
    ),
    "EXIF orientation 6/1": (
        "p.jpg",
        upright_photo(exif=exif((0x0112, RATIONAL, BY_ZERO))),
        BLACK,
        WHITE,
    ),
    "XMP of garbage": ("p.jpg", upright_photo(xmp=XMP + b"\xff\0<"), BLACK, WHITE),
    "XMP orientation, JPEG": ("p.jpg", upright_photo(xmp=UPSIDE_DOWN), BLACK, WHITE),
    "XMP orientation, WebP": ("p.webp", upright_photo("WEBP", xmp=UPSIDE_DOWN), BLACK, WHITE),
    "XMP orientation, TIFF": (
        "p.tif",
        upright_photo("TIFF", tiffinfo={700: UPSIDE_DOWN}),
        BLACK,
        WHITE,
    ),
    "JPEG, a broken profile": ("p.jpg", upright_photo(icc_profile=b"no profile"), BLACK, WHITE),
    "JPEG, a profile with red and blue swapped": (
        "p.jpg",
        profiled("JPEG", quality=100),
        BLUE,
        BLUE,
    ),
    "PNG, the same profile": ("p.png", profiled("PNG"), BLUE, BLUE),
    "palette, the same profile": ("p.png", profiled("PNG", "P"), BLUE, BLUE),
    "WebP, the same profile": ("p.webp", profiled("WEBP", lossless=True), BLUE, BLUE),
    "TIFF with alpha, the same profile": ("p.tif", profiled("TIFF", "RGBA"), BLUE, BLUE),
    "JPEG, half of that profile": (
        "p.jpg",
        profiled("JPEG", profile=SWAPPED[:300], quality=100),
        RED,
        RED,
    ),
    "PNG, half of that profile": ("p.png", profiled("PNG", profile=SWAPPED[:300]), RED, RED),
    "PNG, that profile for grey": (
        "p.png",
        profiled("PNG", profile=SWAPPED.replace(b"RGB ", b"GRAY", 1)),
        RED,
        RED,
    ),
    "JPEG without its last two bytes": ("p.jpg", upright_photo()[:-2], BLACK, WHITE),
    "JPEG, turned, without its last byte": ("p.jpg", photo(exif(SIDEWAYS))[:-1], BLACK, WHITE),
    "progressive JPEG without its end": (
        "p.jpg",
        upright_photo(progressive=True)[:-2],
        BLACK,
        WHITE,
    ),
    "grey JPEG without its end": (
        "p.jpg",
        encoded(Image.new("L", (40, 40), 77), "JPEG")[:-2],
        (77,) * 3,
        (77,) * 3,
    ),
    "JPEG of one grey without its end": (
        "p.jpg",
        encoded(ONE_GREY, "JPEG")[:-2],
        (128,) * 3,
        (128,) * 3,
    ),
    "progressive JPEG without its last byte": (
        "p.jpg",
        upright_photo(progressive=True)[:-1],
        BLACK,
        WHITE,
    ),
    "BMP without its last bytes": ("p.bmp", upright_photo("BMP")[:-3], BLACK, WHITE),
    "PNG, a broken gamma": ("p.png", with_chunk(b"gAMA", b"1"), BLACK, WHITE),
    "PNG without its end": ("p.png", upright_photo("PNG")[:-14], BLACK, WHITE),
    "PNG, 2 MB of text": ("p.png", with_texts(1, 2_000_000), BLACK, WHITE),
    "PNG, 80 MB of texts": ("p.png", with_texts(100, 800_000), BLACK, WHITE),
    "PNG, 2 MB of profile": (
        "p.png",
        upright_photo("PNG", icc_profile=bytes(2_000_000)),
        BLACK,
        WHITE,
    ),
    "PNG, a wrong checksum in a text": ("p.png", with_chunk(b"tEXt", b"a\0b", 7), BLACK, WHITE),
    "PNG, a wrong checksum in its EXIF": (
        "p.png",
        with_chunk(b"eXIf", exif(SIDEWAYS)[6:], 7),
        BLACK,
        WHITE,
    ),
    "PNG, a text without a name": ("p.png", with_chunk(b"zTXt", b""), BLACK, WHITE),
    "PNG, no profile": ("p.png", with_chunk(b"iCCP", b"name\0\x09"), BLACK, WHITE),
    "PNG, no density": ("p.png", with_chunk(b"pHYs", b"1"), BLACK, WHITE),
    "PNG, no animation": ("p.png", with_chunk(b"fcTL", bytes(26)), BLACK, WHITE),
    "PNG, EXIF of garbage": ("p.png", with_chunk(b"eXIf", b"garbage"), BLACK, WHITE),
    "PNG, EXIF-rotated": ("p.png", sideways("PNG", exif=exif(SIDEWAYS)[6:]), BLACK, WHITE),
    "TIFF, EXIF-rotated": ("p.tif", sideways("TIFF", tiffinfo={0x0112: 6}), BLACK, WHITE),
    "TIFF, a table nowhere": (
        "p.tif",
        upright_photo("TIFF", tiffinfo={0x8769: 2**32 - 1}),
        BLACK,
        WHITE,
    ),
    "WebP, EXIF of garbage": (
        "p.webp",
        upright_photo("WEBP", lossless=True, exif=b"garbage"),
        BLACK,
        WHITE,
    ),
    "GIF, a broken second frame": ("p.gif", GIF_OF_TWO[:-20], RED, RED),
    "MPO": ("p.mpo", encoded(GIF[0], "MPO", save_all=True, append_images=GIF[1:]), RED, RED),
    "16-bit RGB": ("p.png", RGB16, (128, 0, 255), (128, 0, 255)),
    "16-bit TIFF, big-endian": (
        "p.tif",
        encoded(Image.new("I;16B", (40, 40), 32896), "TIFF"),
        GREY,
        GREY,
    ),
    "colour that is transparent": (
        "p.png",
        encoded(GIF[0], "PNG", transparency=(255, 0, 0)),
        WHITE,
        WHITE,
    ),
    "grey that is transparent": (
        "p.png",
        encoded(Image.new("L", (9, 9), 5), "PNG", transparency=5),
        WHITE,
        WHITE,
    ),
    "floats, resampled": ("p.tif", floats(-0.07, 0.5, 1.13), BLACK, GREY),
    "floats, half of them above 1": ("p.tif", floats(0, 1.13), BLACK, WHITE),
    "floats to 255, resampled": ("p.tif", floats(-9, 127, 288.0), BLACK, GREY),
    "floats to 255, half of them above": ("p.tif", floats(0, 300), BLACK, WHITE),
    "floats of 10 bits": ("p.tif", floats(0, 511, 1000.0, 1023.0), BLACK, GREY),
    "floats of 16 bits": ("p.tif", floats(0, 32767, 65535.0, 65535.0), BLACK, GREY),
    "floats, an infinity": ("p.tif", floats(0, 0.5, np.inf, 1.0), BLACK, GREY),
    "floats to 255, an infinity": (
        "p.tif",
        floats(0, 127, np.inf, 255.0, 255.0, 255.0),
        BLACK,
        GREY,
    ),
    "floats, all that there is": (
        "p.tif",
        floats(0, 0.5, np.inf, -np.inf, np.nan, -3e38),
        BLACK,
        GREY,
    ),
    "floats, a hot pixel": ("p.tif", floats(0, 0.5, 1e30), BLACK, GREY),
    "animated GIF": (
        "p.gif",
        encoded(GIF[0], "GIF", save_all=True, append_images=GIF[1:]),
        RED,
        RED,
    ),
    "name without suffix": ("p", encoded(Image.new("RGB", (40, 40), "blue"), "PNG"), BLUE, BLUE),
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
NO_PICTURES = {
    "text.png": b"This is not a picture.",
    "page.jpg": b"<html><script>alert(1)</script></html>",
    "empty.png": b"",
    "cut.png": encoded(NOISE, "PNG")[:5000],
    "cut.jpg": encoded(NOISE, "JPEG")[:1500],
    "half of one grey.jpg": encoded(ONE_GREY.resize((999, 999)), "JPEG")[:5000],
    "cut.bmp": encoded(NOISE, "BMP")[:5000],
    "cut.tif": encoded(NOISE, "TIFF")[:5000],
    "a seventh of a large.bmp": encoded(NOISE.resize((1500, 1500)), "BMP")[:1_000_000],
    "hardly anything.jpg": encoded(NOISE, "JPEG")[:700],
    "hardly anything.png": encoded(NOISE, "PNG")[:60],
    "head.png": encoded(NOISE, "PNG")[:33],
    "chunks.png": b"\x89PNG\r\n\x1a\n" + bytes(999),
    "head.gif": b"GIF89a",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
    b'<rect width="9" height="9"/></svg>',
    "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_picture_is_seen_as_it_looks(client, tmp_path, name):
    file, content, top, bottom = PICTURES[name]
    (tmp_path / file).write_bytes(content)
    saw = client.predict(handle_file(tmp_path / file), 1, api_name="/classify")[0]
    seen = np.asarray(Image.open(saw))[4::8, 4::8].astype(int)[:, 8:]  # without the corner of some
    assert seen.shape == (32, 24, 3)
    assert np.abs(seen[:12] - top).max() <= 3 and np.abs(seen[20:] - bottom).max() <= 3


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused_in_words(client, tmp_path, name):
    (tmp_path / name).write_bytes(NO_PICTURES[name])
    for endpoint, options in (("/classify", [3]), ("/explain", [True, 2, STAGE, METHOD, 0.4])):
        with pytest.raises(Exception, match=NOT_A_PICTURE) as caught:
            client.predict(handle_file(tmp_path / name), *options, api_name=endpoint)
        format_error(caught.value)


def compressed_bmp(width: int, height: int) -> bytes:
    """A BMP of a code that skips 255 rows, then its end."""
    body, colours = bytes([0, 2, 0, 255, 0, 1]), bytes(4 * 256)
    size = (40, width, height, 1, 8, 1, len(body), 2835, 2835, 256, 0)
    start = 14 + 40 + len(colours)
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    return head + struct.pack("<IiiHHIIiiII", *size) + colours + body


def tiled_tiff(side: int, tile: int) -> bytes:
    """A square TIFF in tiles of that side, without their content."""
    tags = ((256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1))
    tags += ((322, tile), (323, tile), (324, 0), (325, 9))
    entries = b"".join(struct.pack("<HHII", tag, LONG, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


HUGE_PICTURE = encoded(Image.new("1", (13000, 13000)), "PNG", optimize=True)


def repeated_scans(count: int, kind: str = "JPEG") -> bytes:
    """A progressive JPEG, or an MPO of two, the last scan of the last coming so many times."""
    pictures = {"save_all": True, "append_images": [GIF[0]]} if kind == "MPO" else {}
    content = encoded(Image.new("L", (64, 64), 99), kind, progressive=True, **pictures)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


def with_exif(count: int) -> bytes:
    """A JPEG with so many parts of EXIF data."""
    content = encoded(GIF[0], "JPEG")
    return content[:2] + b"\xff\xe1\0\x12Exif\0\0" * count + content[2:]


HUGE = "25 million pixels, or more than 65,535 in a row or column"
BOMBS = {
    "pixels.png": (HUGE_PICTURE, HUGE),
    "rows.bmp": (compressed_bmp(3_000_000, 8), HUGE),
    "tile.tif": (tiled_tiff(16, 46_336), HUGE),
    "scans.jpg": (repeated_scans(30), "not a picture that can be read"),
    "scans.mpo": (repeated_scans(30, "MPO"), "not a picture that can be read"),
    "exif.jpg": (with_exif(101), "not a picture that can be read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_far_larger_than_its_file_is_refused_before_it_is_decoded(
    client, app, uploads, monkeypatch, name
):
    content, words = BOMBS[name]
    (uploads / name).write_bytes(content)
    assert len(content) < 100_000
    with pytest.raises(Exception, match=words):
        client.predict(handle_file(uploads / name), 3, api_name="/classify")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(gr.Error, match=words):
        app.answers.preprocess({"path": str(uploads / name)}, 32)


def test_as_many_scans_as_programs_write_are_read(app):
    assert app.answers.preprocess(as_data(repeated_scans(20)), 32).shape == (32, 32, 3)


def test_texts_of_a_gif_do_not_reach_pillow_which_is_slow_with_many_parts(app, monkeypatch):
    content = encoded(GIF[0], "GIF", transparency=0)
    assert content.count(b"!\xf9") == 1  # which says what is transparent
    at = content.index(b"!\xf9")
    text = b"!\xfe" + b"\x01a" * 1000 + b"\0"
    opened, open_picture = [], app.answers.preprocess.__globals__["open_picture"]
    monkeypatch.setitem(
        app.answers.preprocess.__globals__,
        "open_picture",
        lambda content: opened.append(content) or open_picture(content),
    )
    for before in (text, b"\0" + text, b"!\xf9\0\0" + text, b""):
        sent = content[:at] + before + content[at:]
        assert (app.answers.preprocess(as_data(sent), 32) == 255).all()  # on white
        assert opened[-1] == content
    for cut in range(len(content)):  # any broken file is refused in a sentence, or read
        with contextlib.suppress(gr.Error):
            app.answers.preprocess(as_data(content[:at] + text[:8] + content[at:cut]), 32)


def test_a_photograph_with_a_video_behind_it_is_read(app):
    """As phones write it; four million bytes have the marker of a scan by chance, too."""
    video = np.random.default_rng(0).bytes(4_000_000)
    assert video.count(b"\xff\xda") > 30
    assert app.answers.preprocess(as_data(photo() + video), 32).shape == (32, 32, 3)


def test_each_of_the_many_jpegs_in_a_tiff_may_have_scans(app):
    content = encoded(halves((2000, 2000), "red", "blue"), "TIFF", compression="jpeg")
    assert content.count(b"\xff\xda") > 100
    small = app.answers.preprocess(as_data(content), 32)
    assert np.allclose(small[16, [8, 24]], [[255, 0, 0], [0, 0, 255]], atol=3)


def test_a_file_that_is_too_large_is_refused_whoever_took_it(app, uploads):
    """Gradio's own limit may not hold where another program serves the app."""
    (uploads / "large.bmp").write_bytes(bytes(10_000_001))
    with pytest.raises(gr.Error, match="more than 10 MB"):
        app.answers.preprocess({"path": str(uploads / "large.bmp")}, 32)


def test_no_more_of_a_truncated_picture_is_unpacked_than_it_has_pixels(app):
    """One pixel, then 50 MB of zeros in 50 kB, then a part that is cut off."""
    head = encoded(Image.new("L", (1, 1)), "PNG")[:33]
    zeros = zlib.compress(bytes(50_000_000))
    content = head + chunk(b"IDAT", zeros) + chunk(b"IDAT", b"cut off")[:-6]
    tracemalloc.start()
    try:
        assert app.answers.preprocess(as_data(content), 32).shape == (32, 32, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000  # bytes


def test_no_picture_made_the_server_take_more_than_a_gigabyte_and_a_half(server, client, tmp_path):
    """After the pictures above, and the largest allowed: 16-bit grey that is scaled in floats."""
    Image.fromarray(np.zeros((4990, 5000), np.uint16)).save(tmp_path / "large.png")
    assert client.predict(handle_file(tmp_path / "large.png"), 1, api_name="/classify")[1]["label"]
    status = Path(f"/proc/{PROCESSES[server]}/status")
    if not status.exists():
        pytest.skip("this system does not tell a process's memory")
    assert int(status.read_text().split("VmHWM:")[1].split()[0]) < 1_500_000  # kB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_orientation_says(app, orientation):
    corners = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(corners.repeat(16, axis=0).repeat(16, axis=1))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    sent, upright = encoded(image, "PNG", exif=image.getexif()), ImageOps.exif_transpose(image)
    got, wanted = (
        app.answers.preprocess(as_data(content), 32) for content in (sent, encoded(upright, "PNG"))
    )
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize(("rows", "is_read"), [(76, True), (74, False)])
def test_three_quarters_of_a_picture_are_enough(app, rows, is_read):
    """Of a BMP, each of whose 100 rows has 300 bytes, after a head of 54."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    picture = as_data(encoded(Image.fromarray(pixels), "BMP")[: 54 + 300 * rows])
    if is_read:
        assert app.answers.preprocess(picture, 32).shape == (32, 32, 3)
        return
    with pytest.raises(gr.Error, match="not a picture that can be read"):
        app.answers.preprocess(picture, 32)


def as_data(content: bytes) -> dict:
    return {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def test_a_picture_within_the_request_is_classified_like_an_uploaded_one(server, folder):
    content = (folder / "examples" / "cat.png").read_bytes()
    inside = raw(server, "classify", json.dumps({"data": [as_data(content), 3]}))
    outside = raw(server, "classify", json.dumps({"data": [upload(server, folder), 3]}))
    labels = [json.loads(answer.split("data: ")[1])[1] for answer in (inside, outside)]
    assert labels[0] == labels[1] and len(labels[0]["confidences"]) == 3


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (as_data(b"nothing"), NOT_A_PICTURE),
        ({"url": "data:image/png;base64,???"}, NOT_A_PICTURE),
        ({"url": "data:"}, NOT_A_PICTURE),
        (as_data(bytes(11_000_000)), "more than 10 MB"),
        ({"url": "file:///etc/passwd"}, "Nothing is fetched from an address"),
        ({"path": None}, "Upload a picture or pick an example first"),
        ({"path": None, "url": None}, "Upload a picture or pick an example first"),
        ({"path": "\0"}, "Upload a picture first"),
        ({"path": "a" * 5000}, "Upload a picture first"),
        ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "Upload a picture first"),
        ({"path": "a" * 5000, "meta": {"_type": "gradio.FileData"}}, "Use via API"),
        ({"path": "x", "meta": 5}, "Use via API"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_uploaded_picture_gets_a_sentence(server, picture, words):
    for endpoint in ("classify", "explain"):
        answer = raw(server, endpoint, json.dumps({"data": [picture, *ARGUMENTS[endpoint][1:]]}))
        assert is_sentence(answer) and words in answer, answer


@pytest.mark.parametrize(
    "meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "with meta"]
)
@pytest.mark.parametrize("key", ["path", "url", "both"])
def test_no_address_is_fetched(server, key, meta):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the name is http.server's
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}/cat.png"
        picture = {name: address for name in (("path", "url") if key == "both" else (key,))} | meta
        for sent in (picture, [picture], {"path": None, "a": picture}):
            answer = raw(server, "classify", json.dumps({"data": [sent, 3]}))
            assert is_sentence(answer), answer
            # Said before Gradio would fetch it, which refuses this address for reasons of its own.
            assert sent is not picture or "Use via API" not in answer, answer
        other.shutdown()
    assert asked == []


def test_only_this_machine_is_served_unless_told_otherwise(app, monkeypatch):
    asked = {}
    monkeypatch.setattr(app.demo, "launch", lambda **options: asked.update(options))
    app.serve()
    assert asked["max_file_size"] == "10mb" and not {"server_name", "share"} & set(asked)


def test_the_notebook_serves_the_app_within_the_same_limits(app):
    app.serve(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        big = {"files": ("big.png", bytes(11_000_000))}
        answer = HTTP.post(f"{app.demo.local_url}gradio_api/upload", files=big)
        assert answer.status_code == 413 and app.demo.state_session_capacity == 200
    finally:
        app.demo.close()


def test_a_file_over_ten_megabytes_is_refused(server):
    answer = HTTP.post(
        f"{server}/gradio_api/upload", files={"files": ("big.png", bytes(11_000_000))}
    )
    assert answer.status_code == 413


# ---- uploads -------------------------------------------------------------------------------------


def break_off_an_upload(server: str) -> None:
    """Send the first half of a file, and hang up."""
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":")[-1]))) as connection:
        connection.sendall(f"{head}\r\n\r\n{part}".encode() + bytes(4000))
        time.sleep(0.5)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_uploads_are_deleted_after_their_time_however_the_server_ended(folder, tmp_path, end):
    (tmp_path / "foreign.txt").write_text("not this app's")
    with serve(folder, tmp_path) as server:
        left = files_of(tmp_path)
        path = Path(upload(server, folder)["path"])
        break_off_an_upload(server)
        wait_until(lambda: len(files_of(tmp_path) - left) == 2)
        left = files_of(tmp_path) - left
        os.kill(PROCESSES[server], end)
        time.sleep(1)
    assert path in left and all(file.exists() for file in left)
    with serve(folder, tmp_path, UPLOADS_KEEP_SECONDS="5") as server:
        wait_until(lambda: not any(file.exists() for file in left))
        examples = files_of(tmp_path) - {tmp_path / "foreign.txt"}
        break_off_an_upload(server)
        mine = Path(upload(server, folder)["path"])
        assert mine.exists()
        wait_until(lambda: files_of(tmp_path) - {tmp_path / "foreign.txt"} == examples)
        assert (tmp_path / "foreign.txt").exists() and len(examples) >= 10
        example = next(
            path for path in examples if path.name == "cat.png"
        )  # they stay as long as the app runs
        assert "event: complete" in raw(
            server, "classify", json.dumps({"data": [{"path": str(example)}, 3]})
        )


def test_a_picture_whose_time_is_over_has_to_be_uploaded_again(folder, tmp_path):
    with serve(folder, tmp_path, UPLOADS_KEEP_SECONDS="6") as server:
        picture = upload(server, folder)
        wait_until(lambda: not Path(picture["path"]).exists())
        for endpoint in ("classify", "explain"):
            answer = raw(
                server, endpoint, json.dumps({"data": [picture, *ARGUMENTS[endpoint][1:]]})
            )
            assert is_sentence(answer) and NO_LONGER_THERE in answer
        again = raw(server, "classify", json.dumps({"data": [upload(server, folder), 3]}))
        assert "event: complete" in again


def start_fails(folder: Path, **options) -> str:
    """Return the one line that an app prints which does not start."""
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("value", ["0", "-5", "3001", "nan", "an hour"])
def test_a_time_that_keeps_no_promise_is_refused_at_the_start(folder, value):
    assert "UPLOADS_KEEP_SECONDS: a number from 1" in start_fails(
        folder, env=os.environ | {"UPLOADS_KEEP_SECONDS": value}
    )


def test_a_folder_that_cannot_be_written_is_named_with_its_variable(folder, tmp_path):
    (tmp_path / "file").touch()
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "file" / "uploads")}
    said = start_fails(folder, env=environment)
    assert (
        str(tmp_path / "file" / "uploads") in said
        and "Set GRADIO_TEMP_DIR to a folder that you may write." in said
    )
    with serve(folder, tmp_path):  # as it says
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows gives each user a folder")
@pytest.mark.parametrize("kind", ["link", "open to all"])
def test_a_folder_that_somebody_else_may_have_made_is_refused(folder, tmp_path, kind):
    made = tmp_path / f"cifar10-space-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        made.symlink_to(tmp_path / "elsewhere")
    else:
        made.mkdir()
        made.chmod(0o777)
    said = start_fails(folder, env=os.environ | {"GRADIO_TEMP_DIR": str(tmp_path)})
    assert f"{made} (it is not this user's alone)" in said


def test_a_folder_of_another_user_is_named_with_its_variable(folder):
    """Root may write everywhere: as root the process becomes nobody first."""
    script = "import os; from temporary_files import own_folder; os.getuid() or os.setuid(65534)"
    script += "; own_folder()"
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o555)
        environment = os.environ | {"GRADIO_TEMP_DIR": place}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        named = f"{place}/cifar10-space-{os.getuid()} (Permission denied). Set GRADIO_TEMP_DIR to"
        assert named in done.stderr


# ---- hostile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "with meta"]
)
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "EXAMPLE", "app.py", "UPLOADS/UP/EXAMPLE", "SERVER/config"]
)
def test_only_what_was_uploaded_is_read(server, folder, path, meta):
    with (folder / "examples" / "cat.png").open("rb") as file:
        uploaded = HTTP.post(f"{server}/gradio_api/upload", files={"files": file}).json()[0]
    example, uploads = (folder / "examples" / "dog.png").resolve(), Path(uploaded).parent
    places = {
        "UPLOADS/UP/EXAMPLE": f"{uploads}/{os.path.relpath(example, uploads)}",
        "EXAMPLE": str(example),
        "SERVER": server,
    }
    for name, place in places.items():
        path = path.replace(name, place)
    answer = raw(server, "classify", json.dumps({"data": [{"path": path, **meta}, 3]}))
    assert "event: error" in answer and "confidences" not in answer and "root:" not in answer


@pytest.mark.parametrize(
    "data",
    [
        '["' + "A" * 30_000_000 + '", 3]',
        "[" * 100_000 + "]" * 100_000,
        "[null, 3" + ", 1" * 10**6 + "]",
    ],
    ids=["long text", "deep", "many values"],
)
def test_an_oversize_request_is_refused_and_the_server_goes_on(server, folder, data):
    """No answer but a refusal, and the next visitor is served."""
    answer = HTTP.post(
        f"{server}/gradio_api/call/classify",
        content=f'{{"data": {data}}}',
        headers={"Content-Type": "application/json"},
    )
    if answer.status_code == 200:
        event = answer.json()["event_id"]
        assert "event: error" in HTTP.get(f"{server}/gradio_api/call/classify/{event}").text
    picture = handle_file(folder / "examples" / "cat.png")
    assert Client(server, verbose=False).predict(picture, 1, api_name="/classify")[1]["label"]


def test_files_of_the_server_are_not_served(server, folder):
    for path in (
        "/etc/passwd",
        folder / "app.py",
        folder / "model.safetensors",
        folder / "model.json",
    ):
        assert HTTP.get(f"{server}/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize(
    "name", ["../../../escaped.png", "<img src=x onerror=alert(1)>.png", "..\\..\\escaped.png"]
)
def test_a_filename_cannot_break_out(server, folder, name):
    content = (folder / "examples" / "cat.png").read_bytes()
    path = HTTP.post(f"{server}/gradio_api/upload", files={"files": (name, content)}).json()[0]
    assert "<" not in path and ".." not in path.replace("\\", "/").split("/")
    uploads = Path(upload(server, folder)["path"]).parent.parent
    assert Path(path).resolve().is_relative_to(uploads.resolve())
    picture = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    answer = raw(server, "classify", json.dumps({"data": [picture, 3]}))
    assert "event: complete" in answer and "<img" not in answer


def test_an_app_with_tampered_weights_does_not_start_and_names_them(app, folder, tmp_path):
    space = copy_space(folder, tmp_path / "space")
    weights = bytearray((space / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (space / "model.safetensors").write_bytes(weights)
    with imports_from_folder(space), pytest.raises(ValueError, match="the weights have the sha256"):
        runpy.run_path(str(space / "app.py"), run_name="__main__")


# ---- many at once --------------------------------------------------------------------------------


def together(batches, *calls) -> list:
    """The results of calls that wait for the same turn."""
    with ThreadPoolExecutor(len(calls)) as pool:
        with batches.turn:
            running = [pool.submit(call) for call in calls]
            wait_until(lambda: batches.arrived.qsize() == len(calls))
        return [one.result() for one in running]


@pytest.mark.numeric
def test_requests_that_wait_together_are_one_batch_and_get_the_answers_of_each_alone(
    app, folder, uploads, monkeypatch
):
    pictures = []
    for name in CLASSES[:5]:
        shutil.copyfile(folder / "examples" / f"{name}.png", uploads / f"{name}.png")
        pictures.append({"path": str(uploads / f"{name}.png")})
    calls = [  # with another number of heatmaps each
        functools.partial(app.answers.look, picture, count, "layer3", "LayerCAM")
        for count, picture in enumerate(pictures, 1)
    ]
    alone, sizes = [call() for call in calls], []

    def counted(key, items, function=app.answers.NETWORK.function):
        sizes.append(len(items))
        return function(key, items)

    monkeypatch.setattr(app.answers.NETWORK, "function", counted)
    for mine, shared in zip(alone, together(app.answers.NETWORK, *calls), strict=True):
        assert np.abs(mine.probs - shared.probs).max() < 1e-5
        assert [panel[2] for panel in mine.panels] == [panel[2] for panel in shared.panels]
        for (_, cam, _), (_, other, _) in zip(mine.panels, shared.panels, strict=True):
            assert np.abs(cam - other).max() < 1e-5
    assert sizes == [5]
    assert len({tuple(seen.probs) for seen in alone}) == 5


def test_a_batch_has_one_key_and_keeps_to_its_limit(app):
    seen = []
    batches = type(app.answers.NETWORK)(
        lambda key, items: seen.append((key, items)) or items, limit=4
    )
    calls = [("a", [1, 2], [1, 2]), ("b", [3], [1]), ("a", [4], [1]), ("a", [5], [1])]
    calls.append(("b", [6], [9]))  # larger than the limit
    calls = [functools.partial(batches, *call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool, batches.turn:
        running = []
        for count, call in zip((2, 3, 4, 5, 6), calls, strict=True):  # they arrive in this order
            running.append(pool.submit(call))
            wait_until(lambda count=count: batches.arrived.qsize() == count)
    assert [one.result() for one in running] == [[1, 2], [3], [4], [5], [6]]
    assert seen == [("a", [1, 2, 4]), ("b", [3]), ("a", [5]), ("b", [6])]


def test_a_batch_that_fails_fails_for_all_in_it_and_for_nobody_else(app):
    batches = type(app.answers.NETWORK)(lambda _, items: [1 / item for item in items], limit=9)
    calls = [functools.partial(batches, None, [item], [1]) for item in (0, 1)]
    with pytest.raises(ZeroDivisionError):
        together(batches, *calls)
    assert calls[1]() == [1]


def is_close(one: object, other: object) -> bool:
    """Whether two answers are equal, numbers to 1e-5 and pixels to one of 256 levels."""
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and bool(np.abs(one - other).max() <= 1)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    return abs(one - other) < 1e-5 if isinstance(one, float) else one == other


@pytest.mark.numeric
def test_many_at_once_get_the_answers_that_each_gets_alone(server, folder, tmp_path):
    pictures = [handle_file(folder / "examples" / f"{name}.png") for name in CLASSES[:4]]
    requests = [
        *(("/classify", (picture, 3 + i)) for i, picture in enumerate(pictures)),
        ("/explain", (pictures[0], True, 3, "layer2", METHOD, 0.5)),
        ("/misclassified", (True, 2, ANY, ANY, True, "layer4", "LayerCAM", 0.3)),
    ]

    def with_pixels(answer: object) -> object:
        """The answer, with the pixels of each picture in place of its path."""
        if isinstance(answer, str) and answer.endswith(".png"):
            return np.asarray(Image.open(answer)).astype(int)
        if isinstance(answer, dict):
            return {key: with_pixels(value) for key, value in answer.items()}
        return list(map(with_pixels, answer)) if isinstance(answer, list | tuple) else answer

    def visitor(number: int) -> list:
        client = Client(server, verbose=False, download_files=tmp_path / str(number))
        # Everyone asks for something else at the same time.
        order = [(number + turn) % len(requests) for turn in range(len(requests))]
        answers = {}
        for index in order:
            endpoint, values = requests[index]
            answers[index] = with_pixels(client.predict(*values, api_name=endpoint))
        return [answers[index] for index in range(len(requests))]

    alone = visitor(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(is_close(alone, answers) for answers in pool.map(visitor, range(1, 5)))
    assert not any(is_close(a[0], b[0]) for a, b in itertools.pairwise(alone[:4]))


# ---- for programs --------------------------------------------------------------------------------


def blocks_of_readme() -> list[str]:
    """The indented blocks of the section for programs: Python, then the shell."""
    text = (
        (PROJECT / "space/README.md")
        .read_text(encoding="utf-8")
        .split("## For programs")[1]
        .split("\n## ")[0]
    )
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    return ["\n".join(line[4:] for line in block.strip("\n").splitlines()) for block in blocks]


def test_the_ways_to_call_it_that_are_described_work(server, folder):
    python, shell = blocks_of_readme()
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 120}
    by_python = subprocess.run(
        [sys.executable, "-c", python.replace("http://127.0.0.1:7860", server)], **options
    )
    assert by_python.returncode == 0, by_python.stderr
    *_, classes, maps = by_python.stdout.splitlines()
    label = classes.split()[0]
    assert label in CLASSES and "confidence" in classes and ".png" in maps
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    by_curl = subprocess.run(
        ["sh", "-c", shell.replace("http://127.0.0.1:7860", server)], **options
    ).stdout
    lines = [line for line in by_curl.splitlines() if line]
    assert lines[-2] == "event: complete"
    picture, classes, remark = json.loads(lines[-1].removeprefix("data: "))
    assert (
        set(picture) >= {"path", "url"}
        and classes["label"] == label
        and len(classes["confidences"]) == 3
    )
    assert "32x32" in remark
