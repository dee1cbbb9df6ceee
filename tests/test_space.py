"""The Space holds up: it stands alone, refuses in words, reads any picture, and tells what the network saw."""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from dataload import CLASSES, normalize
from models import explain as explain_source
from models.bundle import load_bundle, sha256_of_keys
from tests.conftest import PROJECT
from utils import load_app

ANY, STAGE, METHOD = "any class", "layer4", "GradCAM"
PROCESSES = {}  # of the servers: address -> process id
NOT_A_PICTURE = "not a picture that can be read"


# ---- the app, imported and served from a folder of its own ----------------------------------------------------------


def copy_space(exported: Path, folder: Path) -> Path:
    """A copy of the exported Space with ten example pictures, whether the repository has some or not."""
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples").mkdir(exist_ok=True)
    for i, name in enumerate(CLASSES):
        if not (folder / "examples" / f"{name}.png").exists():
            Image.new("RGB", (64, 48), (25 * i, 90, 200 - 20 * i)).save(folder / "examples" / f"{name}.png")
    return folder


@contextlib.contextmanager
def serve(folder: Path, uploads: Path):
    """`python app.py` in that folder, with nothing of the project around it, on a free port: yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    environment = kept | {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(uploads)}
    with (uploads / "server.log").open("w+") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while True:
                assert server.poll() is None and time.monotonic() < deadline, (uploads / "server.log").read_text()
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(address + "/config").status_code == 200:
                        break
                time.sleep(0.1)
            PROCESSES[address] = server.pid
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def folder(exported_space, tmp_path_factory) -> Path:
    return copy_space(exported_space, tmp_path_factory.mktemp("alone") / "space")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve(folder, tmp_path_factory.mktemp("uploads")) as address:
        yield address


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Client:
    return Client(server, verbose=False, download_files=tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def app(folder):
    """The module app of the folder, imported into this process with the project itself out of reach."""
    path = list(sys.path)
    sys.path[:] = [str(folder), *(p for p in path if Path(p or ".").resolve() not in (PROJECT, PROJECT / "tests"))]
    try:
        yield load_app(folder)
    finally:
        sys.path[:] = path


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
    event = httpx.post(url, content=body, headers=headers).json()["event_id"]
    return httpx.get(f"{url}/{event}", timeout=60).text


def in_words(error: BaseException) -> str:
    """The message of an error that a visitor can read: neither a traceback nor Gradio's general excuse."""
    text = str(error)
    assert text and "Traceback" not in text and "show_error" not in text and "preprocess" not in text, text
    return text


# ---- alone ----------------------------------------------------------------------------------------------------------


def test_importing_the_app_needs_only_its_folder_and_starts_nothing(folder):
    script = (
        "import json, sys, threading; import app; "
        "files = [getattr(m, '__file__', None) or '' for m in list(sys.modules.values())]; "
        "print(json.dumps([files, sorted(sys.modules), app.demo.is_running, type(app.demo).__name__]))"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, modules, running, kind = json.loads(done.stdout.splitlines()[-1])
    ours = [Path(file) for file in files if file and Path(file).is_relative_to(PROJECT)]
    assert not [file for file in ours if not {"site-packages", "lib"} & set(file.parts)]
    assert not {"pytorch_lightning", "albumentations", "dataload", "models.registry", "utils"} & set(modules)
    assert kind == "Blocks" and not running
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before  # leaves no litter


def test_the_app_stays_short():
    assert len((PROJECT / "space" / "app.py").read_text(encoding="utf-8").splitlines()) <= 265  # read in ten minutes


def test_a_picture_is_classified_through_the_api(client, folder):
    saw, label, remark = client.predict(handle_file(folder / "examples" / "cat.png"), 10, api_name="/classify")
    assert [entry["label"] for entry in label["confidences"]] != [] and label["label"] in CLASSES
    assert sorted(entry["label"] for entry in label["confidences"]) == sorted(CLASSES)
    assert abs(sum(entry["confidence"] for entry in label["confidences"]) - 1) < 1e-4
    assert Image.open(saw).size == (256, 256) and "32x32" in remark


# ---- the network's view ---------------------------------------------------------------------------------------------


def test_the_app_prepares_an_image_exactly_as_the_network_was_tested(app, noise):
    pixels, picture = noise
    assert np.array_equal(app.seen(picture), pixels)
    assert float((app.normalize(app.seen(picture)) - normalize(pixels[None])).abs().max()) < 1e-5


def test_probabilities_are_those_of_the_network(app, exported_space, noise):
    pixels, picture = noise
    model, _ = load_bundle(exported_space)
    probs = model(normalize(pixels[None]))[0].softmax(0).detach()
    saw, label, _ = app.classify(picture, 3)
    assert np.array_equal(np.asarray(saw)[::8, ::8], pixels)
    assert list(label) == [CLASSES[i] for i in probs.topk(3).indices.tolist()]
    assert all(abs(label[CLASSES[i]] - float(probs[i])) < 1e-4 for i in probs.topk(3).indices)


def test_temperature_and_doubt_come_from_the_bundle(app, noise, monkeypatch):
    cold, sure = max(app.classify(noise[1], 10)[1].values()), app.classify(noise[1], 10)[2]
    monkeypatch.setitem(app.META, "temperature", 5.0)
    monkeypatch.setitem(app.META, "unsure_below", 0.999)
    warm, unsure = max(app.classify(noise[1], 1)[1].values()), app.classify(noise[1], 1)[2]
    assert warm < cold and "unsure" in unsure and "unsure" not in sure


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_opacity_goes_from_the_picture_to_the_map(app, noise, stage):
    pixels, picture = noise
    enlarged = pixels.repeat(8, axis=0).repeat(8, axis=1)
    gallery, panels = app.explain(picture, True, 3, stage, METHOD, 0)
    assert len(gallery) == 3 and all(np.array_equal(shown, enlarged) for shown, _ in gallery)
    for (shown, _), (_, cam, _) in zip(app.blend(panels, 1), panels, strict=True):
        wide = np.clip(np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR)), 0, 1)
        assert np.array_equal(shown, np.uint8(np.round(255 * explain_source.heat(wide))))
    half, full = (np.float32(app.blend(panels, opacity)[0][0]) for opacity in (0.5, 1))
    assert np.abs(half - (enlarged + full) / 2).max() <= 1


def test_each_map_is_for_its_class_and_named_after_it(app, noise):
    gallery, panels = app.explain(noise[1], True, 10, STAGE, METHOD, 0.4)
    likeliest = list(app.classify(noise[1], 10)[1])
    assert [caption.split()[0] for _, caption in gallery] == likeliest
    assert np.abs(panels[0][1] - panels[1][1]).max() > 0.01


@pytest.mark.parametrize("method", explain_source.METHODS)
def test_the_method_that_was_chosen_draws_the_map(app, noise, method):
    _, panels = app.explain(noise[1], True, 2, "layer2", method, 1)
    model, classes = app.MODEL, [CLASSES.index(caption.split()[0]) for *_, caption in panels]
    images = normalize(noise[0][None]).repeat(2, 1, 1, 1)
    with explain_source.METHODS[method](model, [model.layer2]) as cam:
        expected = cam(images, [explain_source.logit_of(label) for label in classes])
    assert np.abs(np.stack([panel[1] for panel in panels]) - expected).max() < 1e-4


def test_grad_cam_can_be_switched_off(app, noise):
    assert app.explain(noise[1], False, 3, STAGE, METHOD, 0.4) == ([], [])


# ---- misclassified images -------------------------------------------------------------------------------------------


def test_misclassified_images_are_pixel_exact_and_most_confident_first(app, tiny_splits):
    gallery, _, remark = app.misclassified(True, 23, ANY, ANY, False, STAGE, METHOD, 0.4)
    assert len(gallery) == 23 and "23 of 23" in remark
    for place, (shown, caption) in enumerate(gallery):
        index = 22 - place  # the probabilities rise with the index
        assert np.array_equal(np.asarray(shown)[::8, ::8], tiny_splits.test.images[index])
        label = int(tiny_splits.test.labels[index])
        assert caption.startswith(f"{CLASSES[label]}, taken for {CLASSES[(label + 1) % 10]}")


def test_misclassified_images_come_with_two_maps_each(app):
    gallery, panels, _ = app.misclassified(True, 5, ANY, ANY, True, "layer3", METHOD, 1)
    assert len(gallery) == 15
    for image, predicted, true in zip(panels[::3], panels[1::3], panels[2::3], strict=True):
        names = image[2].split(" (")[0].split(", taken for ")
        assert [true[2], predicted[2]] == [f"why {names[0]} (true)", f"why {names[1]} (predicted)"]
        assert image[1] is None and predicted[1].shape == true[1].shape == (32, 32)
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(panels[1::3], panels[2::3], strict=True))


def test_misclassified_images_can_be_filtered_and_hidden(app):
    gallery, _, remark = app.misclassified(True, 23, "cat", ANY, False, STAGE, METHOD, 0.4)
    assert len(gallery) in (2, 3) and all(caption.startswith("cat, taken for deer") for _, caption in gallery)
    assert f"of {len(gallery)} " in remark
    assert app.misclassified(True, 23, ANY, "deer", False, STAGE, METHOD, 0.4)[2] == remark
    assert app.misclassified(True, 23, "cat", "truck", False, STAGE, METHOD, 0.4)[0] == []
    assert app.misclassified(False, 23, ANY, ANY, True, STAGE, METHOD, 0.4) == ([], [], "")


def test_a_network_without_stored_mistakes_is_served_too(app, monkeypatch):
    monkeypatch.setattr(app, "TILES", [])
    assert app.misclassified(True, 1, ANY, ANY, True, STAGE, METHOD, 0.4)[0] == []


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 11, 50, -1, None, "abc", "5", True, [1], float("nan"), float("inf")], ids=repr)
def test_the_function_itself_refuses_a_wrong_number_of_classes(app, noise, value):
    with pytest.raises(gr.Error, match="Top classes: a number from 1 to 10"):
        app.classify(noise[1], value)


@pytest.mark.parametrize(("value", "shown"), [(1, 1), (2.7, 3), (10, 10)])
def test_as_many_classes_as_asked_for_and_never_more_than_ten(app, noise, value, shown):
    assert len(app.classify(noise[1], value)[1]) == shown


BAD_NUMBERS = [0, 11, -1, None, "abc", True]
BAD_OPACITIES = [-0.1, 1.1, None, "abc", True]
BAD_CHOICES = ["layer5", "__class__", 0, None, ["layer1"]]
BAD_CALLS = [
    *(("classify", ["picture", v], "Top classes: a number from 1 to 10") for v in [*BAD_NUMBERS, 50]),
    *(
        ("explain", ["picture", True, v, STAGE, METHOD, 0.4], "Number of maps: a number from 1 to 10")
        for v in BAD_NUMBERS
    ),
    *(("explain", ["picture", True, 2, v, METHOD, 0.4], "Stage: one of layer1, layer2") for v in BAD_CHOICES),
    *(("explain", ["picture", True, 2, STAGE, METHOD, v], "Opacity: a number from 0 to 1") for v in BAD_OPACITIES),
    *(("explain", ["picture", True, 2, STAGE, v, 0.4], "Method: one of GradCAM, ") for v in ["ScoreCAM", None, 1]),
    *(("misclassified", [True, 2, ANY, ANY, True, STAGE, v, 0.4], "Method: one of GradCAM, ") for v in ["", "gradcam"]),
    *(
        ("misclassified", [True, v, ANY, ANY, False, STAGE, METHOD, 0.4], "a number from 1 to 23")
        for v in [0, 24, None, True]
    ),
    *(("misclassified", [True, 2, v, ANY, False, STAGE, METHOD, 0.4], "True class: one of") for v in ["cow", None, 3]),
    *(
        ("misclassified", [True, 2, ANY, v, False, STAGE, METHOD, 0.4], "Predicted class: one of")
        for v in ["cow", ["cat"]]
    ),
    *(("misclassified", [True, 2, ANY, ANY, True, v, METHOD, 0.4], "Stage: one of") for v in ["layer5", None]),
    *(("misclassified", [True, 2, ANY, ANY, False, STAGE, METHOD, v], "Opacity: a number") for v in [7, "abc"]),
    ("classify", [None, 3], "Upload a picture"),
    ("explain", [None, True, 2, STAGE, METHOD, 0.4], "Upload a picture"),
]


@pytest.mark.parametrize(("endpoint", "values", "words"), BAD_CALLS, ids=repr)
def test_a_wrong_value_is_refused_in_words_through_the_api(client, folder, endpoint, values, words):
    picture = handle_file(folder / "examples" / "cat.png")
    with pytest.raises(Exception, match=words) as caught:
        client.predict(*(picture if v == "picture" else v for v in values), api_name=f"/{endpoint}")
    in_words(caught.value)


@pytest.mark.parametrize("value", ["NaN", "1e400", "-Infinity"])
def test_a_number_that_no_client_would_send_is_refused_in_words(server, folder, value):
    with (folder / "examples" / "cat.png").open("rb") as file:
        path = httpx.post(f"{server}/gradio_api/upload", files={"files": file}).json()[0]
    answer = raw(server, "classify", f'{{"data": [{{"path": {json.dumps(path)}}}, {value}]}}')
    assert "event: error" in answer and "Top classes: a number from 1 to 10" in answer


# ---- pictures -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size: tuple[int, int], *colours: str) -> Image.Image:
    """Upright stripes of these colours, equally wide."""
    image = Image.new("RGB", size)
    for i, colour in enumerate(colours):
        image.paste(colour, (i * size[0] // len(colours), 0, (i + 1) * size[0] // len(colours), size[1]))
    return image


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 40, 20))  # the upper half is the red that is transparent
    return image


def turned() -> bytes:
    """Stored with black to the left; EXIF orientation 6 turns it clockwise: black is on top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(halves((64, 64), "black", "white"), "JPEG", quality=100, exif=exif)


GIF = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
GREY16 = {value: Image.fromarray(np.full((40, 40), value, np.uint16)) for value in (200, 32896)}
RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)
WHITE, GREY, BLACK = (255,) * 3, (127,) * 3, (0,) * 3
PICTURES = {  # name of the file, its bytes, colour of what is seen: at the top, at the bottom
    "one pixel": ("p.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), RED, RED),
    "5000x1": ("p.png", encoded(halves((5000, 1), "red", "blue", "red"), "PNG"), BLUE, BLUE),
    "middle square": ("p.bmp", encoded(halves((96, 32), "red", "green", "red"), "BMP"), GREEN, GREEN),
    "grey": ("p.png", encoded(Image.new("L", (40, 40), 77), "PNG"), (77,) * 3, (77,) * 3),
    "bilevel": ("p.png", encoded(Image.new("1", (40, 40), 1), "PNG"), WHITE, WHITE),
    "16-bit grey": ("p.png", encoded(GREY16[32896], "PNG"), GREY, GREY),
    "16-bit dark grey": ("p.png", encoded(GREY16[200], "PNG"), BLACK, BLACK),
    "float TIFF": ("p.tif", encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"), GREY, GREY),
    "NaN TIFF": ("p.tif", encoded(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"), BLACK, BLACK),
    "transparent": ("p.png", encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG"), WHITE, WHITE),
    "half transparent": ("p.webp", encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "WEBP"), GREY, GREY),
    "grey with alpha": ("p.png", encoded(Image.new("LA", (40, 40), (9, 0)), "PNG"), WHITE, WHITE),
    "transparent palette": ("p.png", encoded(palette_with_hole(), "PNG", transparency=0), WHITE, BLUE),
    "CMYK": ("p.jpg", encoded(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG", quality=100), RED, RED),
    "EXIF-rotated": ("p.jpg", turned(), BLACK, WHITE),
    "animated GIF": ("p.gif", encoded(GIF[0], "GIF", save_all=True, append_images=GIF[1:]), RED, RED),
    "name without suffix": ("p", encoded(Image.new("RGB", (40, 40), "blue"), "PNG"), BLUE, BLUE),
}  # fmt: skip
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
NO_PICTURES = {
    "text.png": b"This is not a picture.",
    "page.jpg": b"<html><script>alert(1)</script></html>",
    "empty.png": b"",
    "cut.png": encoded(NOISE, "PNG")[:5000],
    "cut.jpg": encoded(NOISE, "JPEG")[:1500],
    "head.gif": b"GIF89a",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_picture_is_seen_as_it_looks(client, tmp_path, name):
    file, content, top, bottom = PICTURES[name]
    (tmp_path / file).write_bytes(content)
    saw = client.predict(handle_file(tmp_path / file), 1, api_name="/classify")[0]
    seen = np.asarray(Image.open(saw))[4::8, 4::8].astype(int)
    assert seen.shape == (32, 32, 3)
    assert np.abs(seen[:12] - top).max() <= 3 and np.abs(seen[20:] - bottom).max() <= 3


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused_in_words(client, tmp_path, name):
    (tmp_path / name).write_bytes(NO_PICTURES[name])
    for endpoint, options in (("/classify", [3]), ("/explain", [True, 2, STAGE, METHOD, 0.4])):
        with pytest.raises(Exception, match=NOT_A_PICTURE) as caught:
            client.predict(handle_file(tmp_path / name), *options, api_name=endpoint)
        in_words(caught.value)


def test_a_huge_picture_is_refused_before_it_is_decoded(client, app, uploads, monkeypatch):
    Image.new("1", (13000, 13000)).save(uploads / "bomb.png", optimize=True)
    assert (uploads / "bomb.png").stat().st_size < 100_000
    with pytest.raises(Exception, match="25 million pixels"):
        client.predict(handle_file(uploads / "bomb.png"), 3, api_name="/classify")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(gr.Error, match="25 million pixels"):
        app.seen({"path": str(uploads / "bomb.png")})


def test_no_picture_made_the_server_take_more_than_a_gigabyte_and_a_half(server, client, tmp_path):
    """After the pictures above; and the largest that is let in, as 16-bit grey, which is scaled in floats."""
    Image.fromarray(np.zeros((4990, 5000), np.uint16)).save(tmp_path / "large.png")
    assert client.predict(handle_file(tmp_path / "large.png"), 1, api_name="/classify")[1]["label"]
    status = Path(f"/proc/{PROCESSES[server]}/status")
    if not status.exists():
        pytest.skip("this system does not tell a process's memory")
    assert int(status.read_text().split("VmHWM:")[1].split()[0]) < 1_500_000  # kB


def test_a_file_over_ten_megabytes_is_refused(server):
    answer = httpx.post(f"{server}/gradio_api/upload", files={"files": ("big.png", bytes(11_000_000))})
    assert answer.status_code == 413


# ---- hostile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "with meta"])
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "EXAMPLE", "app.py", "UPLOADS/../../../../etc/passwd", "SERVER/config"]
)
def test_only_what_was_uploaded_is_read(server, folder, path, meta):
    with (folder / "examples" / "cat.png").open("rb") as file:
        uploaded = httpx.post(f"{server}/gradio_api/upload", files={"files": file}).json()[0]
    places = {"EXAMPLE": str(folder / "examples" / "dog.png"), "UPLOADS": str(Path(uploaded).parent), "SERVER": server}
    for name, place in places.items():
        path = path.replace(name, place)
    answer = raw(server, "classify", json.dumps({"data": [{"path": path, **meta}, 3]}))
    assert "event: error" in answer and "confidences" not in answer and "root:" not in answer


@pytest.mark.parametrize(
    "data",
    ['["' + "A" * 30_000_000 + '", 3]', "[" * 100_000 + "]" * 100_000, "[null, 3" + ", 1" * 10**6 + "]"],
    ids=["long text", "deep", "many values"],
)
def test_an_oversize_request_is_refused_and_the_server_goes_on(server, folder, data):
    """No answer but a refusal, and the next visitor is served."""
    answer = httpx.post(
        f"{server}/gradio_api/call/classify",
        content=f'{{"data": {data}}}',
        timeout=60,
        headers={"Content-Type": "application/json"},
    )
    if answer.status_code == 200:
        event = answer.json()["event_id"]
        assert "event: error" in httpx.get(f"{server}/gradio_api/call/classify/{event}", timeout=60).text
    picture = handle_file(folder / "examples" / "cat.png")
    assert Client(server, verbose=False).predict(picture, 1, api_name="/classify")[1]["label"]


def test_files_of_the_server_are_not_served(server, folder):
    for path in ("/etc/passwd", folder / "app.py", folder / "model.safetensors", folder / "model.json"):
        assert httpx.get(f"{server}/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("name", ["../../../escaped.png", "<img src=x onerror=alert(1)>.png", "..\\..\\escaped.png"])
def test_a_filename_cannot_break_out(server, folder, name):
    content = (folder / "examples" / "cat.png").read_bytes()
    path = httpx.post(f"{server}/gradio_api/upload", files={"files": (name, content)}).json()[0]
    assert "<" not in path and ".." not in path.replace("\\", "/").split("/") and not list(folder.rglob("escaped*"))
    picture = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    answer = raw(server, "classify", json.dumps({"data": [picture, 3]}))
    assert "event: complete" in answer and "<img" not in answer


def change(**changes):
    """Change model.json without telling the checksum; ... takes the key away."""
    return lambda meta: {key: value for key, value in (meta | changes).items() if value is not ...}


def sealed(**changes):
    """The same by someone who knows how the checksum is made."""

    def forge(meta):
        meta = meta | changes
        return meta | {"sha256": meta["sha256"] | {"keys": sha256_of_keys(meta)}}

    return forge


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (change(test_acc=0.99), "the keys have the sha256"),
        (change(std=...), "std: Field required"),
        (change(owner="me"), "owner: Extra inputs"),
        (change(architecture="CustomResNet"), "the keys have the sha256"),
        (sealed(architecture="CustomResNet"), "weights are not those of a CustomResNet"),
        (sealed(architecture="VGG"), "resnet.py has no network 'VGG'"),
        (sealed(source="../evil.py"), "source: String should match"),
        (lambda meta: [meta], "all of it: Input should be"),
    ],
    ids=["value", "missing key", "extra key", "architecture", "sealed architecture", "unknown", "path", "list"],
)  # fmt: skip
def test_an_app_with_a_tampered_description_does_not_start(app, folder, tmp_path, monkeypatch, tamper, words):
    monkeypatch.setattr(gr.Blocks, "launch", lambda *_, **__: pytest.fail("it started"))
    space = copy_space(folder, tmp_path / "space")
    meta = json.loads((space / "model.json").read_text())
    (space / "model.json").write_text(json.dumps(tamper(meta)))
    with pytest.raises(ValueError, match=words):
        runpy.run_path(str(space / "app.py"), run_name="__main__")


def test_an_app_with_tampered_weights_does_not_start_and_names_them(folder, tmp_path):
    space = copy_space(folder, tmp_path / "space")
    weights = bytearray((space / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (space / "model.safetensors").write_bytes(weights)
    done = subprocess.run([sys.executable, "app.py"], cwd=space, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "the weights have the sha256" in done.stderr


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_many_at_once_get_the_answers_that_each_gets_alone(server, folder, tmp_path):
    pictures = [handle_file(folder / "examples" / f"{name}.png") for name in CLASSES[:4]]
    requests = [
        *(("/classify", (picture, 3 + i)) for i, picture in enumerate(pictures)),
        ("/explain", (pictures[0], True, 3, "layer2", METHOD, 0.5)),
        ("/misclassified", (True, 2, ANY, ANY, True, "layer4", "LayerCAM", 0.3)),
    ]

    def ask(request, client):
        """The answer, with the bytes of each picture in place of its path."""
        endpoint, values = request
        text = json.dumps(client.predict(*values, api_name=endpoint), default=str)
        paths = [part for part in text.split('"') if part.endswith(".png")]
        digests = [Image.open(path).tobytes() for path in paths]
        return "|".join(part for part in text.split('"') if not part.endswith(".png")), digests

    def visitor(number):
        client = Client(server, verbose=False, download_files=tmp_path / str(number))
        order = requests[number:] + requests[:number]  # everyone asks for something else at the same time
        answers = {request[0] + repr(request[1][1:]): ask(request, client) for request in order}
        return dict(sorted(answers.items()))

    alone = visitor(0)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(visitor, range(1, 5)))
    assert len(alone) == 6 and all(answers == alone for answers in together)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(answer[0] for answer in alone.values()))


# ---- for programs ---------------------------------------------------------------------------------------------------


def blocks_of_readme() -> list[str]:
    """The indented blocks of the section for programs: Python, then the shell."""
    text = (PROJECT / "space/README.md").read_text(encoding="utf-8").split("## For programs")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    return ["\n".join(line[4:] for line in block.strip("\n").splitlines()) for block in blocks]


def test_the_ways_to_call_it_that_are_described_work(server, folder, tmp_path):
    python, shell = blocks_of_readme()
    shutil.copyfile(folder / "examples" / "cat.png", tmp_path / "cat.png")
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    by_python = subprocess.run([sys.executable, "-c", python.replace("http://127.0.0.1:7860", server)], **options)
    assert by_python.returncode == 0, by_python.stderr
    *_, classes, maps = by_python.stdout.splitlines()
    label = classes.split()[0]
    assert label in CLASSES and "confidence" in classes and ".png" in maps
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    by_curl = subprocess.run(["sh", "-c", shell.replace("http://127.0.0.1:7860", server)], **options).stdout
    lines = [line for line in by_curl.splitlines() if line]
    assert lines[-2] == "event: complete"
    picture, classes, remark = json.loads(lines[-1].removeprefix("data: "))
    assert set(picture) >= {"path", "url"} and classes["label"] == label and len(classes["confidences"]) == 3
    assert "32x32" in remark
