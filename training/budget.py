"""Which recipe a machine can afford: the choice of ARCH = "auto", and advice to a slow run."""

from typing import NamedTuple

from training.console import format_duration
from training.recipes import (
    FASTNET,
    RECIPES,
    Recipe,
    choose_recipe,
    measured_runs,
    multiply_adds,
    training_work,
)
from training.workload import batches_of_work, seconds_per_batch

BUDGET_MINUTES = 15  # of training: with all else, a run of the notebook then takes about 20
SLOW_RUN_MINUTES = 20  # of training, after which a smaller budget is offered
PACE_SPREAD = 2  # by which networks differ at most in multiply-adds per second on one machine


class Offer(NamedTuple):
    """A recipe whose accuracy was measured, and how long it would train here.

    Attributes:
        name: in RECIPES.
        val_single: its validation accuracy without TTA, from 0 to 1.
        seconds: of training on this machine, estimated.
    """

    name: str
    val_single: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} ({self.val_single:.1%}, about {format_duration(self.seconds)})"


def multiply_adds_per_batch(recipe: Recipe) -> int:
    """Return the multiply-adds of a forward pass of a recipe's batch, in millions."""
    return recipe.batch_size * multiply_adds(recipe.network)


def list_offers(precision: str) -> list[Offer]:
    """List the measured recipes, the most accurate first, down to the first that is affordable.

    FastNet is timed here. Another network is timed if it may be affordable by its multiply-adds;
    else these alone make its estimate.

    Args:
        precision: Lightning's name.
    """
    rows = measured_runs()
    if not rows:
        return []
    pace = seconds_per_batch(FASTNET, precision) / multiply_adds_per_batch(FASTNET)
    paces, offers = {"FastNet": pace}, []  # network -> seconds per million multiply-adds
    for row in sorted(rows, key=lambda row: row["val_single"], reverse=True):
        recipe = RECIPES[row["recipe"]]
        work = batches_of_work(recipe) * multiply_adds_per_batch(recipe)
        if work * pace < PACE_SPREAD * 60 * BUDGET_MINUTES and recipe.network not in paces:
            timed = seconds_per_batch(recipe, precision)
            paces[recipe.network] = timed / multiply_adds_per_batch(recipe)
        seconds = work * paces.get(recipe.network, pace)
        offers.append(Offer(row["recipe"], row["val_single"], seconds))
        if seconds <= 60 * BUDGET_MINUTES:
            break
    return offers


def choose_affordable(precision: str) -> str:
    """Choose the most accurate recipe that trains in BUDGET_MINUTES on this CPU, and print why.

    Accuracy is that of the validation images, as it was measured: the test images choose nothing.

    Args:
        precision: Lightning's name.

    Returns:
        Its name in RECIPES; where none is affordable, that of the fastest.
    """
    offers = list_offers(precision)
    if not offers:
        return choose_recipe("FastNet")[0]
    chosen = min(offers, key=lambda offer: offer.seconds)
    better = offers[: offers.index(chosen)]
    why = f"the best measured validation accuracy of what trains in about {BUDGET_MINUTES} minutes"
    if chosen.seconds > 60 * BUDGET_MINUTES:
        why = f"nothing that was measured trains in about {BUDGET_MINUTES} minutes"
    print(f'ARCH = "auto" chose {chosen}: {why} on this CPU')
    if better:
        network = RECIPES[better[-1].name].network
        print(
            f"More accurate, and slower: {', '.join(map(str, reversed(better)))}; for the first of"
            f' them set ARCH = "{network}", RECIPE = "{better[-1].name}"'
        )
    return chosen.name


def smaller_budget(network: str, epochs: float) -> str:
    """Advise what to train where a run takes too long: the best measured recipe that takes less.

    The best is that with the highest validation accuracy: the test images choose nothing. The times
    of the measured runs are of another machine, so multiply-adds are compared.

    Args:
        network: that takes too long.
        epochs: of that network for which there is time.
    """
    affordable = epochs * multiply_adds(network)
    fitting = [row for row in measured_runs() if training_work(row) <= affordable]
    advice = f"This machine needs more than {SLOW_RUN_MINUTES} minutes for it. "
    if not fitting:
        less = "less" if epochs >= 1 else "more"
        return f"{advice}EPOCHS = {max(1, int(epochs))} would take {less}."
    best = max(fitting, key=lambda row: row["val_single"])
    return advice + (
        f'ARCH = "{best["network"]}", RECIPE = "{best["recipe"]}" would take less, for a validation'
        f" accuracy of about {best['val_single']:.1%} (measured, {best['train_images']:,} images)."
    )
