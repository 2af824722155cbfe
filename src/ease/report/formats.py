"""Formats of numbers in text, and safe access to a run's metrics."""

from __future__ import annotations

import math
from typing import Any

SPLITS = {"test": "held-out test tokens", "val": "validation tokens (choices were made on them)"}


def number(value: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if sound else None


def leaving_early(line: dict[str, Any], split: str) -> float | None:
    """The share of tokens that leave before the line's last layer."""
    shares, layers = (line.get(split) or {}).get("exit_shares"), number(line, "num_layers")
    if not isinstance(shares, dict) or layers is None:
        return number(line, split, "shallow_ratio")
    return sum(number(shares, exit) or 0.0 for exit in shares if int(exit) < layers)


def format_ppl(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def format_share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def format_flops(value: float | None) -> str:
    """A count with a metric prefix: 1.21e13 is "12.1 T"."""
    if value is None:
        return "–"
    prefix = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**prefix:.3g} {' KMGTPE'[prefix]}".rstrip()
