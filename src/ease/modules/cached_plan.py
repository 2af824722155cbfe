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

from ease.model_config import AttentionKind
from ease.modules.cache import Bools, Cache, Ints, all_equal
from ease.modules.plan import Plan, View, check_length, mix
from ease.modules.rope import Rope

QUERY_BLOCK = 128  # queries that attend at a time under a mask: keys after the block's last query are not computed


class QueryGroup(NamedTuple):
    """Queries that attend in one call."""

    queries: tuple[slice, slice]  # rows and columns of the (R, width) queries
    rows: slice | Tensor  # of the cache
    places: slice  # of the cache, that some query of the group may attend to
    mask: Tensor | None


@dataclass(kw_only=True)
class CachedView(View):
    """What layers of one attention kind share within a run with a cache."""

    active: Tensor | None = None  # as in `CachedPlan`
    groups: Sequence[QueryGroup] = ()
    start: int = 0  # the first place that `AlignedPlan` attends to
    in_order: bool = False  # the queries of a row are its first tokens, all of them, so attention is plainly causal

    @cached_property
    def token_rope(self) -> Rope:
        """Rotary factors (M or 1, 1, rotary_dim) of the tokens of x."""
        return None if self.rope is None else (self.rope[0][0, 0, :, None], self.rope[1][0, 0, :, None])

    @cached_property
    def active_rope(self) -> Rope:
        """Rotary factors (N, 1, rotary_dim) of the active tokens."""
        return None if self.token_rope is None else (self.token_rope[0][self.active], self.token_rope[1][self.active])


@dataclass(kw_only=True)
class CachedPlan(Plan):
    """What all layers of one run with a cache share.

    Its x (1, M, D) holds, row after row, the tokens that lack keys and values in the first layer of the run. N of them
    are active: those compute queries and change their state.
    """

    cache: Cache
    active: Tensor | None = None  # (N,) index of each active token among the M; None: all
    incoming: Tensor | None = None  # (N,) index of each active token in the flattened (B, T) of the run; None: all

    @classmethod
    def of(cls, cache: Cache, first: int, active: Bools) -> CachedPlan:
        """The plan for layers `first` and up with the active tokens (B, T), of which there is at least one."""
        # At an exit where no token leaves, the plan of the layers below is used again.
        state = (active, cache.slots, cache.length, cache.filled[first - 1])
        key = (active.shape, *(part.tobytes() for part in state))
        if cache.planned is None or cache.planned[0] != key:
            plan = AlignedPlan.of_cache(cache, first, active) or RaggedPlan.of_cache(cache, first, active)
            cache.planned = key, plan
        planned: CachedPlan = cache.planned[1]
        return planned

    def view(self, kind: AttentionKind) -> CachedView:
        view = super().view(kind)
        assert isinstance(view, CachedView)
        return view

    def gather(self, x: Tensor) -> Tensor:
        return x[0] if self.active is None else x[0, self.active]

    def scatter(self, x: Tensor, active: Tensor) -> Tensor:
        return active[None] if self.active is None else x.index_copy(1, self.active, active[None])

    def returned(self, result: Tensor, state: Tensor) -> Tensor:
        """state (B, T, D) with the result (N, D) of its active tokens in place."""
        if self.incoming is None:
            return result.view_as(state)
        return state.flatten(0, 1).index_copy(0, self.incoming, result).view_as(state)

    def start(self) -> Tensor:
        """The states (1, M, D) of the tokens of x."""
        raise NotImplementedError

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        """Stores x (1, M, D), the result of layers first..last, and returns state (B, T, D) with it in place."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AlignedPlan(CachedPlan):
    """The most frequent case of decoding: all rows lack the same places, and the last n of these are active in each.

    It covers a step of one token, the check of a draft, and tokens that left early below a token that did not. Keys and
    values are stored and read through views of the cache.
    """

    batch: int  # B
    filled: int  # places of each row that have keys and values
    length: int

    @classmethod
    def of_cache(cls, cache: Cache, first: int, active: Bools) -> AlignedPlan | None:
        """The plan, or None if the rows differ in what they read."""
        B, n = len(active), int(active[0].sum())
        length, filled = int(cache.length[0]), int(cache.filled[first - 1, 0])
        if not (
            0 < n <= QUERY_BLOCK
            and active.sum() == B * n
            and all_equal(cache.length)
            and all_equal(cache.filled[first - 1])
            and (cache.slots[active].reshape(B, n) == np.arange(length - n, length)).all()
        ):
            return None
        m = length - filled

        def view(kind: AttentionKind) -> CachedView:
            check_length(kind, length)
            rope = query_rope = cache.rope(kind)
            if rope is not None:
                cos, sin = rope
                repeats = 1, 1, B if m > 1 else 1, 1  # a single place is the same for all rows
                rope = cos[:, :, filled:length].repeat(repeats), sin[:, :, filled:length].repeat(repeats)
                query_rope = cos[:, :, length - n : length], sin[:, :, length - n : length]
            reach = length if kind.window is None else kind.window
            start = max(0, length - n + 1 - reach)
            causal, mask = n == length and reach >= n, None
            if n > 1 and not causal:
                seen, at = np.arange(start, length), np.arange(length - n, length)[:, None]
                mask = cache.tensor((seen <= at) & (seen > at - reach))[None, None]
            return CachedView(rope=rope, query_rope=query_rope, active=index, start=start, mask=mask, in_order=causal)

        index = None
        if n < m:
            index = cache.tensor((np.arange(B)[:, None] * m + np.arange(m - n, m)).ravel())
        return cls(
            make_view=view,
            width=n,
            cache=cache,
            active=index,
            batch=B,
            filled=filled,
            length=length,
            incoming=None if active.all() else cache.tensor(np.flatnonzero(active)),
        )

    def start(self) -> Tensor:
        return self.cache.states[:, self.filled : self.length].reshape(1, -1, self.cache.states.shape[-1])

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        result = self.gather(x)
        self.cache.filled[first - 1 : last] = self.length
        self.cache.states[:, self.length - self.width : self.length] = self.pad(result)
        return self.returned(result, state)

    def pad(self, active: Tensor) -> Tensor:
        return active.view(self.batch, self.width, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1)

    def attend(self, kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores keys and values (1, H_kv, M, head_dim) and attends to everything that the rows have read."""
        keys, values = self.cache.keys[self.layer - 1], self.cache.values[self.layer - 1]
        keys[:, :, self.filled : self.length] = k[0].unflatten(1, (self.batch, -1)).transpose(0, 1)
        values[:, :, self.filled : self.length] = v[0].unflatten(1, (self.batch, -1)).transpose(0, 1)
        view = self.view(kind)
        seen = slice(view.start, self.length)
        return mix(kind, q, keys[:, :, seen], values[:, :, seen], view.mask, view.in_order)


@dataclass(kw_only=True)
class RaggedPlan(CachedPlan):
    """Any other run: rows read different numbers of tokens, at different places, and any of them are active.

    R rows of the batch have an active token. Their queries are padded to (R, width).
    """

    token_places: tuple[Tensor, Tensor]  # (M,) row and place in the cache of each token of x
    rows_in_use: Ints | slice  # (R,) rows of the cache with an active token
    query_slots: Tensor | None  # (N,) index of each active token in the flattened (R, width) queries; None: all
    num_rows: int  # R

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
        active_index = None if index is None else cache.tensor(index)

        def view(kind: AttentionKind) -> CachedView:
            check_length(kind, int(length.max()))
            rope = query_rope = cache.rope(kind)
            if rope is not None:
                cos, sin = (table[0, 0] for table in rope)
                rope = cos[at_tokens][None, None], sin[at_tokens][None, None]
                query_rope = cos[at_queries].view(R, 1, width, -1), sin[at_queries].view(R, 1, width, -1)
            causal = in_order and (kind.window is None or kind.window >= width)
            groups = query_groups(cache, query_places, None if every_row else used, causal, kind.window)
            return CachedView(rope=rope, query_rope=query_rope, active=active_index, groups=groups, in_order=causal)

        return cls(
            make_view=view,
            width=width,
            cache=cache,
            active=active_index,
            token_places=(cache.tensor(np.repeat(used, missing)), at_tokens),
            rows_in_use=slice(None) if every_row else used,
            incoming=None if active.all() else cache.tensor(rows * active.shape[1] + cols),
            query_slots=None if len(rows) == R * width else cache.tensor(row * width + slots),
            num_rows=R,
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
        return self.returned(result, state)

    def pad(self, active: Tensor) -> Tensor:
        if self.query_slots is None:
            return active.view(self.num_rows, self.width, -1)
        padded = active.new_zeros(self.num_rows * self.width, active.shape[-1])
        return padded.index_copy_(0, self.query_slots, active).view(self.num_rows, self.width, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        flat = padded.flatten(0, 1)
        return flat if self.query_slots is None else flat[self.query_slots]

    def attend(self, kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores keys and values (1, H_kv, M, head_dim) in their places and attends to all that each query may see."""
        keys, values = self.cache.keys[self.layer - 1], self.cache.values[self.layer - 1]
        rows, places = self.token_places
        # Under autocast the new keys and values have another type than the cache.
        keys[rows, :, places] = k[0].transpose(0, 1).to(keys.dtype)
        values[rows, :, places] = v[0].transpose(0, 1).to(values.dtype)
        view = self.view(kind)
        mixed = [
            mix(kind, q[query_rows, :, query_cols], keys[rows, :, seen], values[rows, :, seen], mask, view.in_order)
            for (query_rows, query_cols), rows, seen, mask in view.groups
        ]
        blocks = 1 if view.in_order else -(-self.width // QUERY_BLOCK)
        if blocks > 1:
            mixed = [torch.cat(mixed[i : i + blocks], 2) for i in range(0, len(mixed), blocks)]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def query_groups(cache: Cache, places: Ints, used: Ints | None, in_order: bool, window: int | None) -> list[QueryGroup]:
    """How queries at the places (R, width) of the rows `used` (R,) attend; None: all rows of the cache."""
    width, everything = places.shape[1], slice(None)
    if in_order:
        every_row = everything if used is None else cache.tensor(used)
        return [QueryGroup((everything, everything), every_row, slice(0, width), None)]
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
            last = int(block.max())
            first = 0 if window is None else max(0, int(block.min()) + 1 - window)
            mask = None
            if block.min() < last:
                seen, at = np.arange(first, last + 1), block[:, None, :, None]
                mask = cache.tensor((seen <= at) if window is None else (seen <= at) & (seen > at - window))
            groups.append(QueryGroup((query_rows, query_cols), cache_rows, slice(first, last + 1), mask))
    return groups
