"""What a run measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_sweep_goes_from_everyone_leaving_to_no_one(made: Path) -> None:
    points = json.loads((made / "summary.json").read_text())["sweep"]["points"]
    costs = [point["compute_cost"] for point in points]
    assert costs[0] == pytest.approx(1 / 3)
    assert costs[-1] == pytest.approx(1.0, abs=0.02)
    assert costs == sorted(costs)


def test_the_report_says_how_well_confidence_ranks(made: Path) -> None:
    exits = json.loads((made / "summary.json").read_text())["reliability"]["exits"]
    assert [e["layer"] for e in exits] == [1, 3]
    assert 0.5 < exits[0]["auroc"] < 1
    assert exits[1]["auroc"] is None
    assert '"auroc":0.' in (made / "report.html").read_text()
