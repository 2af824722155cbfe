"""ease.modules.plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.interface import Layout, RopeScaling
from ease.modules.rope import rotary


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


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim)."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
