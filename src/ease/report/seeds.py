"""Statistics over random seeds: runs that differ only in their seed, with mean and t interval of every line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from ease.report.formats import SPLITS, leaving_early, number, plural

METRICS = ("ppl", "acc", "hard_ppl", "compute_cost", "flops_per_token")

# Two-sided 95% quantiles of Student's t distribution for 1 to 30 degrees of freedom.
T95: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t95(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t distribution."""
    return T95[degrees - 1] if degrees <= len(T95) else 1.960 + 2.372 / degrees


def mean_interval(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and half-width of the 95% t interval; None if a value is missing or there are fewer than two."""
    known = [value for value in values if value is not None]
    if len(known) < max(2, len(values)):
        return None
    half = t95(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known))
    return {"mean": statistics.fmean(known), "half": half}


def seed_groups(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of runs that differ only in their random seed.

    Args:
        runs: each with "label" and "summary", the content of its summary.json.

    Returns:
        Groups of two or more runs with different seeds, each with "label", "seeds" and "lines": for every line that
        all runs have, its name and depth, and mean and half-width of the 95% t interval of its metrics by split.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_recipe(run["summary"]), []).append(run["summary"])
    found = []
    for summaries in groups.values():
        seeds = [summary.get("seed") for summary in summaries]
        if len(seeds) < 2 or len(set(seeds)) < len(seeds):
            continue
        name = summaries[0].get("name") or summaries[0].get("strategy") or "run"
        found.append(
            {
                "label": f"{name}, mean of {plural(len(seeds), 'random seed')}",
                "seeds": seeds,
                "lines": _lines(summaries),
            }
        )
    return found


def _lines(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name = [{line["name"]: line for line in summary["lines"]} for summary in summaries]
    rows = []
    for name, first in by_name[0].items():
        if not all(name in lines for lines in by_name):
            continue
        same = [lines[name] for lines in by_name]
        row = {"name": name, "num_layers": first.get("num_layers")}
        row["train_flops"] = mean_interval([number(line, "train_flops") for line in same])
        for split in SPLITS:
            metrics = {key: mean_interval([number(line, split, key) for line in same]) for key in METRICS}
            row[split] = {**metrics, "early": mean_interval([leaving_early(line, split) for line in same])}
        rows.append(row)
    return rows


def _recipe(summary: dict[str, Any]) -> str:
    """Everything that determines a run's results except its random seeds."""
    config = summary.get("config")
    if isinstance(config, dict):
        strategy = config.get("strategy")
        if isinstance(strategy, dict):
            strategy = {key: value for key, value in strategy.items() if key != "seed"}
        config = {**config, "strategy": strategy, "seed": None}
    else:
        config = summary.get("name")
    parts = [config, *(summary.get(key) for key in ("strategy", "data", "model", "ease_version"))]
    return json.dumps(parts, sort_keys=True)
