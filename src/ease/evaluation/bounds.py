"""Statistics for calibration: confidence bounds on a mean loss, sequential tests, and AUROC.

None of them assumes a distribution of the losses: a threshold's guarantee must hold for any text, and the losses of
sequences are neither normal nor of equal variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor

BETS = 0.5 ** torch.arange(10, dtype=torch.float64)


def upper_bound(losses: Tensor, confidence: float | None, span: tuple[float, float] = (0, 1)) -> float:
    """Upper confidence bound on the mean loss, over the random choice of the sequences.

    A candidate limit a is rejected if betting against it pays: if the mean were above a, the wealth
    prod(1 + b (a - loss)) of a bet b would be at most 1 in expectation, and would therefore reach 1 / (1 - confidence)
    with a probability of at most 1 - confidence (Waudby-Smith and Ramdas 2020, arXiv:2010.09686). The combined wealth
    of ten bets, with stakes in proportion to their size, has the same property. All of this also holds for sampling
    without replacement.

    Args:
        losses: (S,) one per sequence; values outside `span` are clipped to it.
        confidence: the probability with which the mean lies below the bound; None returns the mean of `losses`.
        span: the smallest and the largest loss.
    """
    if confidence is None:
        return losses.double().mean().item()
    low, high = span
    losses = (losses.double().clamp(low, high) - low) / (high - low)
    stakes = (BETS / BETS.sum()).log()
    below, above = 0.0, 1.0
    for _ in range(40):
        limit = (below + above) / 2
        wealth = torch.log1p(BETS[:, None] / (1 - limit) * (limit - losses)).sum(1)
        if float(torch.logsumexp(wealth + stakes, 0)) >= -math.log(1 - confidence):
            above = limit
        else:
            below = limit
    return low + (high - low) * above


def passing(bounds: Iterable[float], limit: float) -> list[float]:
    """Fixed sequence testing: the leading bounds that do not exceed the limit; later ones are not computed.

    The confidence of a single bound holds for all of them together: for any wrong bound to pass, the first wrong one
    must pass.
    """
    return list(takewhile(lambda bound: bound <= limit, bounds))


def auroc(confidences: Tensor, agrees: Tensor) -> float:
    """Probability that a token with `agrees` has a higher confidence than one without; ties count half.

    The area under the ROC curve, computed from ranks (Mann and Whitney 1947).

    Args:
        confidences: (N,).
        agrees: (N,) booleans.

    Returns:
        A number in [0, 1]; NaN if all tokens agree or none does.
    """
    _, inverse, counts = confidences.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    positives = int(agrees.sum())
    pairs = positives * (len(agrees) - positives)
    return float((ranks[agrees].sum() - positives * (positives + 1) / 2) / pairs) if pairs else math.nan
