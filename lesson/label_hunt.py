"""The label hunt: is the network wrong, or the label? Three buttons and a tally."""

from collections import Counter
from collections.abc import Callable, Sequence

import ipywidgets as widgets
from matplotlib.figure import Figure
from torch import Tensor

from evaluation.drawing import Plot, format_confidence, percent, rgb
from evaluation.errors import Misclassified, most_confident
from lesson.explorers import Panel, png

VERDICTS = ("network wrong", "label wrong", "both fair")
IMAGES, COLUMNS = 12, 6

# Northcutt et al. 2021, arXiv:2103.14749; counted in mturk/cifar10_mturk.json of
# github.com/cleanlab/label-errors: test labels that an algorithm flagged, each shown to five
# people; those that fewer than three chose; of these, those that three or more accept if 'both'
# counts, and those where three or more chose the algorithm's class.
FLAGGED, WRONG, ACCEPTED, CORRECTED = 275, 54, 17, 18


class LabelHunt(Panel):
    """The most confident errors, one at a time, with a button for each verdict.

    It works without a front end too: call `judge`, read `tally()`.

    Args:
        misclassified: all errors of a network; the twelve most confident are judged.
        classes: the names of the classes.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        note: a line under the title of the picture of all twelve.

    Attributes:
        samples: the errors to judge.
        verdicts: the verdict on each sample that has been judged, by its index.
        at: the index of the sample that is shown.
    """

    def __init__(
        self,
        misclassified: Sequence[Misclassified],
        classes: Sequence[str],
        inv_normalize: Callable[[Tensor], Tensor],
        note: str = "",
    ):
        self.samples = most_confident(misclassified)[:IMAGES]
        self.classes, self.inv_normalize, self.note = classes, inv_normalize, note
        self.alt = f"The {len(self.samples)} most confident errors: {self.described()}"
        self.verdicts: dict[int, str] = {}
        self.at = 0
        self.picture, self.message = widgets.Image(format="png"), widgets.HTML()
        self.buttons = [widgets.Button(description=verdict) for verdict in VERDICTS]
        for button in self.buttons:
            button.on_click(lambda clicked: self.judge(clicked.description))
        self.panel = widgets.VBox([self.picture, widgets.HBox(self.buttons), self.message])
        self.update()

    def described(self) -> str:
        """Name the label and the prediction of each sample, in a line."""
        pairs = (
            f"{self.classes[sample.label]} predicted as {self.classes[sample.pred]}"
            for sample in self.samples
        )
        return ", ".join(pairs) or "none"

    def judge(self, verdict: str) -> None:
        """Note the verdict on the sample that is shown, and show the next one.

        Args:
            verdict: one of VERDICTS. After the last sample, nothing is noted.
        """
        if self.at < len(self.samples):
            self.verdicts[self.at] = verdict
            self.at += 1
        self.update()

    def update(self) -> None:
        """Show the sample that is to be judged, or all of them and the tally at the end."""
        left = self.samples[self.at : self.at + 1]
        for button in self.buttons:
            button.disabled = not left
        self.picture.value = png(self.figure(left)) if left else self.still()
        self.message.value = (
            f"Image {self.at + 1} of {len(self.samples)}. Who is wrong?" if left else self.tally()
        )

    def figure(self, samples: Sequence[Misclassified]) -> Figure:
        """Draw samples above their labels, predictions and verdicts."""
        images = [rgb(sample.image, self.inv_normalize) for sample in samples]
        titles = [self.caption(sample) for sample in samples]
        if len(samples) > 1:
            titles = [
                f"{title}\n{self.verdicts[i]}" if i in self.verdicts else title
                for i, title in enumerate(titles)
            ]
        question = "Is the network wrong, or the label?"
        title = f"{question} The {len(samples)} most confident errors" if samples[1:] else ""
        columns = min(COLUMNS, len(samples))
        return Plot(images, titles, columns).grid(title, self.note if title else "")

    def caption(self, sample: Misclassified) -> str:
        """Name the label, the predicted class and its probability, in three lines."""
        label, pred = self.classes[sample.label], self.classes[sample.pred]
        return f"label: {label}\nnetwork: {pred}\n({format_confidence(sample.prob)})"

    def still(self) -> bytes:
        """Return a picture of all samples with the verdicts so far; no bytes without samples."""
        return png(self.figure(self.samples)) if self.samples else b""

    def tally(self) -> str:
        """Count the verdicts."""
        if not self.samples:
            return "There is nothing to judge: every test image was classified correctly."
        counts = Counter(self.verdicts.values())
        judged = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS)
        return f"Your verdicts on {len(self.verdicts)} of {len(self.samples)} images: {judged}."


def study() -> str:
    """Say what people found who checked flagged labels, and why the reader's tally differs."""
    return (
        f"Northcutt et al. (2021) had an algorithm flag {FLAGGED} of CIFAR-10's 10,000 test labels"
        " and showed each of these images to five people, who chose the label, the algorithm's"
        f" class, both or neither. {WRONG} of the labels ({percent(WRONG / FLAGGED, 0)}) were"
        f" chosen by fewer than three and count as wrong; but of these, three or more people accept"
        f" {ACCEPTED} if 'both' counts, and for {CORRECTED} they chose the algorithm's class."
        " The most confident errors are not a random sample of the errors: wrong labels gather"
        " among them, so their share among all errors is smaller."
    )
