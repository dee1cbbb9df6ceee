"""The app: classifies a picture, shows Grad-CAM heatmaps and images that the network got wrong.

`python app.py` serves it on 127.0.0.1:7860 (or GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), from this
folder alone.
"""

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temporary_files import keep_seconds, own_folder, start_sweeping

# Before Gradio and torch, which take seconds to import: a wrong setting is refused at once.
KEEP_SECONDS, UPLOADS = keep_seconds(), own_folder()
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.themes import Default

import answers
from answers import ANY, MAX_CLASSES, MAX_TILES
from checks import Blocks
from classifier import CLASSES, META, MODEL, STAGES
from drawing import colour_bar
from models.explain import METHODS

# Hugging Face's ZeroGPU starts no app without a function for its GPU.
with contextlib.suppress(ImportError):
    import spaces  # pyright: ignore[reportMissingImports]  # only there

    spaces.GPU(lambda: None)

HERE = Path(__file__).resolve().parent
EXAMPLES = [path for name in CLASSES if (path := HERE / "examples" / f"{name}.png").is_file()]


def live(function: Callable) -> Callable:
    """Return a function of what is seen and a picture that does nothing without a picture."""
    return lambda seen, picture, *options: (
        function(seen, picture, *options) if picture else gr.skip()
    )


def described(text: str) -> dict[str, Any]:
    """Return the text that a screen reader reads for a picture, for a Gradio that knows it.

    Gradio 6.27 and later do; Colab's is older.
    """
    return {"alt_text": text} if "alt_text" in inspect.signature(gr.Image).parameters else {}


def slider(
    low: int, high: int, value: float, label: str, info: str | None = None, step: float = 1
) -> gr.Slider:
    """Add a slider."""
    return gr.Slider(low, high, value, step=step, label=label, info=info)


def heatmap_controls() -> list:
    """Add the controls for stage, method and opacity of heatmaps."""
    sizes = {
        name: f"{name} ({stage.size}x{stage.size} feature maps)" for name, stage in STAGES.items()
    }
    stages = [(text, name) for name, text in sizes.items()]
    return [
        gr.Dropdown(
            stages, value=stages[-1][1], label="Stage", info="The layers whose output is explained"
        ),
        gr.Dropdown(
            list(METHODS), value="GradCAM", label="Method", info="How feature maps are weighted"
        ),
        slider(0, 1, 0.4, "Heatmap opacity", "0: image alone, 1: heatmap alone", 0.05),
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

with Blocks(title="CIFAR-10: what the network sees") as demo:
    gr.Markdown(f"# CIFAR-10: what the network sees\nIt knows these classes: {', '.join(CLASSES)}.")
    with gr.Tab("Classify"):
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = gr.Image(
                    str(EXAMPLES[0]) if EXAMPLES else None,
                    sources=["upload", "clipboard"],
                    label="Your picture",
                    **described("Your picture"),
                    height=250,
                )
                # As long as the app runs: their files are not deleted as uploads are.
                cached = [save_file_to_cache(p, image.GRADIO_CACHE) for p in EXAMPLES]
                image.keep_in_cache |= set(cached)
                with gr.Row(elem_classes="examples"):
                    examples = [
                        gr.Button(p.stem, icon=p, size="sm", min_width=50) for p in EXAMPLES
                    ]
                run = gr.Button("Classify", variant="primary")
            with gr.Column(scale=3, min_width=240):
                with gr.Row():
                    label = gr.Label(label="Top classes", min_width=160, elem_id="answer")
                    saw = gr.Image(
                        label="What the network saw",
                        **described("What the network saw"),
                        format="png",
                        height=210,
                        min_width=120,
                        buttons=[],
                    )
                remark = gr.Markdown(elem_id="remark")
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
            wrong_true = gr.Dropdown([ANY, *CLASSES], value=ANY, label="True class")
            wrong_pred = gr.Dropdown([ANY, *CLASSES], value=ANY, label="Predicted class")
        with gr.Row():
            wrong_maps = gr.Checkbox(
                False, label="With Grad-CAM", info="For the predicted and the true class"
            )
            wrong_options = heatmap_controls()
    with gr.Tab("About"):
        tta = META["test_acc_tta"]
        about = {
            **META,
            "parameters": sum(p.numel() for p in MODEL.parameters()),
            "minutes": META["training"]["seconds"] / 60,
            "number": len(CLASSES),
            "tta": f", {tta:.2%} with test-time augmentation, not used here" if tta else "",
        }
        gr.Markdown((HERE / "about.md").read_text(encoding="utf-8").format(**about))
        gr.Image(
            str(HERE / "confusion_matrix.png"),
            label="Confusion matrix",
            **described("Confusion matrix"),
            show_label=False,
            interactive=False,
        )

    for path, example in zip(cached, examples, strict=True):
        example.click(lambda path=path: path, None, image, api_visibility="private", queue=False)
    classified, options = [saw, label, remark], [show, maps, stage, method, opacity]
    # Progress is shown where no screen reader reads it out.
    shown = {"api_name": "classify", "show_progress_on": saw}
    done = run.click(answers.classify, [image, top], classified, **shown, **EVENT)
    # Only after a success: an error would be shown twice.
    done.success(answers.explain, [image, *options], [gallery, seen], api_name="explain", **EVENT)
    # One event for all: each visitor's answers come in the order in which they were asked for.
    moves = [demo.load, image.change, top.input, *(control.input for control in options)]
    inputs, outputs = [seen, image, top, *options], [*classified, gallery, seen]
    gr.on(moves, live(answers.answer), inputs, outputs, show_progress_on=gallery, **PAGE_EVENT)

    options = [wrong_show, wrong_count, wrong_true, wrong_pred, wrong_maps, *wrong_options]
    outputs = [wrong_gallery, wrong_remark, wrong_seen]
    # The files of the tab's last gallery may have been deleted.
    wrong_tab.select(answers.misclassified, options, outputs, api_name="misclassified", **EVENT)
    moves = [control.input for control in options]
    inputs = [wrong_seen, *options]
    gr.on(moves, answers.filtered, inputs, outputs, show_progress_on=wrong_gallery, **PAGE_EVENT)


def serve(**options) -> None:
    """Serve the app within its limits, and delete old uploads meanwhile.

    Args:
        options: further ones of Gradio's launch.
    """
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
        **options,
    )


if __name__ == "__main__":
    serve()
