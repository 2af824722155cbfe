"""Memory, brick 0: tables of hashed n-grams, whose rows are added to the embedding.

A token's row of the order n is found by a hash of the last n token ids and is looked up, never multiplied: parameters
that cost no products (Over-Tokenized Transformer, Huang et al. 2025, arXiv:2501.16975; SCONE, Yu et al. 2025,
arXiv:2502.01637). Each of `MEMORY_HASHES` hashes finds a part of the row, so that two n-grams rarely share all of it.

Rows start at zero: an n-gram that training never saw adds next to nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.interface import Layout
from ease.model_config import MEMORY_HASHES, ModelConfig
from ease.modules.norm import new_norm

# Odd 64-bit numbers with evenly mixed bits, as signed integers, since products wrap (splitmix64, Steele et al. 2014).
STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
NO_TOKEN = -1  # before the first token of a text


class Memory(nn.Module):
    """Tables of n-grams of several orders.

    Args:
        config: the shape of the model, with at least one order.

    Attributes:
        table: (orders x MEMORY_HASHES x rows, D / MEMORY_HASHES), part after part.
        norm: the norm of exit 0.
        reach: number of tokens before a token that its rows depend on.
        sparse_gradient: whether the gradient of the table is sparse, which only some optimizers take.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.orders, self.rows, self.reach = config.memory_orders, config.memory_rows, config.memory_orders[-1] - 1
        self.table = nn.Parameter(
            torch.zeros(len(self.orders) * MEMORY_HASHES * self.rows, config.dim // MEMORY_HASHES)
        )
        self.norm = new_norm(config, config.dim)
        self.sparse_gradient = False

    def indices(self, tokens: Tensor) -> Tensor:
        """Tokens (..., reach + 1), the newest first, -> rows of the table (..., orders, MEMORY_HASHES)."""
        state, found = torch.zeros_like(tokens[..., 0]), list[Tensor]()
        for length, token in enumerate(tokens.unbind(-1), 1):
            state = (state + token + 2) * STEP
            state = state ^ (state >> 29)
            if length in self.orders:
                for hashed in range(MEMORY_HASHES):
                    mixed = (state + hashed) * FIRST
                    mixed = (mixed ^ (mixed >> 32)) * SECOND
                    found.append((mixed >> 24) % self.rows + len(found) * self.rows)
        indices: Tensor = torch.stack(found, -1).unflatten(-1, (len(self.orders), MEMORY_HASHES))
        return indices

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., reach + 1), the newest first and NO_TOKEN where there is none, -> states (..., D)."""
        bags = self.indices(tokens).transpose(-1, -2)
        sums = F.embedding_bag(bags.flatten(0, -2), self.table, mode="sum", sparse=self.sparse_gradient)
        states: Tensor = sums.view(*tokens.shape[:-1], MEMORY_HASHES * self.table.shape[1])
        return states


def with_tokens_before(ids: Tensor, count: int, layout: Layout | None = None) -> Tensor:
    """Ids (B, T) -> (B, T, count + 1): each token and, in order, the `count` tokens before it in its segment.

    Args:
        layout: positions and segments; padding is skipped. By default one segment a row without padding.
    """
    if layout is None:
        padded, T = F.pad(ids, (count, 0), value=NO_TOKEN), ids.shape[1]
        return torch.stack([padded[:, count - k : count - k + T] for k in range(count + 1)], -1)
    places = torch.arange(ids.shape[1], device=ids.device)
    segments = layout.segments
    before = F.pad(torch.where(layout.real, places, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    before = torch.where(segments.gather(1, before.clamp(min=0)) == segments, before, -1)
    at, found = places.expand_as(ids), [ids]
    for _ in range(count):
        at = torch.where(at < 0, -1, before.gather(1, at.clamp(min=0)))
        found.append(torch.where(at < 0, NO_TOKEN, ids.gather(1, at.clamp(min=0))))
    return torch.stack(found, -1)


def with_stored_tokens(stored: Tensor, places: Tensor, count: int) -> Tensor:
    """Ids (B, capacity) of the texts read so far -> (B, T, count + 1): the tokens at `places` (B, T) and before."""
    at = places[..., None] - torch.arange(count + 1, device=places.device)
    found = stored.gather(1, at.clamp(min=0).flatten(1)).view_as(at)
    return torch.where(at < 0, NO_TOKEN, found)
