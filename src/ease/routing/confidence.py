"""How sure an exit is of a token: measures behind one small interface.

A measure is made anew for every walk, is shown what an exit has to go by, and answers with a number in [0, 1] per
token. Those that need no head are the choice where the head is a large part of the model: a token that stays then pays
for no logits. Adding one is a function, or a class if it has to remember, and a line in `MEASURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError

if TYPE_CHECKING:
    from ease.interface import ExitModel
    from ease.policy import Policy


class Evidence(NamedTuple):
    """What an exit has to go by, for n tokens."""

    exit: int
    earlier: Tensor
    """(B T, D) all states when the layers since the exit before began."""
    after: Tensor
    """(n, D) their states now."""
    logits: Tensor | None
    """(n, V), for measures that need the head."""
    places: Tensor
    """(n,) where they stand in the ids, flattened."""

    @property
    def before(self) -> Tensor:
        """(n, D) their states when the layers since the exit before began."""
        return self.earlier[self.places]


Measure = Callable[[Evidence], Tensor]


def max_probability(logits: Tensor) -> Tensor:
    """The largest softmax probability, logits (..., V) -> (...) in [0, 1]."""
    return logits.softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """How far the likeliest output is ahead of the second, as probabilities (Schuster et al. 2022, CALM)."""
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def certainty(logits: Tensor) -> Tensor:
    """1 - entropy / its largest value, log V (BranchyNet's measure, Teerapittayanon et al. 2016, turned round)."""
    logs = logits.log_softmax(-1)
    return (1 + (logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])).clamp(0, 1)


def steadiness(seen: Evidence) -> Tensor:
    """How little the layers since the exit before turned the state: its cosine, from [-1, 1] to [0, 1] (CALM)."""
    return ((1 + F.cosine_similarity(seen.before, seen.after, dim=-1)) / 2).clamp(0, 1)


class Agreement:
    """The exits in a row, up to this one, that name the same likeliest output, as a share of `patience`.

    Zhou et al. 2020 (arXiv:2006.04152), whose counter starts at 0 where this one starts at 1.

    Args:
        size: tokens of the batch.
    """

    def __init__(self, patience: int, size: int) -> None:
        self.patience = patience
        self.named, self.times = torch.full((size,), -1), torch.zeros(size, dtype=torch.long)

    def __call__(self, seen: Evidence) -> Tensor:
        best, at = asked(seen).argmax(-1).cpu(), seen.places.cpu()
        self.times[at] = torch.where(best == self.named[at], self.times[at] + 1, 1)
        self.named[at] = best
        return (self.times[at] / self.patience).clamp(max=1).to(seen.after)


def asked(seen: Evidence) -> Tensor:
    """The logits, of a measure that asked for them."""
    assert seen.logits is not None
    return seen.logits


@dataclass(frozen=True)
class Kind:
    """A measure as it is listed: how one is made for a walk over `size` tokens, and whether it needs the head."""

    make: Callable[[ExitModel, Policy, int], Measure]
    needs_head: bool = True


def of_logits(function: Callable[[Tensor], Tensor]) -> Kind:
    """A measure that looks at logits alone."""
    return Kind(lambda model, policy, size: lambda seen: function(asked(seen)))


MEASURES: dict[str, Kind] = {
    "max-probability": of_logits(max_probability),
    "margin": of_logits(margin),
    "entropy": of_logits(certainty),
    "steadiness": Kind(lambda model, policy, size: steadiness, needs_head=False),
    "patience": Kind(lambda model, policy, size: Agreement(policy.patience, size)),
    "classifier": Kind(
        lambda model, policy, size: lambda seen: model.agreement(seen.after, seen.exit), needs_head=False
    ),
}


def kind(name: str) -> Kind:
    """The measure of that name."""
    if name not in MEASURES:
        raise EaseError(f"no measure of confidence {name!r}: use {', '.join(MEASURES)}")
    return MEASURES[name]
