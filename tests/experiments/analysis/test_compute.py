"""The compute multiplier: exact on a made-up law, a bound outside of the curve, absent without one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from data_front import fake, point

from experiments.analysis import compute, tables
from experiments.analysis.compute import Curve
from experiments.analysis.fronts import Fronts


def law(share: float) -> float:
    """The loss of the best standard model, which falls by 0.5 with every doubling of training FLOPs."""
    return 4.0 - 0.5 * math.log2(share)


def with_curve(**settings: Any) -> dict[str, Any]:
    """`fake` with standard models at half and twice the budget; at each, another depth is worse."""
    data = fake(**settings) | {"curve": {"standard 2": 1}, "other_budgets": []}
    for entry in [e for e in data["entries"] if e["line"] == "standard 2"]:
        for share in (0.5, 2):
            for name, worse in ((f"best at {share}", 0.0), (f"other depth at {share}", 0.1)):
                data["curve"][name] = share
                data["other_budgets"] = [*dict.fromkeys([*data["other_budgets"], name])]
                loss = law(share) + worse + 0.3 * entry["seed"]
                new = {"line": name, "points": [point(200.0, loss)], "flops": share * entry["flops"]}
                data["entries"].append(copy.deepcopy(entry) | new)
    return data


def test_a_line_as_good_as_a_standard_model_with_more_flops_has_their_ratio() -> None:
    data = with_curve(lift=-0.75)  # the strategy's loss is 4.5 - 0.75 = 3.75 where half of the tokens continue
    fronts = Fronts(data)
    found = compute.multiplier(fronts, fronts.points["exits & more_"][0])
    assert found is not None
    assert math.exp(found.log.mean) == pytest.approx(2**0.5)
    assert str(found) == "1.41 (1.41 to 1.41)"
    at_two = fronts.full_depth("best at 2")
    assert str(compute.multiplier(fronts, at_two)) == "1.00 (1.00 to 1.00)", "it lies on the curve"
    for entry in data["entries"]:  # a line that used half as much is worth twice as much
        if entry["line"] == "exits & more_":
            entry["flops"] /= 2
    fronts = Fronts(data)
    assert str(compute.multiplier(fronts, fronts.points["exits & more_"][0])) == "2.83 (2.83 to 2.83)"


@pytest.mark.parametrize(("lift", "says"), [(-2.0, "> 2.00"), (0.5, "< 0.50")])
def test_outside_of_the_curve_it_is_a_bound(lift: float, says: str) -> None:
    fronts = Fronts(with_curve(lift=lift))
    assert str(compute.multiplier(fronts, fronts.points["exits & more_"][0])) == says


def test_the_curve_falls_and_its_depths_are_chosen_on_validation() -> None:
    assert Curve.of([(1.0, 5.0), (4.0, 4.0), (2.0, 5.5)]) == Curve((1.0, 4.0), (5.0, 4.0))
    data = with_curve()
    for entry in data["entries"]:
        if entry["line"].startswith("other depth"):
            entry["points"][0]["test"]["loss"] -= 3.0
    assert [best.line for best in compute.best_depths(Fronts(data))] == ["best at 0.5", "standard 2", "best at 2"]


def test_tables_have_the_column_only_with_a_curve() -> None:
    column = "compute multiplier"
    for data, expected in ((with_curve(), {"front", "points", "budgets"}), (fake(), set())):
        found = tables.all_tables(data)
        assert {table.name for table in found if column in table.header} == expected
        for table in found:
            assert {len(row) for row in table.rows} <= {len(table.header)}, table.name
    fronts = Fronts(with_curve())
    assert "best at 2" not in str(tables.summary(fronts).rows), "another budget is no row of the front"
    marks = compute.ticks(fronts, math.exp(3.0), math.exp(6.0))
    assert {text: ppl for ppl, text in marks}["1"] == pytest.approx(math.exp(4.3)), "the mean over three seeds"
