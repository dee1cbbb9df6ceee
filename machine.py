"""What this machine is and which precision it should train in."""

import functools
import importlib.metadata
import os
import platform
import time
from pathlib import Path

# Memory for large tensors comes in pages of 2 MiB instead of 4 KiB, where the system allows it: a training step on a
# CPU otherwise spends a tenth of its time on being given pages. Read by torch when it first asks for memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import nn


def conv_seconds(images: torch.Tensor, conv: nn.Module, bf16: bool) -> tuple[torch.Tensor, float]:
    """Output of a convolution in bf16 or fp32, and the seconds for its forward and backward."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = conv(images)
    out.float().square().mean().backward()
    return out.detach().float(), time.perf_counter() - start


@functools.cache
def cpu_bf16_pays() -> bool:
    """Whether this CPU has bf16 instructions, and a convolution with them agrees with fp32 and is faster."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False  # without them, bf16 on a CPU is emulated and many times slower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.randn(128, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    # In turn, and the best of seven each: whatever else the machine does meanwhile hits both alike.
    rounds = [(conv_seconds(images, conv, False), conv_seconds(images, conv, True)) for _ in range(7)]
    (exact, _), (rounded, _) = rounds[0]
    slow, fast = (min(seconds for _, seconds in column) for column in zip(*rounds, strict=True))
    # bf16 keeps 8 bits: each product is off by up to 2**-8 of itself, their sum by less.
    return fast < slow and bool((rounded - exact).abs().max() < 2**-5 * exact.abs().max())


def choose_precision() -> str:
    """The fastest precision of this machine that is safe: 'bf16-mixed', '16-mixed' or '32-true'."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if cpu_bf16_pays() else "32-true"


def choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_precisions() -> list[str]:
    """The precisions that this machine has instructions for; others are emulated, and many times slower."""
    if choose_device() == "cuda":
        return ["32-true", "16-mixed"] + ["bf16-mixed"] * torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["32-true"] + ["bf16-mixed"] * (choose_device() == "cpu" and native)


def check_precision(name: str) -> None:
    """Raise ValueError for a precision that Lightning or this machine does not have."""
    gpu = torch.cuda.is_available()
    possible = ["32-true"]
    if gpu or not torch.backends.mps.is_available():
        possible += ["bf16-mixed"] if not gpu or torch.cuda.is_bf16_supported(including_emulation=False) else []
    possible += ["16-mixed"] if gpu else []
    if name not in possible:
        raise ValueError(f"expected a precision that {hardware()} has ({', '.join(possible)}), got {name!r}")


def hardware(processes: int = 1) -> str:
    """What trains here, in words; in so many processes, each on a device of its own."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name() if processes == 1 else f"{processes} x {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return f"Apple GPU ({platform.machine()})"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{f'{torch.get_num_threads()} CPU cores' if processes == 1 else f'{processes} processes'} ({name})"


def versions() -> dict[str, str]:
    """Of what shapes the result."""
    packages = ("torch", "pytorch-lightning", "albumentations", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
