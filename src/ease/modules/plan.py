"""Plan of a run: what all layers of one `run` share, computed once.

Attention needs a rectangle of queries per row; projections and the feed-forward work on the active tokens alone. The
plan converts between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.interface import Layout, to_device
from ease.model_config import AttentionKind
from ease.modules.rope import Rope, rotary

FEW_QUERIES = 8  # queries of a head that attend in one call with those of the other heads of its group


@dataclass(kw_only=True)
class View:
    """What layers of one attention kind share within a run."""

    rope: Rope  # cos and sin for keys, each (B or 1, 1, T, rotary_dim)
    query_rope: Rope  # cos and sin for queries, each (B or 1, 1, width, rotary_dim)
    mask: Tensor | None = None  # (B or 1, 1, width, T), true where a query may attend; None: causal


@dataclass(kw_only=True)
class Plan:
    """What all layers of one `run` share.

    If `rows` is None, all tokens are active, and `gather`, `pad`, `unpad`, and `scatter` return their argument.
    Otherwise the i-th of the N active tokens is at (rows[i], cols[i]) of the batch, and is query slots[i] of the
    `width` queries of its row.
    """

    make_view: Callable[[AttentionKind], View]
    batch: int = 0
    rows: Tensor | None = None
    cols: Tensor | None = None
    slots: Tensor | None = None
    width: int = 0
    views: dict[AttentionKind, View] = field(default_factory=dict)
    layer: int = 0  # the layer that runs now

    @classmethod
    def make(cls, state: Tensor, rotary_dim: int, layout: Layout | None, active: Tensor | None) -> Plan:
        """The plan for a run over a whole sequence, without a cache.

        Args:
            state: (B, T, D), for its shape, type, and device.
            rotary_dim: dimensions of a head that are rotated.
            layout: positions and segments; by default positions count up and there is one segment.
            active: (B, T) true for active tokens; by default all. Padding is never active.
        """
        B, T, _ = state.shape
        # Masks are evaluated on the host: an active mask there, or none, needs no wait for the device.
        active = None if active is None else active.cpu()
        if layout is not None and not bool(layout.host.real.all()):
            active = layout.host.real if active is None else active & layout.host.real
        if active is not None and bool(active.all()):
            active = None
        default = torch.arange(T, device=state.device)[None]
        positions = default if layout is None else layout.positions

        def rope_of(kind: AttentionKind) -> Rope:
            check_length(kind, T)
            return rotary_of(kind, positions, rotary_dim, state.dtype)

        if active is None:

            def full_view(kind: AttentionKind) -> View:
                mask = None
                if layout is not None:
                    mask = layout.visible(window=kind.window)[:, None]
                elif kind.window is not None and kind.window < T:
                    mask = within(default, default[0], kind.window)[None, None]
                rope = rope_of(kind)
                return View(rope=rope, query_rope=rope, mask=mask)

            return cls(make_view=full_view)

        at = active.nonzero(as_tuple=True)
        places = torch.stack((*at, active.long().cumsum(1)[at] - 1))
        width = int(active.sum(1).max()) if places.numel() else 0
        rows, cols, slots = to_device(places, state.device)

        def active_view(kind: AttentionKind) -> View:
            window = kind.window
            seen = within(default, cols, window) if layout is None else layout.visible(rows, cols, window)
            # Unused query slots attend to everything: their output is discarded, and a fully masked row would be NaN.
            mask = torch.ones(B, 1, width, T, dtype=torch.bool, device=state.device)
            mask[rows, 0, slots] = seen
            rope = query_rope = rope_of(kind)
            if rope is not None:
                cos, sin = (plan.pad(table[:, 0].expand(B, T, -1)[rows, cols])[:, None] for table in rope)
                query_rope = cos, sin
            return View(rope=rope, query_rope=query_rope, mask=mask)

        plan = cls(make_view=active_view, batch=B, rows=rows, cols=cols, slots=slots, width=width)
        return plan

    def view(self, kind: AttentionKind) -> View:
        """What the layers of a kind share, made when the first of them runs."""
        if kind not in self.views:
            self.views[kind] = self.make_view(kind)
        return self.views[kind]

    def attend(self, kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim)."""
        mask = self.view(kind).mask
        return mix(kind, q, k, v, mask, causal=mask is None)

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
        if self.rows is None or self.slots is None:
            return active
        padded = active.new_zeros(self.batch, self.width, active.shape[-1])
        return padded.index_put((self.rows, self.slots), active)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, width, D) -> (N, D)."""
        return padded if self.rows is None else padded[self.rows, self.slots]


def within(keys: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """(N, T) true where the query at queries[i] attends to the key at keys (1 or N, T), by their positions."""
    seen = keys <= queries[:, None]
    return seen if window is None else seen & (keys > queries[:, None] - window)


def rotary_of(kind: AttentionKind, positions: Tensor, dim: int, dtype: torch.dtype) -> Rope:
    """The rotary factors of a kind for positions (B, T); None if its layers have no rotary positions."""
    return None if kind.theta is None else rotary(positions, dim, kind.theta, dtype, kind.rope_scaling)


def check_length(kind: AttentionKind, length: int) -> None:
    """Refuses sequences for which the kind's rotary frequencies would depend on their length."""
    limit = kind.rope_scaling.limit if kind.rope_scaling is not None else None
    if limit is not None and length > limit:
        raise EaseError(
            f"beyond {limit} tokens the model's rotary positions depend on the length of the text, which ease does not "
            f"support, and there are {length}: use shorter sequences"
        )


def mix(kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of queries (B, H, width, head_dim) over keys and values (B, H_kv, T, head_dim), shaped like q.

    Args:
        kind: for scale and soft cap; windows are part of the mask.
        mask: (B or 1, 1, width, T) true where a query may attend; None for no mask.
        causal: whether query i attends only to keys up to i.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (kind.softcap is not None or (mask is not None and q.device.type != "cpu")):
        # CUDA has no fast kernel for a mask together with grouped queries: it would store (B, H, width, T) scores.
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        groups = 1
    if groups > 1 and kind.softcap is None and not causal and 0 < q.shape[2] <= FEW_QUERIES:
        # As the queries of one head, whose keys are then read once.
        B, H, n, d = q.shape
        if mask is not None:
            mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
        folded = F.scaled_dot_product_attention(
            q.reshape(B, H // groups, groups * n, d), k, v, attn_mask=mask, scale=kind.scale
        )
        return folded.reshape(B, H, n, d)  # some kernels of CUDA give another memory layout than that of q
    if kind.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=kind.scale, enable_gqa=groups > 1
        )
    # The fused kernels have no soft cap.
    scale = q.shape[-1] ** -0.5 if kind.scale is None else kind.scale
    scores = kind.softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / kind.softcap))
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
