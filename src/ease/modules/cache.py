"""Cache of a batch of rows: keys and values per layer, and the state that each token left with.

- Only real tokens have a place; a token's place is its position in its row, independent of padding.
- A token that left early has no keys and values in the deeper layers. They are computed from the state it left with,
  for all missing places of a row in one product, when a later token of that row runs those layers.
- How much of each row has been read is stored on the host, in numpy: a step reads it dozens of times, which there takes
  no kernel and no synchronization with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ease.errors import EaseError
from ease.interface import to_device
from ease.model_config import AttentionKind
from ease.modules.plan import rotary_of
from ease.modules.rope import Rope

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def all_equal(numbers: Ints) -> bool:
    return bool((numbers == numbers.flat[0]).all())


class Cache:
    """Preallocated memory for `capacity` tokens in each of B rows of a model with L layers.

    Args:
        blocks: the functions of the L layers.
        rows: B.
        capacity: tokens per row.
        kv_heads, head_dim: H_kv and the width of a head.
        rotary_dim: dimensions of a head that are rotated.
        like: a tensor (..., D) of the model's device and dtype.
        key: what the cache is for (mode and policy); `check` raises for any other use.
        keeps_ids: whether the ids of the tokens are stored, which a memory reads.

    Attributes:
        keys, values: (L, B, H_kv, capacity, head_dim).
        states: (B, capacity, D), the current state of each token, or the one it left with.
        ids: (B, capacity) ids of the tokens, if they are stored.
        length: (B,) tokens read so far.
        filled: (L, B) tokens with keys and values in that layer, at most `length`.
        slots: (B, T) places of the tokens of the current run.
        real: (B, T) false where these are padding.
        ropes: attention kind -> the rotary factors of all places.
        planned: the last `CachedPlan` and what it was made from.
        embedded: whether the tokens of the next run have their places already.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[Tensor, Any], Tensor]],
        rows: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        like: Tensor,
        key: object = None,
        keeps_ids: bool = False,
    ) -> None:
        self.blocks, self.capacity, self.key = blocks, capacity, key
        self.rotary_dim, self.ropes = rotary_dim, dict[AttentionKind, Rope]()
        layers, dim = len(blocks), like.shape[-1]
        # Zeros: masked places are multiplied by 0, and uninitialized memory may hold NaN.
        self.keys = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
        self.values = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
        self.states = like.new_zeros(rows, capacity, dim)
        self.ids = like.new_zeros(rows, capacity, dtype=torch.long) if keeps_ids else None
        self.length: Ints = np.zeros(rows, np.int64)
        self.filled: Ints = np.zeros((layers, rows), np.int64)
        self.slots: Ints = np.zeros((rows, 0), np.int64)
        self.real: Bools = np.zeros((rows, 0), np.bool_)
        self.planned: tuple[object, Any] | None = None
        self.embedded = False

    def rope(self, kind: AttentionKind) -> Rope:
        """The rotary factors, two tensors (1, 1, capacity, rotary_dim), of all places for layers of a kind."""
        if kind not in self.ropes:
            places = torch.arange(self.capacity, device=self.states.device)[None]
            self.ropes[kind] = rotary_of(kind, places, self.rotary_dim, self.states.dtype)
        return self.ropes[kind]

    def check(self, key: object) -> None:
        """Raises if the cache was made for something other than `key`."""
        if key != self.key:
            raise EaseError(f"this cache was made for {self.key}, not for {key}: make a new one")

    def check_fill(self, first: int, last: int, active: Bools) -> None:
        """Raises unless layers first..last hold equally many tokens of every row with an active token (B, T)."""
        filled = self.filled[first - 1 : last, active.any(1)]
        if last > first and (filled != filled[0]).any():
            raise EaseError(
                f"layers {first}..{last} of the cache hold different numbers of tokens: run them in the groups in "
                "which they were run before, or make a new cache"
            )

    def next(self, real: Tensor) -> Tensor:
        """(B, T) the places, on the host, that the next tokens will get; `real` (B, T) is false for padding."""
        return torch.from_numpy(self.length)[:, None] + real.cpu().long().cumsum(1) - 1

    def place(self, real: Bools) -> None:
        """Gives the next tokens their places: the real ones (B, T) are appended to their rows."""
        length = self.length + real.sum(1)
        if length.max() > self.capacity:
            raise EaseError(
                f"the cache has {self.capacity} places per row, but a row would need {length.max()}: make it larger"
            )
        self.slots, self.real = self.length[:, None] + real.cumsum(1) - 1, real
        self.length, self.embedded = length, True

    def store(self, stored: Tensor, values: Tensor) -> None:
        """Writes values (B, T, ...) of the tokens that `place` appended into `stored` (B, capacity, ...)."""
        length, values = self.length, values.detach()  # `embed` may run where gradients are on
        if self.real.all() and all_equal(length):
            stored[:, length[0] - self.real.shape[1] : length[0]] = values
            return
        rows, cols = np.nonzero(self.real)
        places = self.tensor(rows * self.capacity + self.slots[rows, cols])
        stored.flatten(0, 1)[places] = values[self.tensor(rows), self.tensor(cols)]

    def resume(self, length: Ints, count: int) -> None:
        """Sets the tokens of the next run: the `count` tokens of each row after its first `length` (B,)."""
        self.embedded = True
        self.slots, self.real = length[:, None] + np.arange(count), np.ones((len(length), count), np.bool_)

    def cut(self, length: Ints | Tensor) -> None:
        """Removes all but the first `length` (B,) tokens of each row."""
        self.length = np.minimum(self.length, np.asarray(length))
        self.filled = np.minimum(self.filled, self.length)

    def grow(self, capacity: int) -> None:
        """Increases the number of places per row to `capacity`."""
        more = capacity - self.capacity
        self.keys, self.values = (F.pad(store, (0, 0, 0, more)) for store in (self.keys, self.values))
        self.states = F.pad(self.states, (0, 0, 0, more))
        self.ids = None if self.ids is None else F.pad(self.ids, (0, more))
        self.ropes, self.capacity, self.planned = {}, capacity, None

    def select(self, rows: Ints) -> None:
        """Replaces the rows by those with these indices, which may repeat, as beam search requires."""
        index = self.tensor(rows)
        self.keys, self.values, self.states = self.keys[:, index], self.values[:, index], self.states[index]
        self.ids = None if self.ids is None else self.ids[index]
        self.length, self.filled = self.length[rows], self.filled[:, rows]

    def tensor(self, index: Ints | Bools) -> Tensor:
        """An array of indices, or a mask, as a tensor on the cache's device."""
        return to_device(torch.from_numpy(index), self.states.device)
