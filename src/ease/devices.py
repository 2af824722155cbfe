"""Devices and number formats by name, and a description of the machine for reports.

A time means nothing without the machine it was measured on, so reports show both.
"""

from __future__ import annotations

import math
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ease.errors import EaseError


def choose_device(name: str) -> str:
    """The torch device for a name.

    Args:
        name: "auto" (CUDA, then MPS, then CPU), or a torch device such as "cpu" or "cuda:1".

    Raises:
        EaseError: this machine has no such device.
    """
    if name != "auto":
        try:
            torch.zeros(1, device=name).item()  # "meta" can allocate but holds no values
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            raise EaseError(f"no device {name!r} on this machine: use auto, cpu, cuda or mps") from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def as_device(device: torch.device | str) -> torch.device:
    """The device itself, or that of a name as in `choose_device`."""
    return device if isinstance(device, torch.device) else torch.device(choose_device(device))


def choose_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The floating-point type for a name.

    Args:
        name: its name in torch such as "bfloat16", or the type itself; "auto" and None leave the choice open.

    Returns:
        The type, or None for an open choice.

    Raises:
        EaseError: torch has no floating-point type of that name.
    """
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EaseError(f"no dtype {name!r} for weights: use auto, float32, bfloat16, float16 or float64")
    return dtype


def in_autocast(device: torch.device) -> bool:
    """Whether products on a device run in the precision of an autocast."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on a device run in the dtype of their arguments."""
    return torch.autocast(device.type, enabled=False) if in_autocast(device) else nullcontext()


def free_memory(device: torch.device) -> float:
    """Free bytes of a device; infinite where the system does not report them."""
    if device.type == "cuda":
        # The system does not count what torch's allocator has reserved and not given out.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    # MemAvailable and not MemFree, which leaves out the caches that the system would give up.
    available = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")), "")
    return float(available.split()[1]) * 1024 if available else math.inf


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use: the peak of torch's allocator so far on CUDA, else of this process now; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Dense bfloat16 FLOP/s of accelerators, from their makers' data sheets, by what torch names them.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device in bfloat16 without sparsity; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in PEAKS.items() if f" {known} " in words), None)


def machine(device: str) -> dict[str, Any]:
    """Describes the machine for a report: device, CPU, cores, threads and versions, as plain values fit for JSON."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }
