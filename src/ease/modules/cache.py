"""What a batch of rows has read so far: keys and values per layer, and the state that each token left with.

- Only real tokens have a place; the place of a token is its position in its row, whatever the padding was.
- A token that left early owes deeper layers its keys and values. They are made from the state it left with, for all
  owed places of a row in one product, when a later token of that row goes deeper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.modules.attention import Plan, RopeScaling, rotary


class Cache:
    """Preallocated room for `capacity` tokens in each of B rows of a model with L layers.

    Attributes:
        keys, values: (L, B, H_kv, capacity, head_dim).
        states: (B, capacity, D), the state that each token left with, or has now.
        length: (B,) tokens read so far.
        filled: (L, B) tokens that have keys and values in that layer; never more than `length`.
        key: what it was made for (mode and policy); it is refused for anything else.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dim: int,
        like: Tensor,
        key: object = None,
    ) -> None:
        # Zeros, since a place that is masked out is multiplied by 0, and memory as it comes may hold NaN.
        self.keys = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
        self.values = like.new_zeros(layers, rows, kv_heads, capacity, head_dim)
        self.states = like.new_zeros(rows, capacity, dim)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.filled = torch.zeros(layers, rows, dtype=torch.long, device=like.device)
        self.slots = torch.zeros(rows, 0, dtype=torch.long, device=like.device)
        self.capacity, self.key = capacity, key

    def check(self, key: object) -> None:
        """Refuses a use that the cache was not made for."""
        if key != self.key:
            raise EaseError(f"this cache was made for {self.key}, not for {key}: make a new one")

    def place(self, states: Tensor, real: Tensor) -> None:
        """Gives the real ones of the tokens that come, states (B, T, D), the next places of their rows."""
        self.slots = self.length[:, None] + real.long().cumsum(1) - 1
        length = self.length + real.sum(1)
        if int(length.max()) > self.capacity:
            raise EaseError(
                f"the cache has room for {self.capacity} tokens a row and {int(length.max())} came: make it larger"
            )
        self.length = length
        rows, cols = real.nonzero(as_tuple=True)
        self.states[rows, self.slots[rows, cols]] = states[rows, cols]

    def cut(self, length: Tensor) -> None:
        """Forgets what came after the first `length` (B,) tokens of each row."""
        self.length = torch.minimum(self.length, length)
        self.filled = torch.minimum(self.filled, self.length)


@dataclass(frozen=True)
class CachedPlan(Plan):
    """A plan whose x (1, M, D) holds, row after row, the tokens that lack keys and values, asking ones among them.

    `rows` and `cols` are of the asking ones in the batch of tokens that came, `slots` their places among the queries of
    their row; the cache's rows in use are `used`.
    """

    cache: Cache | None = None
    used: Tensor | None = None  # (R,) rows of the cache with an asking token; None: all
    pairs: tuple[Tensor, Tensor] | None = None  # (M,) row and place of each token of x
    asking: Tensor | None = None  # (N,) which tokens of x ask; None: all
    queries: Tensor | None = None  # (N,) row among those in use
    count: int = 0  # rows in use
    reach: int = 0  # places that a query may look at
    layer: int = 0

    @classmethod
    def of(
        cls,
        cache: Cache,
        first: int,
        active: Tensor,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
    ) -> CachedPlan:
        """For layers `first` and up, of which the active tokens (B, T) ask. At least one does."""
        rows, cols = active.nonzero(as_tuple=True)
        using = active.any(1)
        everyone = bool(using.all())
        used = torch.arange(len(using), device=active.device) if everyone else using.nonzero().squeeze(1)
        compact = using.long().cumsum(0) - 1  # row of the batch -> row in use
        places = cache.slots[rows, cols]
        reach = int(cache.length[used].max())
        at = torch.arange(reach, device=active.device)
        if active.shape[1] == 1 and torch.equal(cache.filled[first - 1][used], places):  # one token a row, and no debts
            pair_rows, pair_slots, asking = compact[rows], places, None
        else:
            owed = (at >= cache.filled[first - 1][used][:, None]) & (at < cache.length[used][:, None])
            pair_rows, pair_slots = owed.nonzero(as_tuple=True)
            index = torch.full(owed.shape, -1, device=active.device)
            index[pair_rows, pair_slots] = torch.arange(len(pair_rows), device=active.device)
            asking = index[compact[rows], places]
            asking = None if len(asking) == len(pair_rows) else asking

        slots = active.long().cumsum(1)[rows, cols] - 1
        width = 1 if active.shape[1] == 1 else int(active.sum(1).max())
        mask = None
        if width > 1 or int(places.min()) < reach - 1:
            mask = torch.ones(len(used), 1, width, reach, dtype=torch.bool, device=active.device)
            mask[compact[rows], 0, slots] = at <= places[:, None]
        dtype = cache.keys.dtype
        rope = rotary(pair_slots[None], head_dim, theta, dtype, scaling)
        plan = cls(
            rope,
            rope,
            mask,
            rows,
            cols,
            slots,
            width,
            cache=cache,
            used=None if everyone else used,
            pairs=(used[pair_rows], pair_slots),
            asking=asking,
            queries=compact[rows],
            count=len(used),
            reach=reach,
        )
        turned = rotary(places[None], head_dim, theta, dtype, scaling)
        return replace(plan, query_rope=(plan.pad(turned[0][0, 0])[:, None], plan.pad(turned[1][0, 0])[:, None]))

    @property
    def causal(self) -> bool:
        return False

    def at(self, layer: int) -> Plan:
        return replace(self, layer=layer)

    def start(self) -> Tensor:
        """The states (1, M, D) of the tokens of x."""
        assert self.cache is not None and self.pairs is not None  # noqa: PT018
        return self.cache.states[self.pairs][None]

    def finish(self, x: Tensor, state: Tensor, first: int, last: int) -> Tensor:
        """Notes what layers first..last have made of x, and puts it in its place in state (B, T, D)."""
        assert self.cache is not None and self.rows is not None and self.cols is not None  # noqa: PT018
        made, cache = self.gather(x), self.cache
        cache.states[self.rows, cache.slots[self.rows, self.cols]] = made
        used = slice(None) if self.used is None else self.used
        cache.filled[first - 1 : last, used] = cache.length[used]
        return state.index_put((self.rows, self.cols), made)

    def gather(self, x: Tensor) -> Tensor:
        return x[0] if self.asking is None else x[0, self.asking]

    def scatter(self, x: Tensor, asking: Tensor) -> Tensor:
        return (
            asking[None] if self.asking is None else x.index_put((torch.zeros_like(self.asking), self.asking), asking)
        )

    def pad(self, asking: Tensor) -> Tensor:
        if self.width == 1:  # a row in use has one token, and they come in order
            return asking[:, None]
        padded = asking.new_zeros(self.count, self.width, asking.shape[-1])
        return padded.index_put((self.queries, self.slots), asking)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded[:, 0] if self.width == 1 else padded[self.queries, self.slots]

    def remember(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (1, H, M, head_dim) where they belong; all that is in reach, (R, H, S, head_dim)."""
        assert self.cache is not None and self.pairs is not None  # noqa: PT018
        rows, slots = self.pairs
        found = []
        for store, new in ((self.cache.keys[self.layer - 1], keys), (self.cache.values[self.layer - 1], values)):
            store[rows, :, slots] = new[0].transpose(0, 1)
            seen = store[:, :, : self.reach]
            found.append(seen if self.used is None else seen[self.used])
        return found[0], found[1]
