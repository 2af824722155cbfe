"""A module's forward without what `nn.Module` costs at every call, for decoding one token at a time.

A step of decoding calls a dozen small modules a layer, and at small widths finding attributes and looking for hooks
takes longer than the products. A layer's mathematics is not written again here, its norm on a CPU excepted: the same
`forward` runs on a stand-in whose parts are plain functions of the same weights. Whatever is more than that (hooked,
wrapped by LoRA) is called as it is. Small layers on a CPU go further (`packed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def light(module: nn.Module, own: tuple[type[nn.Module], ...]) -> Callable[..., Any]:
    """What `module` computes in evaluation mode, as a function.

    Args:
        own: classes whose `forward` runs on a stand-in. It may use their submodules and plain attributes, no methods.
    """
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if kind is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)  # type: ignore[arg-type]
    if kind is nn.Identity:
        return lambda x: x
    if kind is nn.RMSNorm:
        return rms_norm(module)  # type: ignore[arg-type]
    if kind not in own:
        return module
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    parts = {name: light(part, own) for name, part in module.named_children()}
    return partial(kind.forward, SimpleNamespace(**plain | parts | {"training": False}))


def rms_norm(module: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    """x w / sqrt(mean(x^2) + eps), as x / hypot(|x|, sqrt(D eps)) * sqrt(D) w: one token on a CPU in half the time."""
    weight, size, eps = module.weight, module.normalized_shape, module.eps
    # Elsewhere it is one kernel, and half precision needs care.
    if eps is None or weight.device.type != "cpu" or weight.dtype.itemsize < 4:
        return partial(F.rms_norm, normalized_shape=size, weight=weight, eps=eps)
    D = size[-1]
    floor, scaled = torch.tensor(math.sqrt(D * eps), dtype=weight.dtype), weight.detach() * math.sqrt(D)
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * scaled
