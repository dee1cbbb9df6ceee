"""The metrics of a run: read from its logs, summarized, written epoch by epoch."""

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pandas as pd

from models.errors import InvalidValue
from training.console import format_duration

if TYPE_CHECKING:
    from pytorch_lightning.loggers import CSVLogger

EPOCH_COLUMNS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


def read_table(metrics_csv: str | Path) -> pd.DataFrame:
    """Read a table of epochs, without the rows that a killed process left half written.

    The last row counts only if it ends with a newline.

    Raises:
        InvalidValue: if the file is no such table; the message names it.
        OSError: if it cannot be read.
    """
    try:
        text = Path(metrics_csv).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # else "12" may read as 1
        numbers = pd.read_csv(io.StringIO(whole)).apply(pd.to_numeric, errors="coerce")
        return cast(pd.DataFrame, numbers).dropna(subset="epoch")
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise InvalidValue(f"{metrics_csv} is damaged ({error})") from error


def read_metrics(logs: Path) -> pd.DataFrame:
    """Read Lightning's metrics.csv files of a run, one per start, as one table.

    Args:
        logs: the folder that holds version_0, version_1 and so on.

    Returns:
        The rows of all starts; of an epoch that was begun again, those of the last start.
    """
    table = pd.DataFrame({"epoch": []})
    versions = {  # the pattern excludes the copies of a synced drive, such as 'version_0 (1)'
        int(match[1]): path
        for path in logs.glob("*/metrics.csv")
        if (match := re.fullmatch(r"version_(\d+)", path.parent.name))
    }
    for _, path in sorted(versions.items()):
        try:
            rows = read_table(path)
        except (OSError, ValueError) as error:
            print(f"{error} and is not used")
            continue
        if len(rows):
            earlier = table.loc[table["epoch"] < rows["epoch"].min()]
            table = pd.concat([earlier, rows])
    return table.reset_index(drop=True)


def read_finished_metrics(folder: Path, epochs: int) -> pd.DataFrame:
    """Read the metrics.csv of a finished run, or make it again from the logs if it is damaged.

    Args:
        folder: of the run.
        epochs: of the run.
    """
    try:
        table, names = read_table(folder / "metrics.csv"), ["train_loss", "train_acc", "seconds"]
        known = table.reindex(columns=names).dropna()
        if len(known) == epochs:
            return table
        problem = f"{folder / 'metrics.csv'} holds {len(known)} of {epochs} epochs"
    except (OSError, ValueError) as error:
        problem = error
    print(f"{problem}; it is made again")
    table = read_metrics(folder / "logs")
    table.to_csv(folder / "metrics.csv", index=False)
    return table


def summarize_metrics(table: pd.DataFrame) -> dict:
    """Summarize the epochs of a run.

    Args:
        table: what read_metrics returned.

    Returns:
        seconds, without all interruptions, and val_acc of the last validation, or None if there
        was none.
    """
    rows = rows_of(table)
    seconds = sum((row["seconds"] for row in rows if "seconds" in row), 0.0)
    val_accs = [row["val_acc"] for row in rows if "val_acc" in row]
    return {"seconds": round(seconds, 1), "val_acc": val_accs[-1] if val_accs else None}


def epoch_means(table: pd.DataFrame) -> pd.DataFrame:
    """Average the rows of each epoch: each step logs its learning rate in a row of its own.

    Returns:
        A row for each epoch, in their order.
    """
    return cast(pd.DataFrame, table.groupby("epoch").mean()).reset_index()


def epoch_rows(metrics_csv: str | Path) -> list[dict[str, float]]:
    """List the metrics of each epoch of a run, as results.json holds them.

    Args:
        metrics_csv: the table of the run.

    Returns:
        A dict for each epoch with those of EPOCH_COLUMNS that were measured.
    """
    means = epoch_means(read_table(metrics_csv))
    names = [name for name in EPOCH_COLUMNS if name in means]
    return rows_of(cast(pd.DataFrame, means[names]))


def rows_of(table: pd.DataFrame) -> list[dict[str, float]]:
    """List the rows of a table as dicts, column -> value, without the values that are missing."""
    names = [str(name) for name in table]
    return [
        {name: value for name, value in zip(names, row, strict=True) if not math.isnan(value)}
        for row in table.to_numpy(dtype=float).tolist()
    ]


def epoch_line(metrics: dict[str, float], epochs: int) -> str:
    """Format the metrics of an epoch as a line.

    Args:
        metrics: epoch, counted from 0, train_loss, train_acc, seconds, and, if the epoch was
            validated, val_loss and val_acc.
        epochs: of the whole run.
    """
    validated = ""
    if "val_loss" in metrics:
        validated = f" | val loss {metrics['val_loss']:.3f} acc {metrics['val_acc']:.4f}"
    return (
        f"epoch {int(metrics['epoch']) + 1:3d}/{epochs}"
        f" | train loss {metrics['train_loss']:.3f} acc {metrics['train_acc']:.4f}{validated}"
        f" | {format_duration(metrics['seconds'])}"
    )


def write_epoch(
    logger: "CSVLogger", metrics: dict[str, float], rates: dict[int, float], earlier: pd.DataFrame
) -> None:
    """Log an epoch.

    That happens before its checkpoint is written, so that a run that continues from the checkpoint
    finds all earlier epochs in the log.

    Args:
        logger: of the run.
        metrics: of the epoch, with epoch, step and seconds.
        rates: step -> learning rate.
        earlier: the rows of the epochs before; they are written again if the log's folder is gone.
    """
    folder = Path(logger.log_dir)
    if not folder.is_dir():
        print(
            f"{logger.save_dir} was removed, or its disk is gone; it is made again, with all that"
            " is still known"
        )
        folder.mkdir(parents=True)
        for known in rows_of(earlier):
            if "train_loss" in known:
                logger.log_metrics({**known}, int(known["step"]))
    for step, rate in rates.items():
        logger.log_metrics({"epoch": metrics["epoch"], "lr_step": rate}, step)
    logger.log_metrics({**metrics}, int(metrics["step"]))
    logger.save()
