"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

In the half-split convention of Llama checkpoints, optionally stretched to longer contexts. Of a head that is wider than
the factors, the leading dimensions are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ease.model_config import RopeScaling


def rotary(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary factors for `rotate`: cos and sin (B, 1, T, dim), the sine negated in the first half.

    Args:
        positions: (B, T) integers.
        dim: dimensions of a head that are rotated, an even number.
        theta: base of the angles.
        dtype: type of the factors.
        scaling: how positions are stretched; None for plain ones.
    """
    # Angles need at least float32: bfloat16 cannot tell position 257 from 256.
    precise = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, dim, 2, device=positions.device).to(precise)
    # In the order of operations of Llama's code: at position 100,000 one more rounding changes the angle.
    frequencies = 1.0 / theta ** (steps / dim)
    if scaling is not None:
        frequencies = scaling(frequencies, theta)
    angles = positions[:, None, :, None].to(precise) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotation with its own gradient, the inverse rotation: less than half of autograd's time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _apply(upstream[0], cos, -sin), None, None


def _apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if (dim := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_apply(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


Rope = tuple[Tensor, Tensor] | None
"""Rotary factors; None where a layer has no rotary positions."""


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates x (B, H, T, head_dim) by its positions, whose factors `rotary` returns."""
    if rope is None:
        return x
    if not torch.is_grad_enabled():  # an autograd node costs as much as the rotation of one token
        return _apply(x, *rope)
    rotated: Tensor = _Rotate.apply(x, *rope)  # type: ignore[no-untyped-call]
    return rotated
