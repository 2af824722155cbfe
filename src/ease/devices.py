"""The machine: which device to work on, and what to call it beside a figure that depends on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ease.errors import EaseError


def choose_device(name: str) -> str:
    if name != "auto":
        try:
            torch.zeros(1, device=name).item()  # which a device without memory, "meta", cannot answer
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise EaseError(f"no device {name!r} on this machine: use auto, cpu, cuda or mps") from error
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type by its name in torch, or as it is; None, or "auto", leaves it open."""
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EaseError(f"no dtype {name!r} for weights: use auto, float32, bfloat16, float16 or float64")
    return dtype


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
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
