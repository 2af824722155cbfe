"""A layer for decoding at small widths on a CPU, in as few and as short calls as it takes.

There a step is many small operations, and a product with a few rows takes twice as long as on weights laid out for
it: queries, keys and values in one matrix, gate and up in one, and all of them transposed. So a layer's mathematics is
written once more, on a copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.modules.attention import Attention, heads
from ease.modules.block import TransformerBlock, light_layer
from ease.modules.cache import CachedPlan
from ease.modules.cpu import rms_norm
from ease.modules.ffn import FFN
from ease.modules.rope import rotate

MOST = 1_000_000  # numbers in a layer: beyond, the products take the time, and a copy of the weights much memory
LONG = 256  # tokens at a time, from which on a product gains nothing by it: a prompt alone makes no copy
KINDS = (TransformerBlock, Attention, FFN, nn.Linear, nn.RMSNorm, nn.Identity)


def fits(layer: Any) -> bool:
    """Whether a packed layer does all that the layer does, and pays."""
    weights = list(layer.parameters())
    return (
        all(type(m) in KINDS and not (m._forward_hooks or m._forward_pre_hooks) for m in layer.modules())
        and layer.attention.q_proj.bias is None
        and type(layer.attention.q_norm) is nn.Identity
        and all(w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64) for w in weights)
        and sum(w.numel() for w in weights) <= MOST
    )


def packed(layer: Any) -> Callable[[Tensor, CachedPlan], Tensor]:
    """What a layer computes in evaluation mode with the weights that it has now; a light one where it does not fit."""
    plain = light_layer(layer)
    if not fits(layer):
        return plain
    attention, ffn, d = layer.attention, layer.ffn, layer.attention.head_dim
    asked, told = attention.q_proj.out_features, attention.k_proj.out_features
    turning, Q = (asked + told) // d, asked // d

    def lay(*parts: nn.Linear) -> Tensor:
        return torch.cat([part.weight.detach() for part in parts]).t().contiguous()

    @cache
    def laid() -> tuple[Tensor, ...]:
        return (
            *(lay(attention.q_proj, attention.k_proj, attention.v_proj), lay(attention.o_proj)),
            *(lay(ffn.gate_proj, ffn.up_proj), lay(ffn.down_proj)),
        )

    before_attention, before_ffn = rms_norm(layer.attention_norm), rms_norm(layer.ffn_norm)

    def run(x: Tensor, plan: CachedPlan) -> Tensor:
        # A gradient would end at the copy, and what autocast makes of a product is not for the sum after it.
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.shape[1] > LONG:
            return plain(x, plan)
        qkv, out, gate_up, down = laid()
        h = before_attention(x[0])
        if plan.asking is None:
            a = x[0]
            made = (h @ qkv).view(len(h), -1, d)
            turned = rotate(made[:, :turning], plan.turns)
            q, k, v = turned[:, :Q], turned[:, Q:], made[:, turning:]
        else:
            a = x[0, plan.asking]
            made = (h @ qkv[:, asked:]).view(len(h), -1, d)
            k, v = rotate(made[:, : told // d], plan.turns), made[:, told // d :]
            q = rotate((h[plan.asking] @ qkv[:, :asked]).view(len(a), -1, d), plan.query_turns)
        mixed = plan.attend(heads(plan.pad(q.flatten(1)), d), k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        a = a + plan.unpad(mixed.transpose(1, 2).flatten(2)) @ out
        gate, up = (before_ffn(a) @ gate_up).chunk(2, 1)
        return plan.scatter(x, a + F.silu(gate).mul_(up) @ down)

    return run
