"""Fronts of an experiment: every line's operating points over the seeds, the baseline front, and differences.

Differences are of losses, paired by seed. The baseline front is the lowest convex curve of straight pieces, in FLOPs
per token and loss, through the standard models of every depth: between two of them it is the loss reached by sending a
random share of the sequences through one and the rest through the other. The standard models on it, and the operating
point that stands for each strategy, are chosen on validation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from experiments.analysis import names
from experiments.analysis.statistics import Interval, PiecewiseLinear, lower_hull
from experiments.harness.candidates import COMPARED, Candidate, Point


class OperatingPoint(NamedTuple):
    """One candidate of one line, with its metrics for every seed, in the order of the seeds."""

    line: str
    by_seed: tuple[Point, ...]

    @property
    def candidate(self) -> Candidate:
        return Candidate.of(self.by_seed[0])

    def metric(self, name: str, split: str = "test") -> list[float]:
        """A metric's value for every seed."""
        return [point[split][name] for point in self.by_seed]

    def mean(self, name: str, split: str = "test") -> float:
        """A metric's mean over the seeds."""
        return statistics.mean(self.metric(name, split))

    @property
    def routing(self) -> str:
        """A description of the routing."""
        exits, share, threshold = self.candidate
        if not exits:
            return "full depth"
        where = " and ".join(map(str, exits))
        return f"exit {where}, {share:.0%} continue" if share is not None else f"exit {where}, threshold {threshold:g}"


def above(point: OperatingPoint, curves: Sequence[PiecewiseLinear], split: str = "test") -> list[float]:
    """Loss above curves at the same FLOPs per token, for every seed."""
    cost, loss = point.metric("flops_per_token", split), point.metric("loss", split)
    return [y - curve.at(x) for x, y, curve in zip(cost, loss, curves, strict=True)]


@dataclass(frozen=True)
class Fronts:
    """The lines of one `test.json` and the baseline front."""

    kept: dict[str, Any]
    """The content of `test.json`."""

    @cached_property
    def data(self) -> dict[str, Any]:
        """The content of `test.json` with current names."""
        return names.current(self.kept)

    @property
    def title(self) -> str:
        return str(self.data["title"])

    @property
    def baselines(self) -> list[str]:
        """The standard models."""
        return list(self.data["baselines"])

    @cached_property
    def with_memory(self) -> Fronts | None:
        """The same lines with the front of standard models that have a memory; None where there are none."""
        found = self.data.get("memory_baselines")
        return Fronts({**self.kept, "baselines": found}) if found else None

    @property
    def partial(self) -> list[str]:
        """Lines that spend only a part of the budget, because other lines start from them."""
        return list(self.data["partial"])

    @property
    def other_budgets(self) -> list[str]:
        """Lines that spend another budget than the others."""
        return list(self.data.get("other_budgets", ()))

    @property
    def compared_with(self) -> list[str]:
        """The lines that every other line is compared with."""
        return list(self.data["compared_with"])

    @property
    def ablated(self) -> str | None:
        """The line that the others are variants of, in an ablation."""
        return self.data["ablated"]

    @property
    def strategies(self) -> list[str]:
        """Lines other than standard models that spent the budget and were not trained on validation tokens."""
        others = (*self.baselines, *self.partial, *self.other_budgets, self.data["in_sample"])
        return [name for name in self.points if name not in others]

    @property
    def shown(self) -> list[str]:
        """All lines except those trained on validation tokens, in the order of tables."""
        return [*self.partial, *self.baselines, *self.strategies]

    @cached_property
    def points(self) -> dict[str, list[OperatingPoint]]:
        """Line -> its operating points from cheap to expensive."""
        by_line: dict[str, list[dict[str, Any]]] = {}
        for entry in self.data["entries"]:
            by_line.setdefault(entry["line"], []).append(entry)
        return {
            name: [OperatingPoint(name, seeds) for seeds in zip(*(entry["points"] for entry in entries), strict=True)]
            for name, entries in by_line.items()
        }

    def entries(self, name: str) -> list[dict[str, Any]]:
        """A line's entry of every seed."""
        return [entry for entry in self.data["entries"] if entry["line"] == name]

    def front(self, name: str) -> list[OperatingPoint]:
        """A line's points that no cheaper one beats on validation, without those of fixed thresholds."""
        found, best = [], math.inf
        for point in self.points[name]:
            if point.candidate.threshold is None and point.mean("loss", "val") < best:
                found, best = [*found, point], point.mean("loss", "val")
        return found

    def full_depth(self, name: str) -> OperatingPoint:
        return next(point for point in self.points[name] if not point.candidate.exits)

    def compared(self, name: str) -> OperatingPoint | None:
        """The point at which lines are compared, where half of the tokens continue; None for a line without exits."""
        return next((point for point in self.points[name] if point.candidate.share == COMPARED), None)

    @cached_property
    def baseline_front(self) -> list[OperatingPoint]:
        """The standard models on the baseline front."""
        models = [self.full_depth(name) for name in self.baselines]
        hull = lower_hull([(p.mean("flops_per_token", "val"), p.mean("loss", "val")) for p in models])
        return [models[i] for i in hull]

    def baseline_curves(self, split: str = "test") -> list[PiecewiseLinear]:
        """The baseline front of every seed."""
        return self.curves(self.baseline_front, split)

    def curves(self, points: Sequence[OperatingPoint], split: str = "test") -> list[PiecewiseLinear]:
        """The curve through points, for every seed, in the order of their cost with that seed."""
        each = (zip(point.metric("flops_per_token", split), point.metric("loss", split)) for point in points)
        return [PiecewiseLinear(*zip(*sorted(seed))) for seed in zip(*each, strict=True)]

    def above(self, point: OperatingPoint, split: str = "test") -> list[float]:
        """Loss above the baseline front, for every seed."""
        return above(point, self.baseline_curves(split), split)

    def gap(self, point: OperatingPoint, split: str = "test") -> Interval:
        """Loss above the baseline front."""
        return Interval.of(self.above(point, split))

    def best(self, name: str) -> OperatingPoint:
        """The point with the smallest loss above the baseline front on validation, where the front is defined."""
        front = self.front(name)
        gaps = [self.gap(point, "val").mean for point in front]
        return min(zip(gaps, front), key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1]

    def rival(self, point: OperatingPoint) -> tuple[str, Interval] | None:
        """The strategy with the lowest validation loss at the same FLOPs per token, and the test loss above it."""
        gaps = {
            name: Interval.of(above(point, self.curves(self.front(name), "val"), "val")).mean
            for name in self.strategies
            if name != point.line
        }
        gaps = {name: gap for name, gap in gaps.items() if not math.isnan(gap)}
        if not gaps:
            return None
        name = max(gaps, key=lambda name: gaps[name])
        return name, Interval.of(above(point, self.curves(self.front(name))))

    def against_line(self, point: OperatingPoint, name: str) -> Interval | None:
        """Loss above another line at the same routing; None where that was not measured.

        If only one of the two lines has exits, it is compared where half of the tokens continue, or at the full depth
        of a point without exits.
        """
        own, others = self.points[point.line], self.points[name]
        if len(others) == 1:
            required = others[0].candidate
        elif len(own) == 1:
            required = next(other.candidate for other in others if other.candidate.share == COMPARED)
        else:
            required = point.candidate
        same = next((other for other in others if other.candidate == required), None)
        return same and Interval.of([a - b for a, b in zip(point.metric("loss"), same.metric("loss"), strict=True)])
