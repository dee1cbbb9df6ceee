"""The answers of the app's endpoints: classes of a picture, heatmaps, misclassified images.

None of them knows the page, so each can be called as it is by the page, the API and the tests.
"""

from collections.abc import Iterable
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from checks import check_choice, check_flag, check_number

# Before others import from models/: it checks what is there.
from classifier import CLASSES, META, NETWORK, SIZE, STAGES, TILES
from drawing import Panel, blend, draw
from models.explain import METHODS, logit_of, top_logit
from pictures import NO_LONGER_THERE, preprocess

ANY = "any class"
MAX_CLASSES, MAX_TILES = min(10, len(CLASSES)), max(2, len(TILES))  # a slider needs two values


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


def check_way(stage: object, method: object) -> None:
    """Raise gr.Error for a stage or a method that is none of the choices."""
    check_choice(stage, list(STAGES), "Stage")
    check_choice(method, list(METHODS), "Method")


def check_options(show: object, maps: object, stage: object, method: object) -> int:
    """Return how many heatmaps are to be shown; raise gr.Error for a wrong value."""
    check_flag(show, "Show Grad-CAM")
    count = round(check_number(maps, 1, MAX_CLASSES, "Number of heatmaps"))
    check_way(stage, method)
    return count if show else 0


def classify(picture: dict | None, top_classes: float) -> tuple[Image.Image, dict[str, float], str]:
    """Return the image that the network saw, its top classes, and a remark."""
    count = round(check_number(top_classes, 1, MAX_CLASSES, "Top classes"))
    seen = look(picture, 0)
    return draw(seen.image), *classes_of(seen, count)


def explain(
    picture: dict | None, show: bool, maps: float, stage: str, method: str, opacity: float
) -> tuple[list, Seen | dict]:
    """Return a Grad-CAM gallery of the top classes, and what the page remembers of it.

    Without heatmaps, the page goes on remembering the last picture.
    """
    count = check_options(show, maps, stage, method)
    if not count:
        return blend([], opacity), gr.skip()
    seen = look(picture, count, stage, method)
    return blend(seen.panels, opacity), seen


def answer(  # noqa: PLR0913
    seen: Seen | None,
    picture: dict | None,
    top_classes: float,
    show: bool,
    maps: float,
    stage: str,
    method: str,
    opacity: float,
) -> tuple:
    """Return all that the page shows of a picture: of the last one without the network.

    A new picture that is refused leaves nothing of the last one's answer: the remark says why.
    """
    classes = round(check_number(top_classes, 1, MAX_CLASSES, "Top classes"))
    count = check_options(show, maps, stage, method)
    if seen and seen.asked == asked_for(picture, count, stage, method):
        saw = gr.skip()
    else:
        try:
            seen = look(picture, count, stage, method)
        except gr.Error as refused:
            # The picture of this page again, whose file has been deleted.
            gone = refused.message == NO_LONGER_THERE
            if seen.asked[0] == asked_for(picture)[0] if seen else gone:
                raise
            seen = seen and seen._replace(asked=asked_for(picture), panels=[])
            return None, None, f"**{refused.message}**", [], seen
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
    check_way(stage, method)
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
        caption = f"{CLASSES[true]}, predicted as {CLASSES[predicted]} ({prob:.2f})"
        panels.append((tile["image"], None, caption))
        roles = {predicted: "predicted", true: "true"} if key else {}
        captions = {label: f"why {CLASSES[label]} ({role})" for label, role in roles.items()}
        panels += cam_panels(tile["image"], captions, cams)
    return panels


def filtered(seen: tuple | None, *options) -> tuple:
    """Return what `misclassified` does, without the network if only the opacity is another."""
    *asked, opacity = options
    if seen and seen[0] == tuple(asked):
        return blend(seen[1], opacity), gr.skip(), seen
    return misclassified(*options)
