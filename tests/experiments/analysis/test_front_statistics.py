"""Intervals over few seeds, the baseline front and the fit over scales."""

from __future__ import annotations

import math

import pytest

from experiments.analysis.statistics import Fit, Interval, PiecewiseLinear, lower_hull, t95


def test_intervals_follow_students_t() -> None:
    # Two-sided 95% quantiles, from the tables of any textbook.
    for df, value in {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 30: 2.042, 120: 1.980}.items():
        assert t95(df) == pytest.approx(value, abs=6e-4)
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert not Interval.of([1.0, 1.1, 0.9]).noise
    assert Interval.of([1.0, -1.1, 0.9]).noise
    assert Interval.of([1.0]) == Interval(1.0)
    assert Interval.of([1.0]).noise, "the noise is unknown with one seed"


def test_the_baseline_front_is_the_lower_hull_of_standard_models() -> None:
    points = [(1.0, 5.0), (2.0, 4.5), (3.0, 3.0), (4.0, 3.5)]
    assert lower_hull(points) == [0, 2], "the second is above the front, the last is more expensive and worse"
    assert lower_hull([(1.0, 5.0), (2.0, 3.5), (3.0, 3.0)]) == [0, 1, 2]
    curve = PiecewiseLinear((1.0, 3.0), (5.0, 3.0))
    assert [curve.at(x) for x in (1.0, 2.0, 9.0)] == [5.0, 4.0, 3.0]
    assert math.isnan(curve.at(0.5)), "the front is undefined below the cheapest standard model"


def test_a_fit_is_exact_on_a_line_and_its_interval_widens_away_from_the_points() -> None:
    fit = Fit.of([0, 0, 1, 1, 2, 2], [0.1, -0.1, 1.1, 0.9, 2.1, 1.9])
    assert fit.slope.mean == pytest.approx(1.0)
    near, far = fit.at(1.0), fit.at(50.0)
    assert near.mean == pytest.approx(1.0)
    assert far.mean == pytest.approx(50.0)
    assert far.high - far.low > 10 * (near.high - near.low) > 0
