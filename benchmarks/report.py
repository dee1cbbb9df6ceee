"""Write the measured results into README.md and docs/results.md, and draw images/compute.png.

    python -m benchmarks.report

Each file receives its tables between marks: README.md the committed network, of each network the
longest training on all 50,000 images, what was found about heatmaps, and the leaderboard in short;
docs/results.md all rows. The figure shows accuracy against training compute, with published results
beside ours. All numbers of ours come from benchmarks/results/; none is typed.
"""

import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import leaderboard, trust
from benchmarks.accuracy import RESULTS
from benchmarks.leaderboard import deviation_of, mean_and_deviation
from evaluation import saliency_checks
from evaluation.drawing import (
    COLOURS,
    GREY,
    WIDTH,
    headline,
    new_chart,
    percent,
    percent_axis,
    save_figure,
    styled,
)
from lesson.findings import centre_share, markdown_table
from models.errors import InvalidValue
from models.registry import build
from training.files import PROJECT
from training.recipes import RECIPES, multiply_adds
from training.workload import LOW_RES_SAVINGS

MARKS = ("<!-- measured: begin -->\n", "<!-- measured: end -->\n")
LEADERBOARD_MARKS = ("<!-- leaderboard: begin -->\n", "<!-- leaderboard: end -->\n")
NOTE = "Test accuracy: the mean of n runs ± their standard deviation."
TRICKS_NOTE = (
    "Each was added to what the second column names, in 4 epochs of FastNet on 45,000 images; in"
    " parentheses is the value that it replaced. Accuracy: the change of the validation accuracy in"
    " percentage points, the mean of n pairs of runs with equal seeds, ± its standard error. CPU"
    " time: of a run, evaluation included, relative to the one that the trick was added to."
)
CURVE = "fastnet-7"  # the recipe that the curve of accuracy against time is about
CURVE_NOTE = (
    f"Time: of `{CURVE}`, as in the leaderboard; of the others, that times the ratio of the CPU"
    " seconds of a run, evaluation included. So it is not quite the leaderboard's. Accuracy: of the"
    " validation images, trained on 45,000 images; the mean of n seeds ± their standard deviation."
)
HEADLINE_KEYS = ("recipe", "train_images")  # what tells the committed network among the rows
LOWEST = 0.928  # where the accuracy axis of the figure begins


class Published(NamedTuple):
    """A published result.

    Attributes:
        name: of the network and its schedule.
        petaflop: of the training.
        accuracy: of the test, 0..1.
        offset: of the name in the figure, points.
        align: of the name, 'left' or 'right'.
    """

    name: str
    petaflop: float
    accuracy: float
    offset: tuple[int, int] = (7, -4)
    align: str = "left"


# As their authors published them, all with test-time augmentation.
PUBLISHED = [
    Published("airbench94, Muon,\n8 epochs", 0.29, 0.9401, (7, -4)),
    Published("airbench95, 15 epochs", 1.39, 0.9501, (-7, -4), "right"),
    Published("airbench96, 37 epochs", 4.9, 0.9603),
    Published("Page's network,\n10 epochs", 1.14, 0.9409, (7, -20)),
    Published("tuned ResNet-18, 26 epochs", 4.35, 0.9400),
    Published("tuned ResNet-18, 80 epochs", 13.4, 0.9588),
]
ABLATIONS = {  # benchmarks.accuracy --without: what is left out, and what replaces it
    "nothing": "the full recipe",
    "muon": "without Muon (SGD for all filters)",
    "whitening": "without whitening (random, fixed first layer)",
    "fast_biases": "without a larger rate for biases (1/64 of it)",
    "dirac": "without identity (Dirac) initialisation (random)",
    "low_res": "without the start at 24x24 pixels (32x32)",
}


def ablation_table(recipe: str = "fastnet-4", folder: Path = RESULTS) -> str:
    """List what the validation accuracy loses without each technique of a recipe.

    Args:
        recipe: Its name in RECIPES.
        folder: Where ablations.json is. It holds the full recipe too, without nothing; ablations
            of another recipe that had this name are left out.

    Returns:
        A line of headings, one for the full recipe, then one for each ablation, the largest loss
        first: mean and standard deviation of the validation accuracy over n seeds in percent, the
        difference from the full recipe in percentage points, the seconds of training, n.

    Raises:
        InvalidValue: if the full recipe was not measured.
    """
    rows = json.loads((folder / "ablations.json").read_text())
    rows = [row for row in rows if row["recipe"] == recipe and row["without"]]
    base = next((row for row in rows if row["without"] == "nothing"), None)
    if base is None:
        command = f"python -m benchmarks.accuracy {recipe} --without nothing"
        raise InvalidValue(f"there is nothing to compare with yet: {command}")
    same = [row for row in rows if row.get("full_recipe") == base.get("full_recipe")]
    ablations = sorted((row for row in same if row != base), key=lambda row: row["val_single"])
    lines = [f"{'':48s}{'accuracy (change)':24s}  time  runs"]
    for row in [base, *ablations]:
        deviation = deviation_of([run["val_single"] for run in row["runs"]])
        spread = "" if deviation is None else f"± {100 * deviation:.2f} "
        change = row["val_single"] - base["val_single"]
        loss = "" if row is base else f"({100 * change:+.2f})"
        accuracy = f"{100 * row['val_single']:6.2f} {spread}%"
        ending = f"{row['seconds']:4.0f} s  n={row['n']}"
        lines.append(f"{ABLATIONS[row['without']]:48s}{accuracy:15s} {loss:8s} {ending}")
    return "\n".join(lines)


def mean_change(changes: list[float]) -> str:
    """Format a mean in percentage points and, of several values, its standard error."""
    mean = f"{100 * statistics.mean(changes):+.2f}"
    if len(changes) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(changes) / len(changes) ** 0.5:.2f}"


def trick_cells(row: dict, base: dict) -> list[str]:
    """Return the last five cells of a trick's row, from the pairs of runs with equal seeds.

    Args:
        row: Of the trick.
        base: The row that the trick was added to.
    """
    before = {run["seed"]: run for run in base["runs"]}
    pairs = [(run, before[run["seed"]]) for run in row["runs"] if run["seed"] in before]
    changes = [
        mean_change([run[key] - old[key] for run, old in pairs])
        for key in ("val_single", "val_tta")
    ]
    time = statistics.mean(run["cpu_seconds"] / old["cpu_seconds"] for run, old in pairs)
    return [*changes, f"{time:.2f}", str(len(pairs)), "kept" if row["kept"] else "dropped"]


def tricks_table(rows: list[dict]) -> str:
    """Format the tricks that were tried, kept or dropped, as a Markdown table.

    Args:
        rows: of ablations.json. Each trick names the one that it was added `to`.
    """
    names = ["trick", "added to", "no TTA", "with TTA", "CPU time", "n", ""]
    tricks = {row["trick"]: row for row in rows if "trick" in row}
    lines = [
        [name, row["to"], *trick_cells(row, tricks[row["to"]])]
        for name, row in tricks.items()
        if row["to"]  # the recipe that the first ones were added to was added to nothing
    ]
    return markdown_table(names, lines) + "\n"


def curve_table(rows: list[dict], time: float) -> str:
    """Format accuracy against training time, of the recipe CURVE and others, as a Markdown table.

    Args:
        rows: of ablations.json. Those with a name in the curve, `curve`, are shown.
        time: that the recipe takes, as a fraction of the published schedule's.
    """
    names, lines = ["FastNet", "time", "accuracy", "accuracy with TTA"], []
    runs_of = {row["curve"]: row["runs"] for row in rows if "curve" in row}
    seconds = {
        name: statistics.mean(run["cpu_seconds"] for run in runs) for name, runs in runs_of.items()
    }
    for name, runs in sorted(runs_of.items(), key=lambda item: seconds[item[0]]):
        lines.append([name, f"{time * seconds[name] / seconds[CURVE]:.2f}"])
        for values in ([run[key] for run in runs] for key in ("val_single", "val_tta")):
            mean = statistics.mean(values)
            lines[-1].append(mean_and_deviation(mean, deviation_of(values), len(values)))
    return markdown_table(names, lines) + "\n"


def petaflop(row: dict) -> float:
    """Return the training compute of a row of accuracy.json, in PFLOP.

    Each image costs three forward passes in a training step, each multiply-add two operations.
    """
    relative_cost = 1 - LOW_RES_SAVINGS * RECIPES[row["recipe"]].low_res  # 1: all at 32x32 pixels
    images = row["train_images"] * row["epochs"]
    return 6e-9 * multiply_adds(row["network"]) * images * relative_cost


def unmeasured(rows: list[dict]) -> list[dict]:
    """Return a row without results, for 50,000 images, for each recipe that is not in `rows`."""
    known = {row["recipe"] for row in rows}
    return [
        {"network": recipe.network, "recipe": name, "epochs": recipe.epochs, "train_images": 50_000}
        for name, recipe in RECIPES.items()
        if name not in known
    ]


def table(rows: list[dict]) -> str:
    """Format rows of accuracy.json as a Markdown table, the least training compute first.

    The table shows compute, not time: the rows were measured on different machines, whose names
    ('AMD EPYC') do not tell them apart. The ECE is that of the predictions without TTA.
    """
    names = ["network", "parameters", "epochs", "training images", "PFLOP"]
    names += ["accuracy", "accuracy with TTA", "ECE", "runs"]
    lines = []
    for row in sorted(rows, key=petaflop):
        parameters = sum(p.numel() for p in build(row["network"]).parameters())
        lines.append([network_name(row), f"{parameters:,}", row["epochs"]])
        lines[-1] += [f"{row['train_images']:,}", f"{petaflop(row):.2f}", *result_cells(row)]
    return f"{markdown_table(names, lines)}\n\n{NOTE}\n"


def network_name(row: dict) -> str:
    """Name the network of a row of accuracy.json, and say if its recipe is not the one of today."""
    return f"{row['network']} (earlier recipe)" if row.get("earlier_recipe") else row["network"]


def result_cells(row: dict) -> list:
    """Return the last four cells of a row: accuracy, accuracy with TTA, ECE, number of runs."""
    if "n" not in row:
        return ["not measured", "", "", ""]
    cells = []
    for key in ("single", "tta", "ece"):
        spread = f" ± {100 * row[f'{key}_std']:.2f}" if f"{key}_std" in row else ""
        cells.append("" if row[key] is None else f"{100 * row[key]:.2f} %{spread}")
    return [*cells, row["n"]]


def speed(results: dict) -> str:
    """Describe results/speed.json in some sentences.

    The step ratios are those of the slowest and the fastest combination of network and loader.
    """
    steps = [ratio for loaders in results["step_ratio"].values() for ratio in loaders.values()]
    timed = []
    for mark, takes in (("", "takes"), ("_fp32", "in fp32")):
        if f"time_to_94{mark}" in results:
            recipe = results[f"time_to_94{mark}"]["recipe"]
            timed.append(f"`{recipe}` {takes} {results[f'time_to_94_ratio{mark}']:.2f}")
    return (
        "On two CPU cores, our training step, data loading included, runs at"
        f" {min(steps):.2f} to {max(steps):.2f} times the speed of a bare PyTorch loop.\n"
        f"Of the time of airbench94's schedule in a plain loop, {', '.join(timed)}: one pair of"
        " runs each, `python -m benchmarks.speed to94`.\n"
    )


def app_under_load(found: dict) -> str:
    """Describe results/space.json in some sentences."""
    one, each_of_20 = (found["explain_ms"][visitors]["p50"] for visitors in ("1", "20"))
    failed, other = (found[name] or "none" for name in ("failed", "wrong"))
    return (
        f"One heatmap takes {one:.0f} ms (median), with 20 visitors at once {each_of_20:.0f} ms, on"
        f" {found['machine']}. Of {found['requests']} mixed requests of 50 visitors within a minute"
        f" {failed} failed, and {other} had another answer than alone."
        " `python -m benchmarks.space` repeats it.\n"
    )


def compute_title(rows: list[dict]) -> str:
    """Compare the most accurate of our runs with the one of least training compute, with TTA."""
    cheapest, best = min(rows, key=petaflop), max(rows, key=lambda row: row["tta"])
    first = (
        f"With TTA, {cheapest['network']} reaches {percent(cheapest['tta'])}"
        f" with {petaflop(cheapest):.2g} PFLOP"
    )
    if best is cheapest:
        return f"{first}; no run of ours is better"
    times = petaflop(best) / petaflop(cheapest)
    return f"{first}; {best['network']} needs {times:.0f} times as much for {percent(best['tta'])}"


@styled
def plot(rows: list[dict]) -> Figure:
    """Plot test accuracy against training compute, ours beside published results.

    A line joins the accuracies without and with TTA.
    """
    fig, axis = new_chart(WIDTH, 6.2)
    axis.set(xscale="log", xlim=(0.15, 60), ylim=(LOWEST, 0.968))
    plot_published(axis)
    for label, fill in (("ours, no TTA", "white"), ("ours, TTA", GREY)):
        axis.plot([], [], "o", label=label, color=GREY, markerfacecolor=fill)
    networks = sorted({row["network"] for row in rows})  # each has its colour
    for row in rows:
        work, colour = petaflop(row), COLOURS[networks.index(row["network"])]
        axis.plot([work, work], [row["single"], row["tta"]], "-o", color=colour, linewidth=1.5)
        axis.plot([work], [row["single"]], "o", color=colour, markerfacecolor="white")
        part = "" if row["train_images"] == 50_000 else f", {row['train_images']:,} images"
        # With both ends, for two rows may stand above each other.
        ends = f"{100 * row['single']:.1f} to {percent(row['tta'])}"
        name = f"{network_name(row)}, {row['epochs']} epochs{part}: {ends} (n = {row['n']})"
        end = "tta" if line_beside(row, rows) else "single"  # there is more room beside the lower
        axis.annotate(name, (work, row[end]), (7, -4), textcoords="offset points", color=colour)
    axis.set(xlabel="training compute (PFLOP)", ylabel="test accuracy")
    axis.xaxis.set_major_formatter("{x:g}")
    percent_axis(axis)
    axis.legend(loc="lower right")
    shows = "Test accuracy against training compute, ours and published results"
    headline(fig, compute_title(rows), shows)
    return fig


def line_beside(row: dict, rows: list[dict]) -> bool:
    """Tell whether the line of another row stands right of the lower end of a row's line."""
    return any(
        petaflop(row) < petaflop(other) < 1.5 * petaflop(row)
        and other["single"] <= row["single"] <= other["tta"]
        for other in rows
    )


def plot_published(axis: Axes) -> None:
    """Plot the published results in grey, each with its name."""
    work, accuracies = [row.petaflop for row in PUBLISHED], [row.accuracy for row in PUBLISHED]
    axis.plot(work, accuracies, "s", color="0.55", label="published, TTA")
    for row in PUBLISHED:
        point = (row.petaflop, row.accuracy)
        axis.annotate(
            row.name, point, row.offset, textcoords="offset points", color=GREY, ha=row.align
        )


def write_between_marks(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replace what stands between two marks of a Markdown file by `text`."""
    begin, end = (re.escape(mark) for mark in marks)
    page, block = path.read_text(encoding="utf-8"), marks[0] + text + marks[1]
    page, count = re.subn(f"{begin}.*?{end}", lambda _: block, page, flags=re.S)
    if count != 1:
        raise InvalidValue(f"expected the marks {marks} once in {path}, got {count}")
    path.write_text(page, "utf-8")


def headline_row(rows: list[dict], committed: dict) -> dict:
    """Return the row of accuracy.json that is of the committed network.

    Args:
        rows: of accuracy.json.
        committed: what results.json says of the committed network.
    """
    wanted = {key: committed[key] for key in HEADLINE_KEYS}
    found = [row for row in rows if all(row[key] == wanted[key] for key in wanted)]
    if len(found) != 1:
        raise InvalidValue(f"expected one row of {wanted} in accuracy.json, got {len(found)}")
    return found[0]


def on_all_images(rows: list[dict]) -> list[dict]:
    """Return the rows of training on all 50,000 images."""
    return [row for row in rows if row["train_images"] == 50_000]


def readme_table(rows: list[dict], committed: dict) -> str:
    """Format the row of the committed network and, of each network, the longest on all images.

    Args:
        rows: of accuracy.json.
        committed: what results.json says of the committed network.
    """
    names = ["network, epochs, training images", "accuracy", "with TTA", "ECE", "PFLOP"]
    lines = []
    longest = {row["network"]: row for row in sorted(on_all_images(rows), key=petaflop)}
    for row in [headline_row(rows, committed), *sorted(longest.values(), key=petaflop)]:
        single, tta, ece = result_cells(row)[:3]
        name = f"{network_name(row)}, {row['epochs']}, {row['train_images']:,}"
        lines.append([name, f"{single} (n = {row['n']})", tta, ece, f"{petaflop(row):.2f}"])
    return markdown_table(names, lines) + "\n"


def heatmaps_sentence(found: dict) -> str:
    """Say what the tests of the committed network's heatmaps found.

    Args:
        found: of trust.read.
    """
    tables = {"masked": found["deletion"], "shown": found["insertion"]}
    areas = {part: saliency_checks.deletion_areas(table) for part, table in tables.items()}
    return (
        "Can Grad-CAM be trusted? Its heatmaps were compared with those of the network with random"
        f" weights. {saliency_checks.cascade_title(found['cascade'])} ({found['images']} test"
        " images). Squares of an image are masked or shown"
        " in the heatmap's order or that of a control: random, centre first, another image's"
        " heatmap."
        f" {saliency_checks.controls_title([*tables.values()])}. {centre_share(areas)}".rstrip()
        + "\n"
    )


def readme_block(rows: list[dict], speed_results: dict, committed: dict, trusted: dict) -> str:
    """Format what README.md shows of accuracy.json, speed.json and trust.json."""
    if trusted["weights"] != committed["sha256"]:
        raise InvalidValue("trust.json is of another network: run python -m benchmarks.trust")
    sentences = f"{speed(speed_results)}\n{heatmaps_sentence(trusted)}"
    return f"{readme_table(rows, committed)}\n{NOTE} {sentences}"


def results_block(rows: list[dict], steps: list[dict], tricks: list[dict], load: dict) -> str:
    """Format what docs/results.md shows of accuracy, leaderboard, ablations and space.json."""
    time = next(step["time"] for step in reversed(steps) if step["recipe"] == CURVE)
    return (
        f"## Time to 94 % on two CPU cores\n\n{leaderboard.table(steps)}\n"
        f"## Accuracy against time\n\n{curve_table(tricks, time)}\n{CURVE_NOTE}\n\n"
        f"## Tricks that were tried\n\n{tricks_table(tricks)}\n{TRICKS_NOTE}\n\n"
        f"## Every recipe\n\n{table(rows + unmeasured(rows))}\n"
        f"## The app under load\n\n{app_under_load(load)}"
    )


def main() -> None:
    """Write README's blocks, the page of the results, and the figure."""
    names = ("accuracy", "speed", "leaderboard", "ablations", "space")
    rows, speed_results, steps, tricks, load = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    readme, committed = PROJECT / "README.md", json.loads((PROJECT / "results.json").read_text())
    write_between_marks(readme, readme_block(rows, speed_results, committed, trust.read()))
    write_between_marks(readme, leaderboard.short_table(steps), LEADERBOARD_MARKS)
    write_between_marks(PROJECT / "docs/results.md", results_block(rows, steps, tricks, load))
    shown = [headline_row(rows, committed), *on_all_images(rows)]
    save_figure(plot(shown), PROJECT / "images/compute.png")


if __name__ == "__main__":
    main()
