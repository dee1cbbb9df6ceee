"""Explorers: figures with controls, for a notebook.

Each control redraws the figure, and nothing else runs. They are made of ipywidgets (7.7 or 8) and
show their figure as a PNG in an Image widget, which every front end knows. They also work without a
front end: set a control's value, read `picture.value`. A stored notebook holds a picture of the
first state, which is shown where no kernel runs.
"""

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from dataload import IMAGE_SIZE, Draw, Images, cutout_transform, normalize, shift_transforms
from evaluation.drawing import MAX_SAMPLES, format_confidence, new_image_grid, show_image, with_note
from lesson.first_look import square
from models import explain
from models.errors import InvalidValue
from models.stage import Network, eval_mode

ANY = "any class"
TEST_ORDER, CONFIDENT_FIRST, UNCONFIDENT_FIRST = ORDERS = (
    "as in the test set",
    "most confident first",
    "least confident first",
)
ERRORS, TEST_IMAGES, MY_PICTURE = SOURCES = ("errors", "test images", "my picture")


def png(fig: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    return file.getvalue()


class Panel:
    """Widgets that a notebook shows, and a picture that stands in their place without a kernel.

    Attributes:
        panel: the widget that holds all others; ipywidgets has no type for them.
        alt: what the picture shows, for those who cannot see it.
    """

    panel: Any
    alt: str

    def still(self) -> bytes:
        """Return the picture, a PNG file; no bytes where there is none."""
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        from IPython.display import display

        view = {"version_major": 2, "version_minor": 0, "model_id": self.panel.model_id}
        data = {"application/vnd.jupyter.widget-view+json": view, "text/plain": self.alt}
        if still := self.still():
            data["image/png"] = base64.b64encode(still).decode()
        display(data, metadata={"image/png": {"alt": self.alt}}, raw=True)


class Explorer(Panel):
    """Controls above a picture.

    Args:
        controls: widgets with a value; ipywidgets has no type for them.
        draw: takes the controls' values by their names and returns a Figure, or a message instead.
        alt: what the picture shows, for those who cannot see it.
    """

    def __init__(self, controls: dict[str, Any], draw: Callable[..., Figure | str], alt: str):
        self.controls, self.draw, self.alt = controls, draw, alt
        self.picture, self.message = widgets.Image(format="png"), widgets.HTML()
        for control in controls.values():
            if hasattr(control.style, "description_width"):
                control.style.description_width = "110px"
            control.observe(self.update, "value")
        half = (len(controls) + 1) // 2
        columns = [list(controls.values())[:half], list(controls.values())[half:]]
        self.panel = widgets.VBox(
            [widgets.HBox([*map(widgets.VBox, columns)]), self.message, self.picture]
        )
        self.update()

    def update(self, _change: object = None) -> None:
        """Draw again with the values that the controls have now."""
        try:
            drawn = self.draw(**{name: control.value for name, control in self.controls.items()})
        except ValueError as problem:  # an unreadable picture: show it, the controls keep working
            drawn = str(problem)
        self.message.value = drawn if isinstance(drawn, str) else ""
        self.picture.value = b"" if isinstance(drawn, str) else png(drawn)

    def still(self) -> bytes:
        """Return the picture that the explorer shows now."""
        return bytes(self.picture.value)


# ---- augmentation --------------------------------------------------------------------------------


def build_transforms(
    shift: int, mirror: bool, cutout: int, rotate: int, brightness: float
) -> list[A.BasicTransform]:
    """Build the transforms of these strengths; those of strength 0 are left out.

    Args:
        shift: pixels at most.
        mirror: flip half of the images horizontally.
        cutout: side of the masked square, pixels.
        rotate: degrees at most.
        brightness: change at most, as a fraction.
    """
    transforms = [
        (mirror, lambda: A.HorizontalFlip(p=0.5)),
        (rotate, lambda: A.Rotate((-rotate, rotate), border_mode=cv2.BORDER_REFLECT_101, p=1)),
        (brightness, lambda: A.RandomBrightnessContrast((-brightness, brightness), (0, 0), p=1)),
        (cutout, lambda: cutout_transform(cutout)),
    ]
    shifts = shift_transforms(shift) if shift else []
    return [*shifts, *(make() for strength, make in transforms if strength)]


def explore_augmentation(
    images: np.ndarray, labels: Sequence[int], padding: int = 4, cutout: int = 8, note: str = ""
) -> Explorer:
    """Explore transforms and their strengths: the images above, their augmentations below.

    Args:
        images: uint8 (N, 32, 32, 3), 1 to 20 of them.
        labels: (N,), 0..9.
        padding: the first value of the control 'shift', pixels.
        cutout: the first value of the control 'cutout', pixels.
        note: a line under the title.
    """

    def draw(draws: int, seed: int, **strengths) -> Figure:
        transforms = build_transforms(**strengths)
        names = ", ".join(name for name, strength in strengths.items() if strength)
        title = with_note(f"Training images: {names or 'nothing is changed'}", note)
        return Draw.draws(images, labels, transforms, draws, seed, title)

    return Explorer(
        {
            "shift": widgets.IntSlider(padding, 0, 12, description="shift, pixels"),
            "mirror": widgets.Checkbox(True, description="mirror"),
            "cutout": widgets.IntSlider(cutout, 0, 24, description="cutout, pixels"),
            "rotate": widgets.IntSlider(0, 0, 90, description="rotate, degrees"),
            "brightness": widgets.FloatSlider(
                0, min=0, max=0.8, step=0.1, description="brightness"
            ),
            "draws": widgets.IntSlider(3, 1, 6, description="rows"),
            "seed": widgets.IntSlider(0, 0, 20, description="random seed"),
        },
        draw,
        "Training images above, and below each of them what the chosen transforms make of it",
    )


# ---- errors and heatmaps -------------------------------------------------------------------------

Upload = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


def read_upload(value: Upload) -> np.ndarray:
    """Read the middle square of the picture that a FileUpload holds.

    Args:
        value: {name: {"content": ...}} in ipywidgets 7, a sequence of {"content": ...} in 8.

    Returns:
        uint8 RGB (32, 32, 3).

    Raises:
        ValueError: if there is no picture, or one that cannot be read.
    """
    files = list(value.values()) if isinstance(value, Mapping) else list(value)
    if not files:
        raise InvalidValue("Upload a picture first.")
    try:
        with Image.open(io.BytesIO(bytes(files[-1]["content"]))) as image:
            return square(ImageOps.exif_transpose(image))
    except Exception as problem:  # a broken file makes Pillow raise nearly anything
        raise InvalidValue("This file is not a picture that can be read.") from problem


class Sample(NamedTuple):
    """An image to show.

    Attributes:
        image: uint8 RGB (32, 32, 3).
        label: its class, None where nobody knows it.
        probs: the network's probabilities, (num_classes,).
    """

    image: np.ndarray
    label: int | None
    probs: Tensor


class ErrorExplorer(Explorer):
    """Explore errors, any test image, or a picture of one's own, with the heatmaps of two classes.

    Each column is an image; below it are the heatmap for the predicted class and the one for the
    true class. The network runs only for new heatmaps and for a new picture.

    Args:
        model: the network.
        test: the test images.
        logits: of the network for the test images, (N, num_classes), in their order.
        classes: their names.
        temperature: divides the logits.
        opacity: of the heatmaps, the first value of the control, 0..1.

    Raises:
        ValueError: if the logits have another shape.
    """

    def __init__(
        self,
        model: Network,
        test: Images,
        logits: Tensor,
        classes: Sequence[str],
        temperature: float = 1.0,
        opacity: float = 0.4,
    ):
        wanted = (len(test.labels), len(classes))
        if tuple(logits.shape) != wanted:
            raise InvalidValue(f"expected logits of shape {wanted}, got {tuple(logits.shape)}")
        self.model, self.test, self.classes, self.temperature = model, test, classes, temperature
        self.probs = (logits / temperature).softmax(1)
        self.stages = {stage.name: stage for stage in model.stages()}
        # A cache of each explorer's own: another network has other heatmaps.
        self.heatmap = functools.lru_cache(1000)(self.compute_heatmap)
        alt = "Test images with their true and predicted classes, below them heatmaps if asked for"
        super().__init__(self.build_controls(opacity), self.figure, alt)

    def build_controls(self, opacity: float) -> dict[str, Any]:
        """Build the widgets, by the names of the arguments of `figure`."""
        stages = [(f"{name} ({s.size}x{s.size})", name) for name, s in self.stages.items()]
        classes, last = [ANY, *self.classes], list(self.stages)[-1]
        return {
            "source": widgets.Dropdown(options=SOURCES, description="show"),
            "upload": widgets.FileUpload(
                accept="image/*", multiple=False, description="my picture"
            ),
            "true": widgets.Dropdown(options=classes, description="true class"),
            "predicted": widgets.Dropdown(options=classes, description="predicted"),
            "order": widgets.Dropdown(options=ORDERS, description="order"),
            "first": widgets.BoundedIntText(
                1, min=1, max=len(self.test.labels), description="from number"
            ),
            "count": widgets.IntSlider(5, 1, MAX_SAMPLES, description="how many"),
            "heatmaps": widgets.Checkbox(False, description="Grad-CAM"),
            "stage": widgets.Dropdown(options=stages, value=last, description="stage"),
            "method": widgets.Dropdown(options=list(explain.METHODS), description="method"),
            "opacity": widgets.FloatSlider(opacity, min=0, max=1, step=0.05, description="opacity"),
        }

    def select(self, source: str, true: str, predicted: str, order: str) -> list[int]:
        """List the indices of the test images that the controls ask for.

        Args:
            source: 'errors' or 'test images'.
            true: the true class, or 'any class'.
            predicted: the predicted class, or 'any class'.
            order: one of ORDERS.
        """
        preds, probs = self.probs.argmax(1).numpy(), self.probs.amax(1).numpy()
        fits = preds != self.test.labels if source == ERRORS else np.ones(len(preds), dtype=bool)
        if true != ANY:
            fits &= self.test.labels == self.classes.index(true)
        if predicted != ANY:
            fits &= preds == self.classes.index(predicted)
        indices = np.flatnonzero(fits)
        if order != TEST_ORDER:
            keys = probs[indices] * (-1 if order == CONFIDENT_FIRST else 1)
            indices = indices[np.argsort(keys, kind="stable")]
        return indices.tolist()

    def classify_upload(self, value: Upload) -> Sample:
        """Let the network classify an uploaded picture, whose true class nobody knows."""
        image = read_upload(value)
        device = next(self.model.parameters()).device
        with eval_mode(self.model), torch.no_grad():
            logits = self.model(normalize(image[None]).to(device))
        return Sample(image, None, (logits[0].float().cpu() / self.temperature).softmax(0))

    def compute_heatmap(self, pixels: bytes, label: int, stage: str, method: str) -> np.ndarray:
        """Compute the heatmap (32, 32) of a class in an image.

        Args:
            pixels: of the image, uint8 (32, 32, 3), as bytes, which can be a key of a cache.
            label: the class to explain.
            stage: the name of a stage.
            method: a key of `explain.METHODS`.
        """
        image = np.frombuffer(pixels, np.uint8).reshape(1, IMAGE_SIZE, IMAGE_SIZE, 3).copy()
        layer = self.stages[stage].module
        return explain.gradcam(self.model, layer, normalize(image), [label], method)[0]

    def figure(  # noqa: PLR0913
        self,
        source: str,
        upload: Upload,
        true: str,
        predicted: str,
        order: str,
        first: int,
        count: int,
        heatmaps: bool,
        stage: str,
        method: str,
        opacity: float,
    ) -> Figure | str:
        """Draw what the controls, which the arguments are named after, ask for.

        Returns:
            The figure, or a message if there is no such image.
        """
        if source == MY_PICTURE:
            samples = [self.classify_upload(upload)]
        else:
            indices = self.select(source, true, predicted, order)[first - 1 :][:count]
            samples = [
                Sample(self.test.images[i], int(self.test.labels[i]), self.probs[i])
                for i in indices
            ]
        if not samples:
            return "No image fits; choose other classes or a lower number."
        rows, columns = 3 if heatmaps else 1, len(samples)
        fig, axes = new_image_grid(rows, columns, 2.1 * max(3, columns), 2.6 * rows)
        for column, sample in zip(axes.T, samples, strict=True):
            self.draw_sample(column[0], sample)
            for axis, label in zip(column[1:], self.explained_classes(sample), strict=False):
                cam = self.heatmap(sample.image.tobytes(), label, stage, method)
                blended = explain.overlay(sample.image / 255, cam, opacity)
                show_image(axis, blended, f"for {self.classes[label]}")
        return fig

    def draw_sample(self, axis: Axes, sample: Sample) -> None:
        """Draw an image below its true class, predicted class and probability."""
        pred, _ = self.explained_classes(sample)
        known = "" if sample.label is None else f"true: {self.classes[sample.label]}\n"
        confidence = format_confidence(float(sample.probs[pred]))
        title = f"{known}predicted: {self.classes[pred]} ({confidence})"
        show_image(axis, sample.image, title)

    def explained_classes(self, sample: Sample) -> tuple[int, int]:
        """Return the predicted class and the true one, or the second choice instead of the latter.

        The second choice is taken where the prediction is correct and where nobody knows.
        """
        pred, second = sample.probs.topk(2).indices.tolist()
        return pred, second if sample.label is None or sample.label == pred else sample.label
