"""What a training run is asked for besides its recipe and its images."""

from dataclasses import dataclass
from typing import NamedTuple


class AutoChoice(NamedTuple):
    """A recipe that ARCH = "auto" chose.

    Attributes:
        asked: the switches that it was chosen from, name -> value.
        recipe_name: its name in RECIPES.
    """

    asked: dict
    recipe_name: str


@dataclass(frozen=True)
class RunOptions:
    """What a training run is asked for besides its recipe and its images.

    Each batch is split over the devices, so a recipe is the same for any number of them.

    Attributes:
        seed: of the initial weights.
        fresh: train anew even if the run is finished, or began on a machine of another kind; its
            old folder is renamed and kept.
        precision: Lightning's name of a precision, or 'auto'.
        compiled: whether torch.compile prepares the network, which takes a minute; meant for a GPU.
        devices: as in Lightning's Trainer: how many devices of each machine train, or 'auto', which
            is all GPUs in a script and one in a notebook.
        num_nodes: as in Lightning's Trainer: how many machines train.
        strategy: as in Lightning's Trainer: how the devices train together, or 'auto'.
        auto: the choice of ARCH = "auto", if that chose the recipe.
    """

    seed: int = 42
    fresh: bool = False
    precision: str = "auto"
    compiled: bool = False
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    auto: AutoChoice | None = None


DEFAULT_OPTIONS = RunOptions()
