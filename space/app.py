"""The app: classifies a picture, shows Grad-CAM heatmaps and images that the network got wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this
folder alone.
"""

import contextlib
import ctypes
import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path

from uploads import keep_seconds, own_folder, start_sweeping

# Before Gradio and torch, which take seconds to import: a wrong setting is refused at once.
KEEP_SECONDS, UPLOADS = keep_seconds(), own_folder()
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
import torch
from gradio.themes import Default
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from PIL import Image

from models.bundle import load_bundle
from pictures import preprocess, refusal

# Hugging Face's ZeroGPU starts no app without a function for its GPU.
with contextlib.suppress(ImportError):
    import spaces  # pyright: ignore[reportMissingImports]  # only there

    spaces.GPU(lambda: None)

with contextlib.suppress(Exception):  # of glibc, M_ARENA_MAX: a heap per thread makes memory grow
    ctypes.CDLL(None).mallopt(-8, 1)

HERE = Path(__file__).resolve().parent
MODEL, META = load_bundle(HERE)  # checks the other sources as well, so they are imported after it
from models.explain import LOCK, METHODS, gradcam, overlay

CLASSES, SIZE = META["classes"], META["image_size"]
STAGES = {stage.name: stage for stage in MODEL.stages()}
STAGE_NAMES = [(f"{name} ({stage.size}x{stage.size} map)", name) for name, stage in STAGES.items()]
EXAMPLES = [str(path) for name in CLASSES if (path := HERE / "examples" / f"{name}.png").is_file()]
ANY = "any class"
MAX_CLASSES = min(10, len(CLASSES))

# An image uint8 RGB (32, 32, 3), a heatmap (32, 32) in [0, 1] to draw over it or None, a caption.
Panel = tuple[np.ndarray, np.ndarray | None, str]

# ---- inputs --------------------------------------------------------------------------------------


def check_number(value: object, low: int, high: int, name: str) -> float:
    """Return a number from low to high; raise gr.Error for anything else, NaN and True included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(f"{name}: a number from {low} to {high}, please; got {reprlib.repr(value)}.")
    return value


def check_choice(value: object, choices: list[str], name: str) -> None:
    """Raise gr.Error if a value is not among the choices."""
    if value not in choices:
        raise refusal(f"{name}: one of {', '.join(choices)}, please; got {reprlib.repr(value)}.")


def check_flag(value: object, name: str) -> None:
    """Raise gr.Error if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise refusal(f"{name}: true or false, please; got {reprlib.repr(value)}.")


def load_tiles() -> list[dict]:
    """Read the misclassified test images, most confident first, "image": uint8 RGB (32, 32, 3)."""
    tiles = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
    enlarged = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))  # 3 times
    pixels = enlarged[::3, ::3]
    for i, tile in enumerate(tiles):
        top, left = i // 10 * SIZE, i % 10 * SIZE
        tile["image"] = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
    return sorted(tiles, key=lambda tile: -max(tile["probabilities"]))


def normalize(image: np.ndarray) -> torch.Tensor:
    """Normalise an image as in the test: uint8 RGB (32, 32, 3) -> float (1, 3, 32, 32)."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


TILES = load_tiles()
MAX_TILES = max(2, len(TILES))  # a slider needs two values

# ---- answers -------------------------------------------------------------------------------------


def draw(image: np.ndarray, cam: np.ndarray | None = None, opacity: float = 0) -> Image.Image:
    """Draw a panel of 256x256.

    Args:
        image: uint8 RGB (32, 32, 3), enlarged so that its pixels are visible.
        cam: a heatmap (32, 32) in [0, 1] to draw over it, or None.
        opacity: of the heatmap, in [0, 1].
    """
    pixels = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST))
    if cam is not None:
        cam = np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR))
        blended = overlay(pixels / 255, np.clip(cam, 0, 1), opacity)
        pixels = np.round(255 * blended).astype(np.uint8)
    picture = Image.fromarray(pixels)
    # Gradio rewrites the file of an equal picture while others may read it.
    picture.info["id"] = os.urandom(8).hex()
    return picture


def blend(panels: list[Panel], opacity: float) -> list[tuple[Image.Image, str]]:
    """Return the pictures of a gallery with their captions, each heatmap over its image."""
    check_number(opacity, 0, 1, "Opacity")
    return [(draw(image, cam, opacity), caption) for image, cam, caption in panels]


def top_k(image: np.ndarray, count: int) -> dict[int, float]:
    """Return the count likeliest classes of an image, uint8 RGB (32, 32, 3), by probability."""
    with LOCK, torch.inference_mode():
        probs = (MODEL(normalize(image))[0] / (META["temperature"] or 1)).softmax(0)
    best = probs.topk(count)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def cam_panels(image: np.ndarray, stage: str, method: str, captions: dict[int, str]) -> list[Panel]:
    """Return the Grad-CAM panels of an image, uint8 RGB (32, 32, 3), one per class in captions."""
    images = normalize(image).repeat(len(captions), 1, 1, 1)
    cams = gradcam(MODEL, STAGES[stage].module, images, list(captions), method)
    panels: list[Panel] = []
    for (label, caption), cam in zip(captions.items(), cams, strict=True):
        remark = "" if cam.any() else f": no evidence found for {CLASSES[label]}"
        panels.append((image, cam, caption + remark))
    return panels


def classify(picture: dict | None, top_classes: float) -> tuple[Image.Image, dict[str, float], str]:
    """Return the image that the network saw, its likeliest classes, and a remark."""
    count = round(check_number(top_classes, 1, MAX_CLASSES, "Top classes"))
    image = preprocess(picture, SIZE)
    best = top_k(image, count)
    unsure = max(best.values()) < (META["confidence_threshold"] or 0)
    remark = "**The network is unsure: this may be none of its classes.** " if unsure else ""
    remark += f"It saw the middle square of the picture, in {SIZE}x{SIZE} pixels."
    return draw(image), {CLASSES[i]: prob for i, prob in best.items()}, remark


def explain(
    picture: dict | None, show: bool, maps: float, stage: str, method: str, opacity: float
) -> tuple[list, list[Panel]]:
    """Return a Grad-CAM gallery of the likeliest classes, and its panels for another opacity."""
    check_flag(show, "Show Grad-CAM")
    count = round(check_number(maps, 1, MAX_CLASSES, "Number of maps"))
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not show:
        return blend([], opacity), []
    image = preprocess(picture, SIZE)
    captions = {i: f"{CLASSES[i]} {prob:.2f}" for i, prob in top_k(image, count).items()}
    panels = cam_panels(image, stage, method, captions)
    return blend(panels, opacity), panels


def misclassified(  # noqa: PLR0913
    show: bool,
    count: float,
    true_class: str,
    predicted_class: str,
    maps: bool,
    stage: str,
    method: str,
    opacity: float,
) -> tuple[list, list[Panel], str]:
    """Return a gallery of misclassified test images, most confident first, its panels, a remark."""
    check_flag(show, "Show misclassified images")
    check_flag(maps, "With Grad-CAM")
    count = round(check_number(count, 1, MAX_TILES, "Number of images"))
    check_choice(true_class, [ANY, *CLASSES], "True class")
    check_choice(predicted_class, [ANY, *CLASSES], "Predicted class")
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not (show and TILES):
        remark = "No misclassified images are stored with this network." if show else ""
        return blend([], opacity), [], remark
    fits = [tile for tile in TILES if true_class in (ANY, CLASSES[tile["true"]])]
    fits = [tile for tile in fits if predicted_class in (ANY, CLASSES[tile["predicted"]])]
    panels = [panel for tile in fits[:count] for panel in tile_panels(tile, maps, stage, method)]
    remark = f"Showing {min(count, len(fits))} of {len(fits)} stored images that fit."
    return blend(panels, opacity), panels, remark


def tile_panels(tile: dict, maps: bool, stage: str, method: str) -> list[Panel]:
    """Return the panels of a misclassified image, with maps also its two heatmaps."""
    image, predicted, true = tile["image"], tile["predicted"], tile["true"]
    prob = tile["probabilities"][predicted]
    panels: list[Panel] = [
        (image, None, f"{CLASSES[true]}, taken for {CLASSES[predicted]} ({prob:.2f})")
    ]
    if maps:
        captions = {
            predicted: f"why {CLASSES[predicted]} (predicted)",
            true: f"why {CLASSES[true]} (true)",
        }
        panels += cam_panels(image, stage, method, captions)
    return panels


# ---- page ----------------------------------------------------------------------------------------


class Blocks(gr.Blocks):
    """Gradio's Blocks that fetch no address and say what they refuse."""

    async def preprocess_data(self, block_fn, inputs, *rest, **options):
        """Check inputs before any function of the app gets them."""
        try:
            traverse(inputs, refuse_address, is_file_obj)
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error:
            raise
        except Exception as error:
            got = reprlib.repr(inputs)
            message = f"Arguments as the page 'Use via API' shows them, please; got {got}."
            raise refusal(message) from error


def refuse_address(file: dict) -> None:
    """Raise gr.Error for a file that would be downloaded."""
    if is_http_url_like(file["path"]):
        raise refusal("Upload a picture first: nothing is fetched from an address.")


def live(function: Callable) -> Callable:
    """Return a function that does nothing as long as there is no picture."""
    return lambda picture, *options: function(picture, *options) if picture else gr.skip()


def recolor(function: Callable) -> Callable:
    """Return a function for a new opacity: it blends stored panels, or computes them first."""
    return lambda panels, *options: (
        (blend(panels, options[-1]), panels) if panels else function(*options)
    )


NETWORK_EVENT = {
    "preprocess": False,  # the functions check their arguments themselves
    "trigger_mode": "always_last",
    "concurrency_id": "network",
    "concurrency_limit": 1,  # all visitors share one network
}
LIVE_EVENT = {"api_visibility": "private", **NETWORK_EVENT}
BLEND_EVENT = {"show_progress": "hidden", **LIVE_EVENT}  # waits for heatmaps in the same queue
THEME = Default(  # no web fonts
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
GALLERY = {
    "format": "png",
    "height": "auto",
    "object_fit": "contain",
    "buttons": ["download", "download_all"],
}
CSS = """
/* galleries show all their panels, with the captions below them */
.grid-wrap.fixed-height { min-height: 0; max-height: none; padding-top: 36px }
.thumbnail-lg, .thumbnail-lg > img { height: auto !important; aspect-ratio: auto !important }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) }
.thumbnail-item .caption-label {
  position: static; max-width: none; white-space: normal; border: 0
}
/* all three tabs fit on a phone */
@media (max-width: 640px) { .tab-container button { padding: 0 8px } }
"""

with Blocks(
    title="CIFAR-10: what the network sees",
    delete_cache=(KEEP_SECONDS / 6, KEEP_SECONDS),  # pyright: ignore[reportArgumentType]  # floats work
) as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows only these: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"), gr.Row():
        with gr.Column():
            image = gr.Image(sources=["upload", "clipboard"], label="Your picture")
            if EXAMPLES:
                gr.Examples(EXAMPLES, image, label="Examples")
            top = gr.Slider(
                1,
                MAX_CLASSES,
                min(3, MAX_CLASSES),
                step=1,
                label="Top classes",
                info="how many, at most ten",
            )
            run = gr.Button("Classify", variant="primary")
            label = gr.Label(label="Classes")
            remark = gr.Markdown()
        with gr.Column():
            saw = gr.Image(
                label="What the network saw", format="png", height=280, buttons=["download"]
            )
            show = gr.Checkbox(True, label="Show Grad-CAM", info="where the network looked")
            maps = gr.Slider(
                1, MAX_CLASSES, 2, step=1, label="Number of maps", info="for the likeliest classes"
            )
            stage = gr.Dropdown(
                STAGE_NAMES, value=list(STAGES)[-1], label="Stage", info="whose output is explained"
            )
            method = gr.Dropdown(
                list(METHODS), value="GradCAM", label="Method", info="of making the map"
            )
            opacity = gr.Slider(
                0, 1, 0.4, step=0.05, label="Opacity of the map", info="0: picture, 1: map alone"
            )
            gallery = gr.Gallery(label="Grad-CAM", columns=2, **GALLERY)
            panels = gr.State([], time_to_live=KEEP_SECONDS)
    with gr.Tab("Misclassified images") as wrong_tab, gr.Row():
        with gr.Column():
            wrong_show = gr.Checkbox(True, label="Show misclassified images")
            wrong_count = gr.Slider(
                1, MAX_TILES, min(6, MAX_TILES), step=1, label="Number of images"
            )
            wrong_true = gr.Dropdown([ANY, *CLASSES], value=ANY, label="True class")
            wrong_pred = gr.Dropdown([ANY, *CLASSES], value=ANY, label="Predicted class")
            wrong_maps = gr.Checkbox(
                False, label="With Grad-CAM", info="for the predicted and for the true class"
            )
            wrong_stage = gr.Dropdown(STAGE_NAMES, value=list(STAGES)[-1], label="Stage")
            wrong_method = gr.Dropdown(list(METHODS), value="GradCAM", label="Method")
            wrong_opacity = gr.Slider(
                0, 1, 0.4, step=0.05, label="Opacity of the map", info="0: image, 1: map alone"
            )
        with gr.Column(scale=2):
            wrong_remark = gr.Markdown()
            wrong_gallery = gr.Gallery(label="Most confident first", columns=3, **GALLERY)
            wrong_panels = gr.State([], time_to_live=KEEP_SECONDS)
    with gr.Tab("About"):
        tta_acc = META["test_acc_tta"]
        about = {
            **META,
            "parameters": sum(p.numel() for p in MODEL.parameters()),
            "minutes": META["training"]["seconds"] / 60,
            "number": len(CLASSES),
            "tta": "" if tta_acc is None else f", {tta_acc:.2%} with test-time augmentation",
        }
        gr.Markdown((HERE / "about.md").read_text(encoding="utf-8").format(**about))
        gr.Image(
            str(HERE / "confusion_matrix.png"),
            label="Confusion matrix",
            show_label=False,
            interactive=False,
        )

    answers, heatmaps = [saw, label, remark], [gallery, panels]
    options = [image, show, maps, stage, method, opacity]
    done = run.click(classify, [image, top], answers, api_name="classify", **NETWORK_EVENT)
    done.success(explain, options, heatmaps, api_name="explain", **NETWORK_EVENT)
    done = image.change(live(classify), [image, top], answers, **LIVE_EVENT)
    # Only after a success: an error would be shown twice.
    done.success(live(explain), options, heatmaps, **LIVE_EVENT)
    top.input(live(classify), [image, top], answers, **LIVE_EVENT)
    moves = [show.input, maps.input, stage.input, method.input]
    gr.on(moves, live(explain), options, heatmaps, **LIVE_EVENT)
    opacity.input(recolor(live(explain)), [panels, *options], heatmaps, **BLEND_EVENT)

    options = [wrong_show, wrong_count, wrong_true, wrong_pred, wrong_maps]
    options += [wrong_stage, wrong_method]
    # The tab as well: the files of its last gallery may have been deleted.
    moves = [wrong_tab.select, *(control.input for control in options)]
    options, answers = [*options, wrong_opacity], [wrong_gallery, wrong_panels, wrong_remark]
    gr.on(moves, misclassified, options, answers, api_name="misclassified", **NETWORK_EVENT)
    again = recolor(lambda *values: misclassified(*values)[:2])
    wrong_opacity.input(again, [wrong_panels, *options], answers[:2], **BLEND_EVENT)

if __name__ == "__main__":
    kept = set().union(
        *(block.keep_in_cache for block in demo.blocks.values() if hasattr(block, "keep_in_cache"))
    )
    start_sweeping(UPLOADS, kept, KEEP_SECONDS)
    demo.queue(max_size=64).launch(
        max_file_size="10mb",
        state_session_capacity=200,
        run_history=False,
        show_error=True,
        theme=THEME,
        css=CSS,
    )
