"""What this machine is, where it trains and in which precision."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

# Memory for large tensors comes in pages of 2 MiB instead of 4 KiB, where the system allows it: a
# training step on a CPU otherwise spends a tenth of its time on being given pages. Read by torch
# when it first asks for memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor, nn

from models.errors import InvalidValue

PROJECT = Path(__file__).resolve().parent.parent


def training_step(device: str | torch.device) -> list[Tensor]:
    """Compute one training step of two convolutions with BatchNorm in channels_last.

    Returns the loss, all gradients and BatchNorm's running averages, on the CPU. The second
    BatchNorm has a fixed scale, as FastNet's have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.GELU(),
        )
        images, weights = torch.randn(8, 3, 16, 16), torch.randn(8, 32, 16, 16)
    net[4].weight.requires_grad_(False)
    net = net.to(device, memory_format=torch.channels_last)
    images = images.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = (net(images) * weights.to(device)).mean()
    loss.backward()
    gradients = [p.grad for p in (images, *net.parameters()) if p.grad is not None]
    averages = [buffer.float() for buffer in net.buffers()]
    return [value.detach().cpu() for value in (loss, *gradients, *averages)]


def steps_agree(trusted: str | torch.device, tested: str | torch.device) -> bool:
    """Compare a training step on two devices.

    Whether all numbers differ by less than a thousandth.
    """
    try:
        pairs = list(zip(training_step(trusted), training_step(tested), strict=True))
    except Exception:  # whatever it is that a device raises: it cannot train
        return False
    return all(bool((a - b).abs().max() <= 1e-3 * a.abs().max()) for a, b in pairs)


@functools.cache
def mps_trains_right() -> bool:
    """Whether the Apple GPU learns what the CPU does; says so, once, if it does not.

    In channels_last its BatchNorm gave wrong gradients in some versions (pytorch #175189), and in
    others it ended the whole process (#98602), so the test runs in a process of its own.
    """
    code = f"import sys, {__name__} as m; sys.exit(not m.steps_agree('cpu', 'mps'))"
    right = (
        subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True).returncode
        == 0
    )
    if not right:
        print(
            "The Apple GPU computes other gradients than the CPU with this version of torch: the CPU trains."
        )
    return right


def choose_device() -> torch.device:
    """Choose where everything is computed: the one source for training, prediction and Grad-CAM.

    Returns cuda if there is one; mps if a training step there agrees with the CPU's; else cpu. A
    TPU is never chosen.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available() and mps_trains_right():
        return torch.device("mps")
    return torch.device("cpu")


def conv_seconds(images: Tensor, conv: nn.Module, bf16: bool) -> tuple[Tensor, float]:
    """Output of a convolution in bf16 or fp32, and the seconds for its forward and backward."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = conv(images)
    out.float().square().mean().backward()
    return out.detach().float(), time.perf_counter() - start


def cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def cpu_bf16_pays() -> bool:
    """Whether this CPU has bf16 instructions, and a convolution with them agrees with fp32 and is faster."""
    if not cpu_has_bf16():
        return False  # without them, bf16 on a CPU is emulated and many times slower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.randn(128, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    # In turn, and the best of seven each: whatever else the machine does meanwhile hits both alike.
    rounds = [[conv_seconds(images, conv, bf16) for bf16 in (False, True)] for _ in range(7)]
    (exact, _), (rounded, _) = rounds[0]
    slow, fast = (min(seconds for _, seconds in column) for column in zip(*rounds, strict=True))
    # bf16 keeps 8 bits: each product is off by up to 2**-8 of itself, their sum by less.
    return fast < slow and bool((rounded - exact).abs().max() < 2**-5 * exact.abs().max())


def choose_precision() -> str:
    """The fastest precision of this machine that is safe: 'bf16-mixed', '16-mixed' or '32-true'."""
    device = choose_device().type
    if device == "cuda":
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        )
    return "bf16-mixed" if device == "cpu" and cpu_bf16_pays() else "32-true"


def possible_precisions() -> list[str]:
    """Lightning's names of the precisions that the device of this machine has."""
    device = choose_device().type
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["32-true", *(["bf16-mixed"] if native else []), "16-mixed"]
    return ["32-true", "bf16-mixed"] if device == "cpu" else ["32-true"]


def native_precisions() -> list[str]:
    """Those of possible_precisions that are not emulated here, many times slower."""
    emulated = ["bf16-mixed"] if choose_device().type == "cpu" and not cpu_has_bf16() else []
    return [name for name in possible_precisions() if name not in emulated]


def check_precision(name: str) -> None:
    """Raise InvalidValue for a precision that Lightning or this machine does not have."""
    possible = possible_precisions()
    if name not in possible:
        raise InvalidValue(
            f"expected a precision that {hardware()} has ({', '.join(possible)}), got {name!r}"
        )


def cpu_name() -> str:
    """The processor's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def hardware(processes: int = 1) -> str:
    """Name what trains here, in so many processes, each on a device of its own."""
    device = choose_device().type
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name if processes == 1 else f"{processes} x {name}"
    if device == "mps":
        return f"Apple GPU ({platform.machine()})"
    cores = f"{torch.get_num_threads()} CPU cores" if processes == 1 else f"{processes} processes"
    return f"{cores} ({cpu_name()})"


def versions() -> dict[str, str]:
    """Of what shapes the result."""
    packages = ("torch", "pytorch-lightning", "albumentations", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
