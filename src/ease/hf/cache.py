"""The native cache as a citizen of transformers: what `generate` asks of a cache, answered by the model's own.

transformers counts columns of the batch, padding among them; the native cache counts the tokens of each row. Which
columns hold a token is kept here, and is all that is kept here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ease.errors import EaseError
from ease.interface import Layout
from ease.modules.cache import Cache as NativeCache


class EaseCache(Cache):
    """What a batch has read so far. It belongs to the policy and the weights that the model had when it was made.

    Attributes:
        native: keys, values and states.
        real: (B, T) true where a column read so far holds a token, false for padding.
    """

    def __init__(self, native: NativeCache) -> None:
        super().__init__(layers=[])
        self.native = native
        self.real = torch.ones(len(native.length), 0, dtype=torch.bool, device=native.states.device)

    def come(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout:
        """Which of the tokens ids (B, T) that come next are real; makes room for them.

        Args:
            attention_mask: (B, columns read + T); all real by default.
            position_ids: (B, T), which can only say what follows from the tokens read.
        """
        (B, T), (rows, columns) = ids.shape, self.real.shape
        real = torch.ones_like(ids, dtype=torch.bool)
        known = rows == B
        if known and attention_mask is not None:
            mask = attention_mask.bool()
            known = mask.shape == (rows, columns + T) and torch.equal(mask[:, :columns], self.real)
            real = mask[:, columns:]
        if not known:
            raise EaseError(
                f"the cache has read {columns} columns of {rows} rows: give ids of {rows} rows, and an attention_mask "
                f"({rows}, {columns + T}) that says of the columns read what it said then"
            )
        places = self.native.next(real)
        if position_ids is not None and not torch.equal(position_ids.expand_as(ids)[real], places[real]):
            raise EaseError(
                "with a cache a row is one text, whose positions count up: leave position_ids out, or the cache "
                "(use_cache=False)"
            )
        longest = int(self.native.length.max()) + T
        if longest > self.native.capacity:
            self.native.grow(2 * longest)
        return Layout(torch.zeros_like(ids), real.long() - 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.real.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets so many of the last columns, given as a negative number."""
        self._keep(self.real[:, : tokens_to_remove or None])

    def reset(self) -> None:
        self._keep(self.real[:, :0])

    def _keep(self, real: Tensor) -> None:
        self.real = real
        self.native.cut(real.sum(1).cpu())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with these rows in this order, each as often as it is named."""
        self.native.select(indices.long().cpu().numpy())
        self.real = self.real[indices.to(self.real.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.real)).repeat_interleave(repeats))
