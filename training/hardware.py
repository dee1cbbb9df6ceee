"""What this machine is, on which device it trains and in which precision."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.errors import InvalidValue
from training.files import PROJECT

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]  # Lightning's names


def training_step(device: str | torch.device) -> list[Tensor]:
    """Compute one training step of two convolutions with BatchNorm in channels_last.

    The second BatchNorm has a fixed scale, as FastNet's have.

    Returns:
        The loss, all gradients and BatchNorm's running averages, on the CPU.
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
    net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = images.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = (net(images) * weights.to(device)).mean()
    loss.backward()
    gradients = [p.grad for p in (images, *net.parameters()) if p.grad is not None]
    averages = [buffer.float() for buffer in net.buffers()]
    return [value.detach().cpu() for value in (loss, *gradients, *averages)]


def steps_agree(trusted: str | torch.device, tested: str | torch.device) -> bool:
    """Compare a training step on two devices.

    Args:
        trusted: the device whose numbers count as right.
        tested: the other device.

    Returns:
        Whether all numbers agree to a thousandth of their tensor's largest.
    """
    try:
        pairs = list(zip(training_step(trusted), training_step(tested), strict=True))
    except Exception:  # whatever it is that a device raises: it cannot train
        return False
    return all(bool((a - b).abs().max() <= 1e-3 * a.abs().max()) for a, b in pairs)


@functools.cache
def mps_trains_correctly() -> bool:
    """Tell whether the Apple GPU computes the same training step as the CPU; print it if not.

    In channels_last its BatchNorm gave wrong gradients in some versions (pytorch #175189), and in
    others it ended the whole process (#98602), so the test runs in a process of its own.
    """
    code = f"import sys, {__name__} as m; sys.exit(not m.steps_agree('cpu', 'mps'))"
    # PYTHONSAFEPATH would hide the project.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True)
    if done.returncode:
        print(
            "With this version of torch, the Apple GPU fails or computes other gradients than the"
            " CPU: the CPU trains."
        )
    return not done.returncode


@functools.cache
def cuda_is_too_old() -> bool:
    """Tell whether this version of torch has no code for the NVIDIA GPU; print it if so."""
    major, minor = torch.cuda.get_device_capability()
    names = torch.cuda.get_arch_list()  # of AMD's GPUs as 'gfx900', which are not compared
    known = [int(name[3:]) for name in names if name.startswith("sm_") and name[3:].isdecimal()]
    if not known or 10 * major + minor >= min(known):
        return False
    print(f"This version of torch has no code for {torch.cuda.get_device_name()}: the CPU trains.")
    return True


def choose_device() -> torch.device:
    """Choose the device for training, prediction and Grad-CAM.

    Returns:
        cuda if there is one that torch has code for; mps if a training step there agrees with the
        CPU's; else cpu. A TPU is never chosen.
    """
    if torch.cuda.is_available() and not cuda_is_too_old():
        return torch.device("cuda")
    if torch.backends.mps.is_available() and mps_trains_correctly():
        return torch.device("mps")
    return torch.device("cpu")


def conv_seconds(images: Tensor, conv: nn.Module, bf16: bool) -> tuple[Tensor, float]:
    """Time the forward and backward pass of a convolution on the CPU.

    Args:
        images: (N, in_channels, H, W).
        conv: the convolution.
        bf16: whether to compute in bf16 instead of fp32.

    Returns:
        The output in fp32, (N, out_channels, H, W), and the seconds of CPU time.
    """
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = conv(images)
    out.float().square().mean().backward()
    return out.detach().float(), time.process_time() - start


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_has_bf16() -> bool:
    """Tell whether this CPU has bf16 instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def cpu_bf16_is_faster() -> bool:
    """Tell whether a convolution on this CPU is faster in bf16 than in fp32, and agrees with it."""
    if not cpu_has_bf16():
        return False  # without them, bf16 on a CPU is emulated and many times slower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(256, 256, 3, padding=1)
        conv.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = torch.randn(128, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    # CPU time of one thread, in turn, and the best of seven each: on a busy machine, several
    # threads would wait for each other most of the time.
    with one_thread():
        rounds = [[conv_seconds(images, conv, bf16) for bf16 in (False, True)] for _ in range(7)]
    (exact, _), (rounded, _) = rounds[0]
    slow, fast = (min(seconds for _, seconds in column) for column in zip(*rounds, strict=True))
    # bf16 keeps 8 bits: each product is off by up to 2**-8 of itself, their sum by less.
    return fast < slow and bool((rounded - exact).abs().max() < 2**-5 * exact.abs().max())


def choose_precision() -> Precision:
    """Choose this machine's fastest safe precision."""
    if choose_device().type == "cpu":
        return "bf16-mixed" if cpu_bf16_is_faster() else "32-true"
    possible = possible_precisions()
    return "bf16-mixed" if "bf16-mixed" in possible else possible[-1]


def possible_precisions() -> list[Precision]:
    """List the precisions that the device of this machine has, by Lightning's names."""
    device = choose_device().type
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["32-true", *(["bf16-mixed"] if native else []), "16-mixed"]
    return ["32-true", "bf16-mixed"] if device == "cpu" else ["32-true"]


def native_precisions() -> list[Precision]:
    """List the possible precisions that are not emulated here, which is many times slower."""
    emulated = ["bf16-mixed"] if choose_device().type == "cpu" and not cpu_has_bf16() else []
    return [name for name in possible_precisions() if name not in emulated]


def check_precision(name: str) -> None:
    """Raise InvalidValue for the name of a precision that this machine does not have."""
    possible = possible_precisions()
    if name not in possible:
        raise InvalidValue(
            f"expected a precision that {hardware()} has ({', '.join(possible)}), got {name!r}"
        )


def cpu_name() -> str:
    """Return the processor's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def hardware(processes: int = 1) -> str:
    """Name what trains here.

    Args:
        processes: how many processes train, each on a device of its own.
    """
    device = choose_device().type
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name if processes == 1 else f"{processes} x {name}"
    if device == "mps":
        return f"Apple GPU ({platform.machine()})"
    if processes > 1:
        return f"{processes} processes ({cpu_name()})"
    threads = torch.get_num_threads()
    return f"{threads} CPU core{'s' * (threads > 1)} ({cpu_name()})"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the result."""
    packages = ("torch", "pytorch-lightning", "albumentations", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
