"""Formats of numbers in text, and safe access to the metrics of a run."""

from __future__ import annotations

import math
from typing import Any

SPLITS = {"test": "held-out test tokens", "val": "validation tokens (choices were made on them)"}


def number(value: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if valid else None


def leaving_early(line: dict[str, Any], split: str) -> float | None:
    """The share of tokens that exit before the line's last layer."""
    shares, layers = (line.get(split) or {}).get("exit_shares"), number(line, "num_layers")
    if not isinstance(shares, dict) or layers is None:
        return number(line, split, "shallow_ratio")
    return sum(number(shares, exit) or 0.0 for exit in shares if int(exit) < layers)


def plural(count: Any, noun: str, spec: str = "") -> str:
    """A count with its noun: "1 layer", "2 layers"."""
    text = "?" if count is None else format(count, spec)
    return f"{text} {noun}{'' if text == '1' else 's'}"


def format_ppl(value: float | None) -> str:
    """A perplexity with two or fewer decimals, or a dash."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def format_share(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "–" if value is None else f"{value:.1%}"


def format_flops(value: float | None) -> str:
    """A count with a metric prefix, or a dash: 1.21e13 is "12.1 T"."""
    if value is None:
        return "–"
    prefix = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**prefix:.3g} {' KMGTPE'[prefix]}".rstrip()
