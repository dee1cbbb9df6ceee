"""Write what was measured into the README, and draw it: `python -m benchmarks.report`.

The table between the README's two marks, and images/compute.png: accuracy against the work of
training, with published results beside ours. Both come from benchmarks/results/, nothing is typed.
"""

import json
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.accuracy import RESULTS
from evaluation.drawing import save_figure
from models.registry import build
from training.progress import LOW_RES_SAVINGS
from training.recipes import RECIPES, multiply_adds

PROJECT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- measured: begin -->\n", "<!-- measured: end -->\n")
# (name, PFLOP of training, accuracy): as their authors published them, all with test-time
# augmentation, except the last
PUBLISHED = [
    ("airbench94, Muon, 8 epochs", 0.29, 0.9401),
    ("airbench95, 15 epochs", 1.39, 0.9501),
    ("airbench96, 37 epochs", 4.9, 0.9603),
    ("Page's network, 10 epochs", 1.14, 0.9409),
    ("tuned ResNet-18, 26 epochs", 4.35, 0.9400),
    ("tuned ResNet-18, 80 epochs", 13.4, 0.9588),
    ("students of this course, 24 epochs (median)", 2.73, 0.903),
]


TRICKS = {  # what benchmarks.accuracy leaves out, and what is there instead
    "muon": "Muon (SGD for all filters)",
    "whitening": "the computed stem (a random one)",
    "fast_biases": "fast biases (64 times slower ones)",
    "dirac": "identity filters (random ones)",
    "low_res": "the start at 24x24 pixels (32x32)",
}


def trick_table(recipe: str = "fastnet-4", folder: Path = RESULTS) -> str:
    """What each trick of a recipe is worth: validation accuracy of the recipe and without each of them, mean and
    standard deviation of n seeds, the difference, and the seconds of training.
    """
    whole, parts = (
        json.loads((folder / name).read_text()) for name in ("accuracy.json", "ablations.json")
    )
    (base,) = (row for row in whole if row["recipe"] == recipe and row["train_images"] == 45_000)
    lines = []
    for row in [
        base,
        *sorted(
            (row for row in parts if row["recipe"] == recipe), key=lambda row: row["val_single"]
        ),
    ]:
        name = f"without {TRICKS[row['without']]}" if row["without"] else "with all of them"
        spread = statistics.stdev(run["val_single"] for run in row["runs"])
        loss = f"({100 * (row['val_single'] - base['val_single']):+.2f})" if row["without"] else ""
        accuracy = f"{100 * row['val_single']:6.2f} ± {100 * spread:.2f} % {loss:8s}"
        lines.append(f"{name:44s}{accuracy} {row['seconds']:4.0f} s  n={row['n']}")
    return "\n".join(lines)


def petaflop(row: dict) -> float:
    """Work of a training run.

    Three passes' worth of multiply-adds per image, two operations each.
    """
    share = 1 - LOW_RES_SAVINGS * RECIPES[row["recipe"]].low_res
    return 6e-9 * multiply_adds(row["network"]) * row["train_images"] * row["epochs"] * share


def unmeasured(rows: list[dict]) -> list[dict]:
    """A row without figures, on all images, for each recipe that no row is of."""
    known = {row["recipe"] for row in rows}
    return [
        {"network": recipe.network, "recipe": name, "epochs": recipe.epochs, "train_images": 50_000}
        for name, recipe in RECIPES.items()
        if name not in known
    ]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, cheapest first.

    ECE: of an image without test-time augmentation.

    Compute stands in the place of time: the rows were measured on different machines, whose names
    ('AMD EPYC') do not tell them apart, so their times, which the files keep, do not compare.
    """
    names = ["network", "parameters", "epochs", "training images", "PFLOP"]
    names += ["accuracy", "accuracy with TTA", "ECE", "runs"]
    lines = [names, ["---"] * len(names)]
    for row in sorted(rows, key=petaflop):
        parameters = sum(p.numel() for p in build(row["network"]).parameters())
        cells = [
            row["network"],
            f"{parameters:,}",
            row["epochs"],
            f"{row['train_images']:,}",
            f"{petaflop(row):.2f}",
        ]
        if "n" in row:
            cells += [
                "" if row[key] is None else f"{100 * row[key]:.2f} %"
                for key in ("single", "tta", "ece")
            ]
            cells += [row["n"]]
        else:
            cells += ["not measured", "", "", ""]
        lines.append(cells)
    markdown = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return f"{markdown}\n\nMeans of the runs' test accuracies.\n"


def speed(found: dict) -> str:
    """What benchmarks.speed found, in two sentences.

    Of all networks and loaders the slowest and the fastest step.
    """
    steps = [ratio for paths in found["step_ratio"].values() for ratio in paths.values()]
    return (
        f"A training step of ours, its data included, runs at {min(steps):.2f} to {max(steps):.2f} times the speed of a"
        " bare PyTorch loop (above 1 is noise).\n"
        f"FastNet's whole training takes {found['time_to_94_ratio']:.2f} times as long as the published"
        " schedule of airbench94 in a plain loop (`make bench`).\n"
    )


def plot(rows: list[dict]) -> Figure:
    """Accuracy against work, both views of ours, published results in grey."""
    fig, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axis.plot(
        [p for _, p, _ in PUBLISHED],
        [100 * a for _, _, a in PUBLISHED],
        "o",
        color="grey",
        label="published",
    )
    for name, work, accuracy in PUBLISHED:
        below_or_above = -10 if accuracy < 0.95 else 6  # where the names of ours are not
        axis.annotate(
            name,
            (work, 100 * accuracy),
            (4, below_or_above),
            textcoords="offset points",
            fontsize=7,
            color="grey",
        )
    for view, style, label in (
        ("tta", "s", "ours, six views"),
        ("single", "^", "ours, single view"),
    ):
        axis.plot(
            [petaflop(row) for row in rows], [100 * row[view] for row in rows], style, label=label
        )
    for row in rows:
        name = f"{row['network']}, {row['epochs']} epochs"
        axis.annotate(
            name, (petaflop(row), 100 * row["tta"]), (5, 0), textcoords="offset points", fontsize=8
        )
    axis.set(
        xscale="log",
        xlabel="work of training (PFLOP)",
        ylabel="test accuracy (%)",
        ylim=(89.5, 96.7),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    axis.set_xlim(0.15, 60)  # room for the names on the right
    plt.close(fig)
    return fig


def write_between_marks(path: Path, measured: str) -> None:
    """Put what was measured into a Markdown file, in the place of what was measured before."""
    begin, end = (re.escape(mark) for mark in MARKS)
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(f"{begin}.*?{end}", lambda _: MARKS[0] + measured + MARKS[1], text, flags=re.S),
        "utf-8",
    )


def measured(rows: list[dict], found: dict) -> str:
    """What the README says of results/accuracy.json and results/speed.json."""
    return f"{table(rows + unmeasured(rows))}\n{speed(found)}"


def main() -> None:
    rows, found = (
        json.loads((RESULTS / name).read_text()) for name in ("accuracy.json", "speed.json")
    )
    write_between_marks(PROJECT / "README.md", measured(rows, found))
    save_figure(
        plot([row for row in rows if row["train_images"] == 50_000]), PROJECT / "images/compute.png"
    )


if __name__ == "__main__":
    main()
