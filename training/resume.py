"""How a run begins or is resumed: what is written to started.json, and who may continue from it."""

import uuid
from dataclasses import asdict
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from dataload import CIFAR10DataModule
from models.errors import InvalidValue
from training.checkpoints import newest_checkpoint
from training.files import read_json, write_json
from training.hardware import choose_device, choose_precision, hardware, native_precisions
from training.options import RunOptions
from training.recipes import Recipe
from training.run_folder import STARTED_KEYS, archive_run, wait_until_begun


def start_or_resume(
    folder: Path, identity: dict, recipe: Recipe, data: CIFAR10DataModule, options: RunOptions
) -> dict:
    """Write started.json if the run begins now, or read it if the run is resumed.

    A run that is resumed keeps its device, precision and loader batches; one without a checkpoint
    begins anew where this machine could not continue it. With options.fresh, a run that is
    finished, or that this machine cannot continue, is archived.

    Args:
        folder: of the run.
        identity: what run_identity returned.
        recipe: the hyperparameters.
        data: the loaders; their batch size and workers are set to those that the run began with.
        options: what was asked for.

    Returns:
        The content of started.json: the run's identity, and what 'auto' became when it began.

    Raises:
        InvalidValue: if this machine cannot continue the run.
    """
    started = read_json(folder / "started.json", STARTED_KEYS)
    problem = why_not_resumable(folder, started, recipe)
    replaced = options.fresh and (problem or (folder / "finished.json").exists())
    unused = problem and started and not any(folder.glob("*.ckpt"))  # stopped in its first epoch
    if replaced or unused or not (started or problem):
        if rank_zero_only.rank:  # all processes train as the first one does, say in its precision
            started = wait_until_begun(folder, started)
        else:
            if replaced:
                archive_run(folder)
            started = begin(folder, identity, recipe, data, options)
        problem = why_not_resumable(folder, started, recipe)
    if problem or not started:
        raise InvalidValue(f"{problem}, or set FRESH = True to set that run aside and train anew")
    data.batch_size = started["resolved"]["batch_size"]
    data.num_workers = started["resolved"]["num_workers"]
    return started


def begin(
    folder: Path, identity: dict, recipe: Recipe, data: CIFAR10DataModule, options: RunOptions
) -> dict:
    """Decide, as a run begins, what was left to this machine, and write it to started.json.

    Arguments and return value are those of `start_or_resume`.
    """
    chosen = choose_precision() if options.precision == "auto" else options.precision
    resolved = {
        "recipe_name": options.auto.recipe_name if options.auto else "",
        "recipe": asdict(recipe),
        "device": choose_device().type,
        "precision": chosen,
        "batch_size": data.batch_size,
        "num_workers": data.num_workers,
    }
    started = {"identity": identity, "resolved": resolved, "run_id": uuid.uuid4().hex}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "started.json", started)
    return started


def why_not_resumable(folder: Path, started: dict | None, recipe: Recipe) -> str:
    """Explain why the run in a folder cannot be continued here, and what to do.

    Args:
        folder: of the run.
        started: the content of its started.json, or None if that is missing or damaged.
        recipe: the hyperparameters that are asked for now.

    Returns:
        The first half of a sentence; '' if the run can be continued, or none has begun.
    """
    if started is None:
        return why_unknown(folder)
    resolved, automatic = started["resolved"], started["identity"]["precision"] == "auto"
    if not recipe.matches(resolved["recipe"]):
        return (
            f"the run in {folder} has other hyperparameters than 'auto' chooses now; use it with"
            " the version of this project that began it"
        )
    if resolved["device"] != choose_device().type:
        began, here = resolved["device"], choose_device().type
    elif automatic and resolved["precision"] not in native_precisions():
        began, here = resolved["precision"], f"{', '.join(native_precisions())} only"
    else:
        return ""
    return (
        f"the run in {folder} began with {began}, and {hardware()} has {here}; continue it on a"
        " machine like the first"
    )


def why_unknown(folder: Path) -> str:
    """Explain that the checkpoints in a folder without started.json are of unknown origin.

    Returns:
        The first half of a sentence; '' if there are no checkpoints.
    """
    if not newest_checkpoint(folder):
        return ""
    return (
        f"{folder} holds checkpoints without a readable started.json, so how they were trained is"
        " not known; bring that file back"
    )
