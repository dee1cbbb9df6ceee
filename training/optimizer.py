"""Muon for the filters and SGD for the rest, in one optimiser, and which parameters each trains."""

import torch
from torch import Tensor, nn

from models.errors import InvalidValue
from training.recipes import Recipe

MUON_MOMENTUM = 0.6  # of airbench94


def orthogonalize(matrix: Tensor, steps: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrix, by Newton and Schulz's iteration.

    The coefficients are those of Jordan et al. 2024 (Muon): singular values come into 0.7..1.2
    after five steps; three are enough to train with.

    Args:
        matrix: of shape (R, C).
        steps: of the iteration.
        dtype: to compute in; bf16 suffices, where it is fast.

    Returns:
        A matrix of shape (R, C) and matrix's dtype, whose singular values are much closer to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(dtype)
    x = x / (x.norm() + 1e-7)  # then no singular value is above 1
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the product below is then the smaller one
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class MuonWithSGD(torch.optim.Optimizer):
    """SGD with Nesterov momentum that, in groups with muon=True, orthogonalizes each step.

    The gradient of a convolution's filters is dominated by a few directions, and a step along it
    changes only these. The nearest orthogonal step moves all directions by the same amount. The
    filters keep the norm sqrt(out_channels), so the learning rate is a rate of rotation.
    torch.optim.Muon takes matrices only; here 4-D weights (out, in, k, k) are treated as matrices
    (out, in * k * k). Source: Jordan et al. 2024 (Muon); the fixed norm: his airbench94.

    Args:
        params: parameters or groups; a group may set lr, momentum, weight_decay, which Muon does
            not use, and muon.
        lr: the learning rate.
        momentum: of Nesterov.
        weight_decay: of what SGD trains.
        dtype: in which steps are orthogonalized.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "muon": False}
        )
        for group in self.param_groups:
            for p in group["params"]:
                if group["muon"] and p.ndim != 4:
                    raise InvalidValue(
                        f"expected 4-D filters for Muon, got a parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step, and return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def update(self, p: Tensor, gradient: Tensor, group: dict) -> None:
        """Update one parameter in place."""
        step = gradient if group["muon"] else gradient.add(p, alpha=group["weight_decay"])
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].mul_(group["momentum"]).add_(step)
        step = step.add(state["momentum"], alpha=group["momentum"])  # Nesterov: look one step ahead
        if group["muon"]:
            p.mul_(len(p) ** 0.5 / p.norm())
            step = orthogonalize(step.flatten(1), dtype=self.dtype).view_as(p)
        p.sub_(step, alpha=group["lr"])


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Divide a network's parameters into groups.

    Returns:
        The filters that Muon trains, the biases of convolutions and BatchNorm, and the rest, as
        far as there are any, each with its peak learning rate.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    biases = {id(layer.bias) for layer in layers} if recipe.bias_lr else set()
    filters, bias_group, rest = [], [], []
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        # The first convolution, of three colours, is too small to be made orthogonal to any use.
        if recipe.muon_lr and p.shape[2:] == (3, 3) and p.shape[1] > 3:
            filters.append(p)
        else:
            (bias_group if id(p) in biases else rest).append(p)
    decay = recipe.weight_decay * recipe.max_lr  # per step: a faster bias does not decay faster
    bias_decay = decay / (recipe.bias_lr or 1)
    groups = (
        {"params": filters, "lr": recipe.muon_lr, "momentum": MUON_MOMENTUM, "muon": True},
        {"params": bias_group, "lr": recipe.bias_lr, "weight_decay": bias_decay},
        {"params": rest},
    )
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe, bf16: bool) -> MuonWithSGD:
    """Make the optimiser of a recipe.

    Args:
        model: the network to train.
        recipe: the hyperparameters.
        bf16: whether to orthogonalize Muon's steps in bf16.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    return MuonWithSGD(
        parameter_groups(model, recipe), recipe.max_lr, recipe.momentum, recipe.weight_decay, dtype
    )
