"""Layers for decoding with a cache: the same mathematics with fewer and shorter calls.

`decoding_layer` chooses one of three forms of a layer; all use the weights that the layer has at that moment.

- Packed: a copy of the weights (`products.py`) with queries, keys and values in one matrix and gate and up in another.
  On a CPU a product with a few rows then takes half the time, and a step at small widths is mostly small products.
  It applies to layers of at most `MAX_PACKED_PARAMETERS` in float32 or float64 on a CPU, without biases, head norms,
  hooks or replaced parts, and to calls of at most `MAX_PACKED_TOKENS` tokens without gradients or autocast.
- Functional (`functional.py`): the layer's own `forward` without `nn.Module` calls, for every other call.
- The module itself, for parts that have hooks or were replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ease.modules.attention import Attention, split_heads
from ease.modules.block import TransformerBlock
from ease.modules.cached_plan import CachedPlan
from ease.modules.ffn import FFN
from ease.modules.functional import functional, is_altered, rms_norm
from ease.modules.plan import Plan
from ease.modules.products import packed_product
from ease.modules.rope import rotate

MAX_PACKED_PARAMETERS = 1_000_000  # of a layer: above, the products dominate, and the copy takes much memory
MAX_PACKED_TOKENS = 256  # of a call: above, products gain nothing from packing; a prompt alone makes no copy
PACKABLE = (TransformerBlock, Attention, FFN, nn.Linear, nn.RMSNorm, nn.Identity)


def decoding_layer(layer: Any) -> Callable[[Tensor, CachedPlan], Tensor]:
    """The function of a layer in evaluation mode, for decoding: packed if the layer allows it, otherwise functional."""
    return packed_layer(layer) if packable(layer) else functional_layer(layer)


def functional_layer(layer: nn.Module) -> Callable[[Tensor, Plan], Tensor]:
    """The function of a layer in evaluation mode, without `nn.Module` calls."""
    return functional(layer, (TransformerBlock, Attention, FFN))


def packable(layer: Any) -> bool:
    """Whether a packed layer computes all that the layer does, and is faster."""
    weights = list(layer.parameters())
    return (
        all(type(m) in PACKABLE and not is_altered(m) for m in layer.modules())
        and not any(isinstance(m, nn.Linear) and m.bias is not None for m in layer.modules())
        and type(layer.attention.q_norm) is type(layer.ffn_post_norm) is nn.Identity
        and type(layer.ffn_norm) is nn.RMSNorm
        and layer.residual_scale == 1
        # A quantized weight is a subclass of `nn.Parameter` in a plain module.
        and all(type(w) is nn.Parameter and w.device.type == "cpu" for w in weights)
        and all(w.dtype in (torch.float32, torch.float64) for w in weights)
        and sum(w.numel() for w in weights) <= MAX_PACKED_PARAMETERS
    )


def packed_layer(layer: Any) -> Callable[[Tensor, CachedPlan], Tensor]:
    """The function of a packable layer; the packed weights are made at the first call that uses them."""
    unpacked = functional_layer(layer)
    attention, ffn, d = layer.attention, layer.ffn, layer.attention.head_dim
    q_size, kv_size = attention.q_proj.out_features, attention.k_proj.out_features
    q_heads, rotated_heads = q_size // d, (q_size + kv_size) // d

    product = cache(packed_product)
    kind, activation = attention.kind, ffn.activation
    attention_norm, ffn_norm = rms_norm(layer.attention_norm), rms_norm(layer.ffn_norm)

    def run(x: Tensor, plan: CachedPlan) -> Tensor:
        # A gradient would end at the copy, and autocast must not apply to the sums that follow a product.
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.shape[1] > MAX_PACKED_TOKENS:
            return unpacked(x, plan)
        h, view = attention_norm(x[0]), plan.view(kind)
        if plan.active is None:
            a = x[0]
            projected = product(attention.q_proj, attention.k_proj, attention.v_proj)(h).view(len(h), -1, d)
            rotated = rotate(projected[:, :rotated_heads], view.token_rope)
            q, k, v = rotated[:, :q_heads], rotated[:, q_heads:], projected[:, rotated_heads:]
        else:
            a = x[0, plan.active]
            projected = product(attention.k_proj, attention.v_proj)(h).view(len(h), -1, d)
            k, v = rotate(projected[:, : kv_size // d], view.token_rope), projected[:, kv_size // d :]
            q = rotate(product(attention.q_proj)(h[plan.active]).view(len(a), -1, d), view.active_rope)
        mixed = plan.attend(
            kind, split_heads(plan.pad(q.flatten(1)), d), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        )
        a = a + product(attention.o_proj)(plan.unpad(mixed.transpose(1, 2).flatten(2)))
        gate, up = product(ffn.gate_proj, ffn.up_proj)(ffn_norm(a)).chunk(2, 1)
        return plan.scatter(x, a + product(ffn.down_proj)(activation(gate).mul_(up)))

    return run
