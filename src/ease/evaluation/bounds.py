"""ease.evaluation.bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor

CLIP = 1.0  # nats a sequence counts for at most, up or down, where a confidence needs bounded losses

BETS = 0.5 ** torch.arange(10, dtype=torch.float64)


def auroc(confidences: Tensor, agrees: Tensor) -> float:
    """The chance that a token with `agrees` is surer than one without; equal confidences count half.

    The area under the ROC curve, by ranks (Mann and Whitney 1947); NaN where all or none agree.
    """
    _, inverse, counts = confidences.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    yes = int(agrees.sum())
    pairs = yes * (len(agrees) - yes)
    return float((ranks[agrees].sum() - yes * (yes + 1) / 2) / pairs) if pairs else math.nan


def upper_bound(losses: Tensor, confidence: float | None, span: tuple[float, float] = (0, 1)) -> float:
    """The least number that the mean loss stays below, with probability `confidence` over the draw of the sequences.

    A limit a is ruled in when betting on it pays: if the mean were above a, then the wealth prod(1 + b (a - loss)) of
    a bet b would be 1 at most in the mean, and so reach 1 / (1 - confidence) with probability 1 - confidence at most
    (Waudby-Smith and Ramdas 2020, arXiv:2010.09686). The joint wealth of ten bets, staked in proportion to their size,
    is such a wealth too. All of this holds for draws without replacement as well.

    Args:
        losses: (S,) one per sequence; what lies outside `span` counts as its nearer end.
        confidence: None for the plain mean.
    """
    if confidence is None:
        return losses.double().mean().item()
    low, high = span
    losses = (losses.double().clamp(low, high) - low) / (high - low)
    below, above = 0.0, 1.0
    for _ in range(40):
        limit = (below + above) / 2
        wealth = torch.log1p(BETS[:, None] / (1 - limit) * (limit - losses)).sum(1)
        pays = float(torch.logsumexp(wealth + (BETS / BETS.sum()).log(), 0)) >= -math.log(1 - confidence)
        below, above = (below, limit) if pays else (limit, above)
    return low + (high - low) * above


def passing(bounds: Iterable[float], limit: float) -> list[float]:
    """Fixed sequence testing: the bounds in order, up to the first that is above the limit; none after it is asked.

    All of them hold together with the confidence of one: for a wrong one to pass, the first wrong one must.
    """
    return list(takewhile(lambda bound: bound <= limit, bounds))
