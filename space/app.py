"""The app: classifies a picture, shows Grad-CAM heatmaps and images that the network got wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this
folder alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from temporary_files import keep_seconds, own_folder, start_sweeping

# Before Gradio and torch, which take seconds to import: a wrong setting is refused at once.
KEEP_SECONDS, UPLOADS = keep_seconds(), own_folder()
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
from gradio.processing_utils import save_file_to_cache
from gradio.themes import Default
from PIL import Image

from checks import Blocks, check_choice, check_flag, check_number

# Before others import from models/: it checks what is there.
from classifier import CLASSES, META, MODEL, NETWORK, SIZE, STAGES, TILES
from drawing import Panel, blend, colour_bar, draw
from models.explain import METHODS, logit_of, top_logit
from pictures import preprocess

# Hugging Face's ZeroGPU starts no app without a function for its GPU.
with contextlib.suppress(ImportError):
    import spaces  # pyright: ignore[reportMissingImports]  # only there

    spaces.GPU(lambda: None)

HERE = Path(__file__).resolve().parent
EXAMPLES = [path for name in CLASSES if (path := HERE / "examples" / f"{name}.png").is_file()]
ANY = "any class"
MAX_CLASSES, MAX_TILES = min(10, len(CLASSES)), max(2, len(TILES))  # a slider needs two values

# ---- answers -------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the page remembers of a visitor's last picture, to draw the answer again.

    Attributes:
        asked: the picture and the options that it is the answer to.
        image: what the network saw, uint8 RGB (32, 32, 3).
        probs: of all classes.
        panels: of the gallery.
    """

    asked: tuple
    image: np.ndarray
    probs: np.ndarray
    panels: list[Panel]


def cam_panels(image: np.ndarray, captions: dict[int, str], cams: Iterable) -> list[Panel]:
    """Return the panels of an image's heatmaps; captions has the class of each as its key."""
    remarks = [f": no evidence found for {CLASSES[label]}" for label in captions]
    return [
        (image, cam, caption + ("" if cam.any() else remark))
        for caption, remark, cam in zip(captions.values(), remarks, cams, strict=True)
    ]


def asked_for(picture: object, *options: object) -> tuple:
    """Return what tells a request from others, however large its picture is."""
    return hash(repr(picture)), *options


def look(picture: dict | None, count: int, stage: str = "", method: str = "") -> Seen:
    """Run the network on a picture, with heatmaps for so many of the top classes."""
    image, key = preprocess(picture, SIZE), (stage, method) if count else None
    targets = [top_logit(rank) for rank in range(count)]
    ((logits, cams),) = NETWORK(key, [(image, targets)], [max(1, count)])
    probs = (logits / (META["temperature"] or 1)).softmax(0)
    top = logits.argsort(descending=True)[:count].tolist()
    panels = cam_panels(image, {i: f"{CLASSES[i]} {probs[i]:.2f}" for i in top}, cams)
    return Seen(asked_for(picture, count, stage, method), image, probs.numpy(), panels)


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
    if seen and seen.asked == asked_for(picture, count, *options[2:]):
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
) -> tuple[list, str, tuple]:
    """Return a gallery of misclassified test images, most confident first, a remark, its panels."""
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
    return blend(panels, opacity), remark if show else "", (asked, panels)


def tile_panels(tiles: list[dict], key: tuple[str, str] | None) -> list[Panel]:
    """Return the panels of misclassified images, with a stage and a method also two heatmaps."""
    items = [
        (tile["image"], [logit_of(tile["predicted"]), logit_of(tile["true"])]) for tile in tiles
    ]
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


def filtered(seen: tuple | None, *options) -> tuple:
    """Return what `misclassified` does, without the network if only the opacity is another."""
    *asked, opacity = options
    if seen and seen[0] == tuple(asked):
        return blend(seen[1], opacity), gr.skip(), seen
    return misclassified(*options)


# ---- page ----------------------------------------------------------------------------------------


def live(function: Callable) -> Callable:
    """Return a function of what is seen and a picture that does nothing without a picture."""
    return lambda seen, picture, *options: (
        function(seen, picture, *options) if picture else gr.skip()
    )


def slider(
    low: int, high: int, value: float, label: str, info: str | None = None, step: float = 1
) -> gr.Slider:
    """Add a slider."""
    return gr.Slider(low, high, value, step=step, label=label, info=info)


def dropdown(choices: list, value: str, label: str, info: str | None = None) -> gr.Dropdown:
    """Add a dropdown."""
    return gr.Dropdown(choices, value=value, label=label, info=info)


def heatmap_controls() -> list:
    """Add the controls for stage, method and opacity of heatmaps."""
    sizes = {
        name: f"{name} ({stage.size}x{stage.size} feature maps)" for name, stage in STAGES.items()
    }
    stages = [(text, name) for name, text in sizes.items()]
    return [
        dropdown(stages, stages[-1][1], "Stage", "The layers whose output is explained"),
        dropdown(list(METHODS), "GradCAM", "Method", "How feature maps are weighted"),
        slider(
            0, 1, 0.4, "Opacity of the heatmap", "0: the image alone, 1: the heatmap alone", 0.05
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
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)

with Blocks(
    title="CIFAR-10: what the network sees",
    delete_cache=(KEEP_SECONDS / 6, KEEP_SECONDS),  # pyright: ignore[reportArgumentType]  # floats work
) as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows only these: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"):
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = gr.Image(
                    str(EXAMPLES[0]) if EXAMPLES else None,
                    sources=["upload", "clipboard"],
                    label="Your picture",
                    alt_text="Your picture",
                    height=250,
                )
                # As long as the app runs: their files are not deleted as uploads are.
                image.keep_in_cache |= {save_file_to_cache(p, image.GRADIO_CACHE) for p in EXAMPLES}
                with gr.Row(elem_classes="examples"):
                    examples = [
                        gr.Button(p.stem, icon=p, size="sm", min_width=50) for p in EXAMPLES
                    ]
                run = gr.Button("Classify", variant="primary")
            with gr.Column(scale=3, min_width=240):
                with gr.Row():
                    label = gr.Label(label="Top classes", min_width=160)
                    saw = gr.Image(
                        label="What the network saw",
                        alt_text="What the network saw",
                        format="png",
                        height=210,
                        min_width=120,
                        buttons=["download"],
                    )
                remark = gr.Markdown()
            with gr.Column(scale=6, min_width=340):
                gallery = gr.Gallery(label="Grad-CAM heatmaps", columns=2, **GALLERY)
                gr.HTML(colour_bar())
                seen = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            show = gr.Checkbox(
                True, label="Show Grad-CAM", info="Heatmaps of the evidence for a class"
            )
            maps = slider(
                1, MAX_CLASSES, 2, "Number of heatmaps", "One for each of the top classes"
            )
            top = slider(1, MAX_CLASSES, min(3, MAX_CLASSES), "Top classes", "How many are listed")
        with gr.Row():
            stage, method, opacity = heatmap_controls()
    with gr.Tab("Misclassified images") as wrong_tab:
        wrong_remark = gr.Markdown()
        wrong_gallery = gr.Gallery(
            label="Most confident first", columns=6, elem_classes="wrong", **GALLERY
        )
        gr.HTML(colour_bar())
        wrong_seen = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            wrong_show = gr.Checkbox(True, label="Show misclassified images")
            wrong_count = slider(1, MAX_TILES, min(6, MAX_TILES), "Number of images")
            wrong_true = dropdown([ANY, *CLASSES], ANY, "True class")
            wrong_pred = dropdown([ANY, *CLASSES], ANY, "Predicted class")
        with gr.Row():
            wrong_maps = gr.Checkbox(
                False, label="With Grad-CAM", info="For the predicted and the true class"
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
            alt_text="Confusion matrix",
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
        head_paths=HERE / "head.html",
    )
