"""What a CIFAR-10 network sees in a picture: its classes, its Grad-CAM maps, and where it was wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this folder alone.
"""

import contextlib
import ctypes
import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
import torch
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from PIL import Image

from models.bundle import load_bundle
from pictures import preprocess, refusal
from uploads import keep_seconds, own_folder, start_sweeping

with contextlib.suppress(
    ImportError
):  # Hugging Face's ZeroGPU starts no app without a function for its GPU
    import spaces

    spaces.GPU(lambda: None)

with contextlib.suppress(
    Exception
):  # glibc: one heap for all threads, M_ARENA_MAX; with one each, memory grows
    ctypes.CDLL(None).mallopt(-8, 1)

HERE = Path(__file__).resolve().parent
MODEL, META = load_bundle(HERE)  # checks the other sources as well, so they are imported after it
from models.explain import LOCK, METHODS, gradcam, overlay  # noqa: E402

CLASSES, SIZE, STAGES = (
    META["classes"],
    META["image_size"],
    {stage.name: stage for stage in MODEL.stages()},
)
STAGE_NAMES = [(f"{name} ({stage.size}x{stage.size} map)", name) for name, stage in STAGES.items()]
EXAMPLES = [str(path) for name in CLASSES if (path := HERE / "examples" / f"{name}.png").is_file()]
ANY = "any class"
MOST = min(10, len(CLASSES))  # of classes and maps
KEEP_SECONDS, FOLDER = keep_seconds(), own_folder()
os.environ["GRADIO_TEMP_DIR"] = str(FOLDER)

# ---- what came in --------------------------------------------------------------------------------


def number(value: object, low: int, high: int, name: str) -> float:
    """The value, if it is a number from low to high.

    Gr.Error in words otherwise, for NaN and True as well.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(f"{name}: a number from {low} to {high}, please; got {reprlib.repr(value)}.")
    return value


def check_choice(value: object, choices: list[str], name: str) -> None:
    if value not in choices:
        raise refusal(f"{name}: one of {', '.join(choices)}, please; got {reprlib.repr(value)}.")


def check_flag(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise refusal(f"{name}: true or false, please; got {reprlib.repr(value)}.")


def load_tiles() -> list[dict]:
    """The misclassified test images, most confident first, each with its "image", uint8 RGB (32, 32, 3)."""
    tiles = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
    pixels = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))[
        ::3, ::3
    ]  # they were enlarged 3 times
    for i, tile in enumerate(tiles):
        top, left = i // 10 * SIZE, i % 10 * SIZE
        tile["image"] = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
    return sorted(tiles, key=lambda tile: -max(tile["probabilities"]))


def normalize(image: np.ndarray) -> torch.Tensor:
    """uint8 RGB (32, 32, 3) -> (1, 3, 32, 32), exactly as the network was tested."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


TILES = load_tiles()
MOST_TILES = max(2, len(TILES))  # a slider needs room

# ---- what goes out -------------------------------------------------------------------------------


def draw(image: np.ndarray, cam: np.ndarray | None = None, opacity: float = 0) -> Image.Image:
    """An image, uint8 RGB (32, 32, 3), with visible pixels, 256x256, and over it the colours of its map, if any."""
    pixels = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST))
    if cam is not None:
        cam = np.asarray(Image.fromarray(cam).resize((256, 256), Image.Resampling.BILINEAR))
        pixels = np.uint8(np.round(255 * overlay(pixels / 255, np.clip(cam, 0, 1), opacity)))
    picture = Image.fromarray(pixels)
    picture.info["id"] = os.urandom(
        8
    ).hex()  # Gradio rewrites the file of an equal picture while others may read it
    return picture


def blend(panels: list[tuple], opacity: float) -> list[tuple[Image.Image, str]]:
    """Panels (image uint8 (32, 32, 3), cam (32, 32) or None, caption) -> the gallery, each map over its image."""
    number(opacity, 0, 1, "Opacity")
    return [(draw(image, cam, opacity), caption) for image, cam, caption in panels]


def top_k(image: np.ndarray, count: int) -> dict[int, float]:
    """The `count` likeliest classes of an image, uint8 RGB (32, 32, 3), with their probabilities, likeliest first."""
    with LOCK, torch.inference_mode():
        probs = (MODEL(normalize(image))[0] / (META["temperature"] or 1)).softmax(0)
    best = probs.topk(count)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def cam_panels(image: np.ndarray, stage: str, method: str, captions: dict[int, str]) -> list[tuple]:
    """The Grad-CAM panels of an image, one for each class in captions.

    A map of zeros is said to be one.
    """
    images = normalize(image).repeat(len(captions), 1, 1, 1)
    cams = gradcam(MODEL, STAGES[stage].module, images, list(captions), method)
    panels = []
    for (label, caption), cam in zip(captions.items(), cams, strict=True):
        remark = "" if cam.any() else f": no evidence found for {CLASSES[label]}"
        panels.append((image, cam, caption + remark))
    return panels


def classify(picture: dict | None, top_classes: float) -> tuple[Image.Image, dict[str, float], str]:
    """The 32x32 image that the network saw, its likeliest classes with their probabilities, and a remark."""
    count, image = round(number(top_classes, 1, MOST, "Top classes")), preprocess(picture, SIZE)
    best = top_k(image, count)
    unsure = max(best.values()) < (META["confidence_threshold"] or 0)
    remark = "**The network is unsure: this may be none of its classes.** " if unsure else ""
    remark += f"It saw the middle square of the picture, in {SIZE}x{SIZE} pixels."
    return draw(image), {CLASSES[i]: prob for i, prob in best.items()}, remark


def explain(
    picture: dict | None, show: bool, maps: float, stage: str, method: str, opacity: float
) -> tuple[list, list[tuple]]:
    """Grad-CAM of the likeliest classes, side by side.

    The gallery, and its panels for the next opacity.
    """
    check_flag(show, "Show Grad-CAM")
    count = round(number(maps, 1, MOST, "Number of maps"))
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not show:
        return blend([], opacity), []
    image = preprocess(picture, SIZE)
    captions = {i: f"{CLASSES[i]} {prob:.2f}" for i, prob in top_k(image, count).items()}
    panels = cam_panels(image, stage, method, captions)
    return blend(panels, opacity), panels


def misclassified(
    show: bool,
    count: float,
    true_class: str,
    predicted_class: str,
    maps: bool,
    stage: str,
    method: str,
    opacity: float,
) -> tuple[list, list[tuple], str]:
    """Test images that the network got wrong, most confident first, with the maps for both classes if wanted."""
    check_flag(show, "Show misclassified images")
    check_flag(maps, "With Grad-CAM")
    count = round(number(count, 1, MOST_TILES, "Number of images"))
    check_choice(true_class, [ANY, *CLASSES], "True class")
    check_choice(predicted_class, [ANY, *CLASSES], "Predicted class")
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    if not (show and TILES):
        return (
            blend([], opacity),
            [],
            "No misclassified images are stored with this network." if show else "",
        )
    fits = [tile for tile in TILES if true_class in (ANY, CLASSES[tile["true"]])]
    fits = [tile for tile in fits if predicted_class in (ANY, CLASSES[tile["predicted"]])]
    panels = [panel for tile in fits[:count] for panel in tile_panels(tile, maps, stage, method)]
    return (
        blend(panels, opacity),
        panels,
        f"Showing {min(count, len(fits))} of {len(fits)} stored images that fit.",
    )


def tile_panels(tile: dict, maps: bool, stage: str, method: str) -> list[tuple]:
    """One misclassified image.

    Itself, and with maps the map of the predicted class and that of the true class.
    """
    image, predicted, true = tile["image"], tile["predicted"], tile["true"]
    prob = tile["probabilities"][predicted]
    panels = [(image, None, f"{CLASSES[true]}, taken for {CLASSES[predicted]} ({prob:.2f})")]
    if maps:
        captions = {
            predicted: f"why {CLASSES[predicted]} (predicted)",
            true: f"why {CLASSES[true]} (true)",
        }
        panels += cam_panels(image, stage, method, captions)
    return panels


# ---- page ----------------------------------------------------------------------------------------


class Blocks(gr.Blocks):
    """Gradio's Blocks; what it refuses before our functions see it is refused in words, and no address is fetched."""

    async def preprocess_data(self, block_fn, inputs, *rest, **options):
        try:
            traverse(inputs, refuse_address, is_file_obj)
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error:
            raise
        except Exception as error:
            got = reprlib.repr(inputs)
            raise refusal(
                f"Arguments as the page 'Use via API' shows them, please; got {got}."
            ) from error


def refuse_address(file: dict) -> None:
    if is_http_url_like(file["path"]):
        raise refusal("Upload a picture first: nothing is fetched from an address.")


def live(function: Callable) -> Callable:
    """The function for controls that can be moved before there is a picture.

    Then nothing happens.
    """
    return lambda picture, *options: function(picture, *options) if picture else gr.skip()


def recolor(function: Callable) -> Callable:
    """The function for a move of the opacity alone.

    Blends the panels that are stored, and runs it if none are.
    """
    return lambda panels, *options: (
        (blend(panels, options[-1]), panels) if panels else function(*options)
    )


AS_SENT = {
    "preprocess": False,
    "trigger_mode": "always_last",
}  # our functions say in words what is wrong
NETWORK = {
    "concurrency_id": "network",
    "concurrency_limit": 1,
    **AS_SENT,
}  # one at a time: all share one network
LIVE = {"api_visibility": "private", **NETWORK}
BLEND = {
    "show_progress": "hidden",
    **LIVE,
}  # in the same queue: after the maps that are being computed, not before
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)  # no web fonts
GALLERY = {
    "format": "png",
    "height": "auto",
    "object_fit": "contain",
    "buttons": ["download", "download_all"],
}
CSS = """
.grid-wrap.fixed-height { min-height: 0; max-height: none; padding-top: 36px }  /* galleries show all their panels */
.thumbnail-lg, .thumbnail-lg > img { height: auto !important; aspect-ratio: auto !important }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) }
.thumbnail-item .caption-label { position: static; max-width: none; white-space: normal; border: 0 }  /* below it */
@media (max-width: 640px) { .tab-container button { padding: 0 8px } }  /* all three tabs fit on a phone */
"""

with Blocks(
    title="CIFAR-10: what the network sees", delete_cache=(KEEP_SECONDS / 6, KEEP_SECONDS)
) as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows only these: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"), gr.Row():
        with gr.Column():
            image = gr.Image(sources=["upload", "clipboard"], label="Your picture")
            if EXAMPLES:
                gr.Examples(EXAMPLES, image, label="Examples")
            top = gr.Slider(
                1, MOST, min(3, MOST), step=1, label="Top classes", info="how many, at most ten"
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
                1, MOST, 2, step=1, label="Number of maps", info="for the likeliest classes"
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
                1, MOST_TILES, min(6, MOST_TILES), step=1, label="Number of images"
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
        tta = (
            ""
            if META["test_acc_tta"] is None
            else f", {META['test_acc_tta']:.2%} with test-time augmentation"
        )
        metadata = {
            "parameters": sum(p.numel() for p in MODEL.parameters()),
            "minutes": META["training"]["seconds"] / 60,
        }
        metadata["number"] = len(CLASSES)
        gr.Markdown(
            (HERE / "about.md").read_text(encoding="utf-8").format(**META, **metadata, tta=tta)
        )
        gr.Image(
            str(HERE / "confusion_matrix.png"),
            label="Confusion matrix",
            show_label=False,
            interactive=False,
        )

    answers, maps_of = [saw, label, remark], [gallery, panels]
    chosen = [image, show, maps, stage, method, opacity]
    done = run.click(classify, [image, top], answers, api_name="classify", **NETWORK)
    done.success(explain, chosen, maps_of, api_name="explain", **NETWORK)
    done = image.change(live(classify), [image, top], answers, **LIVE)
    done.success(
        live(explain), chosen, maps_of, **LIVE
    )  # not at once with it: the same error would be said twice
    top.input(live(classify), [image, top], answers, **LIVE)
    gr.on(
        [show.input, maps.input, stage.input, method.input], live(explain), chosen, maps_of, **LIVE
    )
    opacity.input(recolor(live(explain)), [panels, *chosen], maps_of, **BLEND)

    chosen = [
        wrong_show,
        wrong_count,
        wrong_true,
        wrong_pred,
        wrong_maps,
        wrong_stage,
        wrong_method,
    ]
    moves = [
        wrong_tab.select,
        *(control.input for control in chosen),
    ]  # select: the files of the last time may be gone
    chosen, found = [*chosen, wrong_opacity], [wrong_gallery, wrong_panels, wrong_remark]
    gr.on(moves, misclassified, chosen, found, api_name="misclassified", **NETWORK)
    again = recolor(lambda *options: misclassified(*options)[:2])
    wrong_opacity.input(again, [wrong_panels, *chosen], found[:2], **BLEND)

if __name__ == "__main__":
    kept = set().union(
        *(block.keep_in_cache for block in demo.blocks.values() if hasattr(block, "keep_in_cache"))
    )
    start_sweeping(FOLDER, kept, KEEP_SECONDS)
    demo.queue(max_size=64).launch(
        max_file_size="10mb",
        state_session_capacity=200,
        run_history=False,
        show_error=True,
        theme=THEME,
        css=CSS,
    )
