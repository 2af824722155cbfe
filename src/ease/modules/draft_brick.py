"""Draft brick: one layer above the frozen model that predicts the token after next.

It has the form of EAGLE (Li et al. 2024, arXiv:2401.15077) and of the multi-token prediction module of DeepSeek-V3
(arXiv:2412.19437, section 2.2): from the last layer's state h_t and the embedding of the token x_{t+1} that follows,

    g_t = norm(block(fuse([norm(h_t); norm(embed(x_{t+1}))]))),

which stands for h_{t+1} at a mean square of 1: head(scale * g_t), with a factor per dimension, predicts x_{t+2}, and
for the next draft g_t takes the place of h_{t+1}.

The norms start with weights from data, so that every dimension of a state enters the layer with a mean square of 1 and
leaves it with its own: in trained models a few dimensions hold most of it (88% in one of 640 in Gemma 3 270M).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.interface import Layout, capped
from ease.model_config import AttentionKind, ModelConfig
from ease.modules.block import TransformerBlock
from ease.modules.norm import factor_of, new_norm, set_factor
from ease.modules.plan import Plan, View, check_length, rotary_of
from ease.modules.products import inference_product


class DraftBrick(nn.Module):
    """One block of the model's own kind, with full attention, on states and the embeddings of the tokens that follow.

    Args:
        config: the shape of the model.

    Attributes:
        vocabulary: (N,) ids of the tokens that the brick can draft.
    """

    vocabulary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.state_norm, self.token_norm, self.norm = (new_norm(c, c.dim) for _ in range(3))
        self.fuse = nn.Linear(2 * c.dim, c.dim, bias=False)
        self.scale = nn.Parameter(torch.ones(c.dim))
        shape = replace(c, window=None, windowed_layers=None, local_rope_theta=None, unrotated_layers=())
        self.block = TransformerBlock(shape)
        self.register_buffer("vocabulary", torch.arange(c.draft_vocabulary or c.vocab_size))
        self.rotary_dim, self.softcap, self.divisor = c.rotary_size, c.logit_softcap, c.logit_divisor
        self._head_rows: dict[str, Any] = {}  # a dictionary, which views of the model for evaluation share

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_head_rows": {}}  # a copy is not stored: it holds a function

    def fused(self, states: Tensor, next_embeddings: Tensor) -> Tensor:
        """States h_t and embeddings of x_{t+1}, both (B, T, D), -> the input (B, T, D) of the block."""
        out: Tensor = self.fuse(torch.cat((self.state_norm(states), self.token_norm(next_embeddings)), -1))
        return out

    def forward(self, states: Tensor, next_embeddings: Tensor, plan: Plan) -> Tensor:
        """States h_t and embeddings of x_{t+1}, both (B, T, D), -> g_t (B, T, D)."""
        out: Tensor = self.norm(self.block(self.fused(states, next_embeddings), plan))
        return out

    @torch.no_grad()
    def start_at(self, states: Tensor, exit_norm: nn.RMSNorm) -> None:
        """Gives the norms the weights that fit states (N, D) of the last layer and the norm of its exit."""
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        spread = F.rms_norm(states, states.shape[-1:]).square().mean(0).sqrt().clamp(min=1e-4)
        set_factor(self.state_norm, 1 / spread)
        set_factor(self.norm, spread)
        self.scale.copy_(factor_of(exit_norm) / self.divisor)

    def chain(self, states: Tensor, next_embeddings: Tensor, length: int, layout: Layout | None = None) -> list[Tensor]:
        """What the 1st to `length`-th draft of a round compute, at every place of a text at once.

        The k-th draft reads what the one before it gave in place of a state, and attends as in decoding: to the inputs
        with real states that are known when its round begins, and to the drafts of its own round.

        Args:
            states, next_embeddings: as in `forward`.
            length: drafts of a round.
            layout: positions and segments of the states.

        Returns:
            g (B, T, D) of every draft. The k-th draft at t stands for h_{t+1}, as the first does; it exists from
            t = k - 1 on, and what is before it is without meaning.
        """
        inputs = [self.fused(states, next_embeddings)]
        drafts = [self.norm(self.block(inputs[0], Plan.make(states, self.rotary_dim, layout, None)))]
        for _ in range(1, length):
            inputs.append(self.fused(F.pad(drafts[-1], (0, 0, 1, -1)), next_embeddings))
            plan = ChainPlan.of(inputs, self.rotary_dim, layout)
            drafts.append(self.norm(self.block(torch.cat(inputs, 1), plan)))
        return drafts

    def logits(self, drafts: Tensor, head: Tensor) -> Tensor:
        """g (..., D) -> logits (..., N) over `vocabulary`, given the rows of the model's head (V, D)."""
        rows, normed, kept = self.head_rows(head), self.normed(drafts), self._head_rows
        logits: Tensor = kept["product"](normed) if kept.get("rows") is rows else F.linear(normed, rows)
        return self.capped(logits)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits under the soft cap of the model."""
        return capped(logits, self.softcap)

    def normed(self, drafts: Tensor) -> Tensor:
        """g (..., D), scaled as the head expects it."""
        return drafts * self.scale

    def head_rows(self, head: Tensor) -> Tensor:
        """The rows (N, D) of a head (V, D) for `vocabulary`, copied once as long as neither changes.

        A change through `head.data` leaves no trace and is not noticed: the drafts are then those of the head before.
        """
        if head.requires_grad and torch.is_grad_enabled():
            return head[self.vocabulary]
        state = [
            (tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.dtype)
            for tensor in (head, self.vocabulary)
        ]
        if self._head_rows.get("state") != state:
            rows = head.detach()[self.vocabulary]
            self._head_rows.update(state=state, rows=rows, product=inference_product(rows))
        kept: Tensor = self._head_rows["rows"]
        return kept


@dataclass(kw_only=True)
class ChainPlan(Plan):
    """The plan of the k-th drafts at every place. Its x (B, k T, D) holds the inputs of the 1st to the k-th drafts."""

    @classmethod
    def of(cls, inputs: list[Tensor], rotary_dim: int, layout: Layout | None) -> ChainPlan:
        """The plan given the inputs (B, T, D) of the 1st to the k-th drafts."""
        k, x = len(inputs), inputs[-1]
        T = x.shape[1]
        places = torch.arange(T, device=x.device)
        positions = places[None] if layout is None else layout.positions
        # The k-th draft at t sees the 1st up to t - k + 1, where its round began, and of each later one that of its
        # own round.
        back = places[:, None] - places
        seen = [back >= k - 1, *(back == k - draft for draft in range(2, k + 1))]
        if layout is not None:
            same = layout.segments[:, :, None] == layout.segments[:, None]
            seen = [part & same for part in seen]
        mask = torch.cat(seen, -1).view(-1, 1, T, k * T)

        def view(kind: AttentionKind) -> View:
            check_length(kind, T)
            rope = rotary_of(kind, positions.repeat(1, k), rotary_dim, x.dtype)
            query_rope = rotary_of(kind, positions, rotary_dim, x.dtype)
            return View(rope=rope, query_rope=query_rope, mask=mask)

        return cls(make_view=view, width=T)

    def gather(self, x: Tensor) -> Tensor:
        return x[:, -self.width :]

    def scatter(self, x: Tensor, active: Tensor) -> Tensor:
        return active
