"""How the tokens of a trained model may be routed: the candidates that are measured, and what each costs and gives.

A candidate names exits and the share of the tokens that goes on from the first of them; its threshold, one for all of
its exits, is the quantile of the validation confidences there. Or it names the threshold. Without exits every token
runs to the end, past no head but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

import ease
from ease.runs.metrics import sending

SHARES = (0.0, 0.15, 0.3, 0.5, 0.7)
COMPARED = 0.5
"""The share, at a line's first exit, at which its learning rates are compared."""
FIGURES = ("loss", "ppl", "acc", "hard_ppl", "easy_ppl", "shallow_ratio", "compute_cost", "flops_per_token")

Point = dict[str, Any]
"""A candidate as it is kept: its fields, the thresholds that it led to, and figures by split."""


class Candidate(NamedTuple):
    """One way to route."""

    exits: tuple[int, ...] = ()
    share: float | None = None
    """Of the validation tokens that go on from the first exit."""
    threshold: float | None = None
    """Of all exits, where it is given instead of a share."""

    @classmethod
    def of(cls, point: Point) -> Candidate:
        return cls(tuple(point["exits"]), point["share"], point["threshold"])


def candidates(
    exits: Sequence[int], thresholds: Sequence[float] = (), shares: Sequence[float] = SHARES
) -> list[Candidate]:
    """Full depth, each exit alone, all together; all together also at fixed `thresholds`."""
    found = [Candidate(), *(Candidate((exit,), share) for exit in exits for share in shares)]
    if len(exits) > 1:  # where nobody goes on from the first exit, the others make no difference
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
    """Every candidate with its figures on validation.

    Args:
        depth: layers that costs are a share of.
        measure: of confidence.
        shares: of the tokens that go on.
    """
    sure = {}
    for exit in exits:  # where nothing is asked for, all leave, each with the confidence that it has
        sure[exit] = ease.score(model, val, ease.Policy((exit,), (sending(None, 0.0),), measure)).confidences
    points = []
    for wanted in candidates(exits, thresholds, shares):
        threshold = wanted.threshold
        if threshold is None and wanted.exits:
            threshold = sending(sure[wanted.exits[0]], wanted.share or 0.0)
        found = wanted._asdict() | {"exits": list(wanted.exits), "thresholds": [threshold] * len(wanted.exits)}
        found |= {"confidence": measure} if wanted.exits else {}
        points.append(found | {"val": figures(ease.score(model, val, policy(found)), depth)})
    return points


def compared(points: Sequence[Point], exits: Sequence[int]) -> Point:
    """The point at which a line's learning rates are compared: full depth where it has no exit."""
    return next((p for p in points if p["exits"] == list(exits[:1]) and p["share"] == COMPARED), points[0])


def policy(point: Point) -> ease.Policy:
    return ease.Policy(tuple(point["exits"]), tuple(point["thresholds"]), point.get("confidence", "max-probability"))


def figures(scores: ease.Scores, depth: int, hard: Tensor | None = None) -> dict[str, float]:
    """The figures that tables are made of."""
    return {name: value for name, value in scores.figures(hard, depth).items() if name in FIGURES}
