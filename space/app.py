"""What a CIFAR-10 network sees in a picture: its classes, its Grad-CAM maps, and where it was wrong.

`python app.py` serves it on GRADIO_SERVER_NAME:GRADIO_SERVER_PORT (127.0.0.1:7860). Everything it needs is in this
folder. Each function checks what it is given itself, because a client can send what no widget would.
"""

import json
import math
import os
import warnings
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from bundle import load_bundle
from explain import LOCK, gradcam, overlay

try:  # Hugging Face's ZeroGPU starts no app without such a function; on the CPU this network answers in milliseconds
    import spaces

    spaces.GPU(lambda: None)
except ImportError:
    pass

HERE = Path(__file__).resolve().parent
MODEL, META = load_bundle(HERE)
CLASSES, SIZE, STAGES = META["classes"], META["image_size"], {stage.name: stage for stage in MODEL.stages()}
STAGE_CHOICES = [(f"{name} ({stage.size}x{stage.size} map)", name) for name, stage in STAGES.items()]
DEFAULT_STAGE = list(STAGES)[-1]  # the last map after a residual sum
TILES = json.loads((HERE / "misclassified.json").read_text(encoding="utf-8"))
TILE_FIGURE = np.asarray(Image.open(HERE / "misclassified.png").convert("RGB"))
ENLARGED = 256  # side in pixels of the pictures shown
ANY = "any class"
Image.MAX_IMAGE_PIXELS = 25_000_000  # a larger picture is refused before it is decoded
warnings.simplefilter("error", Image.DecompressionBombWarning)

# ---- what came in ---------------------------------------------------------------------------------------------------


def whole(value: object, low: int, high: int, name: str) -> int:
    """The number rounded, if it is one from low to high; gr.Error in words otherwise."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= round(value) <= high:
        raise gr.Error(f"{name}: a whole number from {low} to {high}, please; got {value!r}.")
    return round(value)


def choice(value: object, choices: list[str], name: str) -> str:
    if value not in choices:
        raise gr.Error(f"{name}: one of {', '.join(choices)}, please; got {value!r}.")
    return value


def fraction(value: object, name: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # refuses NaN as well
        raise gr.Error(f"{name}: a number from 0 to 1, please; got {value!r}.")
    return float(value)


def to_rgb(image: Image.Image) -> Image.Image:
    """First frame, turned as its EXIF says, scaled to 8 bits, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits or more: Pillow would clip them to white
        values = np.asarray(image, dtype=np.float64)
        full = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
        return Image.fromarray(np.uint8(np.clip(255 * values / full, 0, 255))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def seen(path: str | None) -> np.ndarray:
    """What the network sees of a picture file: the square in its middle, as uint8 RGB (32, 32, 3)."""
    if path is None:
        raise gr.Error("Upload a picture or pick an example first.")
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(to_rgb(image), (SIZE, SIZE), Image.Resampling.LANCZOS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise gr.Error("This picture has more than 25 million pixels; please make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise gr.Error("This file is not a picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF).") from error


def normalize(image: np.ndarray) -> torch.Tensor:
    """uint8 RGB (32, 32, 3) -> (1, 3, 32, 32), exactly as the network was tested."""
    values = (image.astype(np.float32) / 255 - np.float32(META["mean"])) / np.float32(META["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


# ---- what goes out --------------------------------------------------------------------------------------------------


def enlarge(image: np.ndarray) -> np.ndarray:
    """uint8 RGB -> the same with visible pixels."""
    return np.asarray(Image.fromarray(image).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST))


def blend(panels: list[dict], opacity: float) -> list[tuple[np.ndarray, str]]:
    """Panels (image uint8, cam (32, 32) or None, caption) -> the gallery, each map over its image."""
    opacity, gallery = fraction(opacity, "Opacity"), []
    for panel in panels or []:
        picture = enlarge(panel["image"])
        if panel["cam"] is not None:
            cam = Image.fromarray(panel["cam"]).resize((ENLARGED, ENLARGED), Image.Resampling.BILINEAR)
            mixed = overlay(picture / 255, np.clip(np.asarray(cam), 0, 1), opacity)
            picture = np.uint8(np.round(255 * mixed))
        gallery.append((picture, panel["caption"]))
    return gallery


def probabilities(images: torch.Tensor) -> torch.Tensor:
    with LOCK, torch.inference_mode():
        return (MODEL(images) / (META["temperature"] or 1)).softmax(1)


def classify(path: str | None, top_classes: float) -> tuple[np.ndarray, dict[str, float], str]:
    """The 32x32 image that the network saw, its likeliest classes with their probabilities, and a remark."""
    count, image = whole(top_classes, 1, 10, "Top classes"), seen(path)
    probs = probabilities(normalize(image))[0]
    best = probs.topk(min(count, len(CLASSES)))
    label = {CLASSES[i]: float(p) for p, i in zip(*best, strict=True)}
    unsure = META["unsure_below"] is not None and float(probs.max()) < META["unsure_below"]
    hint = "The network is unsure: this may be none of its ten classes." if unsure else ""
    return enlarge(image), label, f"{hint} It knows ten classes only: {', '.join(CLASSES)}.".strip()


def explain(path: str | None, show: bool, maps: float, stage: str, opacity: float) -> tuple[list, list[dict]]:
    """Grad-CAM of the likeliest classes, side by side: the gallery, and its panels for the next opacity."""
    maps, stage = whole(maps, 1, 10, "Number of maps"), choice(stage, list(STAGES), "Stage")
    fraction(opacity, "Opacity")
    if not show:
        return [], []
    image = seen(path)
    probs, classes = probabilities(normalize(image))[0].topk(min(maps, len(CLASSES)))
    batch = normalize(image).repeat(len(classes), 1, 1, 1)
    cams = gradcam(MODEL, STAGES[stage].module, batch, classes.tolist())
    panels = [
        {"image": image, "cam": cam, "caption": f"{CLASSES[i]} {p:.2f}"}
        for cam, i, p in zip(cams, classes.tolist(), probs.tolist(), strict=True)
    ]
    return blend(panels, opacity), panels


def explain_again(path: str | None, *options: object) -> tuple[list, list[dict]]:
    """explain, for the widgets that are moved before there is a picture."""
    return explain(path, *options) if path else ([], [])


def misclassified(
    show: bool, count: float, true_class: str, predicted_class: str, maps: bool, stage: str, opacity: float
) -> tuple[list, list[dict], str]:
    """Test images that the network got wrong, most confident first, with the maps for both classes if wanted."""
    count = whole(count, 1, max(1, len(TILES)), "Number of images")
    stage = choice(stage, list(STAGES), "Stage")
    wanted = {"true": choice(true_class, [ANY, *CLASSES], "True class"),
              "predicted": choice(predicted_class, [ANY, *CLASSES], "Predicted class")}  # fmt: skip
    fraction(opacity, "Opacity")
    if not show:
        return [], [], ""
    fits = [i for i, tile in enumerate(TILES) if all(w in (ANY, CLASSES[tile[key]]) for key, w in wanted.items())]
    fits.sort(key=lambda i: -max(TILES[i]["probabilities"]))
    panels = [panel for i in fits[:count] for panel in tile_panels(i, maps, stage)]
    return blend(panels, opacity), panels, f"{min(count, len(fits))} of the {len(fits)} stored images that fit."


def tile_panels(index: int, maps: bool, stage: str) -> list[dict]:
    """One misclassified image: itself, and with maps the map of the predicted class and that of the true class."""
    tile, side = TILES[index], 3 * SIZE  # each pixel was enlarged three times: every third is the image itself
    top, left = index // 10 * side, index % 10 * side
    image = np.ascontiguousarray(TILE_FIGURE[top : top + side : 3, left : left + side : 3])
    both = [tile["predicted"], tile["true"]]
    names, prob = [CLASSES[i] for i in both], tile["probabilities"][both[0]]
    panels = [{"image": image, "cam": None, "caption": f"{names[1]}, taken for {names[0]} ({prob:.2f})"}]
    if maps:
        cams = gradcam(MODEL, STAGES[stage].module, normalize(image).repeat(2, 1, 1, 1), both)
        captions = [f"why {names[0]} (predicted)", f"why {names[1]} (true)"]
        panels += [{"image": image, "cam": cam, "caption": text} for cam, text in zip(cams, captions, strict=True)]
    return panels


# ---- page -----------------------------------------------------------------------------------------------------------


def about() -> str:
    """about.md with the facts of this network filled in."""
    training, tta = META["training"], META["test_acc_tta"]
    return (HERE / "about.md").read_text(encoding="utf-8").format(
        **training, architecture=META["architecture"], parameters=sum(p.numel() for p in MODEL.parameters()),
        minutes=training["seconds"] / 60, accuracy=META["test_acc"],
        tta="" if tta is None else f", {tta:.2%} with test-time augmentation",
    )  # fmt: skip


class Picture(gr.Image):
    """An image that reaches the function as the file it came in, so that the function can say what is wrong with it."""

    is_template = True  # for Gradio's page it is an Image

    def preprocess(self, payload):
        return payload.path if payload else None


NETWORK = {"concurrency_id": "network", "concurrency_limit": 1}  # one at a time: all share one network
PRIVATE = {"api_visibility": "private"}
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts

with gr.Blocks(title="CIFAR-10: what the network sees", delete_cache=(600, 3000)) as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nUpload a picture of one of: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"), gr.Row():
        with gr.Column():
            image = Picture(type="filepath", sources=["upload", "clipboard"], label="Your picture")
            pictures = [[str(HERE / "examples" / f"{name}.png")] for name in CLASSES]
            examples = gr.Examples(pictures, image, label="Ten examples", cache_examples=False)
            top = gr.Slider(1, 10, 3, step=1, precision=0, label="Top classes", info="how many, at most ten")
            show = gr.Checkbox(True, label="Show Grad-CAM", info="where the network looked")
            maps = gr.Slider(1, 10, 2, step=1, precision=0, label="Number of maps", info="for the likeliest classes")
            stage = gr.Dropdown(STAGE_CHOICES, value=DEFAULT_STAGE, label="Stage", info="whose output is explained")
            opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Opacity of the map", info="0: picture, 1: map alone")
            run = gr.Button("Classify", variant="primary")
        with gr.Column():
            label = gr.Label(label="Classes")
            remark = gr.Markdown()
            saw = gr.Image(label="What the network saw: the middle square, 32x32", format="png", interactive=False)
            gallery = gr.Gallery(label="Grad-CAM", format="png", columns=2, height="auto", object_fit="contain")
            panels = gr.State([], time_to_live=3600)
    with gr.Tab("Misclassified images"), gr.Row():
        with gr.Column():
            wrong_show = gr.Checkbox(True, label="Show misclassified images")
            wrong_count = gr.Slider(1, max(1, len(TILES)), max(1, min(5, len(TILES))), step=1, precision=0,
                                    label="Number of images")  # fmt: skip
            wrong_true = gr.Dropdown([ANY, *CLASSES], value=ANY, label="True class")
            wrong_pred = gr.Dropdown([ANY, *CLASSES], value=ANY, label="Predicted class")
            wrong_maps = gr.Checkbox(False, label="With Grad-CAM", info="for the predicted and for the true class")
            wrong_stage = gr.Dropdown(STAGE_CHOICES, value=DEFAULT_STAGE, label="Stage")
            wrong_opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Opacity of the map")
            wrong_run = gr.Button("Show", variant="primary")
        with gr.Column(scale=2):
            wrong_remark = gr.Markdown()
            wrong_gallery = gr.Gallery(label="Most confident first", format="png", columns=3, height="auto")
            wrong_panels = gr.State([], time_to_live=3600)
    with gr.Tab("About"):
        gr.Markdown(about())
        gr.Image(str(HERE / "confusion_matrix.png"), label="Confusion matrix", format="png", interactive=False)

    what, why = ([image, top], [saw, label, remark]), ([image, show, maps, stage, opacity], [gallery, panels])
    run.click(classify, *what, api_name="classify", **NETWORK)
    run.click(explain, *why, api_name="explain", **NETWORK)
    new_picture = [image.upload, examples.load_input_event.then]
    for event in new_picture:
        event(classify, *what, **PRIVATE, **NETWORK)
        event(explain, *why, **PRIVATE, **NETWORK)
    gr.on([show.input, maps.release, stage.input], explain_again, *why, **PRIVATE, **NETWORK)
    opacity.input(blend, [panels, opacity], gallery, show_progress="hidden", **PRIVATE)
    errors = [wrong_show, wrong_count, wrong_true, wrong_pred, wrong_maps, wrong_stage, wrong_opacity]
    wrong_run.click(
        misclassified, errors, [wrong_gallery, wrong_panels, wrong_remark], api_name="misclassified", **NETWORK
    )
    wrong_opacity.input(blend, [wrong_panels, wrong_opacity], wrong_gallery, show_progress="hidden", **PRIVATE)

demo.queue(max_size=64)

if __name__ == "__main__":
    demo.launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        max_file_size="10mb", run_history=False, theme=THEME,
    )  # fmt: skip
