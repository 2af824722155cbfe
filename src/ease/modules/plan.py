"""Plan of a run: what all layers of one `run` share, computed once.

Attention needs a rectangle of queries per row; projections and the feed-forward work on the active tokens alone. The
plan converts between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.interface import Layout
from ease.model_config import RopeScaling
from ease.modules.rope import rotary


@dataclass
class Plan:
    """What all layers of one `run` share.

    If `rows` is None, all tokens are active, and `gather`, `pad`, `unpad`, and `scatter` return their argument.
    Otherwise the i-th of the N active tokens is at (rows[i], cols[i]) of the batch, and is query slots[i] of the
    `width` queries of its row.
    """

    rope: tuple[Tensor, Tensor]  # cos and sin for keys, each (B or 1, 1, T, head_dim)
    query_rope: tuple[Tensor, Tensor]  # cos and sin for queries, each (B or 1, 1, width, head_dim)
    mask: Tensor | None  # (B or 1, 1, width, T), true where a query may attend; None: causal
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
        """The plan for a run over a whole sequence, without a cache.

        Args:
            state: (B, T, D), for its shape, type, and device.
            head_dim, theta, scaling: as in `rotary`.
            layout: positions and segments; by default positions count up and there is one segment.
            active: (B, T) true for active tokens; by default all. Padding is never active.
        """
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
        # Unused query slots attend to everything: their output is discarded, and a fully masked row would be NaN.
        mask = torch.ones(B, 1, width, T, dtype=torch.bool, device=state.device)
        mask[rows, 0, slots] = visible
        plan = cls(rope, rope, mask, rows, cols, slots, width)
        cos, sin = (plan.pad(table[:, 0].expand(B, T, head_dim)[rows, cols])[:, None] for table in rope)
        return cls(rope, (cos, sin), mask, rows, cols, slots, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim)."""
        return mix(q, k, v, self.mask, causal=self.mask is None)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (N, D), the active tokens."""
        return x if self.rows is None else x[self.rows, self.cols]

    def scatter(self, x: Tensor, active: Tensor) -> Tensor:
        """x (B, T, D) with the active tokens replaced by `active` (N, D)."""
        if self.rows is None or self.cols is None:
            return active
        return x.index_put((self.rows, self.cols), active)

    def pad(self, active: Tensor) -> Tensor:
        """(N, D) -> (B, width, D)."""
        if self.rows is None or self.slots is None or self.mask is None:
            return active
        padded = active.new_zeros(self.mask.shape[0], self.width, active.shape[-1])
        return padded.index_put((self.rows, self.slots), active)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, width, D) -> (N, D)."""
        return padded if self.rows is None else padded[self.rows, self.slots]


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim), shaped like q.

    Args:
        mask: (B or 1, 1, width, T) true where a query may attend; None for no mask.
        causal: whether query i attends only to keys up to i.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
