"""Measurement of trained lines, written to `test.json`: candidates on a line's front, test metrics, and wall-clock.

Candidates are chosen on validation alone: those that no cheaper candidate of the same line beats in the mean over
seeds. Each is scored on the test split once, and its scores are reused later. Wall-clock is measured on validation
batches, with the candidates of all lines interleaved.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import ease
from ease.devices import machine
from ease.evaluation.decoding_speed import in_turns
from ease.flops import parameters_read
from ease.training.mining import Quantile
from experiments.harness import token_groups
from experiments.harness.candidates import Candidate, Point, compared, metrics, policy
from experiments.harness.lab import Lab
from experiments.harness.scheduler import LOADED, Row, Scheduler, with_lab

HARD_SET = 0.5  # of the validation tokens: those with the lowest confidence of phase 1's final model
TIMED = (5, 4)  # rounds, and validation batches in each


@dataclass(frozen=True)
class Report:
    """How an experiment is measured and reported."""

    title: str
    base: str
    """The line whose final model determines the hard tokens."""
    baselines: tuple[str, ...]
    """The standard models that the baseline front is made of."""
    compared_with: tuple[str, ...] = ()
    """Lines that every other line is compared with."""
    by_token_group: tuple[str, ...] = ()
    """The line whose gains are shown by token group, and the line that it is compared with there."""
    ablated: str | None = None
    """The line that the others are variants of, in an ablation."""
    on_validation: tuple[str, ...] = ()
    """Lines that are shown on validation tokens as well."""
    in_sample: str | None = None
    """The one of them that was trained on validation tokens, and is excluded from all other tables."""
    task_metrics: tuple[str, ...] = ()
    """Task metrics that are shown in addition to perplexity, by their names in `tables.TASK_METRICS`."""
    curve: Mapping[str, float] = field(default_factory=dict)
    """Standard models of several budgets -> their share of the lab's; compute multipliers are read off their losses."""
    command: str = ""
    """The command that reproduces the experiment."""
    memory_baselines: tuple[str, ...] = ()
    """The standard models with a memory that a second front is made of."""


def front(rows: Sequence[Row]) -> list[int]:
    """Indices of the candidates of a line that no cheaper one beats on validation, from cheap to expensive.

    Full depth, the candidate at which learning rates are compared and fixed thresholds are always among them.

    Args:
        rows: the line's row of every seed.
    """
    sweeps = list(zip(*(row["sweep"] for row in rows), strict=True))
    cost = [statistics.mean(p["val"]["flops_per_token"] for p in points) for points in sweeps]
    loss = [statistics.mean(p["val"]["loss"] for p in points) for points in sweeps]
    first = rows[0]["sweep"]
    kept = {0, first.index(compared(first, rows[0]["exits"]))}
    kept |= {i for i, point in enumerate(first) if point["threshold"] is not None}
    best = float("inf")
    for i in sorted(range(len(sweeps)), key=lambda i: (cost[i], loss[i])):
        if loss[i] < best:
            kept, best = kept | {i}, loss[i]
    return sorted(kept, key=lambda i: cost[i])


def sizes(lab: Lab, row: Row) -> dict[str, int]:
    """The parameters of a row's model, and the bytes of them that one token reads at full depth."""
    with torch.device("meta"):
        model = lab.build(row["model"])
    return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": parameters_read(model)["bytes"]}


def measure(
    scheduler: Scheduler,
    report: Report,
    seeds: Sequence[int],
    pool: ProcessPoolExecutor,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score the lines that are finished with every seed, and write `test.json`.

    The line that determines the hard set and at least one standard model have to be among them.

    Returns:
        The content of `test.json`.
    """
    done, finished = scheduler.status(seeds).done, scheduler.finished(seeds)
    path = scheduler.folder / "test.json"
    scored = scored_before(path)
    entries, waiting = [], []
    for name in finished:
        rows = [done[name, seed] for seed in seeds]
        chosen = front(rows)
        for row in rows:
            entry = {key: row[key] for key in ("key", "line", "seed", "lr", "flops", "seconds", "memory", "strategy")}
            entry["lr"] = row["lr"] if scheduler.lines[name].rates else None
            entry |= sizes(scheduler.lab, row)
            entry["points"] = [dict(row["sweep"][i]) for i in chosen]
            entries.append(entry)
            base = done[report.base, row["seed"]]
            entry["base"] = base["key"]
            required = {"test", "groups"} if name in report.by_token_group else {"test"}
            new = [point for point in entry["points"] if not required <= scored.get(scoring(entry, point), {}).keys()]
            future = pool.submit(score_test, scheduler.without_lab, row, new, base, report) if new else None
            waiting.append((entry, new, future))
    for entry, new, future in waiting:
        if future is not None:
            for point, found in zip(new, future.result(), strict=True):
                scored[scoring(entry, point)] = found
            log(f"test split: {entry['line']}, seed {entry['seed']}")
        entry["points"] = [point | scored[scoring(entry, point)] for point in entry["points"]]
    if any(new for _, new, _ in waiting):
        timed = [(done[e["line"], e["seed"]], e["points"]) for e in entries if e["seed"] == seeds[0]]
        clocked = pool.submit(clock, scheduler.without_lab, timed).result()
        for point, microseconds in zip((point for _, points in timed for point in points), clocked, strict=True):
            point["microseconds"] = microseconds
    started_from = {line.on for line in scheduler.lines.values()}
    data = {
        "title": report.title,
        "command": report.command,
        "lab": scheduler.lab.describe(),
        "seeds": list(seeds),
        "machine": machine(scheduler.device),
        "timed": {"seed": seeds[0], "rounds": TIMED[0], "batches": TIMED[1]},
        "base": report.base,
        "baselines": [name for name in report.baselines if name in finished],
        "partial": [name for name in finished if scheduler.lines[name].share != 1 and name in started_from],
        "other_budgets": [name for name in finished if scheduler.lines[name].share != 1 and name not in started_from],
        "rate_of": {name: line.rate_of for name, line in scheduler.lines.items() if name in finished and line.rate_of},
        "curve": {name: share for name, share in report.curve.items() if name in finished},
        "memory_baselines": [name for name in report.memory_baselines if name in finished],
        "compared_with": [name for name in report.compared_with if name in finished],
        "by_token_group": report.by_token_group if set(report.by_token_group) <= set(finished) else (),
        "ablated": report.ablated if report.ablated in finished else None,
        "on_validation": [name for name in report.on_validation if name in finished],
        "in_sample": report.in_sample,
        "task_metrics": list(report.task_metrics),
        "missing": scheduler.missing(seeds),
        "entries": entries,
    }
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return data


Scoring = tuple[str, str, Candidate]


def scoring(entry: Mapping[str, Any], point: Point) -> Scoring:
    """What test metrics depend on: the model, the model that determines the hard tokens, and the routing."""
    return entry["key"], entry["base"], Candidate.of(point)


def scored_before(path: Path) -> dict[Scoring, Point]:
    """The scores that `test.json` already holds, if it exists."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    fields = ("test", "groups", "val", "microseconds")
    return {
        scoring(entry, point): {name: point[name] for name in fields if name in point}
        for entry in entries
        for point in entry["points"]
    }


@lru_cache(4)
def base_scores(folder: Path, key: str) -> tuple[dict[str, ease.Scores], float]:
    """Phase 1's scores on validation and test, and the confidence below which a token is hard."""
    scheduler, quantile = LOADED[folder], Quantile()
    model = scheduler.model(scheduler.rows()[key])
    scores = {split: ease.score(model, getattr(scheduler.lab, split)) for split in ("val", "test")}
    quantile.add(scores["val"].confidences)
    return scores, quantile(HARD_SET)


@lru_cache(1)
def kinds(folder: Path) -> token_groups.Kinds:
    """The token groups of a worker's lab."""
    return token_groups.kinds(LOADED[folder].lab)


def score_test(
    scheduler: Scheduler, row: Row, points: Iterable[Point], base: Row, report: Report
) -> list[dict[str, Any]]:
    """A worker's part of `measure`: a line's candidates on the test split."""
    scheduler = with_lab(scheduler)
    model, (first, threshold) = scheduler.model(row), base_scores(scheduler.folder, base["key"])
    hard, found = {split: scores.confidences < threshold for split, scores in first.items()}, []
    for point in points:
        scores = ease.score(model, scheduler.lab.test, policy(point))
        extra = scheduler.lab.extra_metrics(model, policy(point), scores)
        found.append({"test": metrics(scores, scheduler.lab.depth, hard["test"]) | extra})
        if row["line"] in report.by_token_group:
            found[-1]["groups"] = token_groups.groups(kinds(scheduler.folder), first["test"], scores, hard["test"])
        if row["line"] in report.on_validation:
            on_val = ease.score(model, scheduler.lab.val, policy(point))
            found[-1]["val"] = metrics(on_val, scheduler.lab.depth, hard["val"])
    return found


def clock(scheduler: Scheduler, timed: Sequence[tuple[Row, list[Point]]]) -> list[dict[str, float]]:
    """A worker's part of `measure`: microseconds per token of every point, median and range over interleaved rounds.

    It runs in a worker because a model may be too large for one more process to hold it.
    """
    scheduler = with_lab(scheduler)
    rounds, batches = TIMED
    text = list(islice(scheduler.lab.val, batches))
    turns = [(scheduler.model(row), point) for row, points in timed for point in points]
    calls = {i: partial(ease.score, model, text, policy(point)) for i, (model, point) in enumerate(turns)}
    seconds, scores = in_turns(calls, rounds)
    found = []
    for i in calls:
        each = [1e6 * taken / scores[i].processed for taken in seconds[i]]
        found.append({"median": statistics.median(each), "low": min(each), "high": max(each)})
    return found
