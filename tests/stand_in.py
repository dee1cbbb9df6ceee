"""A stand-in for a GPU: it computes on the CPU and refuses to mix what was moved with what was not.

`.to("cuda")` gives a tensor that says it is on 'cuda', and so does every result that it has a part
in. Where it meets a tensor of the CPU, or NumPy, the error is the one that a GPU would raise. As on
a GPU, tensors without dimensions may mix, copies cross over, and indices may stay on the CPU. What
carries no mark, such as the gradients that autograd makes, fits everywhere.

Lightning's Trainer asks the driver and cannot be fooled: tests call the steps themselves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# What may take tensors of both: copies, and questions.
CROSSES = {
    "__deepcopy__",
    "copy_",
    "to",
    "cpu",
    "__get__",
    "__set__",
    "_has_compatible_shallow_copy_type",
}


def place(value: Any) -> torch.device | None:
    """Return where a tensor is: None where that is not known."""
    return getattr(value, "stand_in_place", CPU if isinstance(value, nn.Parameter) else None)


def tensors(values: Any) -> Iterator[Tensor]:
    """Find the tensors in arguments or results, which may be nested."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


def mark(values: Any, device: torch.device | None) -> Any:
    """Mark all tensors of a result as being on a device, and return it."""
    for tensor in tensors(values):
        if device is not None:
            tensor.stand_in_place = device
    return values


def real(device: Any) -> Any:
    """Return the device on which to compute: the CPU for a GPU."""
    return CPU if device is not None and torch.device(device).type == "cuda" else device


def wanted_device(args: tuple, kwargs: dict) -> torch.device | None:
    """Return the device that the arguments of `to` or of a new tensor name, if they do."""
    named = kwargs.get("device")
    if named is None:
        named = next((a for a in args if isinstance(a, (torch.device, str))), None)
    if named is None:
        return None
    return GPU if torch.device(named).type == "cuda" else torch.device(named)


class StandInGenerator(torch.Generator):
    """A generator that says it is on a GPU, and draws on the CPU."""

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls, device="cpu")
        made.stand_in_place = GPU if torch.device(device).type == "cuda" else CPU
        return made


class StandIn(TorchFunctionMode):
    """The mode in which tensors have the places that they say."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compute on the CPU, after the check, and mark the result."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        qualified = resolve_name(func) or ""
        given = list(tensors((args, kwargs)))
        here = place(args[0]) if args else None
        if name == "__get__" and qualified == "torch.Tensor.device.__get__":
            return here or func(*args)
        if name == "__get__" and qualified == "torch.Tensor.is_cuda.__get__":
            return here == GPU
        if name in ("numpy", "__array__") and here == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        wanted = wanted_device(args if name == "to" else (), kwargs)
        if name == "to" and wanted is None:
            wanted = next((place(t) for t in given[1:]), None) or here
        if name == "cpu":
            wanted = CPU
        if name in ("to", "cpu"):
            args = tuple(real(a) if isinstance(a, (torch.device, str)) else a for a in args)
            kwargs = {k: real(v) if k == "device" else v for k, v in kwargs.items()}
            out = func(*args, **kwargs)
            moves = wanted != here and out is args[0]
            return mark(out.view_as(out) if moves else out, wanted)
        self.check(name, given, wanted, kwargs.get("generator"))
        if "device" in kwargs:
            kwargs["device"] = real(kwargs["device"])
        out = func(*args, **kwargs)
        if name == "__set__":
            if qualified == "torch.Tensor.data.__set__":
                mark(args[0], place(args[1]))
            return out
        places = [p for p in map(place, given) if p is not None]
        made = wanted or (GPU if GPU in places else CPU if places else None)
        return mark(out, made or (None if given else CPU))

    def check(
        self, name: str, given: list[Tensor], wanted: torch.device | None, generator: Any
    ) -> None:
        """Raise the RuntimeError of a GPU if the tensors of an operation do not fit together."""
        if generator is not None and place(generator) not in (None, wanted or CPU):
            raise RuntimeError(
                f"Expected a '{wanted or CPU}' device type for generator but found"
                f" '{place(generator)}'"
            )
        if name in CROSSES:
            return
        indexed = name in ("__getitem__", "__setitem__") and place(given[0]) == GPU
        sized = [t for t in given if Tensor.dim(t)] if not indexed else []
        if {CPU, GPU} <= {place(tensor) for tensor in sized}:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" cuda:0 and cpu! (in {name})"
            )
