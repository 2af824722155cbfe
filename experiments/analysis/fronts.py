"""What `test.json` says: every line's candidates over the seeds, the line to beat, and how they stand to each other.

Differences are of losses, seed by seed. The line to beat at some inference compute is the straight line, in FLOPs per
token and loss, between the plain models on either side: what a coin that sends some sequences to the one and the rest
to the other reaches. Its corners and every candidate that stands for a strategy are chosen on validation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from experiments.analysis.statistics import Broken, Interval, corners
from experiments.harness.candidates import COMPARED, Candidate, Point


class Place(NamedTuple):
    """One candidate of one line, with its figures of every seed, in the order of the seeds."""

    line: str
    points: tuple[Point, ...]

    @property
    def candidate(self) -> Candidate:
        return Candidate.of(self.points[0])

    def figure(self, name: str, split: str = "test") -> list[float]:
        return [point[split][name] for point in self.points]

    def mean(self, name: str, split: str = "test") -> float:
        return statistics.mean(self.figure(name, split))

    @property
    def routing(self) -> str:
        """The candidate in words."""
        exits, share, threshold = self.candidate
        if not exits:
            return "full depth"
        where = " and ".join(map(str, exits))
        return f"exit {where}, {share:.0%} go on" if share is not None else f"exit {where}, threshold {threshold:g}"


def above(place: Place, lines: Sequence[Broken], split: str) -> list[float]:
    """Loss above lines of straight pieces, one per seed, at the same FLOPs per token."""
    cost, loss = place.figure("flops_per_token", split), place.figure("loss", split)
    return [b - line.at(a) for a, b, line in zip(cost, loss, lines, strict=True)]


@dataclass(frozen=True)
class Fronts:
    """Every line's candidates, and the line to beat."""

    data: dict[str, Any]

    @cached_property
    def places(self) -> dict[str, list[Place]]:
        """Line -> its candidates from cheap to dear."""
        by_line: dict[str, list[dict[str, Any]]] = {}
        for entry in self.data["entries"]:
            by_line.setdefault(entry["line"], []).append(entry)
        return {
            name: [Place(name, points) for points in zip(*(entry["points"] for entry in entries), strict=True)]
            for name, entries in by_line.items()
        }

    def front(self, name: str) -> list[Place]:
        """A line's candidates that stand on its front: without fixed thresholds, and full depth only where it does."""
        found, best = [], math.inf
        for place in self.places[name]:
            if place.candidate.threshold is None and place.mean("loss", "val") < best:
                found, best = [*found, place], place.mean("loss", "val")
        return found

    def full_depth(self, name: str) -> Place:
        return next(place for place in self.places[name] if not place.candidate.exits)

    @property
    def strategies(self) -> list[str]:
        """Lines that are no plain models, spent their whole budget and were not trained on the tokens that choose."""
        others = (*self.data["plain"], *self.data["unfinished"], self.data["leaky"])
        return [name for name in self.places if name not in others]

    @cached_property
    def corners(self) -> list[Place]:
        """The plain models that the line to beat goes through."""
        plain = [self.full_depth(name) for name in self.data["plain"]]
        return [plain[i] for i in corners([(p.mean("flops_per_token", "val"), p.mean("loss", "val")) for p in plain])]

    def plain(self, split: str = "test") -> list[Broken]:
        """The line to beat, of every seed."""
        return self.broken(self.corners, split)

    def broken(self, places: Sequence[Place], split: str = "test") -> list[Broken]:
        """The line through places, of every seed, in the order of what they cost that seed."""
        figures = (zip(place.figure("flops_per_token", split), place.figure("loss", split)) for place in places)
        return [Broken(*zip(*sorted(points))) for points in zip(*figures, strict=True)]

    def against(self, place: Place, lines: Sequence[Broken], split: str = "test") -> Interval:
        """Loss above lines of straight pieces at the same FLOPs per token."""
        return Interval.of(above(place, lines, split))

    def above(self, place: Place, split: str = "test") -> list[float]:
        """Loss above the line to beat, of every seed."""
        return above(place, self.plain(split), split)

    def gap(self, place: Place, split: str = "test") -> Interval:
        """Loss above the line to beat."""
        return Interval.of(self.above(place, split))

    def best(self, name: str) -> Place:
        """The candidate that validation prefers: the lowest against the line to beat, where there is one."""
        gaps = [self.gap(place, "val").mean for place in self.front(name)]
        return min(zip(gaps, self.front(name)), key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1]

    def rival(self, place: Place) -> tuple[str, Interval] | None:
        """The other strategy that validation prefers at the same FLOPs per token, and the loss above it."""
        above = {
            name: self.against(place, self.broken(self.front(name), "val"), "val").mean
            for name in self.strategies
            if name != place.line
        }
        above = {name: loss for name, loss in above.items() if not math.isnan(loss)}
        if not above:
            return None
        name = max(above, key=lambda name: above[name])
        return name, self.against(place, self.broken(self.front(name)))

    def beside(self, place: Place, name: str) -> Interval | None:
        """Loss above another line's that is routed in the same way; None where it was not measured.

        Where only one of the two has exits, it stands where half of the tokens go on or at the other's full depth.
        """
        own, others = self.places[place.line], self.places[name]
        if len(others) == 1:
            wanted = others[0].candidate
        elif len(own) == 1:
            wanted = next(other.candidate for other in others if other.candidate.share == COMPARED)
        else:
            wanted = place.candidate
        alike = next((other for other in others if other.candidate == wanted), None)
        return alike and Interval.of([a - b for a, b in zip(place.figure("loss"), alike.figure("loss"), strict=True)])

    def entries(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.data["entries"] if entry["line"] == name]
