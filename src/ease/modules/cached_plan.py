"""Plans of runs with a cache: which tokens the layers compute, and what their queries attend to.

The layers get only the tokens that lack keys and values in the cache, joined to one row, and among them the active
tokens. Deciding which these are happens on the host, in numpy, like the cache's own bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ease.modules.cache import Bools, Cache, Ints, all_equal
from ease.modules.plan import Plan, mix

QUERY_BLOCK = 128  # queries that attend at a time under a mask: keys after the block's last query are not computed


@dataclass(kw_only=True)
class CachedPlan(Plan):
    """What all layers of one run with a cache share.

    Its x (1, M, D) holds, row after row, the tokens that lack keys and values in the first layer of the run. N of them
    are active: those compute queries and change their state.
    """

    cache: Cache
    active: Tensor | None = None  # (N,) index of each active token among the M; None: all
    layer: int = 0  # the layer that runs now

    @classmethod
    def of(cls, cache: Cache, first: int, active: Bools) -> CachedPlan:
        """The plan for layers `first` and up with the active tokens (B, T), of which there is at least one."""
        # At an exit where no token leaves, the plan of the layers below is used again.
        state = (active, cache.slots, cache.length, cache.filled[first - 1])
        key = (active.shape, *(part.tobytes() for part in state))
        if cache.planned is None or cache.planned[0] != key:
            single = SingleTokenPlan.applies(cache, first, active)
            plan = SingleTokenPlan.of_cache(cache) if single else RaggedPlan.of_cache(cache, first, active)
            cache.planned = key, plan
        planned: CachedPlan = cache.planned[1]
        return planned

    def start(self) -> Tensor:
        """The states (1, M, D) of the tokens of x."""
        raise NotImplementedError

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        """Stores x (1, M, D), the result of layers first..last, and returns state (B, T, D) with it in place."""
        raise NotImplementedError

    @cached_property
    def token_rope(self) -> tuple[Tensor, Tensor]:
        """Rotary factors (M or 1, 1, head_dim) of the tokens of x."""
        return self.rope[0][0, 0, :, None], self.rope[1][0, 0, :, None]

    @cached_property
    def active_rope(self) -> tuple[Tensor, Tensor]:
        """Rotary factors (N, 1, head_dim) of the active tokens."""
        cos, sin = self.token_rope
        return cos[self.active], sin[self.active]


@dataclass(kw_only=True)
class SingleTokenPlan(CachedPlan):
    """The most frequent case of decoding: each row reads one token, all at the same place, and all are active."""

    place: int

    @classmethod
    def applies(cls, cache: Cache, first: int, active: Bools) -> bool:
        last_place = cache.length - 1
        return bool(
            active.size == len(cache.length)
            and active.all()
            and all_equal(cache.length)
            and (cache.slots[:, 0] == last_place).all()
            and (cache.filled[first - 1] == last_place).all()
        )

    @classmethod
    def of_cache(cls, cache: Cache) -> SingleTokenPlan:
        place = int(cache.length[0]) - 1
        cos, sin = (table[:, :, place : place + 1] for table in cache.rope)
        return cls((cos, sin), (cos, sin), None, cache=cache, place=place)

    def start(self) -> Tensor:
        return self.cache.states[None, :, self.place]

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        self.cache.filled[first - 1 : last] = self.cache.length
        self.cache.states[:, self.place] = x[0]
        return x[0].view_as(state)

    def gather(self, x: Tensor) -> Tensor:
        return x[0]

    def scatter(self, x: Tensor, active: Tensor) -> Tensor:
        return active[None]

    def pad(self, active: Tensor) -> Tensor:
        return active[:, None]

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores keys and values (1, H_kv, B, head_dim) and attends to everything that the rows have read."""
        keys, values = self.cache.keys[self.layer - 1], self.cache.values[self.layer - 1]
        keys[:, :, self.place] = k[0].transpose(0, 1)
        values[:, :, self.place] = v[0].transpose(0, 1)
        return mix(q, keys[:, :, : self.place + 1], values[:, :, : self.place + 1], None)


class QueryGroup(NamedTuple):
    """Queries that attend in one call."""

    queries: tuple[slice, slice]  # rows and columns of the (R, width) queries
    rows: slice | Tensor  # of the cache
    reach: int  # places of the cache that the group may attend to
    mask: Tensor | None


@dataclass(kw_only=True)
class RaggedPlan(CachedPlan):
    """Any other run: rows read different numbers of tokens, at different places, and any of them are active.

    R rows of the batch have an active token. Their queries are padded to (R, width).
    """

    groups: Sequence[QueryGroup]
    token_places: tuple[Tensor, Tensor]  # (M,) row and place in the cache of each token of x
    rows_in_use: Ints | slice  # (R,) rows of the cache with an active token
    incoming: Tensor | None  # (N,) index of each active token in the flattened (B, T) of the run's tokens; None: all
    query_slots: Tensor | None  # (N,) index of each active token in the flattened (R, width) queries; None: all
    num_rows: int  # R
    in_order: bool  # the queries of a row are its first tokens, all of them, so attention is plainly causal

    @classmethod
    def of_cache(cls, cache: Cache, first: int, active: Bools) -> RaggedPlan:
        rows, cols = np.nonzero(active)
        count, used = active.sum(1), np.nonzero(active.any(1))[0]
        R, every_row = len(used), len(used) == len(active)
        count, length, filled = count[used], cache.length[used], cache.filled[first - 1, used]
        row = np.repeat(np.arange(R), count)  # of each active token, among the rows in use
        places = cache.slots[rows, cols]
        slots = np.arange(len(rows)) - np.repeat(count.cumsum() - count, count)
        width = int(count.max())

        missing = length - filled
        starts = missing.cumsum() - missing
        M = int(missing.sum())
        missing_places = np.arange(M) - np.repeat(starts - filled, missing)
        index = None if len(rows) == M else starts[row] + places - filled[row]

        query_places = np.zeros((R, width), np.int64)
        query_places[row, slots] = places
        in_order = 1 < width == int(length.max()) and bool((places == slots).all())
        at_tokens, at_queries = cache.tensor(missing_places), cache.tensor(query_places.ravel())
        cos, sin = (table[0, 0] for table in cache.rope)
        return cls(
            rope=(cos[at_tokens][None, None], sin[at_tokens][None, None]),
            query_rope=(cos[at_queries].view(R, 1, width, -1), sin[at_queries].view(R, 1, width, -1)),
            mask=None,
            width=width,
            cache=cache,
            active=None if index is None else cache.tensor(index),
            groups=query_groups(cache, query_places, None if every_row else used, in_order),
            token_places=(cache.tensor(np.repeat(used, missing)), at_tokens),
            rows_in_use=slice(None) if every_row else used,
            incoming=None if active.all() else cache.tensor(rows * active.shape[1] + cols),
            query_slots=None if len(rows) == R * width else cache.tensor(row * width + slots),
            num_rows=R,
            in_order=in_order,
        )

    def start(self) -> Tensor:
        return self.cache.states[self.token_places][None]

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        result = self.gather(x)
        self.cache.filled[first - 1 : last, self.rows_in_use] = self.cache.length[self.rows_in_use]
        rows, places = self.token_places
        if self.active is not None:
            rows, places = rows[self.active], places[self.active]
        self.cache.states[rows, places] = result
        if self.incoming is None:
            return result.view_as(state)
        return state.flatten(0, 1).index_copy(0, self.incoming, result).view_as(state)

    def gather(self, x: Tensor) -> Tensor:
        return x[0] if self.active is None else x[0, self.active]

    def scatter(self, x: Tensor, active: Tensor) -> Tensor:
        return active[None] if self.active is None else x.index_copy(1, self.active, active[None])

    def pad(self, active: Tensor) -> Tensor:
        if self.query_slots is None:
            return active.view(self.num_rows, self.width, -1)
        padded = active.new_zeros(self.num_rows * self.width, active.shape[-1])
        return padded.index_copy_(0, self.query_slots, active).view(self.num_rows, self.width, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        flat = padded.flatten(0, 1)
        return flat if self.query_slots is None else flat[self.query_slots]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores keys and values (1, H_kv, M, head_dim) in their places and attends to all that each query may see."""
        keys, values = self.cache.keys[self.layer - 1], self.cache.values[self.layer - 1]
        rows, places = self.token_places
        # Under autocast the new keys and values have another type than the cache.
        keys[rows, :, places] = k[0].transpose(0, 1).to(keys.dtype)
        values[rows, :, places] = v[0].transpose(0, 1).to(values.dtype)
        mixed = [
            mix(q[query_rows, :, query_cols], keys[rows, :, :reach], values[rows, :, :reach], mask, self.in_order)
            for (query_rows, query_cols), rows, reach, mask in self.groups
        ]
        blocks = 1 if self.in_order else -(-self.width // QUERY_BLOCK)
        if blocks > 1:
            mixed = [torch.cat(mixed[i : i + blocks], 2) for i in range(0, len(mixed), blocks)]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def query_groups(cache: Cache, places: Ints, used: Ints | None, in_order: bool) -> list[QueryGroup]:
    """How queries at the places (R, width) of the rows `used` (R,) attend; None: all rows of the cache."""
    width, everything = places.shape[1], slice(None)
    if in_order:
        every_row = everything if used is None else cache.tensor(used)
        return [QueryGroup((everything, everything), every_row, width, None)]
    rows: list[tuple[slice, slice | Tensor]] = [(everything, everything)]
    if used is not None and cache.keys.device.type == "cpu":  # views of single rows cost less than a copy of several
        rows = [(slice(i, i + 1), slice(row, row + 1)) for i, row in enumerate(used.tolist())]
    elif used is not None:
        rows = [(everything, cache.tensor(used))]
    groups = []
    for query_rows, cache_rows in rows:
        for start in range(0, width, QUERY_BLOCK):
            query_cols = slice(start, start + QUERY_BLOCK)
            block = places[query_rows, query_cols]
            reach = int(block.max()) + 1
            mask = None
            if block.min() < reach - 1:
                mask = cache.tensor(np.arange(reach) <= block[:, None, :, None])
            groups.append(QueryGroup((query_rows, query_cols), cache_rows, reach, mask))
    return groups
