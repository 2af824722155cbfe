"""Statistics over random seeds: which runs belong together, their mean and their t interval."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_report import run_folder, synthetic_summary, with_line

from ease.report.page import write_report
from ease.report.seeds import mean_interval, seed_groups, t95


def loaded(summary: dict[str, Any]) -> dict[str, Any]:
    return {"label": summary["name"], "summary": summary}


def of_seed(seed: int, ppl: float, **changes: Any) -> dict[str, Any]:
    return with_line(synthetic_summary(seed=seed, **changes), "phase 2", ppl=ppl)


def test_intervals_are_students() -> None:
    # Two-sided 95% quantiles, from the tables of any textbook.
    for degrees, value in {1: 12.706, 2: 4.303, 9: 2.262, 30: 2.042, 40: 2.021, 120: 1.980}.items():
        assert t95(degrees) == pytest.approx(value, abs=2e-3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx({"mean": 2.0, "half": 4.303 / 3**0.5})
    assert mean_interval([1.0]) is mean_interval([1.0, None]) is None


def test_runs_that_differ_only_in_their_seed_are_grouped() -> None:
    other = of_seed(3, 50.0, config={"strategy": {"lr": 1}, "seed": 3})
    runs = [of_seed(0, 38.0), of_seed(1, 39.0), of_seed(2, 40.0), other]
    (group,) = seed_groups([loaded(run) for run in runs])
    assert (group["label"], group["seeds"]) == ("synthetic, mean of 3 random seeds", [0, 1, 2])
    line = next(line for line in group["lines"] if line["name"] == "phase 2")
    assert line["test"]["ppl"] == pytest.approx({"mean": 39.0, "half": 4.303 / 3**0.5})
    assert line["val"]["early"] == {"mean": pytest.approx(0.52), "half": pytest.approx(0.0)}


def test_seeds_inside_the_configuration_do_not_separate_runs() -> None:
    config = {"strategy": {"lr": 1, "seed": 0}, "seed": 0}
    again = {"strategy": {"lr": 1, "seed": 5}, "seed": 5}
    runs = [of_seed(0, 38.0, config=config), of_seed(5, 39.0, config=again, name="another name")]
    assert len(seed_groups([loaded(run) for run in runs])) == 1


def test_one_seed_twice_is_no_sample() -> None:
    assert seed_groups([loaded(of_seed(0, 38.0)), loaded(of_seed(0, 38.0))]) == []
    assert seed_groups([loaded(of_seed(0, 38.0))]) == []


def test_the_report_has_the_groups(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / f"seed{seed}", of_seed(seed, 38.0 + seed)) for seed in (0, 1)]
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data
    (group,) = json.loads(data[1])["seeds"]
    assert group["label"] == "synthetic, mean of 2 random seeds"
