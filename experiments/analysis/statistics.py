"""Statistics over few seeds: intervals by Student's t, piecewise-linear fronts, and a straight-line fit over scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np


@cache
def t95(df: int) -> float:
    """Half the width of a 95% interval in standard errors, with `df` degrees of freedom.

    With t = sqrt(df) tan(a), Student's density is proportional to cos(a)^(df - 1), which is integrated on a fine grid.
    """
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(df) * math.tan(np.interp(0.95, area / area[-1], angle))


class Interval(NamedTuple):
    """A mean over seeds with its 95% interval; with one seed the interval is None."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of one value per seed, by Student's t."""
        mean, n = float(np.mean(values)), len(values)
        if n < 2:
            return cls(mean)
        half = t95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        return cls(mean, mean - half, mean + half)

    @property
    def noise(self) -> bool:
        """Whether the interval contains zero, or is unknown."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


class PiecewiseLinear(NamedTuple):
    """A curve of straight pieces through points in order of x."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def at(self, x: float) -> float:
        """The curve's value: NaN below the first x, constant beyond the last."""
        return float(np.interp(x, self.x, self.y)) if x >= self.x[0] * (1 - 1e-9) else math.nan


def lower_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) on the decreasing part of the lower convex hull, in order of x."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[i]
        if kept and y >= points[kept[-1]][1]:
            continue
        while len(kept) > 1:
            (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):  # the middle point is below the straight line
                break
            kept.pop()
        kept.append(i)
    return kept


class Fit(NamedTuple):
    """A straight line by least squares, y = at_zero + slope x."""

    slope: Interval
    at_zero: float
    x: tuple[float, ...]
    error: float
    """Standard deviation of the residuals."""

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        """Fit at least three points at two or more values of x."""
        a, b = np.asarray(x), np.asarray(y)
        slope, at_zero = np.polyfit(a, b, 1)
        residuals = b - at_zero - slope * a
        error = math.sqrt(float(residuals @ residuals) / (len(a) - 2))
        half = t95(len(a) - 2) * error / math.sqrt(float(((a - a.mean()) ** 2).sum()))
        return cls(Interval(float(slope), slope - half, slope + half), float(at_zero), tuple(a.tolist()), error)

    def at(self, x: float) -> Interval:
        """The 95% prediction interval of a new observation at x."""
        a = np.asarray(self.x)
        spread = 1 + 1 / len(a) + (x - a.mean()) ** 2 / float(((a - a.mean()) ** 2).sum())
        mean, half = self.at_zero + self.slope.mean * x, t95(len(a) - 2) * self.error * math.sqrt(spread)
        return Interval(mean, mean - half, mean + half)
