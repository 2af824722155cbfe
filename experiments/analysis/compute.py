"""The compute multiplier: what a line's training FLOPs are worth in training FLOPs of standard models.

It is the number of training FLOPs that a standard model of the best depth needs for a line's test loss, divided by the
number that the line used. Standard models are trained at several budgets, each with its own schedule and learning rate,
and the depth of each budget is chosen on validation. Between budgets the loss is linear in the logarithm of FLOPs; a
budget whose loss is not below that of every smaller one is left out. Beyond the smallest and the largest budget nothing
is extrapolated: the multiplier is a bound there. Every seed has its own curve, and intervals are over the logarithms of
the seeds' multipliers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.analysis.fronts import Fronts, OperatingPoint
from experiments.analysis.statistics import Interval

TICKS = (1, 2, 0.5, 4, 0.25, 1.5, 0.7, 3, 1.25, 0.8, 1.1, 0.9, 1.75, 0.6, 2.5, 0.4, 0.3)
"""Multipliers that an axis may show, the ones to show first at the beginning."""
MIN_BUDGETS = 2


class Curve(NamedTuple):
    """Test loss of standard models of the best depth against training FLOPs."""

    flops: tuple[float, ...]
    loss: tuple[float, ...]
    """Decreasing."""

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The curve through (FLOPs, loss), without points that do not improve on all cheaper ones."""
        kept: list[tuple[float, float]] = []
        for flops, loss in sorted(points):
            if not kept or loss < kept[-1][1]:
                kept.append((flops, loss))
        return cls(*zip(*kept))

    def needed(self, loss: float) -> float:
        """Training FLOPs for a loss, limited to the range of the curve."""
        return math.exp(np.interp(-loss, [-y for y in self.loss], np.log(self.flops)))

    def reached(self, flops: float) -> float:
        """The loss that training FLOPs reach; NaN outside of the curve."""
        inside = self.flops[0] <= flops <= self.flops[-1]
        return float(np.interp(math.log(flops), np.log(self.flops), self.loss)) if inside else math.nan


class Multiplier(NamedTuple):
    """A compute multiplier."""

    log: Interval
    """Of its logarithm."""
    sign: str
    """"<" or ">" for a bound, where the loss is outside of the curve with some seed, else ""."""

    def __str__(self) -> str:
        mean = f"{math.exp(self.log.mean):.2f}"
        if self.sign or self.log.low is None or self.log.high is None:
            return f"{self.sign} {mean}".strip()
        return f"{mean} ({math.exp(self.log.low):.2f} to {math.exp(self.log.high):.2f})"


def best_depths(fronts: Fronts) -> list[OperatingPoint]:
    """The standard model of every budget with the lowest validation loss, from small to large budgets."""
    by_budget: dict[float, list[OperatingPoint]] = {}
    for name, share in fronts.data.get("curve", {}).items():
        by_budget.setdefault(share, []).append(fronts.full_depth(name))
    return [min(models, key=lambda point: point.mean("loss", "val")) for _, models in sorted(by_budget.items())]


def curves(fronts: Fronts) -> list[Curve]:
    """The curve of every seed; none if standard models of too few budgets are trained."""
    best = best_depths(fronts)
    if len(best) < MIN_BUDGETS:
        return []
    each = (zip(used(fronts, point), point.metric("loss"), strict=True) for point in best)
    return [Curve.of(seed) for seed in zip(*each, strict=True)]


def used(fronts: Fronts, point: OperatingPoint) -> list[float]:
    """Training FLOPs of a point's line, for every seed."""
    return [entry["flops"] for entry in fronts.entries(point.line)]


def multiplier(fronts: Fronts, point: OperatingPoint) -> Multiplier | None:
    """The compute multiplier of a line at an operating point; None without a curve or without training."""
    each, spent = curves(fronts), used(fronts, point)
    if not each or not all(spent):
        return None
    losses = point.metric("loss")
    logs = [math.log(c.needed(loss) / flops) for c, loss, flops in zip(each, losses, spent, strict=True)]
    signs = {"<" if loss > c.loss[0] else ">" if loss < c.loss[-1] else "" for c, loss in zip(each, losses)} - {""}
    return Multiplier(Interval.of(logs), signs.pop() if len(signs) == 1 else "")


def ticks(fronts: Fronts, low: float, high: float) -> list[tuple[float, str]]:
    """(perplexity, multiplier) for an axis from perplexity `low` to `high`, at the lab's budget and mean over seeds."""
    each, found = curves(fronts), list[tuple[float, str]]()
    for times in TICKS if each else ():
        ppl = math.exp(statistics.mean(curve.reached(times * fronts.data["lab"]["budget"]) for curve in each))
        apart = all(abs(math.log(other / ppl)) > 0.06 * math.log(high / low) for other, _ in found)
        if low <= ppl <= high and apart:
            found.append((ppl, f"{times:g}"))
    return sorted(found)
