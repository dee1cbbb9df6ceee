"""The sentences of the notebooks that depend on the run: computed, and chosen by the numbers.

Each function returns Markdown.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from torch import Tensor

from evaluation.calibration import reliability_bins
from evaluation.curves import read_epochs
from evaluation.drawing import format_confidence, listed, percent
from evaluation.errors import Misclassified, class_accuracy, most_confused
from evaluation.saliency_checks import sort_controls
from models.registry import NETWORKS, build
from training.console import format_duration
from training.optimizer import MUON_MOMENTUM
from training.recipes import LOW_RESOLUTION, Recipe, multiply_adds, training_work

BRIGHT = "Bright colours mark the evidence for the answer above the picture."


def with_article(noun: str) -> str:
    """Put 'a' or 'an' before a noun."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


# ---- before the training -------------------------------------------------------------------------


def first_look(preds: Sequence[int], probs: Sequence[float], classes: Sequence[str]) -> str:
    """Say which pictures, one of each class in their order, are named correctly.

    Args:
        preds: the predicted class of each picture.
        probs: the probability of that class.
        classes: their names.
    """
    wrong = [
        f"the {classes[label]} for {with_article(classes[pred])} ({format_confidence(prob)})"
        for label, (pred, prob) in enumerate(zip(preds, probs, strict=True))
        if pred != label
    ]
    if not wrong:
        return f"All answers are correct. {BRIGHT}"
    return f"It mistakes {listed(wrong)}. {BRIGHT}"


def budgets(rows: Sequence[Mapping]) -> str:
    """Tabulate what recipes reached (means) and how much training compute they need.

    That of fastnet-7, or else of the first, counts as 1. Times of different machines cannot be
    compared, so only the time of that recipe is given.

    Args:
        rows: of benchmarks/results/accuracy.json.
    """
    if not rows:
        return "Nothing was measured yet: `python -m benchmarks.accuracy fastnet-7`."
    rows = sorted(rows, key=training_work)
    one = next((row for row in rows if row["recipe"] == "fastnet-7"), rows[0])
    cells = [
        [
            row["network"],
            f"`{row['recipe']}`",
            row["epochs"],
            f"{training_work(row) / training_work(one):.3g}",
            percent(row["val_single"]),
            row["n"],
        ]
        for row in rows
    ]
    head = ("network", "recipe", "epochs", "training compute", "validation accuracy", "runs")
    return (
        f"{markdown_table(head, cells)}\n\n"
        f"The compute of `{one['recipe']}` is 1, all images counted as 32x32 pixels; that took"
        f" {format_duration(one['seconds'])} on {one['machine']}."
    )


def networks() -> str:
    """Tabulate the networks: parameters, multiply-adds for an image, sizes of the feature maps."""
    rows = []
    for name in NETWORKS:
        model = build(name)
        sizes = ", ".join(str(stage.size) for stage in model.stages())
        parameters = sum(p.numel() for p in model.parameters())
        rows.append([f"`{name}`", f"{parameters:,}", f"{multiply_adds(name):,} million", sizes])
    head = ("network", "parameters", "multiply-adds", "stages: cells per side")
    return markdown_table(head, rows)


MEANINGS = {
    "network": "which network is trained",
    "epochs": "number of passes through all training images",
    "batch_size": "images per step",
    "micro_batch": "without a GPU, images that pass through the network together; the gradients of"
    " all micro-batches of a step are added up (*gradient accumulation*), but BatchNorm's mean is"
    " that of each (0: the whole batch)",
    "max_lr": "peak learning rate of SGD, for all that the next two rows do not name",
    "bias_lr": "SGD's peak learning rate for biases of convolutions and BatchNorm (0: `max_lr`)",
    "muon_lr": "peak learning rate of the filters that Muon trains (0: SGD trains them)",
    "momentum": "the part of the previous step that each step of SGD keeps (of Muon:"
    f" {MUON_MOMENTUM})",
    "weight_decay": "how strongly SGD pulls what it trains towards zero, against overfitting (Muon"
    " keeps the sum of a layer's squared weights instead)",
    "label_smoothing": "the part of the target (true class 1, others 0) that is spread over all"
    " classes; if it is not 0, no loss can reach 0",
    "warmup": "fraction of the steps before the peak learning rate",
    "bn_momentum": "weight of the newest batch in BatchNorm's running averages",
    "fixed_bn_scale": "whether BatchNorm's scales stay 1, so that only its biases are learned",
    "padding": "training images are shifted by up to this many pixels",
    "cutout": "side of the masked square in pixels (0: none)",
    "low_res": f"fraction of the steps, at the start, on images of"
    f" {LOW_RESOLUTION}x{LOW_RESOLUTION} pixels",
}


def recipe(name: str, values: Recipe) -> str:
    """Tabulate the hyperparameters of a recipe and what each of them does."""
    rows = [[f"`{key}`", value, MEANINGS[key]] for key, value in vars(values).items()]
    return f"Recipe `{name}`:\n\n" + markdown_table(("hyperparameter", "value", "meaning"), rows)


LEARNED = 0.95  # of a batch: known by heart


def overfitting(losses: Sequence[float], correct: float) -> str:
    """Say what a loop on a single batch has learned.

    Args:
        losses: of each step.
        correct: the fraction of the batch that is classified correctly at the end.
    """
    fell = f"The loss went from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    if losses[-1] > losses[0] / 2 or correct < LEARNED:
        return (
            f"{fell}: that is too little. The loop, the learning rate or the labels must be wrong."
        )
    return (
        f"{fell}, and {percent(correct, 0)} of the batch is classified correctly: the network knows"
        " this one batch by heart. That is useless in itself, and the best test of a loop."
    )


# ---- training ------------------------------------------------------------------------------------


def curves(metrics_csv: str | Path) -> str:
    """Say what the curves of a run show.

    Args:
        metrics_csv: the table of the run; accuracies are fractions.
    """
    epochs = read_epochs(metrics_csv)
    numbers = (epochs.index + 1).astype(int).tolist()
    first, last = epochs.iloc[0], epochs.iloc[-1]
    if len(epochs) == 1:
        when = "the only epoch" if numbers == [1] else f"epoch {numbers[0]}"
        return f"Validation accuracy is {percent(last['val_acc'])} after {when}."
    verb = "rises" if last["val_acc"] > first["val_acc"] else "goes"
    sentences = [
        f"Validation accuracy {verb} from {percent(first['val_acc'])} after epoch {numbers[0]} to"
        f" {percent(last['val_acc'])} after epoch {numbers[-1]}."
    ]
    best = numbers[int(np.argmin(epochs["val_loss"].to_numpy()))]
    if best == numbers[-1]:
        sentences.append(
            "The validation loss is lowest at the very end: by this sign, no overfitting."
        )
    else:
        sentences.append(
            f"The validation loss is lowest in epoch {best} and higher at the end: by"
            " overfitting, by steps that were too large, or by chance."
        )
    gap = last["train_acc"] - last["val_acc"]
    if gap > 0:
        sentences.append(
            f"In the last epoch the accuracy on training images is {100 * gap:.1f} percentage"
            " points above that on validation images: augmentation is there to keep this gap small."
        )
    return " ".join(sentences)


# ---- evaluation ----------------------------------------------------------------------------------


def test_accuracy(errors: int, images: int, tta: float | None) -> str:
    """Say how accurate the network is on the test images, and how exactly that is known.

    Args:
        errors: misclassified images.
        images: test images.
        tta: the accuracy with test-time augmentation; None: it was not measured.
    """
    correct = 1 - errors / images
    low, high = binomtest(images - errors, images).proportion_ci(method="wilson")
    sentences = [
        f"**{percent(correct, 2)}** of {images:,} test images are classified correctly. Other test"
        f" images of the same kind would give a slightly different number: the 95 % interval, which"
        " holds the true value in 95 of 100 such measurements, goes"
        f" from {percent(low)} to {percent(high)}."
    ]
    if tta is not None:
        change = 100 * (tta - correct)
        sentences.append(
            f"With test-time augmentation the accuracy is {percent(tta, 2)}, {change:+.2f}"
            " percentage points on the same images."
        )
    return " ".join(sentences)


def by_class(wrong: Sequence[Misclassified], labels: np.ndarray, classes: Sequence[str]) -> str:
    """Say which class is classified correctly most often, and which least."""
    recalls = class_accuracy(wrong, labels, classes).dropna()  # of classes that have images
    best, worst = recalls.max(), recalls.min()
    if best == worst:
        return f"All classes have the same recall, {percent(best)}."
    easiest, hardest = (listed([*recalls.index[recalls == value]]) for value in (best, worst))
    return f"Easiest: {easiest} ({percent(best)} recall). Hardest: {hardest} ({percent(worst)})."


def confusions(wrong: Sequence[Misclassified], classes: Sequence[str]) -> str:
    """Tabulate the pairs of classes that are confused most."""
    if not wrong:
        return "Nothing is confused: every test image was classified correctly."
    pairs = [list(row) for row in most_confused(wrong, classes).itertuples(index=False)]
    table = markdown_table(("pair", "images"), pairs)
    return f"The most frequent pairs, in either direction:\n\n{table}"


def confidence(logits: Tensor, labels: Tensor, temperature: float) -> str:
    """Say how far confidence and accuracy stay apart in the fullest bin, and in all others.

    Args:
        logits: of test images, (N, num_classes).
        labels: (N,).
        temperature: divides the logits.
    """
    bins = reliability_bins(logits, labels, temperature)
    fullest, images = int(bins.total.argmax()), float(bins.total.sum())
    excess, total = bins.confidence - bins.correct, bins.total  # summed over a bin's images
    held = float(total[fullest])
    said = (
        f"With the temperature, the fullest bar holds {percent(held / images, 0)} of the images,"
        f" with a gap of {100 * abs(float(excess[fullest])) / held:.1f} percentage points."
    )
    same = " Images move to other bars, so the bars change; no answer does, so the accuracy stays."
    if held == images:
        return said + same
    others = (float(excess.sum()) - float(excess[fullest])) / (images - held)
    kind = "overconfident" if others > 0 else "underconfident"
    opposed = float(excess[fullest]) * others < 0
    return (
        f"{said} The other {percent(1 - held / images, 0)} are {kind}, by"
        f" {100 * abs(others):.1f} percentage points on average"
        f"{': one number cannot correct both' if opposed else ''}.{same}"
    )


# ---- trust ---------------------------------------------------------------------------------------


FAIR = ("another image's heatmap", "centre first")  # controls that are hard to beat


def trust(deleted: pd.DataFrame, inserted: pd.DataFrame) -> str:
    """Say which controls the heatmaps beat, and what that leaves to trust.

    Args:
        deleted: of evaluation.saliency_checks.deletion_areas for masking, where a smaller area is
            better; the first row is the heatmap's.
        inserted: the same for showing, where a larger area is better.
    """
    areas = {"masked": deleted, "shown": inserted}
    masked, shown = (sort_controls(table, part) for part, table in areas.items())
    sentences = [
        "(*area*: under the curve; *from* and *to*: the 95 % interval of its difference from the"
        " heatmap's, image by image.) When squares are masked in the order of the heatmap, the"
        f" probability {sooner('fall', masked[0])}. When they are shown in that order, it"
        f" {sooner('rise', shown[0])}."
    ]
    if masked[1] or shown[1]:
        sentences.append(
            "A control that is not named was not beaten: the interval of the difference holds zero,"
            " or lies on its other side."
        )
    sentences += [
        centre_share(areas),
        conclusion([set(FAIR) <= set(beaten) for beaten, _ in (masked, shown)]),
    ]
    return " ".join(filter(None, sentences))


def sooner(verb: str, beaten: Sequence[str]) -> str:
    """Say with which controls a probability falls or rises later, if with any."""
    if not beaten:
        return f"does not {verb} measurably sooner, by area, than with any control"
    return f"{verb}s sooner, by area, than with {listed(beaten)}"


def conclusion(passed: Sequence[bool]) -> str:
    """Conclude from whether the heatmaps beat all fair controls in each of the two measures."""
    if all(passed):
        return "**These heatmaps say something about their own image, within these limits.**"
    if any(passed):
        return (
            "**The two measures disagree: a single heatmap marks where the object may be. Do not"
            " read more into it.**"
        )
    return "**On these images no heatmap is shown to know more than where objects usually are.**"


def centre_share(controls: Mapping[str, pd.DataFrame]) -> str:
    """Say how much of the lead over random squares an order has that never saw the image.

    Args:
        controls: 'masked' and 'shown' -> the areas of at least the controls, with the difference
            from the heatmap's: positive in the former, negative in the latter if that leads.
    """
    shares = []
    for way, verb, sign in (("masked", "masking", 1), ("shown", "showing", -1)):
        differences = controls[way]["difference"]
        lead, left = (float(differences.loc[name]) for name in ("random", "centre first"))
        if sign * lead > 0:
            shares.append(f"{percent(1 - left / lead, 0)} when {verb}")
    if not shares:
        return ""
    return (
        "The order *centre first*, which needs no network, gains this part of the heatmap's lead"
        f" over random: {', '.join(shares)}."
    )


# ---- the end -------------------------------------------------------------------------------------


def lessons(name: str, epochs: int, correct: float, temperature: float, top_pair: str) -> str:
    """List what a run has taught.

    Args:
        name: of the network.
        epochs: of its training.
        correct: its accuracy on the test images, a fraction.
        temperature: fitted on the validation images.
        top_pair: the two classes that are confused most; '' if no pair is.
    """
    points = [
        f"`{name}` classifies {percent(correct)} of the test images correctly after"
        f" {epochs} epoch{'s' * (epochs != 1)}. That is one run with one seed.",
        f"One number, the temperature {temperature:.2f}, is meant to bring its confidence nearer to"
        " its accuracy: on average, not in every bar. It changes no answer.",
        "A confident error can be an error in the label: look before you blame the network.",
        "A heatmap is a hint: a few cells, scaled to their own range, for one class at a time. How"
        " much it can be trusted has to be measured, with controls that are hard to beat.",
        "The network knows ten classes. It gives every picture one of them, whatever the picture"
        " shows.",
    ]
    if top_pair:
        points.insert(2, f"It confuses {top_pair} most.")
    return "\n".join(f"- {point}" for point in points)
