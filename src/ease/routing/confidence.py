"""Confidence measures: numbers in [0, 1] per token, which a policy compares with its thresholds.

A measure is created for each routed forward and called at each exit with the `Evidence` there. Measures that need no
head suit models whose head is a large part of the cost: a token that continues then pays for no logits.

To add a measure, write a function (or a class, if it keeps state between exits) and list it in `MEASURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.flops import classifier_flops
from ease.interface import ExitModel, to_device
from ease.model_config import ModelConfig
from ease.policy import Policy


class Evidence(NamedTuple):
    """The inputs of a measure at an exit, for n tokens."""

    exit: int
    earlier: Tensor
    """(B T, D) states of all tokens as they entered the layers since the previous exit."""
    after: Tensor
    """(n, D) states of the n tokens at this exit."""
    logits: Tensor | None
    """(n, V), for measures that need the head."""
    places: Tensor
    """(n,) indices of the tokens in the flattened ids."""

    @property
    def before(self) -> Tensor:
        """(n, D) states of the n tokens as they entered the layers since the previous exit."""
        return self.earlier[self.places]


Measure = Callable[[Evidence], Tensor]


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or as they are if they are wider: in half precision most confidences would be ties."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


SOFTMAX_CHUNK = 2**21  # probabilities that exist at a time on a CPU: a larger result is new memory at every call


def max_probability(logits: Tensor) -> Tensor:
    """The largest softmax probability, logits (..., V) -> (...) in [0, 1]."""
    logits = at_least_float32(logits)
    if logits.dim() == 2 and logits.device.type == "cpu" and logits.numel() > SOFTMAX_CHUNK:
        rows = max(1, SOFTMAX_CHUNK // logits.shape[1])
        return torch.cat([part.softmax(-1).amax(-1) for part in logits.split(rows)])
    return logits.softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """The difference of the two largest probabilities, logits (..., V) -> (...) (Schuster et al. 2022, CALM)."""
    first, second = at_least_float32(logits).softmax(-1).topk(2).values.unbind(-1)
    return first - second


def certainty(logits: Tensor) -> Tensor:
    """1 - entropy / log V, logits (..., V) -> (...); from BranchyNet's entropy (Teerapittayanon et al. 2016)."""
    logs = at_least_float32(logits).log_softmax(-1)
    return (1 + (logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])).clamp(0, 1)


def steadiness(evidence: Evidence) -> Tensor:
    """The cosine between the states at the previous exit and at this one, mapped from [-1, 1] to [0, 1] (CALM)."""
    before, after = at_least_float32(evidence.before), at_least_float32(evidence.after)
    return ((1 + F.cosine_similarity(before, after, dim=-1)) / 2).clamp(0, 1)


class Patience:
    """The number of exits in a row, up to this one, with the same likeliest output, as a share of `patience`.

    Zhou et al. 2020 (arXiv:2006.04152), whose counter starts at 0 where this one starts at 1.

    Args:
        patience: exits that have to agree for a confidence of 1.
        size: tokens of the batch.
    """

    def __init__(self, patience: int, size: int) -> None:
        self.patience = patience
        self.likeliest = torch.full((size,), -1)
        self.times = torch.zeros(size, dtype=torch.long)

    def __call__(self, evidence: Evidence) -> Tensor:
        likeliest, at = _logits(evidence).argmax(-1), evidence.places
        self.likeliest, self.times = to_device(self.likeliest, at.device), to_device(self.times, at.device)
        self.times[at] = torch.where(likeliest == self.likeliest[at], self.times[at] + 1, 1)
        self.likeliest[at] = likeliest
        return (self.times[at] / self.patience).clamp(max=1).to(at_least_float32(evidence.after))


def _logits(evidence: Evidence) -> Tensor:
    assert evidence.logits is not None
    return evidence.logits


@dataclass(frozen=True)
class Kind:
    """An entry of `MEASURES`.

    Attributes:
        make: creates the measure for a routed forward over a batch of `size` tokens.
        needs_head: whether `Evidence.logits` is needed.
        flops: FLOPs of measuring n tokens, beyond the head.
    """

    make: Callable[[ExitModel, Policy, int], Measure]
    needs_head: bool = True
    flops: Callable[[ModelConfig, int], int] = lambda config, tokens: 0


def of_logits(function: Callable[[Tensor], Tensor]) -> Kind:
    """A measure that is a function of the logits alone."""
    return Kind(lambda model, policy, size: lambda evidence: function(_logits(evidence)))


def of_classifier(model: ExitModel, policy: Policy, size: int) -> Measure:
    """The output of the exit's own classifier."""
    return lambda evidence: model.exit_confidence(evidence.after, evidence.exit)


MEASURES: dict[str, Kind] = {
    "max-probability": of_logits(max_probability),
    "margin": of_logits(margin),
    "entropy": of_logits(certainty),
    "steadiness": Kind(lambda model, policy, size: steadiness, needs_head=False),
    "patience": Kind(lambda model, policy, size: Patience(policy.patience, size)),
    "classifier": Kind(of_classifier, needs_head=False, flops=classifier_flops),
}


def measure_named(name: str) -> Kind:
    """The entry of `MEASURES` with that name; `EaseError` if there is none."""
    if name not in MEASURES:
        raise EaseError(f"no measure of confidence {name!r}: use {', '.join(MEASURES)}")
    return MEASURES[name]
