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
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise EaseError(f"no device {name!r} on this machine: use auto, cpu, cuda or mps") from error
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


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
