"""The app: classifies a picture, shows Grad-CAM heatmaps and images that the network got wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this
folder alone.
"""

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from uploads import keep_seconds, own_folder, start_sweeping

# Before Gradio and torch, which take seconds to import: a wrong setting is refused at once.
KEEP_SECONDS, UPLOADS = keep_seconds(), own_folder()
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
import torch
from gradio.processing_utils import save_file_to_cache
from gradio.themes import Default
from PIL import Image

from batches import Batches
from checks import Blocks, check_choice, check_flag, check_number
from models.bundle import load_bundle
from pictures import preprocess

# Hugging Face's ZeroGPU starts no app without a function for its GPU.
with contextlib.suppress(ImportError):
    import spaces  # pyright: ignore[reportMissingImports]  # only there

    spaces.GPU(lambda: None)

with contextlib.suppress(Exception):  # of glibc, M_ARENA_MAX: a heap per thread makes memory grow
    ctypes.CDLL(None).mallopt(-8, 1)

HERE = Path(__file__).resolve().parent
MODEL, META = load_bundle(HERE)  # checks the other sources as well, so they are imported after it
from models.explain import METHODS, classify_and_explain, colorize, logit_of, overlay, top_logit

CLASSES, SIZE = META["classes"], META["image_size"]
STAGES = {stage.name: stage for stage in MODEL.stages()}
EXAMPLES = [path for name in CLASSES if (path := HERE / "examples" / f"{name}.png").is_file()]
ANY = "any class"
MAX_CLASSES = min(10, len(CLASSES))

# ---- the network ---------------------------------------------------------------------------------


def normalize(image: np.ndarray) -> torch.Tensor:
    """Normalise an image as in the test: uint8 RGB (32, 32, 3) -> float (1, 3, 32, 32)."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


def run_network(key: tuple[str, str] | None, items: list[tuple]) -> list[tuple]:
    """Compute a batch.

    Args:
        key: stage and method of the heatmaps, or None if there are none.
        items: of each image its pixels, uint8 RGB (32, 32, 3), and the logits to explain.

    Returns:
        Of each image its logits (num_classes,), and its heatmaps (number of logits, 32, 32).
    """
    images = torch.cat([normalize(image) for image, _ in items])
    if key is None:
        with torch.inference_mode():
            return [(logits, []) for logits in MODEL(images)]
    targets, layer = [targets for _, targets in items], STAGES[key[0]].module
    return list(zip(*classify_and_explain(MODEL, layer, images, targets, key[1]), strict=True))


NETWORK = Batches(run_network, limit=32)  # heatmaps at once, so that memory stays bounded

# ---- answers -------------------------------------------------------------------------------------

# An image uint8 RGB (32, 32, 3), a heatmap (32, 32) in [0, 1] to draw over it or None, a caption.
Panel = tuple[np.ndarray, np.ndarray | None, str]


class Seen(NamedTuple):
    """What the page remembers of a visitor's last answer, to draw it again.

    Attributes:
        asked: the picture and the options that it is the answer to.
        panels: of its gallery.
        image: what the network saw, uint8 RGB (32, 32, 3).
        probs: of the classes.
    """

    asked: tuple
    panels: list[Panel]
    image: np.ndarray | None = None
    probs: np.ndarray | None = None


def load_tiles() -> list[dict]:
    """Read the misclassified test images, most confident first, "image": uint8 RGB (32, 32, 3)."""
    tiles = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
    enlarged = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))  # 3 times
    pixels = enlarged[::3, ::3]
    for i, tile in enumerate(tiles):
        top, left = i // 10 * SIZE, i % 10 * SIZE
        tile["image"] = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
    return sorted(tiles, key=lambda tile: -max(tile["probabilities"]))


TILES = load_tiles()
MAX_TILES = max(2, len(TILES))  # a slider needs two values


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


def cam_panels(image: np.ndarray, captions: dict[int, str], cams: Iterable) -> list[Panel]:
    """Return the panels of an image's heatmaps; captions has the class of each as its key."""
    remarks = [f": no evidence found for {CLASSES[label]}" for label in captions]
    return [
        (image, cam, caption + ("" if cam.any() else remark))
        for caption, remark, cam in zip(captions.values(), remarks, cams, strict=True)
    ]


def look(picture: dict | None, count: int, stage: str = "", method: str = "") -> Seen:
    """Run the network on a picture, with heatmaps for so many of the top classes."""
    image, key = preprocess(picture, SIZE), (stage, method) if count else None
    targets = [top_logit(rank) for rank in range(count)]
    ((logits, cams),) = NETWORK(key, [(image, targets)], [max(1, count)])
    probs = (logits / (META["temperature"] or 1)).softmax(0)
    top = logits.argsort(descending=True)[:count].tolist()
    panels = cam_panels(image, {i: f"{CLASSES[i]} {probs[i]:.2f}" for i in top}, cams)
    return Seen((picture, count, stage, method), panels, image, probs.numpy())


def classes_of(seen: Seen, count: int) -> tuple[dict[str, float], str]:
    """Return the top classes of a picture with their probabilities, and a remark."""
    top = np.argsort(-seen.probs, kind="stable")[:count]
    unsure = seen.probs.max() < (META["confidence_threshold"] or 0)
    remark = "**The network is unsure: this may be none of its classes.** " if unsure else ""
    remark += f"It saw the middle square of the picture, in {SIZE}x{SIZE} pixels."
    return {CLASSES[i]: float(seen.probs[i]) for i in top}, remark


def check_options(show: object, maps: object, stage: object, method: object) -> int:
    """Return how many heatmaps are to be shown; raise gr.Error for a wrong value."""
    check_flag(show, "Show Grad-CAM")
    count = round(check_number(maps, 1, MAX_CLASSES, "Number of heatmaps"))
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")
    return count if show else 0


def classify(picture: dict | None, top_classes: float) -> tuple[Image.Image, dict[str, float], str]:
    """Return the image that the network saw, its top classes, and a remark."""
    count = round(check_number(top_classes, 1, MAX_CLASSES, "Top classes"))
    seen = look(picture, 0)
    return draw(seen.image), *classes_of(seen, count)


def explain(
    picture: dict | None, show: bool, maps: float, stage: str, method: str, opacity: float
) -> tuple[list, Seen | None]:
    """Return a Grad-CAM gallery of the top classes, and what the page remembers of it."""
    count = check_options(show, maps, stage, method)
    if not count:
        return blend([], opacity), None
    seen = look(picture, count, stage, method)
    return blend(seen.panels, opacity), seen


def answer(seen: Seen | None, picture: dict | None, top_classes: float, *options) -> tuple:
    """Return all that the page shows of a picture: of the last one without the network."""
    classes = round(check_number(top_classes, 1, MAX_CLASSES, "Top classes"))
    *options, opacity = options
    count = check_options(*options)
    if seen and seen.asked == (picture, count, *options[2:]):
        saw = gr.skip()
    else:
        seen = look(picture, count, *options[2:])
        saw = draw(seen.image)
    return saw, *classes_of(seen, classes), blend(seen.panels, opacity), seen


def misclassified(  # noqa: PLR0913
    show: bool,
    count: float,
    true_class: str,
    predicted_class: str,
    maps: bool,
    stage: str,
    method: str,
    opacity: float,
) -> tuple[list, str, Seen]:
    """Return a gallery of misclassified test images, most confident first, and a remark."""
    check_flag(show, "Show misclassified images")
    check_flag(maps, "With Grad-CAM")
    number = round(check_number(count, 1, MAX_TILES, "Number of images"))
    check_choice(true_class, [ANY, *CLASSES], "True class")
    check_choice(predicted_class, [ANY, *CLASSES], "Predicted class")
    check_options(maps, 1, stage, method)
    fits = [tile for tile in TILES if true_class in (ANY, CLASSES[tile["true"]])]
    fits = [tile for tile in fits if predicted_class in (ANY, CLASSES[tile["predicted"]])]
    tiles = fits[:number] if show else []
    panels = tile_panels(tiles, (stage, method) if maps else None)
    remark = f"Showing {len(tiles)} of {len(fits)} stored images that fit."
    if not TILES:
        remark = "No misclassified images are stored with this network."
    asked = (show, count, true_class, predicted_class, maps, stage, method)
    return blend(panels, opacity), remark if show else "", Seen(asked, panels)


def tile_panels(tiles: list[dict], key: tuple[str, str] | None) -> list[Panel]:
    """Return the panels of misclassified images, with a stage and a method also two heatmaps."""
    items = [(tile["image"], [logit_of(tile["predicted"]), logit_of(tile["true"])]) for tile in tiles]
    found = NETWORK(key, items, [2] * len(items)) if key else [((), ())] * len(items)
    panels: list[Panel] = []
    for tile, (_, cams) in zip(tiles, found, strict=True):
        predicted, true = tile["predicted"], tile["true"]
        prob = tile["probabilities"][predicted]
        caption = f"{CLASSES[true]}, taken for {CLASSES[predicted]} ({prob:.2f})"
        panels.append((tile["image"], None, caption))
        why = {predicted: "predicted", true: "true"} if key else {}
        captions = {label: f"why {CLASSES[label]} ({name})" for label, name in why.items()}
        panels += cam_panels(tile["image"], captions, cams)
    return panels


def filtered(seen: Seen | None, *options) -> tuple:
    """Return what `misclassified` does, without the network if only the opacity is another."""
    *asked, opacity = options
    if seen and seen.asked == tuple(asked):
        return blend(seen.panels, opacity), gr.skip(), seen
    return misclassified(*options)


# ---- page ----------------------------------------------------------------------------------------


def live(function: Callable) -> Callable:
    """Return a function of what is seen and a picture that does nothing without a picture."""
    return lambda seen, picture, *options: (
        function(seen, picture, *options) if picture else gr.skip()
    )


def colour_bar() -> str:
    """Return the colours of the heatmaps as HTML."""
    colours = np.round(255 * colorize(np.linspace(0, 1, 17)[None])[0]).astype(int)
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)
    name = "The colours of the heatmaps: blue, cyan, green, yellow, red"
    bar = f'<div role="img" aria-label="{name}" style="background: linear-gradient(90deg, {stops})">'
    return f'<div class="colour-bar">least evidence {bar}</div> most evidence for the class</div>'


def heatmap_controls() -> list:
    """Add the controls for stage, method and opacity of heatmaps."""
    stages = [
        (f"{name} ({stage.size}x{stage.size} feature maps)", name) for name, stage in STAGES.items()
    ]
    return [
        gr.Dropdown(
            stages, value=stages[-1][1], label="Stage", info="The layers whose output is explained"
        ),
        gr.Dropdown(
            list(METHODS), value="GradCAM", label="Method", info="How feature maps are weighted"
        ),
        gr.Slider(
            0,
            1,
            0.4,
            step=0.05,
            label="Opacity of the heatmap",
            info="0: the image alone, 1: the heatmap alone",
        ),
    ]


EVENT = {
    "preprocess": False,  # the functions check their arguments themselves
    "trigger_mode": "always_last",
    "concurrency_id": "network",
    "concurrency_limit": 32,  # the network computes those who wait together
}
PAGE_EVENT = {"api_visibility": "private", "show_progress": "minimal", **EVENT}
GALLERY = {
    "format": "png",
    "height": "auto",
    "object_fit": "contain",
    "buttons": ["download", "download_all"],
}
THEME = Default(  # no web fonts
    primary_hue="indigo",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)

with Blocks(
    title="CIFAR-10: what the network sees",
    delete_cache=(KEEP_SECONDS / 6, KEEP_SECONDS),  # pyright: ignore[reportArgumentType]  # floats work
) as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows only these: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"):
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    str(EXAMPLES[0]) if EXAMPLES else None,
                    sources=["upload", "clipboard"],
                    label="Your picture",
                    height=270,
                )
                # As long as the app runs: their files are not deleted as uploads are.
                image.keep_in_cache |= {save_file_to_cache(p, image.GRADIO_CACHE) for p in EXAMPLES}
                with gr.Row(elem_classes="examples"):
                    examples = [gr.Button(p.stem, icon=p, size="sm", min_width=60) for p in EXAMPLES]
                run = gr.Button("Classify", variant="primary")
            with gr.Column(scale=3):
                with gr.Row():
                    label = gr.Label(label="Classes", scale=2, min_width=180)
                    saw = gr.Image(
                        label="What the network saw",
                        format="png",
                        height=190,
                        min_width=130,
                        buttons=["download"],
                    )
                remark = gr.Markdown()
                gallery = gr.Gallery(label="Grad-CAM heatmaps", columns=2, **GALLERY)
                gr.HTML(colour_bar())
                seen = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            top = gr.Slider(
                1,
                MAX_CLASSES,
                min(3, MAX_CLASSES),
                step=1,
                label="Top classes",
                info="How many are listed",
            )
            show = gr.Checkbox(True, label="Show Grad-CAM", info="Where the evidence is")
            maps = gr.Slider(
                1,
                MAX_CLASSES,
                2,
                step=1,
                label="Number of heatmaps",
                info="One for each of the top classes",
            )
        with gr.Row():
            stage, method, opacity = heatmap_controls()
    with gr.Tab("Misclassified images") as wrong_tab:
        wrong_remark = gr.Markdown()
        wrong_gallery = gr.Gallery(label="Most confident first", columns=6, **GALLERY)
        gr.HTML(colour_bar())
        wrong_seen = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            wrong_show = gr.Checkbox(True, label="Show misclassified images")
            wrong_count = gr.Slider(
                1, MAX_TILES, min(6, MAX_TILES), step=1, label="Number of images"
            )
            wrong_true = gr.Dropdown([ANY, *CLASSES], value=ANY, label="True class")
            wrong_pred = gr.Dropdown([ANY, *CLASSES], value=ANY, label="Predicted class")
        with gr.Row():
            wrong_maps = gr.Checkbox(
                False, label="With Grad-CAM", info="For the predicted and for the true class"
            )
            wrong_options = heatmap_controls()
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

    for path, example in zip(EXAMPLES, examples, strict=True):
        example.click(
            lambda path=path: str(path), None, image, api_visibility="private", queue=False
        )
    classified, options = [saw, label, remark], [show, maps, stage, method, opacity]
    done = run.click(classify, [image, top], classified, api_name="classify", **EVENT)
    # Only after a success: an error would be shown twice.
    done.success(explain, [image, *options], [gallery, seen], api_name="explain", **EVENT)
    # One event for all: each visitor's answers come in the order in which they were asked for.
    moves = [demo.load, image.change, top.input, *(control.input for control in options)]
    inputs, outputs = [seen, image, top, *options], [*classified, gallery, seen]
    gr.on(moves, live(answer), inputs, outputs, show_progress_on=gallery, **PAGE_EVENT)

    options = [wrong_show, wrong_count, wrong_true, wrong_pred, wrong_maps, *wrong_options]
    outputs = [wrong_gallery, wrong_remark, wrong_seen]
    # The files of the tab's last gallery may have been deleted.
    wrong_tab.select(misclassified, options, outputs, api_name="misclassified", **EVENT)
    moves = [control.input for control in options]
    inputs = [wrong_seen, *options]
    gr.on(moves, filtered, inputs, outputs, show_progress_on=wrong_gallery, **PAGE_EVENT)

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
        css_paths=HERE / "style.css",
    )
