"""What a CIFAR-10 network sees in a picture: its classes, its Grad-CAM maps, and where it was wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this folder alone.
"""

import contextlib
import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
import torch
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image, ImageOps

import uploads
from models.bundle import load_bundle
from pictures import Unreadable, read_picture

with contextlib.suppress(ImportError):  # Hugging Face's ZeroGPU starts no app without a function for its GPU
    import spaces

    spaces.GPU(lambda: None)

with contextlib.suppress(Exception):  # glibc: one heap for all threads, M_ARENA_MAX; with one each, memory grows
    ctypes.CDLL(None).mallopt(-8, 1)

HERE, UPLOADS = Path(__file__).resolve().parent, uploads.own_folder()
MODEL, META = load_bundle(HERE)  # checks the other sources as well, so they are imported after it
from models.explain import LOCK, METHODS, gradcam, overlay  # noqa: E402

CLASSES, SIZE, STAGES = META["classes"], META["image_size"], {stage.name: stage for stage in MODEL.stages()}
STAGE_NAMES = [(f"{name} ({stage.size}x{stage.size} map)", name) for name, stage in STAGES.items()]
MOST = min(10, len(CLASSES))  # classes or maps at a time
EXAMPLES = [str(path) for path in (HERE / "examples" / f"{name}.png" for name in CLASSES) if path.exists()]
ANY = "any class"

refusal = functools.partial(gr.Error, print_exception=False)  # for the visitor, not for the log

# ---- what came in ---------------------------------------------------------------------------------------------------


def number(value: object, low: int, high: int, name: str) -> float:
    """The value, if it is a number from low to high; gr.Error in words otherwise, for NaN and True as well."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(f"{name}: a number from {low} to {high}, please; got {value!r:.40}.")
    return value


def check_choice(value: object, choices: list[str], name: str) -> None:
    if value not in choices:
        raise refusal(f"{name}: one of {', '.join(choices)}, please; got {value!r:.40}.")


def check_switch(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise refusal(f"{name}: true or false, please; got {value!r:.40}.")


def seen(picture: dict | None) -> np.ndarray:
    """What the network sees of an uploaded {"path": file}: the square in its middle, as uint8 RGB (32, 32, 3)."""
    path = picture.get("path") if isinstance(picture, dict) else None
    if not (path and isinstance(path, str)):
        asked = "; addresses are not read" if picture else ""
        raise refusal(f"Upload a picture or pick an example first{asked}.")
    if not is_in_or_equal(path, get_upload_folder()):  # Gradio itself trusts a path without its "meta"
        raise refusal("Only a picture that was uploaded here is read; upload it first.")
    try:
        return np.asarray(ImageOps.fit(read_picture(path), (SIZE, SIZE), Image.Resampling.LANCZOS))
    except FileNotFoundError as error:
        raise refusal("This picture is no longer there; please upload it again.") from error
    except (Unreadable, OSError) as error:
        raise refusal(str(error)) from error


def load_tiles() -> list[dict]:
    """The misclassified test images, most confident first, each with its "image", uint8 RGB (32, 32, 3)."""
    tiles = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
    pixels = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))[::3, ::3]  # they were enlarged 3 times
    for i, tile in enumerate(tiles):
        top, left = i // 10 * SIZE, i % 10 * SIZE
        tile["image"] = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
    return sorted(tiles, key=lambda tile: -max(tile["probabilities"]))


def normalize(image: np.ndarray) -> torch.Tensor:
    """uint8 RGB (32, 32, 3) -> (1, 3, 32, 32), exactly as the network was tested."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


TILES = load_tiles()
COUNTS = max(2, len(TILES))  # the largest number of images to ask for: a slider needs a range

# ---- what goes out --------------------------------------------------------------------------------------------------


def draw(image: np.ndarray, cam: np.ndarray | None = None, opacity: float = 0) -> Image.Image:
    """An image, uint8 RGB (32, 32, 3), with visible pixels, 256x256, and over it the colours of its map, if any."""
    pixels = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST))
    if cam is not None:
        cam = np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR))
        pixels = np.uint8(np.round(255 * overlay(pixels / 255, np.clip(cam, 0, 1), opacity)))
    picture = Image.fromarray(pixels)
    picture.info["id"] = os.urandom(8).hex()  # Gradio rewrites the file of an equal picture while others may read it
    return picture


def blend(panels: list[tuple], opacity: float) -> list[tuple[Image.Image, str]]:
    """Panels (image uint8 (32, 32, 3), cam (32, 32) or None, caption) -> the gallery, each map over its image."""
    number(opacity, 0, 1, "Opacity")
    return [(draw(image, cam, opacity), caption) for image, cam, caption in panels]


def likeliest(image: np.ndarray, count: int) -> dict[int, float]:
    """The `count` likeliest classes of an image, uint8 RGB (32, 32, 3), with their probabilities, likeliest first."""
    with LOCK, torch.inference_mode():
        probs = (MODEL(normalize(image))[0] / (META["temperature"] or 1)).softmax(0)
    best = probs.topk(min(count, len(CLASSES)))
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def cam_panels(image: np.ndarray, stage: str, method: str, captions: dict[int, str]) -> list[tuple]:
    """The Grad-CAM panels of an image, one for each class in captions; a heatmap of zeros says so."""
    images = normalize(image).repeat(len(captions), 1, 1, 1)
    cams = gradcam(MODEL, STAGES[stage].module, images, list(captions), method)
    found = zip(cams, captions.values(), strict=True)
    return [(image, cam, text if cam.any() else f"{text}: no evidence found") for cam, text in found]


def classify(picture: dict | None, top_classes: float) -> tuple[Image.Image, dict[str, float], str]:
    """The 32x32 image that the network saw, its likeliest classes with their probabilities, and a remark."""
    count, image = round(number(top_classes, 1, MOST, "Top classes")), seen(picture)
    best = likeliest(image, count)
    unsure = max(best.values()) < (META["unsure_below"] or 0)
    remark = "**The network is unsure: this may be none of its classes.** " if unsure else ""
    remark += f"It saw the middle square of the picture, in {SIZE}x{SIZE} pixels."
    return draw(image), {CLASSES[i]: prob for i, prob in best.items()}, remark


def explain(
    picture: dict | None, show: bool, maps: float, stage: str, method: str, opacity: float
) -> tuple[list, list[tuple]]:
    """Grad-CAM of the likeliest classes, side by side: the gallery, and its panels for the next opacity."""
    count = round(number(maps, 1, MOST, "Number of maps"))
    check_switch(show, "Show Grad-CAM")
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not show:
        return blend([], opacity), []
    image = seen(picture)
    captions = {i: f"{CLASSES[i]} {prob:.2f}" for i, prob in likeliest(image, count).items()}
    panels = cam_panels(image, stage, method, captions)
    return blend(panels, opacity), panels


def misclassified(
    show: bool, count: float, true_class: str, predicted_class: str, maps: bool, stage: str, method: str, opacity: float
) -> tuple[list, list[tuple], str]:
    """Test images that the network got wrong, most confident first, with the maps for both classes if wanted."""
    count = round(number(count, 1, COUNTS, "Number of images"))
    check_switch(show, "Show misclassified images")
    check_switch(maps, "With Grad-CAM")
    check_choice(true_class, [ANY, *CLASSES], "True class")
    check_choice(predicted_class, [ANY, *CLASSES], "Predicted class")
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not show:
        return blend([], opacity), [], ""
    fits = [tile for tile in TILES if true_class in (ANY, CLASSES[tile["true"]])]
    fits = [tile for tile in fits if predicted_class in (ANY, CLASSES[tile["predicted"]])]
    panels = [panel for tile in fits[:count] for panel in tile_panels(tile, maps, stage, method)]
    remark = f"Showing {min(count, len(fits))} of {len(fits)} stored images that fit."
    return blend(panels, opacity), panels, remark if TILES else "This network has no stored mistakes."


def tile_panels(tile: dict, maps: bool, stage: str, method: str) -> list[tuple]:
    """One misclassified image: itself, and with maps the map of the predicted class and that of the true class."""
    image, predicted, true = tile["image"], tile["predicted"], tile["true"]
    prob = tile["probabilities"][predicted]
    panels = [(image, None, f"{CLASSES[true]}, taken for {CLASSES[predicted]} ({prob:.2f})")]
    if maps:
        captions = {predicted: f"why {CLASSES[predicted]} (predicted)", true: f"why {CLASSES[true]} (true)"}
        panels += cam_panels(image, stage, method, captions)
    return panels


# ---- page -----------------------------------------------------------------------------------------------------------


def live(function: Callable) -> Callable:
    """The function for controls that can be moved before there is a picture: then nothing happens."""
    return lambda picture, *options: function(picture, *options) if picture else gr.skip()


def reblend(function: Callable) -> Callable:
    """The function for the opacity: it blends anew, and computes the panels again only if their time was over."""

    def run(panels: list[tuple] | None, *options: object) -> tuple | dict:
        return (blend(panels, options[-1]), panels) if panels else function(*options)

    return run


def forget() -> tuple:
    """What is shown of a picture that could not be read: nothing."""
    return None, None, "", [], []


AS_SENT = {"preprocess": False, "trigger_mode": "always_last"}  # our functions say in words what is wrong
NETWORK = {"concurrency_id": "network", "concurrency_limit": 1, **AS_SENT}  # one at a time: all share one network
LIVE = {"api_visibility": "private", **NETWORK}
BLEND = {"show_progress": "hidden", **LIVE}  # in the same queue: after the maps that are being computed, not before
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
GALLERY = {"format": "png", "height": "auto", "object_fit": "contain", "buttons": ["download", "download_all"]}
CSS = """
.grid-wrap.fixed-height { min-height: 0; max-height: none; padding-top: 36px }  /* galleries show all their panels */
.thumbnail-lg, .thumbnail-lg > img { height: auto !important; aspect-ratio: auto !important }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) }
.thumbnail-item .caption-label { position: static; max-width: none; white-space: normal; border: 0 }  /* below it */
@media (max-width: 640px) { .tab-container button { padding: 0 8px } }  /* all three tabs fit on a phone */
"""

with gr.Blocks(title="CIFAR-10: what the network sees") as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows only these: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"), gr.Row():
        with gr.Column():
            image = gr.Image(sources=["upload", "clipboard"], label="Your picture")
            gr.Examples(EXAMPLES, image, label="Examples")
            top = gr.Slider(1, MOST, min(3, MOST), step=1, label="Top classes", info=f"how many, at most {MOST}")
            run = gr.Button("Classify", variant="primary")
            label = gr.Label(label="Classes")
            remark = gr.Markdown()
        with gr.Column():
            saw = gr.Image(label="What the network saw", format="png", height=280, buttons=["download"])
            show = gr.Checkbox(True, label="Show Grad-CAM", info="where the network looked")
            maps = gr.Slider(1, MOST, 2, step=1, label="Number of maps", info="for the likeliest classes")
            stage = gr.Dropdown(STAGE_NAMES, value=list(STAGES)[-1], label="Stage", info="whose output is explained")
            method = gr.Dropdown(list(METHODS), value="GradCAM", label="Method", info="of making the map")
            opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Opacity of the map", info="0: picture, 1: map alone")
            gallery = gr.Gallery(label="Grad-CAM", columns=2, **GALLERY)
            panels = gr.State([], time_to_live=3600)
    with gr.Tab("Misclassified images") as wrong_tab, gr.Row():
        with gr.Column():
            wrong_show = gr.Checkbox(True, label="Show misclassified images")
            wrong_count = gr.Slider(1, COUNTS, min(6, COUNTS), step=1, label="Number of images")
            wrong_true = gr.Dropdown([ANY, *CLASSES], value=ANY, label="True class")
            wrong_pred = gr.Dropdown([ANY, *CLASSES], value=ANY, label="Predicted class")
            wrong_maps = gr.Checkbox(False, label="With Grad-CAM", info="for the predicted and for the true class")
            wrong_stage = gr.Dropdown(STAGE_NAMES, value=list(STAGES)[-1], label="Stage")
            wrong_method = gr.Dropdown(list(METHODS), value="GradCAM", label="Method")
            wrong_opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Opacity of the map", info="0: image, 1: map alone")
        with gr.Column(scale=2):
            wrong_remark = gr.Markdown()
            wrong_gallery = gr.Gallery(label="Most confident first", columns=3, **GALLERY)
            wrong_panels = gr.State([], time_to_live=3600)
    with gr.Tab("About"):
        tta = "" if META["test_acc_tta"] is None else f", {META['test_acc_tta']:.2%} with test-time augmentation"
        facts = {"parameters": sum(p.numel() for p in MODEL.parameters()), "minutes": META["training"]["seconds"] / 60}
        gr.Markdown((HERE / "about.md").read_text(encoding="utf-8").format(**META, **facts, tta=tta))
        gr.Image(str(HERE / "confusion_matrix.png"), label="Confusion matrix", show_label=False, interactive=False)

    what, why = ([image, top], [saw, label, remark]), ([image, show, maps, stage, method, opacity], [gallery, panels])
    done = run.click(classify, *what, api_name="classify", **NETWORK)
    done.success(explain, *why, api_name="explain", **NETWORK)
    done.failure(forget, None, [*what[1], *why[1]], **LIVE)
    changed = image.change(live(classify), *what, **LIVE)
    changed.success(live(explain), *why, **LIVE)  # after it: a file that is no picture is refused once
    changed.failure(forget, None, [*what[1], *why[1]], **LIVE)
    top.input(live(classify), *what, **LIVE)
    gr.on([show.input, maps.input, stage.input, method.input], live(explain), *why, **LIVE)
    opacity.input(reblend(live(explain)), [panels, *why[0]], why[1], **BLEND)
    wanted = [wrong_show, wrong_count, wrong_true, wrong_pred, wrong_maps, wrong_stage, wrong_method]
    found, moves = [wrong_gallery, wrong_panels, wrong_remark], [control.input for control in wanted]
    # When the tab is opened, not when the page is: by then the pictures may have been deleted.
    moves, asked = [wrong_tab.select, *moves], [*wanted, wrong_opacity]
    gr.on(moves, misclassified, asked, found, api_name="misclassified", **NETWORK)
    wrong_again = reblend(lambda *options: misclassified(*options)[:2])
    wrong_opacity.input(wrong_again, [wrong_panels, *asked], found[:2], **BLEND)

if __name__ == "__main__":
    uploads.start_sweeping(UPLOADS)
    demo.queue(max_size=64).launch(
        max_file_size="10mb", state_session_capacity=200, run_history=False, show_error=True, theme=THEME, css=CSS
    )
