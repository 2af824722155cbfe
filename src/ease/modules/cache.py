"""What a batch of rows has read so far: keys and values per layer, and the state that each token left with.

- Only real tokens have a place; the place of a token is its position in its row, whatever the padding was.
- A token that left early owes deeper layers its keys and values. They are made from the state it left with, for all
  owed places of a row in one product, when a later token of that row goes deeper.
- Who has read what is kept on the host, in numpy: a step asks for it dozens of times, and there it costs no kernel and
  no wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ease.errors import EaseError
from ease.modules.attention import Plan

Ints = NDArray[np.int64]


class Cache:
    """Preallocated room for `capacity` tokens in each of B rows of a model with L layers.

    Attributes:
        keys, values: (L, B, capacity, H_kv, head_dim).
        states: (B, capacity, D), the state that each token left with, or has now.
        length: (B,) tokens read so far.
        blocks: what the L layers compute.
        turns, rope: the rotary factors (1, 1, n, head_dim) of the first n places, and those of all there are.
        filled: (L, B) tokens that have keys and values in that layer; never more than `length`.
        key: what it was made for (mode and policy); it is refused for anything else.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[Tensor, Plan], Tensor]],
        rows: int,
        capacity: int,
        kv_heads: int,
        turns: Callable[[int], tuple[Tensor, Tensor]],
        like: Tensor,
        key: object = None,
    ) -> None:
        self.blocks, self.turns, self.rope = blocks, turns, turns(capacity)
        layers, head_dim, dim = len(blocks), self.rope[0].shape[-1], like.shape[-1]
        # Zeros, since a place that is masked out is multiplied by 0, and memory as it comes may hold NaN.
        self.keys = like.new_zeros(layers, rows, capacity, kv_heads, head_dim)
        self.values = like.new_zeros(layers, rows, capacity, kv_heads, head_dim)
        self.states = like.new_zeros(rows, capacity, dim)
        self.length: Ints = np.zeros(rows, np.int64)
        self.filled: Ints = np.zeros((layers, rows), np.int64)
        self.slots: Ints = np.zeros((rows, 0), np.int64)
        self.capacity, self.key = capacity, key
        self.planned: tuple[object, CachedPlan] | None = None  # the last plan, and what it was made for

    def check(self, key: object) -> None:
        """Refuses a use that the cache was not made for."""
        if key != self.key:
            raise EaseError(f"this cache was made for {self.key}, not for {key}: make a new one")

    def next(self, real: Tensor) -> Tensor:
        """(B, T) the places that the real ones of the tokens that come will have."""
        return self.tensor(self.length)[:, None] + real.long().cumsum(1) - 1

    def place(self, states: Tensor, real: Tensor) -> None:
        """Gives the real ones of the tokens that come, states (B, T, D), the next places of their rows."""
        came = real.cpu().numpy()
        length = self.length + came.sum(1)
        if length.max() > self.capacity:
            raise EaseError(
                f"the cache has room for {self.capacity} tokens a row and {length.max()} came: make it larger"
            )
        self.slots = self.length[:, None] + came.cumsum(1) - 1
        self.length = length
        rows, cols = np.nonzero(came)
        chosen = states.flatten(0, 1) if came.all() else states[self.tensor(rows), self.tensor(cols)]
        self.states.flatten(0, 1)[self.tensor(rows * self.capacity + self.slots[rows, cols])] = chosen

    def resume(self, length: Ints, count: int) -> None:
        """The tokens that come to the next run are the `count` tokens of each row after its first `length` (B,)."""
        self.slots = length[:, None] + np.arange(count)

    def cut(self, length: Ints | Tensor) -> None:
        """Forgets what came after the first `length` (B,) tokens of each row."""
        self.length = np.minimum(self.length, np.asarray(length))
        self.filled = np.minimum(self.filled, self.length)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in each row, no fewer than there is now."""
        more = capacity - self.capacity
        self.keys, self.values = (F.pad(store, (0, 0, 0, 0, 0, more)) for store in (self.keys, self.values))
        self.states = F.pad(self.states, (0, 0, 0, more))
        self.rope, self.capacity, self.planned = self.turns(capacity), capacity, None

    def select(self, rows: Ints) -> None:
        """Goes on with these rows in this order, each as often as it is named: what beam search asks for."""
        index = self.tensor(rows)
        self.keys, self.values, self.states = self.keys[:, index], self.values[:, index], self.states[index]
        self.length, self.filled = self.length[rows], self.filled[:, rows]

    def tensor(self, index: Ints | NDArray[np.bool_]) -> Tensor:
        """Indices, or a mask, on the cache's device."""
        return torch.from_numpy(index).to(self.states.device)


@dataclass(kw_only=True)
class CachedPlan(Plan):
    """A plan whose x (1, M, D) holds, row after row, the tokens that lack keys and values, asking ones among them.

    R rows of the batch have an asking token; `used` says which.
    """

    cache: Cache
    owed: Tensor  # (M,) place of each token of x in the flattened (B, capacity) of the cache
    asking: Tensor | None = None  # (N,) which tokens of x ask; None: all
    used: Tensor | None = None  # (R,) rows of the cache with an asking token; None: all
    came: Tensor | None = None  # (N,) place of each asking token in the flattened (B, T) of the tokens that came
    queries: Tensor | None = None  # (N,) place of each asking token in the flattened (R, width) of queries
    count: int = 0  # R
    reach: int = 0  # places that a query may look at
    in_order: bool = False  # the queries of a row are its first tokens, all of them
    layer: int = 0  # the one that runs now

    @classmethod
    def of(cls, cache: Cache, first: int, active: Tensor) -> CachedPlan:
        """For layers `first` and up, of which the active tokens (B, T) ask. At least one does."""
        asks = active.cpu().numpy()
        # An exit that nobody takes leaves the plan as it was.
        parts = (asks, cache.slots, cache.length, cache.filled[first - 1])
        asked_for = (asks.shape, *(part.tobytes() for part in parts))
        if cache.planned is not None and cache.planned[0] == asked_for:
            return cache.planned[1]
        rows, cols = np.nonzero(asks)
        every, used = asks.sum(1), np.nonzero(asks.any(1))[0]
        R, everyone = len(used), len(used) == len(asks)
        counts, length, filled = every[used], cache.length[used], cache.filled[first - 1, used]
        row = np.repeat(np.arange(R), counts)  # of each asking token, among the rows in use
        places = cache.slots[rows, cols]
        slots = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        width, reach = int(counts.max()), int(length.max())

        lacking = length - filled
        starts = lacking.cumsum() - lacking
        M = int(lacking.sum())
        owed_slots = np.arange(M) - np.repeat(starts - filled, lacking)
        owed = np.repeat(used, lacking) * cache.capacity + owed_slots
        asking = None if len(rows) == M else starts[row] + places - filled[row]

        at = np.zeros((R, width), np.int64)
        at[row, slots] = places
        # Rows that are read from their start on, all of their tokens, are plain causal ones.
        causal = width == reach > 1 and bool((places == slots).all())
        mask = None
        if not causal and (width > 1 or places.min() < reach - 1):
            mask = cache.tensor(np.arange(reach) <= at[:, None, :, None])
        slots_rope, at_rope = cache.tensor(owed_slots), cache.tensor(at.ravel())
        cos, sin = (table[0, 0] for table in cache.rope)
        plan = cls(
            rope=(cos[slots_rope][None, None], sin[slots_rope][None, None]),
            query_rope=(cos[at_rope].view(R, 1, width, -1), sin[at_rope].view(R, 1, width, -1)),
            mask=mask,
            width=width,
            cache=cache,
            owed=cache.tensor(owed),
            asking=None if asking is None else cache.tensor(asking),
            used=None if everyone else cache.tensor(used),
            came=None if asks.all() else cache.tensor(rows * asks.shape[1] + cols),
            queries=None if len(rows) == R * width else cache.tensor(row * width + slots),
            count=R,
            reach=reach,
            in_order=causal,
        )
        cache.planned = asked_for, plan
        return plan

    @property
    def causal(self) -> bool:
        return self.in_order

    def start(self) -> Tensor:
        """The states (1, M, D) of the tokens of x."""
        return self.cache.states.flatten(0, 1)[self.owed][None]

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        """Notes what layers first..last have made of x, and puts it in its place in state (B, T, D)."""
        made, cache = self.gather(x), self.cache
        cache.states.flatten(0, 1)[self.owed if self.asking is None else self.owed[self.asking]] = made
        used = slice(None) if self.used is None else self.used.cpu().numpy()
        cache.filled[first - 1 : last, used] = cache.length[used]
        return (
            made.view_as(state)
            if self.came is None
            else state.flatten(0, 1).index_copy(0, self.came, made).view_as(state)
        )

    def gather(self, x: Tensor) -> Tensor:
        return x[0] if self.asking is None else x[0, self.asking]

    def scatter(self, x: Tensor, asking: Tensor) -> Tensor:
        return asking[None] if self.asking is None else x.index_copy(1, self.asking, asking[None])

    def pad(self, asking: Tensor) -> Tensor:
        if self.queries is None:
            return asking.view(self.count, self.width, -1)
        padded = asking.new_zeros(self.count * self.width, asking.shape[-1])
        return padded.index_copy_(0, self.queries, asking).view(self.count, self.width, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        flat = padded.flatten(0, 1)
        return flat if self.queries is None else flat[self.queries]

    def remember(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (1, H, M, head_dim) where they belong; all that is in reach, (R, H, S, head_dim)."""
        found = []
        for store, new in ((self.cache.keys[self.layer - 1], keys), (self.cache.values[self.layer - 1], values)):
            store.flatten(0, 1)[self.owed] = new[0].transpose(0, 1).to(store.dtype)  # autocast makes others
            seen = store[:, : self.reach]
            found.append((seen if self.used is None else seen[self.used]).transpose(1, 2))
        return found[0], found[1]
