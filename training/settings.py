"""The settings of a run of the notebook, resolved from its switches."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.bundle import read_bundle
from models.errors import InvalidValue
from training.budget import choose_affordable
from training.files import PROJECT, scratch_folder
from training.hardware import check_precision, choose_device, choose_precision
from training.lightning_output import print_rank_zero
from training.options import AutoChoice, RunOptions
from training.recipe_check import check_recipe
from training.recipes import RECIPES, Recipe, choose_recipe
from training.run_folder import earlier_auto_choice
from training.switches import SWITCHES as SWITCHES  # who resolves settings needs the switches too
from training.switches import Switches, from_environment, parse_bool, parse_folder, validate

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive, which outlives a runtime


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a run of the notebook.

    Attributes:
        options: seed, precision, devices and the like, for `train`.
        recipe_name: its name in RECIPES.
        recipe: the hyperparameters, with EPOCHS and BATCH_SIZE applied.
        fast_loader: whether the fast loader replaces Albumentations.
        train: 'yes', or 'stored' to use the network of the Space.
        num_samples: images in the figures of errors and of Grad-CAM.
        opacity: of Grad-CAM's heatmaps, from 0 to 1.
        data_dir: the folder of CIFAR-10.
        checkpoint_dir: the folder of the runs.
        out_dir: the folder of the results.
        push_to: a Space on Hugging Face as 'user/name', or '' to push nothing.
        launch: whether to start the app at the end.
        smoke: whether this is a test run: two epochs of a part of the sample, in small batches.
        device: the kind of device that trains: 'cpu', 'cuda' or 'mps'.
    """

    options: RunOptions
    recipe_name: str
    recipe: Recipe
    fast_loader: bool
    train: str
    num_samples: int
    opacity: float
    data_dir: Path
    checkpoint_dir: Path
    out_dir: Path
    push_to: str
    launch: bool
    smoke: bool
    device: str

    @property
    def seed(self) -> int:
        """Return the seed of the split, the loaders and the weights."""
        return self.options.seed


def resolve(switches: dict) -> Settings:
    """Resolve the settings from the switches and the environment.

    Args:
        switches: of the notebook's cell, name -> value.

    Raises:
        InvalidValue: if a switch, an environment variable, or a combination of them is not
            allowed; the message names it.
    """
    chosen = validate({name: from_environment(name, value) for name, value in switches.items()})
    if chosen.PRECISION:
        check_precision(chosen.PRECISION)
    smoke, device = parse_bool("SMOKE_TEST", os.environ.get("SMOKE_TEST", "")), choose_device().type
    if smoke and os.environ.get("WORLD_SIZE", "1") != "1":  # each would have its scratch folder
        raise InvalidValue(f"SMOKE_TEST is for one process, got {os.environ['WORLD_SIZE']} of them")
    if smoke and chosen.DEVICES == "auto":  # without a notebook, Lightning would take all GPUs
        chosen = chosen.model_copy(update={"DEVICES": "1"})
    checkpoint_dir = scratch_folder() if smoke else checkpoint_folder(chosen.CHECKPOINT_DIR)
    arch, name, auto = chosen.ARCH, chosen.RECIPE, None
    if chosen.TRAIN == "stored":
        name, recipe = stored_recipe(PROJECT / "space")
    else:
        if arch == "auto":
            auto = choose_automatically(chosen, checkpoint_dir, device, smoke)
            name, arch = auto.recipe_name, RECIPES[auto.recipe_name].network
        epochs = min(chosen.EPOCHS or 2, 2) if smoke else chosen.EPOCHS
        batch_size = chosen.BATCH_SIZE or (100 if smoke else 0)
        name, recipe = choose_recipe(arch, name, epochs, batch_size)
    check_recipe(recipe)
    return Settings(
        options=resolve_options(chosen, auto),
        recipe_name=name,
        recipe=recipe,
        fast_loader=chosen.LOADER == "fast",
        train=chosen.TRAIN,
        num_samples=chosen.NUM_SAMPLES,
        opacity=chosen.OPACITY,
        data_dir=parse_folder("DATA_DIR", chosen.DATA_DIR),
        checkpoint_dir=checkpoint_dir,
        out_dir=parse_folder("OUT_DIR", chosen.OUT_DIR),
        push_to=chosen.PUSH_TO,
        launch=chosen.LAUNCH,
        smoke=smoke,
        device=device,
    )


def stored_recipe(space: Path) -> tuple[str, Recipe]:
    """Return the name of the recipe that trained a bundle's network, and the recipe.

    Args:
        space: the folder of the bundle.

    Raises:
        InvalidValue: if the bundle is damaged, or there is no such recipe any more.
    """
    meta, _ = read_bundle(space)
    trained = meta["training"]
    name, batch_size = trained.get("recipe", ""), trained.get("batch_size", 0)
    return choose_recipe(meta["architecture"], name, trained["epochs"], batch_size)


def choose_automatically(
    chosen: Switches, checkpoint_dir: Path, device: str, smoke: bool
) -> AutoChoice:
    """Choose the recipe for ARCH = "auto": RECIPE, or one that suits the machine.

    That is ResNet18's on a GPU, and what the CPU can afford without one.

    A run that the same switches began keeps the recipe that was chosen then, on whatever machine,
    unless it has no checkpoint or FRESH is set.

    Args:
        chosen: the switches.
        checkpoint_dir: the folder of the runs.
        device: 'cpu', 'cuda' or 'mps'.
        smoke: whether this is a test run, which is short in any case.
    """
    asked = {name: getattr(chosen, name) for name in ("ARCH", "RECIPE", "EPOCHS", "BATCH_SIZE")}
    wanted = {"recipe": asked, "seed": chosen.SEED, "loader": chosen.LOADER}
    wanted["precision"] = chosen.PRECISION or "auto"
    before = None if chosen.FRESH else earlier_auto_choice(checkpoint_dir, wanted)
    if before in RECIPES:
        said = f'ARCH = "auto" chose {before} when this run began; FRESH = True chooses anew'
        print_rank_zero(said)
        return AutoChoice(asked, before)
    name = chosen.RECIPE or choose_recipe("FastNet" if device == "cpu" else "ResNet18")[0]
    settled = smoke or chosen.RECIPE or chosen.EPOCHS
    if device == "cpu" and not settled and trains_alone(chosen):
        name = choose_affordable(chosen.PRECISION or choose_precision())
    return AutoChoice(asked, name)


def trains_alone(chosen: Switches) -> bool:
    """Tell whether one process trains: of several, each would time itself and choose for itself."""
    placement = resolve_placement(chosen.model_dump())
    return placement["devices"] in ("auto", 1) and placement["num_nodes"] == 1


def resolve_options(chosen: Switches, auto: AutoChoice | None) -> RunOptions:
    """Resolve the options of the run.

    Args:
        chosen: the switches.
        auto: the choice of ARCH = "auto", if that chose the recipe.
    """
    return RunOptions(
        seed=chosen.SEED,
        fresh=chosen.FRESH,
        precision=chosen.PRECISION or "auto",
        auto=auto,
        **resolve_placement(chosen.model_dump()),
    )


def resolve_placement(switches: dict) -> dict[str, Any]:
    """Resolve on how many devices of how many machines to train.

    Where torchrun has started this process, its numbers replace DEVICES and NUM_NODES.

    Args:
        switches: name -> value.

    Returns:
        devices, num_nodes and strategy, as Lightning's Trainer has them.
    """
    devices, num_nodes = switches["DEVICES"], switches["NUM_NODES"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, num_nodes = os.environ["LOCAL_WORLD_SIZE"], int(os.environ["GROUP_WORLD_SIZE"])
    devices = devices if devices == "auto" else int(devices)
    return {"devices": devices, "num_nodes": num_nodes, "strategy": switches["STRATEGY"]}


def checkpoint_folder(wanted: str) -> Path:
    """Return the folder of the runs: on Google Drive if that is mounted and no other is wanted."""
    path = parse_folder("CHECKPOINT_DIR", wanted)
    return DRIVE / "cifar10-checkpoints" if path == Path("checkpoints") and DRIVE.is_dir() else path


def shorten_for_sample(recipe: Recipe) -> Recipe:
    """Limit a recipe to three epochs, which leave a few errors on the sample to look at."""
    return replace(recipe, epochs=min(recipe.epochs, 3))


def output_folder(settings: Settings, is_cifar10: bool) -> Path:
    """Make the folder of a run's results, and return it.

    On the sample that is never the project itself, but a scratch folder.
    """
    if settings.out_dir.resolve() == PROJECT and not is_cifar10:
        return scratch_folder()
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    return settings.out_dir
