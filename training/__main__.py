"""Train without the notebook, on one device or many.

The switches are the notebook's, taken from the environment.

    ERA_ARCH=FastNet .venv/bin/python -m training
    ERA_ARCH=FastNet .venv/bin/torchrun --nproc-per-node 2 -m training

A run that was interrupted is continued. The notebook, run with the same switches, loads the result.
More in docs/scaling.md.
"""

import sys

from dataload import load_splits, sample_splits
from models.errors import EXPLAINED, InvalidValue
from training.console import command_line, forgive_output
from training.runs import build_datamodule, train
from training.settings import PROJECT, SWITCHES, resolve


def main() -> None:
    """Train as the switches of the environment say."""
    forgive_output()
    command_line(__doc__).parse_args()
    s = resolve(SWITCHES)
    if s.train == "stored":
        raise InvalidValue("expected TRAIN=yes for a training, got stored: nothing to be trained")
    if s.smoke:
        splits = sample_splits(PROJECT / "space/examples", s.seed, 0.3)
    else:
        splits = load_splits(s.data_dir, s.seed)
    data = build_datamodule(s.recipe, splits, s.seed, s.fast_loader)
    train(s.recipe, data, s.checkpoint_dir, s.options)


if __name__ == "__main__":
    try:
        main()
    except EXPLAINED as error:
        sys.exit(f"{type(error).__name__}: {error}")
