"""What Lightning prints, reduced to what is of use, and printing in one of several processes."""

import logging
import warnings

from pytorch_lightning.utilities import rank_zero_only

# Lightning's warnings that nobody can act on here, as regular expressions, each with the reason.
HARMLESS = (
    ".*LeafSpec.*",  # of torch's own code, about torch's own code
    ".*does not have many workers.*",  # without a GPU they would take the cores that train
    ".*Checkpoint directory .* exists and is not empty.*",  # so it is when a run is resumed
    ".*smaller than the logging interval.*",  # Progress logs every step itself
    ".*bf16-mixed is not supported by the model summary",  # no summary is shown
)


def quiet_lightning() -> None:
    """Silence what Lightning prints at every fit: advertisements, and warnings of no use here.

    Its errors are still shown, and its note that it uses one of several GPUs.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for package in ("pytorch_lightning", "lightning_fabric"):
        # Most messages come from there.
        logger = logging.getLogger(f"{package}.utilities.rank_zero")
        logger.setLevel(logging.INFO)
        logger.addFilter(is_worth_reading)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Tell whether a message of Lightning is an error, or says that it leaves GPUs unused."""
    return record.levelno >= logging.ERROR or "will use only 1 of" in record.getMessage()


print_rank_zero = rank_zero_only(print)  # once, however many processes train
