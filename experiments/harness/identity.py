"""Configurations as JSON: the identity of a training run, from which the key of its result is made."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch


def non_defaults(value: Any) -> Any:
    """A configuration's fields that differ from their defaults, as JSON: a new option leaves old keys as they are."""
    if is_dataclass(value):
        current = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return {"kind": type(value).__name__} | {
            f.name: non_defaults(current[f.name]) for f in fields(value) if f.init and current[f.name] != default(f)
        }
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    return [non_defaults(part) for part in value] if isinstance(value, list | tuple) else value


def default(spec: Any) -> Any:
    """The default of a dataclass field."""
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default
