"""Causal grouped-query attention with rotary positions, in which only active tokens ask.

- What a run's layers share (rotary factors, who sees whom, which tokens ask) is worked out once, in a `Plan`.
- Every token gives keys and values; queries, mixing and the output projection are done for asking tokens only.
- Rotary embedding (Su et al. 2021, arXiv:2104.09864) in the half-split convention of Llama checkpoints, with
  Llama 3.1's scaling by choice. Biases on queries, keys and values are Qwen2's, norms on queries and keys Qwen3's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.seam import Layout


@dataclass
class Plan:
    """What all layers of one `run` share.

    With `rows` None every token asks and `gather`, `pad`, `unpad` and `scatter` hand their argument through.
    Otherwise token i of the N asking ones stands at (rows[i], cols[i]) of the batch and in place slots[i] of
    its row's `width` queries: attention wants a rectangle, everything else works on the N tokens alone.
    """

    rope: tuple[Tensor, Tensor]  # cos and sin, (B or 1, 1, T, head_dim), for keys
    query_rope: tuple[Tensor, Tensor]  # the same for queries, (B or 1, 1, width, head_dim)
    mask: Tensor | None  # (B or 1, 1, width, T), true where a query may look; None: plain causal
    rows: Tensor | None = None
    cols: Tensor | None = None
    slots: Tensor | None = None
    width: int = 0

    @classmethod
    def make(
        cls,
        state: Tensor,
        head_dim: int,
        theta: float,
        layout: Layout | None,
        active: Tensor | None,
        scaling: RopeScaling | None = None,
    ) -> Plan:
        B, T, _ = state.shape
        if layout is not None and not bool(layout.real.all()):
            active = layout.real if active is None else active & layout.real
        if active is not None and bool(active.all()):
            active = None
        default = torch.arange(T, device=state.device)[None]
        rope = rotary(default if layout is None else layout.positions, head_dim, theta, state.dtype, scaling)
        if active is None:
            mask = None
            if layout is not None:
                rows = torch.arange(B, device=state.device).repeat_interleave(T)
                mask = layout.visible(rows, default.expand(B, T).reshape(-1)).view(B, 1, T, T)
            return cls(rope, rope, mask)

        rows, cols = active.nonzero(as_tuple=True)
        slots = active.long().cumsum(1)[rows, cols] - 1
        width = int(active.sum(1).max()) if rows.numel() else 0
        visible = default <= cols[:, None] if layout is None else layout.visible(rows, cols)
        # Places that no token takes look everywhere: their result is never read, and a softmax over nothing is NaN.
        mask = torch.ones(B, 1, width, T, dtype=torch.bool, device=state.device)
        mask[rows, 0, slots] = visible
        plan = cls(rope, rope, mask, rows, cols, slots, width)
        query_rope = (plan.pad(t[:, 0].expand(B, T, head_dim)[rows, cols])[:, None] for t in rope)
        return cls(rope, (next(query_rope), next(query_rope)), mask, rows, cols, slots, width)

    @property
    def causal(self) -> bool:
        """Whether every token asks and may look at itself and all before it."""
        return self.mask is None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What queries (B, H, width, head_dim) make of keys and values (B, H_kv, T, head_dim): as the queries."""
        return mix(q, k, v, self.mask, self.causal)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (N, D), the tokens that ask."""
        return x if self.rows is None else x[self.rows, self.cols]

    def scatter(self, x: Tensor, asking: Tensor) -> Tensor:
        """x (B, T, D) with the tokens that ask replaced by asking (N, D)."""
        if self.rows is None or self.cols is None:
            return asking
        return x.index_put((self.rows, self.cols), asking)

    def pad(self, asking: Tensor) -> Tensor:
        """(N, D) -> (B, width, D)."""
        if self.rows is None or self.slots is None or self.mask is None:
            return asking
        return asking.new_zeros(self.mask.shape[0], self.width, asking.shape[-1]).index_put(
            (self.rows, self.slots), asking
        )

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, width, D) -> (N, D)."""
        return padded if self.rows is None else padded[self.rows, self.slots]


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches rotary positions to a longer context (`rope_type` "llama3" of a config.json).

    A pair of dimensions that turns more than `high_freq_factor` times within `original_max_position` tokens keeps
    its frequency, one that turns less than `low_freq_factor` times turns `factor` times slower, and between the two
    the frequency moves linearly in the number of turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_max_position / (2 * math.pi / frequencies)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


def rotary(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos and sin (B, 1, T, head_dim), the sine negative in the first half, for `rotate`."""
    # Angles need at least float32: bfloat16 cannot tell position 257 from 256.
    precise = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, head_dim, 2, device=positions.device).to(precise)
    # Written as Llama's own code has it: at position 100,000 one rounding more shows in the angle.
    frequencies = 1.0 / theta ** (steps / head_dim)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions[:, None, :, None].to(precise) * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """A turn, whose gradient is the turn back: less than half the time of what autograd makes of it on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(upstream[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, T, head_dim) turned by its position."""
    if not torch.is_grad_enabled():  # a node of autograd costs as much as the turn of one token
        return _turn(x, *rope)
    turned: Tensor = _Rotate.apply(x, *rope)  # type: ignore[no-untyped-call]
    return turned


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim)."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


class Attention(nn.Module):
    """h (B, T, dim) -> (B, T, dim), or (N, dim) for the N asking tokens of the plan."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)

    def forward(self, h: Tensor, plan: Plan) -> Tensor:
        d = self.head_dim
        q = rotate(self.q_norm(heads(plan.pad(self.q_proj(plan.gather(h))), d)), plan.query_rope)
        k = rotate(self.k_norm(heads(self.k_proj(h), d)), plan.rope)
        mixed = plan.attend(q, k, heads(self.v_proj(h), d))
        out: Tensor = self.o_proj(plan.unpad(mixed.transpose(1, 2).flatten(2)))
        return out
