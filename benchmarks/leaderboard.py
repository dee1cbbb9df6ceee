"""The leaderboard 'Time to 94 % on two CPU cores': what made FastNet's training faster.

    python -m benchmarks.leaderboard "what changed"    # adds a row for what was measured last

Each row is a step: the time of a whole training as a fraction of the plain airbench94 schedule's,
both measured in turn on one machine and in one precision, and the accuracy that it reached. A row
takes both from results/speed.json and results/accuracy.json: the time in the precision that is the
fastest here, as `benchmarks.speed to94` does, or in --precision. The rows are in
results/leaderboard.json, and in docs/results.md.
"""

import json
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.accuracy import RESULTS
from lesson.findings import markdown_table
from models.errors import InvalidValue
from training.console import command_line
from training.files import write_json
from training.hardware import check_precision, choose_precision
from training.recipes import RECIPES

FILE = RESULTS / "leaderboard.json"
AGREES = 3  # standard deviations that a single run may be away from the mean of the others


def precision_suffix(precision: str) -> str:
    """Return the suffix of a precision's keys in speed.json: '' for bf16, '_fp32' for fp32."""
    return "_fp32" if precision == "32-true" else ""


def last_row() -> dict:
    """Read the leaderboard's last row: the one to beat."""
    return json.loads(FILE.read_text(encoding="utf-8"))[-1]


def deviation_of(values: list[float]) -> float | None:
    """Return the standard deviation of the values of single runs; None of one run."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_and_deviation(mean: float, deviation: float | None, runs: int) -> str:
    """Format an accuracy: '94.11 % ± 0.13 (n = 3)'.

    Args:
        mean: From 0 to 1.
        deviation: The standard deviation of single runs, from 0 to 1; None of one run.
        runs: How many.
    """
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return f"{100 * mean:.2f} %{spread} (n = {runs})"


def accuracy_cell(row: dict) -> str:
    """Format the accuracy with TTA of a row of the leaderboard."""
    if "tta" not in row:
        return "not measured"
    return mean_and_deviation(row["tta"], row.get("tta_std"), row["n"])


def table(rows: list[dict]) -> str:
    """Format rows of the leaderboard as a Markdown table."""
    names = ["step", "time", "precision", "on", "accuracy with TTA", "what changed"]
    names += ["date", "commit"]
    lines = []
    for number, row in enumerate(rows):
        cells = [number, f"{row['time']:.2f}", row["precision"], row["machine"]]
        cells += [accuracy_cell(row), row["changed"], row["date"], f"`{row['commit']}`"]
        lines.append(cells)
    return markdown_table(names, lines) + "\n"


def short_table(rows: list[dict]) -> str:
    """Format the leaderboard for the README: step, time, accuracy, what changed."""
    names = ["step", "time", "accuracy with TTA", "what changed"]
    lines = [
        [number, f"{row['time']:.2f}", accuracy_cell(row), row["changed"]]
        for number, row in enumerate(rows)
    ]
    return markdown_table(names, lines) + "\n"


def compare(row: dict, recipe: str, ratio: float, precision: str, tta: float) -> str:
    """Compare a training with a row of the leaderboard.

    Args:
        row: Of the leaderboard.
        recipe: The name of the recipe that was trained.
        ratio: Our seconds over those of the published schedule.
        precision: Of both, by Lightning's name.
        tta: The accuracy with TTA that was reached, from 0 to 1.

    Returns:
        A sentence.
    """
    told = f"{recipe}: {ratio:.3f} of the published schedule's time in {precision}"
    told += f" (leaderboard, {row['recipe']}: {row['time']:.3f} in {row['precision']})"
    told += f", {100 * tta:.2f} % with TTA"
    if row["recipe"] != recipe or row.get("tta_std") is None:
        return told
    away = abs(tta - row["tta"]) / row["tta_std"]
    verdict = "agrees with" if away <= AGREES else f"is {away:.1f} standard deviations away from"
    return f"{told}, which {verdict} {accuracy_cell(row)}"


def measured_row(changed: str, recipe: str, precision: str, folder: Path = RESULTS) -> dict:
    """Make a row of what speed.json and accuracy.json hold of a recipe.

    Args:
        changed: What changed, for the table.
        recipe: Its name in RECIPES.
        precision: Of the time, by Lightning's name.
        folder: Where the two files are.

    Raises:
        InvalidValue: if one of them holds nothing of the recipe.
    """
    speed, rows = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("speed.json", "accuracy.json")
    )
    mark = precision_suffix(precision)
    timed = speed.get(f"time_to_94{mark}", {}).get("recipe") == recipe
    found = [row for row in rows if row["recipe"] == recipe and row["train_images"] == 50_000]
    if not timed or not found:
        time_of = f"time in {precision} by `benchmarks.speed to94`"
        missing = "accuracy on 50,000 images" if timed else time_of
        raise InvalidValue(f"expected a measured {missing} of {recipe}, got none in {folder}")
    row = found[-1]
    return {
        "recipe": recipe,
        "time": speed[f"time_to_94_ratio{mark}"],
        "precision": precision,
        "machine": speed["machine"][f"to94{mark}"],
        "tta": row["tta"],
        "tta_std": deviation_of([run["tta"] for run in row["runs"]]),
        "n": row["n"],
        "changed": changed,
    }


def main() -> None:
    """Add a row for the recipe that is named, with today's date and the commit that is out."""
    parser = command_line(__doc__)
    parser.add_argument("changed", help="what changed since the row before")
    parser.add_argument("--recipe", choices=list(RECIPES), default=last_row()["recipe"])
    parser.add_argument("--precision", default=choose_precision())
    args = parser.parse_args()
    check_precision(args.precision)
    commit = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], text=True).strip()
    row = measured_row(args.changed, args.recipe, args.precision)
    row |= {"date": time.strftime("%Y-%m-%d"), "commit": commit}
    rows = [*json.loads(FILE.read_text(encoding="utf-8")), row]
    write_json(FILE, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
