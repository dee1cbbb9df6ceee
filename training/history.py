"""The metrics of a run: read from its logs, summarized, written epoch by epoch."""

import re
from pathlib import Path

import pandas as pd
from pytorch_lightning.loggers import CSVLogger

from models.errors import InvalidValue
from training.console import format_duration


def read_table(metrics_csv: str | Path) -> pd.DataFrame:
    """A table of epochs. What a killed process left half written is left out.

    ValueError names a file that is none.
    """
    try:
        return pd.read_csv(metrics_csv).apply(pd.to_numeric, errors="coerce").dropna(subset="epoch")
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise InvalidValue(f"{metrics_csv} is damaged ({error})") from error


def read_metrics(logs: Path) -> pd.DataFrame:
    """Lightning's metrics.csv files of a run, one per start, as one table.

    An epoch begun again counts once.
    """
    table = pd.DataFrame({"epoch": []})
    starts = {
        int(match[1]): path
        for path in logs.glob("*/metrics.csv")
        if (
            match := re.fullmatch(r"version_(\d+)", path.parent.name)
        )  # not a synced drive's copy 'version_0 (1)'
    }
    for _, path in sorted(starts.items()):
        try:
            rows = read_table(path)
        except (OSError, ValueError) as error:
            print(f"{error} and is not used")
            continue
        if len(rows):
            table = pd.concat([table[table.epoch < rows.epoch.min()], rows])
    return table.reset_index(drop=True)


def finished_metrics(folder: Path) -> pd.DataFrame:
    """The metrics.csv of a finished run.

    Where it is damaged or gone, it is put together again from the logs.
    """
    try:
        table = read_table(folder / "metrics.csv")
        if len(table) and {"train_loss", "train_acc", "seconds"} <= set(table):
            return table
        problem = f"{folder / 'metrics.csv'} holds no epochs"
    except (OSError, ValueError) as error:
        problem = error
    print(f"{problem}; it is made again")
    table = read_metrics(folder / "logs")
    table.to_csv(folder / "metrics.csv", index=False)
    return table


def summarize_metrics(table: pd.DataFrame) -> dict:
    """What training gave so far, from its epochs.

    Its time, all interruptions left out, and the last validation.
    """
    val_acc = float(table.val_acc.dropna().iloc[-1]) if "val_acc" in table else None
    return {"seconds": round(float(table.seconds.sum()), 1), "val_acc": val_acc}


def epoch_line(row: pd.Series, epochs: int) -> str:
    """One epoch of read_metrics' table as a line."""
    validated = "val_loss" in row and row.val_loss == row.val_loss  # not NaN
    return (
        f"epoch {int(row.epoch) + 1:3d}/{epochs} | train loss {row.train_loss:.3f} acc {row.train_acc:.4f}"
        + (f" | val loss {row.val_loss:.3f} acc {row.val_acc:.4f}" if validated else "")
        + f" | {format_duration(row.seconds)}"
    )


def write_epoch(
    logger: CSVLogger, row: dict[str, float], rates: dict[int, float], earlier: pd.DataFrame
) -> None:
    """Log an epoch before its checkpoint is written: who continues from it finds the epochs before in the log.

    Args:
        logger: of the run.
        row: the epoch's metrics, with epoch, step and seconds.
        rates: step -> learning rate.
        earlier: the epochs before, as rows; they are written again if the log's folder is gone.
    """
    folder = Path(logger.log_dir)
    if not folder.is_dir():
        print(
            f"{logger.save_dir} was removed, or its disk is gone; it is made again, with all that is still known"
        )
        folder.mkdir(parents=True)
        for _, known in earlier.dropna(subset="train_loss").iterrows():
            logger.log_metrics(known.dropna().to_dict(), int(known.step))
    for step, rate in rates.items():
        logger.log_metrics({"epoch": row["epoch"], "lr_step": rate}, step)
    logger.log_metrics(row, row["step"])
    logger.save()
