"""Explorers: figures with controls, for a notebook.

Each control redraws the figure, and nothing else runs.

They are made of ipywidgets (7.7 or 8) and show their figure as a PNG in an Image widget, which
every front end knows. Where there is no front end they still work: set a control's value, read
`picture.value`.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import albumentations as A
import cv2
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

from dataload import IMAGE_SIZE, MEAN_COLOUR, Draw, Images, normalize
from evaluation.drawing import MAX_SAMPLES
from models import explain
from models.errors import InvalidValue

ANY = "any class"
ORDERS = ("as in the test set", "surest first", "least sure first")
SOURCES = ("errors", "test images", "my picture")


def png(fig: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    return file.getvalue()


class Explorer:
    """Controls above a picture.

    Draw: takes the controls' values by their names, returns a Figure or words instead.
    """

    def __init__(self, controls: dict[str, widgets.Widget], draw: Callable[..., Figure | str]):
        self.controls, self.draw = controls, draw
        self.picture, self.words = widgets.Image(format="png"), widgets.HTML()
        for control in controls.values():
            if hasattr(control.style, "description_width"):
                control.style.description_width = "110px"
            control.observe(self.update, "value")
        half = (len(controls) + 1) // 2
        columns = [list(controls.values())[:half], list(controls.values())[half:]]
        self.panel = widgets.VBox(
            [widgets.HBox([*map(widgets.VBox, columns)]), self.words, self.picture]
        )
        self.update()

    def update(self, _change: object = None) -> None:
        """Draw again with the values that the controls have now."""
        try:
            drawn = self.draw(**{name: control.value for name, control in self.controls.items()})
        except (
            ValueError
        ) as problem:  # of a picture that cannot be read: say it, the controls go on working
            drawn = str(problem)
        self.words.value = drawn if isinstance(drawn, str) else ""
        self.picture.value = b"" if isinstance(drawn, str) else png(drawn)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.panel)


# ---- augmentation --------------------------------------------------------------------------------


def chosen_transforms(
    shift: int, mirror: bool, cutout: int, rotate: int, brightness: float
) -> list[A.BasicTransform]:
    """Albumentations' transforms of these strengths; those of strength 0 are left out.

    shift: pixels at most. cutout: side of the square, pixels. rotate: degrees at most. brightness:
    fraction at most.
    """
    padded = IMAGE_SIZE + 2 * shift
    transforms = [
        (shift, lambda: A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101)),
        (shift, lambda: A.RandomCrop(IMAGE_SIZE, IMAGE_SIZE)),
        (mirror, lambda: A.HorizontalFlip(p=0.5)),
        (rotate, lambda: A.Rotate((-rotate, rotate), border_mode=cv2.BORDER_REFLECT_101, p=1)),
        (brightness, lambda: A.RandomBrightnessContrast((-brightness, brightness), (0, 0), p=1)),
        (
            cutout,
            lambda: A.CoarseDropout(
                (1, 1), (cutout, cutout), (cutout, cutout), fill=MEAN_COLOUR, p=0.5
            ),
        ),
    ]
    return [make() for strength, make in transforms if strength]


def explore_augmentation(
    images: np.ndarray, labels: Sequence[int], padding: int = 4, cutout: int = 8, note: str = ""
) -> Explorer:
    """Choose transforms and strengths: the images above, what augmentation makes of them below.

    'draw' draws anew.

    images: uint8 (N, 32, 32, 3), 1 to 20 of them. padding, cutout: what the controls begin with.
    """

    def draw(draws: int, seed: int, **strengths) -> Figure:
        transforms = chosen_transforms(**strengths)
        names = (
            ", ".join(type(transform).__name__ for transform in transforms) or "nothing is changed"
        )
        return Draw.draws(images, labels, transforms, draws, seed, names, note)

    return Explorer(
        {
            "shift": widgets.IntSlider(padding, 0, 12, description="shift, pixels"),
            "mirror": widgets.Checkbox(True, description="mirror"),
            "cutout": widgets.IntSlider(cutout, 0, 24, description="cutout, pixels"),
            "rotate": widgets.IntSlider(0, 0, 90, description="rotate, degrees"),
            "brightness": widgets.FloatSlider(
                0, min=0, max=0.8, step=0.1, description="brightness"
            ),
            "draws": widgets.IntSlider(3, 1, 6, description="draws"),
            "seed": widgets.IntSlider(0, 0, 20, description="draw"),
        },
        draw,
    )


# ---- errors and maps -----------------------------------------------------------------------------


def read_upload(value: dict | Sequence) -> np.ndarray:
    """What a FileUpload holds, uint8 RGB (32, 32, 3): the middle square.

    ValueError for what is no picture.

    value: {name: {"content": ...}} in ipywidgets 7, a sequence of {"content": ...} in ipywidgets 8.
    """
    files = list(value.values()) if isinstance(value, dict) else list(value)
    if not files:
        raise InvalidValue("Upload a picture first.")
    try:
        with Image.open(io.BytesIO(bytes(files[-1]["content"]))) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as problem:  # a broken file makes Pillow raise nearly anything
        raise InvalidValue("This file is not a picture that can be read.") from problem
    return np.array(ImageOps.fit(upright, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


class Shown(NamedTuple):
    """An image to show: uint8 RGB (32, 32, 3), its class, or None where nobody knows, probabilities (classes,)."""

    image: np.ndarray
    label: int | None
    probs: Tensor


class ErrorExplorer(Explorer):
    """Look at errors, at any test image, or at a picture of your own, with the maps of two classes.

    Each column is an image; below it the map for the predicted class and the one for the true
    class. The network runs for new maps and for a new picture only: opacity, order and filters do
    not run it. test: the test images. logits: (N, classes), what the model answers to them, in
    their order; ValueError for another shape. temperature: divides the logits.
    """

    def __init__(
        self,
        model: nn.Module,
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
        self.cam = functools.lru_cache(1000)(
            self.cam
        )  # of each explorer its own: another network has other maps
        names = [
            (f"{name} ({stage.size}x{stage.size})", name) for name, stage in self.stages.items()
        ]
        super().__init__(
            {
                "source": widgets.Dropdown(options=SOURCES, description="show"),
                "upload": widgets.FileUpload(
                    accept="image/*", multiple=False, description="my picture"
                ),
                "true": widgets.Dropdown(options=[ANY, *classes], description="true class"),
                "predicted": widgets.Dropdown(options=[ANY, *classes], description="predicted"),
                "order": widgets.Dropdown(options=ORDERS, description="order"),
                "first": widgets.BoundedIntText(
                    1, min=1, max=len(test.labels), description="from number"
                ),
                "count": widgets.IntSlider(5, 1, MAX_SAMPLES, description="how many"),
                "maps": widgets.Checkbox(True, description="Grad-CAM"),
                "stage": widgets.Dropdown(
                    options=names, value=list(self.stages)[-1], description="stage"
                ),
                "method": widgets.Dropdown(options=list(explain.METHODS), description="method"),
                "opacity": widgets.FloatSlider(
                    opacity, min=0, max=1, step=0.05, description="opacity"
                ),
            },
            self.figure,
        )

    def chosen(self, source: str, true: str, predicted: str, order: str) -> list[int]:
        """The numbers of the test images that the controls ask for, in that order."""
        preds, probs = self.probs.argmax(1).numpy(), self.probs.amax(1).numpy()
        fits = preds != self.test.labels if source == "errors" else np.ones(len(preds), dtype=bool)
        if true != ANY:
            fits &= self.test.labels == self.classes.index(true)
        if predicted != ANY:
            fits &= preds == self.classes.index(predicted)
        numbers = np.flatnonzero(fits)
        if order != ORDERS[0]:
            numbers = numbers[
                np.argsort(probs[numbers] * (-1 if order == ORDERS[1] else 1), kind="stable")
            ]
        return numbers.tolist()

    def uploaded(self, value: dict | Sequence) -> Shown:
        image = read_upload(value)
        with torch.no_grad():
            logits = self.model.eval()(
                normalize(image[None]).to(next(self.model.parameters()).device)
            )
        return Shown(image, None, (logits[0].float().cpu() / self.temperature).softmax(0))

    def cam(self, pixels: bytes, label: int, stage: str, method: str) -> np.ndarray:
        """The map of a class in an image, given as the bytes of its pixels."""
        image = np.frombuffer(pixels, np.uint8).reshape(1, IMAGE_SIZE, IMAGE_SIZE, 3)
        return explain.gradcam(
            self.model, self.stages[stage].module, normalize(image.copy()), [label], method
        )[0]

    def figure(
        self,
        source: str,
        upload: object,
        true: str,
        predicted: str,
        order: str,
        first: int,
        count: int,
        maps: bool,
        stage: str,
        method: str,
        opacity: float,
    ) -> Figure | str:
        """What the controls ask for, or words if there is no such image."""
        if source == "my picture":
            samples = [self.uploaded(upload)]
        else:
            numbers = self.chosen(source, true, predicted, order)[first - 1 :][:count]
            samples = [
                Shown(self.test.images[i], int(self.test.labels[i]), self.probs[i]) for i in numbers
            ]
        if not samples:
            return "No image fits; choose other classes or a lower number."
        rows, columns = 3 if maps else 1, len(samples)
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=(1.75 * max(3, columns), 2.1 * rows),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat:
            axis.axis("off")
        for column, (image, label, probs) in zip(axes.T, samples, strict=True):
            most_confident_class, second = probs.topk(2).indices.tolist()
            known = "" if label is None else f"true: {self.classes[label]}\n"
            column[0].imshow(image, interpolation="nearest")
            column[0].set_title(
                f"{known}predicted: {self.classes[most_confident_class]} ({probs[most_confident_class]:.2f})",
                fontsize=9,
            )
            other = (
                second if label in (None, most_confident_class) else label
            )  # where the answer is right: what it was not
            for axis, explained in zip(column[1:], (most_confident_class, other), strict=False):
                cam = self.cam(image.tobytes(), explained, stage, method)
                axis.imshow(
                    explain.overlay(image / 255, cam, opacity).clip(0, 1), interpolation="nearest"
                )
                axis.set_title(f"for {self.classes[explained]}", fontsize=9)
        plt.close(fig)
        return fig
