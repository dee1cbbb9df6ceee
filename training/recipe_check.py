"""Whether the tricks of a recipe fit its network: asked before a run begins, not an hour later."""

import torch

from models.errors import InvalidValue
from models.registry import build
from models.stage import Network
from training.optimizer import parameter_groups
from training.recipes import LOW_RESOLUTION, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe's network has what its learning rates train, and takes its images.

    Args:
        recipe: the hyperparameters.

    Raises:
        InvalidValue: that names the hyperparameter, its value and the network.
    """
    with torch.random.fork_rng(devices=[]):
        network = build(recipe.network)
        check_rates(network, recipe)
        if recipe.low_res:
            check_low_resolution(network, recipe)


def check_rates(network: Network, recipe: Recipe) -> None:
    """Raise InvalidValue if a learning rate of a recipe has no parameters in its network."""
    groups = parameter_groups(network, recipe)
    if recipe.muon_lr and not any(group.get("muon") for group in groups):
        raise InvalidValue(
            f"expected muon_lr 0 for {recipe.network}, which has no 3x3 filters that Muon could"
            f" train, got {recipe.muon_lr}"
        )
    of_sgd = [group for group in groups if not group.get("muon")]
    if recipe.bias_lr and not any(group.get("lr") == recipe.bias_lr for group in of_sgd):
        raise InvalidValue(
            f"expected bias_lr 0 for {recipe.network}, whose convolutions and BatchNorm have no"
            f" biases, got {recipe.bias_lr}"
        )


def check_low_resolution(network: Network, recipe: Recipe) -> None:
    """Raise InvalidValue if a network does not take the small images its recipe begins with."""
    side = LOW_RESOLUTION
    try:
        network.train()(torch.zeros(2, 3, side, side))
    except Exception as error:  # whatever a network raises for images of another size
        raise InvalidValue(
            f"expected low_res 0 for {recipe.network}, which takes no images of {side}x{side}"
            f" pixels ({error!r:.200}), got {recipe.low_res}"
        ) from error
