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
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ease.errors import EaseError
from ease.modules.plan import Plan, mix

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
BLOCK = 128  # queries that attend at a time where a mask says over what: what follows them is not computed


def alike(numbers: Ints) -> bool:
    """Whether all are the same."""
    return bool((numbers == numbers.flat[0]).all())


class Cache:
    """Preallocated room for `capacity` tokens in each of B rows of a model with L layers.

    Attributes:
        keys, values: (L, B, H_kv, capacity, head_dim).
        states: (B, capacity, D), the state that each token left with, or has now.
        length: (B,) tokens read so far.
        blocks: what the L layers compute.
        turns, rope: the rotary factors (1, 1, n, head_dim) of the first n places, and those of all there are.
        filled: (L, B) tokens that have keys and values in that layer; never more than `length`.
        key: what it was made for (mode and policy); it is refused for anything else.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[Tensor, CachedPlan], Tensor]],
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
        self.keys = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
        self.values = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
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

    def place(self, states: Tensor, came: Bools) -> None:
        """Gives those of states (B, T, D) that `came` (B, T), and are no padding, the next places of their rows."""
        length = self.length + came.sum(1)
        if length.max() > self.capacity:
            raise EaseError(
                f"the cache has room for {self.capacity} tokens a row and {length.max()} came: make it larger"
            )
        self.slots = self.length[:, None] + came.cumsum(1) - 1
        self.length = length
        if came.all() and alike(length):
            self.states[:, length[0] - came.shape[1] : length[0]] = states
            return
        rows, cols = np.nonzero(came)
        places = self.tensor(rows * self.capacity + self.slots[rows, cols])
        self.states.flatten(0, 1)[places] = states[self.tensor(rows), self.tensor(cols)]

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
        self.keys, self.values = (F.pad(store, (0, 0, 0, more)) for store in (self.keys, self.values))
        self.states = F.pad(self.states, (0, 0, 0, more))
        self.rope, self.capacity, self.planned = self.turns(capacity), capacity, None

    def select(self, rows: Ints) -> None:
        """Goes on with these rows in this order, each as often as it is named: what beam search asks for."""
        index = self.tensor(rows)
        self.keys, self.values, self.states = self.keys[:, index], self.values[:, index], self.states[index]
        self.length, self.filled = self.length[rows], self.filled[:, rows]

    def tensor(self, index: Ints | Bools) -> Tensor:
        """Indices, or a mask, on the cache's device."""
        return torch.from_numpy(index).to(self.states.device)


class Piece(NamedTuple):
    """Queries that attend together."""

    queries: tuple[slice, slice]  # rows and columns of the (R, width) of queries
    rows: slice | Tensor  # of the cache
    reach: int  # places that they may look at
    mask: Tensor | None


@dataclass(kw_only=True)
class CachedPlan(Plan):
    """A plan whose x (1, M, D) holds, row after row, the tokens that lack keys and values, asking ones among them.

    R rows of the batch have an asking token; `used` says which.
    """

    cache: Cache
    pieces: list[Piece]
    step: int | None = None  # the place of the one token that every row reads and that asks; None: `owed` says
    owed: tuple[Tensor, Tensor]  # (M,) row and place of each token of x
    asking: Tensor | None = None  # (N,) which tokens of x ask; None: all
    used: Ints | slice  # (R,) rows of the cache with an asking token
    came: Tensor | None = None  # (N,) place of each asking token in the flattened (B, T) of the tokens that came
    queries: Tensor | None = None  # (N,) place of each asking token in the flattened (R, width) of queries
    count: int = 0  # R
    in_order: bool = False  # the queries of a row are its first tokens, all of them
    layer: int = 0  # the one that runs now

    @classmethod
    def of(cls, cache: Cache, first: int, asks: Bools) -> CachedPlan:
        """For layers `first` and up, of which the tokens in `asks` (B, T) ask. At least one does."""
        # An exit that nobody takes leaves the plan as it was.
        parts = (asks, cache.slots, cache.length, cache.filled[first - 1])
        asked_for = (asks.shape, *(part.tobytes() for part in parts))
        if cache.planned is None or cache.planned[0] != asked_for:
            step = asks.size == len(cache.length) and asks.all() and alike(cache.length)
            step = step and (cache.slots[:, 0] == cache.length - 1).all()
            step = step and (cache.filled[first - 1] == cache.length - 1).all()
            cache.planned = asked_for, cls._step(cache) if step else cls._any(cache, first, asks)
        return cache.planned[1]

    @classmethod
    def _step(cls, cache: Cache) -> CachedPlan:
        """The usual case of decoding: every row reads one token in the same place, which asks."""
        R, at = len(cache.length), int(cache.length[0]) - 1
        rope = (cache.rope[0][:, :, at : at + 1], cache.rope[1][:, :, at : at + 1])
        every = slice(None)
        piece = Piece((every, every), every, at + 1, None)
        none = cache.states.new_zeros(0)
        return cls(
            rope, rope, None, width=1, cache=cache, pieces=[piece], step=at, owed=(none, none), used=every, count=R
        )

    @classmethod
    def _any(cls, cache: Cache, first: int, asks: Bools) -> CachedPlan:
        rows, cols = np.nonzero(asks)
        every, used = asks.sum(1), np.nonzero(asks.any(1))[0]
        R, everyone = len(used), len(used) == len(asks)
        counts, length, filled = every[used], cache.length[used], cache.filled[first - 1, used]
        row = np.repeat(np.arange(R), counts)  # of each asking token, among the rows in use
        places = cache.slots[rows, cols]
        slots = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        width = int(counts.max())

        lacking = length - filled
        starts = lacking.cumsum() - lacking
        M = int(lacking.sum())
        owed_slots = np.arange(M) - np.repeat(starts - filled, lacking)
        asking = None if len(rows) == M else starts[row] + places - filled[row]

        at = np.zeros((R, width), np.int64)
        at[row, slots] = places
        # Rows that are read from their start on, all of their tokens, are plain causal ones.
        causal = 1 < width == int(length.max()) and bool((places == slots).all())
        slots_rope, at_rope = cache.tensor(owed_slots), cache.tensor(at.ravel())
        cos, sin = (table[0, 0] for table in cache.rope)
        return cls(
            rope=(cos[slots_rope][None, None], sin[slots_rope][None, None]),
            query_rope=(cos[at_rope].view(R, 1, width, -1), sin[at_rope].view(R, 1, width, -1)),
            mask=None,
            width=width,
            cache=cache,
            pieces=cls._pieces(cache, at, None if everyone else used, causal),
            owed=(cache.tensor(np.repeat(used, lacking)), slots_rope),
            asking=None if asking is None else cache.tensor(asking),
            used=slice(None) if everyone else used,
            came=None if asks.all() else cache.tensor(rows * asks.shape[1] + cols),
            queries=None if len(rows) == R * width else cache.tensor(row * width + slots),
            count=R,
            in_order=causal,
        )

    @staticmethod
    def _pieces(cache: Cache, at: Ints, used: Ints | None, causal: bool) -> list[Piece]:
        """How the queries that stand at (R, width) attend."""
        width, every = at.shape[1], slice(None)
        if causal:
            every_row = every if used is None else cache.tensor(used)
            return [Piece((every, every), every_row, width, None)]
        rows: list[tuple[slice, slice | Tensor]] = [(every, every)]
        if used is not None and cache.keys.device.type == "cpu":  # a view costs less than a copy of some rows
            rows = [(slice(i, i + 1), slice(row, row + 1)) for i, row in enumerate(used.tolist())]
        elif used is not None:
            rows = [(every, cache.tensor(used))]
        pieces = []
        for mine, theirs in rows:
            for start in range(0, width, BLOCK):
                cols = slice(start, start + BLOCK)
                looks = at[mine, cols]
                reach = int(looks.max()) + 1
                mask = None if looks.min() == reach - 1 else cache.tensor(np.arange(reach) <= looks[:, None, :, None])
                pieces.append(Piece((mine, cols), theirs, reach, mask))
        return pieces

    @property
    def causal(self) -> bool:
        return self.in_order

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """The rotary factors (M or 1, 1, head_dim) of the tokens of x."""
        return self.rope[0][0, 0, :, None], self.rope[1][0, 0, :, None]

    @cached_property
    def query_turns(self) -> tuple[Tensor, Tensor]:
        """Those of the N asking tokens."""
        cos, sin = self.turns
        return cos[self.asking], sin[self.asking]

    def start(self) -> Tensor:
        """The states (1, M, D) of the tokens of x."""
        states = self.cache.states
        return states[None, :, self.step] if self.step is not None else states[self.owed][None]

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        """Notes what layers first..last have made of x, and puts it in its place in state (B, T, D)."""
        made, cache = self.gather(x), self.cache
        cache.filled[first - 1 : last, self.used] = cache.length[self.used]
        if self.step is not None:
            cache.states[:, self.step] = made
            return made.view_as(state)
        rows, places = self.owed if self.asking is None else (part[self.asking] for part in self.owed)
        cache.states[rows, places] = made
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes keys and values (1, H_kv, M, head_dim) where they belong, and reads all that is in reach."""
        stores = self.cache.keys[self.layer - 1], self.cache.values[self.layer - 1]
        for store, new in zip(stores, (k, v), strict=True):
            made = new[0].transpose(0, 1)
            if self.step is not None:
                store[:, :, self.step] = made
            else:
                store[self.owed[0], :, self.owed[1]] = made.to(store.dtype)  # autocast makes others
        keys, values = stores
        mixed = [
            mix(q[rows, :, cols], keys[theirs, :, :reach], values[theirs, :, :reach], mask, self.in_order)
            for (rows, cols), theirs, reach, mask in self.pieces
        ]
        blocks = 1 if self.in_order else -(-self.width // BLOCK)
        if blocks > 1:
            mixed = [torch.cat(mixed[i : i + blocks], 2) for i in range(0, len(mixed), blocks)]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
