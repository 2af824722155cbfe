"""A module's evaluation forward as a plain function, without the cost of `nn.Module` calls.

A decoding step calls a dozen small modules per layer, and at small widths attribute lookup and hook checks take longer
than the matrix products. The mathematics is not written a second time, except for the norm on a CPU: the same `forward`
runs on a stand-in object whose parts are plain functions of the same weights. A module with hooks, with a forward of
its own, or of another class (wrapped by LoRA or quantized, for example) is called as it is. `decoding.py` says when
this is used.
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
from torch.nn.modules.module import _has_any_global_hook

from ease.modules.norm import OffsetRMSNorm
from ease.modules.products import inference_product


def functional(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Callable[..., Any]:
    """The function that `module` computes in evaluation mode.

    Args:
        module: any module.
        kinds: classes whose `forward` may run on a stand-in: it uses submodules and plain attributes, no methods.
    """
    kind = type(module)
    if is_altered(module):
        return module
    if kind is nn.Linear:
        return inference_product(module.weight, module.bias)  # type: ignore[arg-type]
    if kind is nn.Identity:
        return lambda x: x
    if kind in (nn.RMSNorm, OffsetRMSNorm):
        return rms_norm(module)  # type: ignore[arg-type]
    if kind not in kinds:
        return module
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    parts = {name: functional(part, kinds) for name, part in module.named_children()}
    return partial(kind.forward, SimpleNamespace(**plain | parts | {"training": False}))


def is_altered(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, a forward of its own, or a compiled one."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own_call = "forward" in vars(module) or module._compiled_call_impl is not None
    return own_call or any(hooks) or bool(_has_any_global_hook())


def rms_norm(module: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    """x w / sqrt(mean(x^2) + eps), as x / hypot(|x|, sqrt(D eps)) * sqrt(D) w: half the time for one token on a CPU."""
    weight, size, eps = module.weight, module.normalized_shape, module.eps
    # On other devices the norm is one kernel, and in half precision the terms of hypot would lose digits.
    if eps is None or weight.device.type != "cpu" or weight.dtype.itemsize < 4:
        if isinstance(module, OffsetRMSNorm):
            return module.forward
        return partial(F.rms_norm, normalized_shape=size, weight=weight, eps=eps)
    D = size[-1]
    floor = torch.tensor(math.sqrt(D * eps), dtype=weight.dtype)
    factor = 1 + weight.detach() if isinstance(module, OffsetRMSNorm) else weight.detach()
    scaled = factor * math.sqrt(D)
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * scaled
