"""Candidate routings of a trained model: the exits and thresholds that are measured for every line.

A candidate names exits and the share of the tokens that continues past the first of them; its threshold, one for all of
its exits, is the quantile of the validation confidences there. Alternatively it gives the threshold itself. Without
exits every token runs all layers and evaluates the last head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

import ease
from ease.evaluation.shares import threshold_continuing
from ease.policy import LOOSEST

SHARES = (0.0, 0.15, 0.3, 0.5, 0.7)
COMPARED = 0.5
"""The share, at a line's first exit, at which its learning rates are compared."""
METRICS = ("loss", "ppl", "acc", "hard_ppl", "easy_ppl", "shallow_ratio", "compute_cost", "flops_per_token")

Point = dict[str, Any]
"""A candidate as JSON: its fields, the resulting thresholds, and metrics by split."""


class Candidate(NamedTuple):
    """One way to route."""

    exits: tuple[int, ...] = ()
    share: float | None = None
    """Share of the validation tokens that continues past the first exit."""
    threshold: float | None = None
    """The threshold of all exits, where it is given instead of a share."""

    @classmethod
    def of(cls, point: Point) -> Candidate:
        return cls(tuple(point["exits"]), point["share"], point["threshold"])


def candidates(
    exits: Sequence[int], thresholds: Sequence[float] = (), shares: Sequence[float] = SHARES
) -> list[Candidate]:
    """Full depth, each exit alone, and all exits together, the latter also at fixed `thresholds`."""
    found = [Candidate(), *(Candidate((exit,), share) for exit in exits for share in shares)]
    if len(exits) > 1:  # at a share of 0 no token reaches the later exits
        found += [Candidate(tuple(exits), share) for share in shares if share]
    return found + [Candidate(tuple(exits), None, t) for t in thresholds if exits]


def sweep(
    model: ease.StandardTransformer,
    val: ease.TokenBatches,
    exits: Sequence[int],
    depth: int,
    thresholds: Sequence[float] = (),
    measure: str = "max-probability",
    shares: Sequence[float] = SHARES,
) -> list[Point]:
    """Score every candidate on validation.

    Args:
        model: a trained model.
        val: validation batches.
        exits: exits that candidates may use.
        depth: the number of layers that compute costs are a share of.
        thresholds: fixed thresholds to measure in addition to quantiles.
        measure: of confidence.
        shares: shares of the tokens that continue past an exit.

    Returns:
        A point per candidate, with its metrics under "val".
    """
    confidences = {}
    for exit in exits:  # at share 0 every token leaves, and its confidence is known
        leaving = ease.Policy((exit,), (LOOSEST,), measure)
        confidences[exit] = ease.score(model, val, leaving).confidences
    points = []
    for candidate in candidates(exits, thresholds, shares):
        threshold = candidate.threshold
        if threshold is None and candidate.exits:
            threshold = threshold_continuing(confidences[candidate.exits[0]], candidate.share or 0.0)
        thresholds_used = [threshold] * len(candidate.exits)
        point = candidate._asdict() | {"exits": list(candidate.exits), "thresholds": thresholds_used}
        point |= {"confidence": measure} if candidate.exits else {}
        points.append(point | {"val": metrics(ease.score(model, val, policy(point)), depth)})
    return points


def compared(points: Sequence[Point], exits: Sequence[int]) -> Point:
    """The point at which a line's learning rates are compared: full depth for a line without exits."""
    return next((p for p in points if p["exits"] == list(exits[:1]) and p["share"] == COMPARED), points[0])


def policy(point: Point) -> ease.Policy:
    """The routing of a point."""
    return ease.Policy(tuple(point["exits"]), tuple(point["thresholds"]), point.get("confidence", "max-probability"))


def metrics(scores: ease.Scores, depth: int, hard: Tensor | None = None) -> dict[str, float]:
    """The metrics that tables show.

    Args:
        scores: of a model on a split.
        depth: the number of layers that compute costs are a share of.
        hard: (N,) mask of the hard tokens.
    """
    return {name: value for name, value in scores.metrics(hard, depth).items() if name in METRICS}
