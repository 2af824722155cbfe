"""From trained lines to `test.json`: which candidates stand on a front, the test split, the clock.

Candidates are chosen on validation alone: those that no cheaper candidate of the same line beats in the mean over
seeds. Each is then scored on the test split, once; what has been scored is kept. Wall-clock is measured on validation
batches, all candidates of all lines taking turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import ease
from ease.devices import machine
from ease.evaluation.decoding_speed import in_turns
from ease.training.mining import Quantile
from experiments.harness import scheduler as lines
from experiments.harness import token_groups as tokens
from experiments.harness.candidates import Candidate, Point, compared, figures, policy
from experiments.harness.scheduler import Plan, Row

HARD_SET = 0.5  # of the validation tokens: those that phase 1's final model is least sure of
TIMED = (5, 4)  # rounds, and validation batches in each


@dataclass(frozen=True)
class Report:
    """What a plan is reported for."""

    title: str
    base: str
    """The line whose final model says which tokens are hard."""
    plain: tuple[str, ...]
    """The plain models, between which lies the line to beat."""
    beside: tuple[str, ...] = ()
    """Lines that every other one is compared with."""
    explained: tuple[str, ...] = ()
    """The line of which it is told which tokens gained, and the one to compare it with there."""
    original: str | None = None
    """The line that others are variants of."""
    both: tuple[str, ...] = ()
    """Lines that are shown on validation tokens as well."""
    leaky: str | None = None
    """That one of them which was trained on validation tokens, and stands in no other table."""
    measures: tuple[str, ...] = ()
    """Figures of quality that are shown beside perplexity, by their names in `tables.MEASURES`."""
    command: str = ""
    """What made it."""


def front(rows: Sequence[Row]) -> list[int]:
    """Which candidates of a line, from its rows of every seed, no cheaper one beats on validation, from cheap to dear.

    Full depth, the one where learning rates are compared and fixed thresholds are always among them.
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


def measure(
    plan: Plan, report: Report, seeds: Sequence[int], pool: ProcessPoolExecutor, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Scores the lines that are finished with every seed, and writes `test.json`.

    The line that fixes the hard set and a plain model have to be among them.
    """
    done, finished = plan.progress(seeds).done, plan.finished(seeds)
    path = plan.folder / "test.json"
    scored = scored_before(path)
    entries, waiting = [], []
    for name in finished:
        rows = [done[name, seed] for seed in seeds]
        chosen = front(rows)
        for row in rows:
            entry = {key: row[key] for key in ("key", "line", "seed", "lr", "flops", "seconds", "memory", "strategy")}
            entry["lr"] = row["lr"] if plan.lines[name].rates else None
            entry["points"] = [dict(row["sweep"][i]) for i in chosen]
            entries.append(entry)
            base = done[report.base, row["seed"]]
            entry["base"] = base["key"]
            wanted = {"test", "groups"} if name in report.explained else {"test"}
            new = [point for point in entry["points"] if not wanted <= scored.get(scoring(entry, point), {}).keys()]
            future = pool.submit(score_test, plan.closed, row, new, base, report) if new else None
            waiting.append((entry, new, future))
    for entry, new, future in waiting:
        if future is not None:
            for point, found in zip(new, future.result(), strict=True):
                scored[scoring(entry, point)] = found
            say(f"test split: {entry['line']}, seed {entry['seed']}")
        entry["points"] = [point | scored[scoring(entry, point)] for point in entry["points"]]
    if any(new for _, new, _ in waiting):
        timed = [(done[e["line"], e["seed"]], e["points"]) for e in entries if e["seed"] == seeds[0]]
        seen = pool.submit(clock, plan.closed, timed).result()
        for point, taken in zip((point for _, points in timed for point in points), seen, strict=True):
            point["microseconds"] = taken
    data = {
        "title": report.title,
        "command": report.command,
        "lab": plan.lab.describe(),
        "seeds": list(seeds),
        "machine": machine(plan.device),
        "timed": {"seed": seeds[0], "rounds": TIMED[0], "batches": TIMED[1]},
        "base": report.base,
        "plain": [name for name in report.plain if name in finished],
        "unfinished": [name for name in finished if plan.lines[name].share < 1],
        "beside": [name for name in report.beside if name in finished],
        "explained": report.explained if set(report.explained) <= set(finished) else (),
        "original": report.original if report.original in finished else None,
        "both": [name for name in report.both if name in finished],
        "leaky": report.leaky,
        "measures": list(report.measures),
        "missing": plan.missing(seeds),
        "entries": entries,
    }
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return data


Scoring = tuple[str, str, Candidate]


def scoring(entry: Mapping[str, Any], point: Point) -> Scoring:
    """What figures on the test split depend on: the model, the one that says what is hard, the routing."""
    return entry["key"], entry["base"], Candidate.of(point)


def scored_before(path: Path) -> dict[Scoring, Point]:
    """What `test.json` says of candidates already."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    kept = ("test", "groups", "val", "microseconds")
    return {
        scoring(entry, point): {name: point[name] for name in kept if name in point}
        for entry in entries
        for point in entry["points"]
    }


@lru_cache(4)
def before(folder: Path, key: str) -> tuple[dict[str, ease.Scores], float]:
    """Phase 1's scores on validation and test, and the confidence below which a token is hard."""
    plan, quantile = lines.OPEN[folder], Quantile()
    model = plan.model(plan.rows()[key])
    scores = {split: ease.score(model, getattr(plan.lab, split)) for split in ("val", "test")}
    quantile.add(scores["val"].confidences)
    return scores, quantile(HARD_SET)


@lru_cache(1)
def kinds(folder: Path) -> tokens.Kinds:
    return tokens.kinds(lines.OPEN[folder].lab)


def score_test(plan: Plan, row: Row, points: Iterable[Point], base: Row, report: Report) -> list[dict[str, Any]]:
    """A worker's part: what a line's candidates do on the test split."""
    plan = lines.opened(plan)
    model, (first, threshold) = plan.model(row), before(plan.folder, base["key"])
    hard, found = {split: scores.confidences < threshold for split, scores in first.items()}, []
    for point in points:
        scores = ease.score(model, plan.lab.test, policy(point))
        further = plan.lab.further(model, policy(point))
        found.append({"test": figures(scores, plan.lab.depth, hard["test"]) | further})
        if row["line"] in report.explained:
            found[-1]["groups"] = tokens.groups(kinds(plan.folder), first["test"], scores, hard["test"])
        if row["line"] in report.both:
            seen = ease.score(model, plan.lab.val, policy(point))
            found[-1]["val"] = figures(seen, plan.lab.depth, hard["val"])
    return found


def clock(plan: Plan, timed: Sequence[tuple[Row, list[Point]]]) -> list[dict[str, float]]:
    """A worker's part: microseconds per token of every point, the median of rounds in which all take turns, and range.

    A model may be too large for one more process to hold it.
    """
    plan = lines.opened(plan)
    rounds, batches = TIMED
    text = list(islice(plan.lab.val, batches))
    turns = [(plan.model(row), point) for row, points in timed for point in points]
    calls = {i: partial(ease.score, model, text, policy(point)) for i, (model, point) in enumerate(turns)}
    seconds, scores = in_turns(calls, rounds)
    found = []
    for i in calls:
        seen = [1e6 * taken / scores[i].processed for taken in seconds[i]]
        found.append({"median": statistics.median(seen), "low": min(seen), "high": max(seen)})
    return found
