"""Keys and values that precede the tokens of a run: the prefix of prefix tuning. Gradients reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.interface import Layout
from ease.model_config import AttentionKind
from ease.modules.plan import Plan, View, check_length


@dataclass
class Prefix:
    """Keys and values (B, H_kv, P, head_dim) of P places per layer, which every token of its row attends to."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def __len__(self) -> int:
        return self.keys[0].shape[2]


@dataclass(kw_only=True)
class PrefixPlan(Plan):
    """The plan of a run whose tokens attend to a prefix, too."""

    prefix: Prefix

    @classmethod
    def after(
        cls, prefix: Prefix, state: Tensor, rotary_dim: int, layout: Layout | None, active: Tensor | None
    ) -> PrefixPlan:
        """The plan of tokens whose positions count on from the prefix; the other arguments are those of `Plan.make`."""
        (B, T, _), P = state.shape, len(prefix)
        if layout is None:
            layout = Layout.from_attention_mask(torch.ones(B, T, device=state.device))
        plan = Plan.make(state, rotary_dim, Layout(layout.positions + P, layout.segments), active)

        def view_after(kind: AttentionKind) -> View:
            check_length(kind, P + T)
            if kind.window is not None and kind.window < P + T:
                raise EaseError(
                    f"layers with a window of {kind.window} tokens would not see all of a prefix of {P} places and {T} "
                    "tokens: use shorter sequences"
                )
            view = plan.view(kind)
            assert view.mask is not None, "there is a mask wherever there is a layout"
            return replace(view, mask=torch.cat([view.mask.new_ones(*view.mask.shape[:3], P), view.mask], 3))

        return cls(**vars(plan) | {"make_view": view_after, "views": {}}, prefix=prefix)

    def attend(self, kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.prefix.keys[self.layer - 1], self.prefix.values[self.layer - 1]
        return super().attend(kind, q, torch.cat([keys.to(k), k], 2), torch.cat([values.to(v), v], 2))
