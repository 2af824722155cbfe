"""Tables of an experiment, made from its `test.json`, each with the configuration and the seeds behind it.

Nothing is computed from a model here, and no number comes from elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from experiments.analysis import compute
from experiments.analysis.fronts import Fronts, OperatingPoint
from experiments.analysis.statistics import Interval
from experiments.analysis.table import Table, difference, ppl, short, signed, spread, thousands
from experiments.harness import probes
from experiments.harness.candidates import COMPARED

SAVING = 0.005  # nats of validation loss above the best that count as no loss when a saving is looked for
MEMORY = (
    "The second front goes through standard models of every depth that have the same memory: tables of n-grams that "
    "are looked up, at no FLOPs. A line above it gains from the memory alone."
)
ON_FRONT = "baseline"
"""The cell of a standard model on the baseline front, which has no distance from it."""
SAME_ROUTING = (
    "Differences against another line are at the same routing and empty where that was not measured; if only one of "
    f"the two lines has exits, it is compared where {COMPARED:.0%} continue, or at the full depth of the other."
)
COMPUTE = (
    "The compute multiplier is the training FLOPs that a standard model of the best depth needs for the same test "
    "loss, divided by those that the line used: above 1 is better. Standard models at several budgets give the curve "
    "of each seed, linear in log FLOPs between budgets; < and > mark a bound, where the loss is outside of the curve."
)
TASK_METRICS = {"acc": "accuracy", "f1": "macro F1", "rouge_l": "ROUGE-L"}
SHARED_SETTINGS = ("kind", "lr", "schedule", "warmup", "patience", "max_epochs", "max_flops", "seed", "pretrained")
"""Settings that all lines of a lab have in common, or that stand in a column of their own."""


def all_tables(data: dict[str, Any]) -> list[Table]:
    """Every table that the content of a `test.json` has data for."""
    fronts = Fronts(data)
    made: Iterable[Table | None] = (
        ablation(fronts),
        summary(fronts),
        operating_points(fronts),
        budgets(fronts),
        savings(fronts),
        task_quality(fronts),
        thresholds(fronts),
        by_token_group(fronts),
        in_sample(fronts),
        costs(fronts),
    )
    return [table for table in made if table is not None]


def notes(kept: dict[str, Any]) -> list[str]:
    """The configuration and the seeds behind a table."""
    data = Fronts(kept).data
    lab, about = data["lab"], data["machine"]
    text = ", ".join(f"{count:,} {split}" for split, count in lab["tokens"].items())
    seeds = ", ".join(map(str, data["seeds"]))
    several = len(data["seeds"]) > 1
    spent = {e["line"]: e["flops"] / lab["budget"] for e in data["entries"]}
    without_rate = {e["line"] for e in data["entries"] if e["lr"] is None}
    named = {*without_rate, *data["partial"]} - {*Fronts(kept).other_budgets}
    other = {n: f"{share:.0%}" for n, share in spent.items() if n in named or not share}
    shares = {share: [name for name, its in other.items() if its == share] for share in other.values()}
    less = "".join(f" ({'; '.join(lines)}: {share} of it)" for share, lines in shares.items())
    some = [f"{n} of {split}" for n, split in zip(lab["eval_batches"], ("validation", "test")) if n]
    scored = f" Only the first batches of a split are scored: {' and '.join(some)}." if some else ""
    found = [
        f"{lab['corpus']} (tokens: {text}), vocabulary {lab['vocab_size']:,}, dim {lab['dim']}, {lab['heads']} heads, "
        f"sequences of {lab['seq']}, batches of {lab['batch']}, {'tied' if lab['tie_embeddings'] else 'untied'} head, "
        f"dropout {lab['dropout']:g}; {lab['budget']:.3g} training FLOPs for every line{less}; learning rates "
        f"{', '.join(f'{lr:g}' for lr in lab['lrs'])} tried with the first seed and chosen on validation, a cosine "
        f"schedule in each phase, or one over all phases where the strategy defines it so; seeds {seeds}.{scored}",
        f"In brackets: 95% intervals over {len(data['seeds'])} seeds (Student's t), differences paired by seed, not "
        "corrected for the number of rows and not covering other texts."
        if several
        else "One seed: no difference here is known to exceed the noise.",
        f"{about['cpu']}, {about['device']}, one thread, torch {about['torch']}, Python {about['python']}. "
        f"Made by `{data['command']}`.",
    ]
    first = [entry for entry in data["entries"] if entry["seed"] == data["seeds"][0]]
    taken = data.get("rate_of", {})
    rates = [entry["lr"] for entry in first if entry["lr"] is not None and entry["line"] not in taken]
    if len(lab["lrs"]) > 1:
        high, low = rates.count(max(lab["lrs"])), rates.count(min(lab["lrs"]))
        found[0] += f" Of {len(rates)} lines with a learning rate {high} chose the highest and {low} the lowest."
    for source in dict.fromkeys(taken.values()):
        names = "; ".join(name for name, its in taken.items() if its == source)
        found[0] += f" The learning rate of {source} is taken over by: {names}."
    if data["missing"]:
        found.append(f"Not trained yet: {'; '.join(data['missing'])}.")
    return found


# ---------------------------------------------------------------------------------------------------------
# Cells


def against_front(fronts: Fronts, point: OperatingPoint) -> str:
    """A point's distance from the baseline front."""
    return ON_FRONT if point in fronts.baseline_front else difference(fronts.gap(point))


def against_lines(fronts: Fronts, point: OperatingPoint) -> list[str]:
    """A point against each line that all lines are compared with."""
    against = [fronts.against_line(point, other) for other in fronts.compared_with]
    return [difference(interval) if interval else "" for interval in against]


def quality_and_cost(point: OperatingPoint) -> list[str]:
    """The cells under `QUALITY_AND_COST`."""
    hard = ppl([math.log(value) for value in point.metric("hard_ppl")])
    layers = f"{point.mean('compute_cost'):.2f}"
    return [ppl(point.metric("loss")), hard, layers, thousands(point.mean("flops_per_token"))]


class Column(NamedTuple):
    """A column that only some experiments have."""

    heading: str
    cell: Callable[[OperatingPoint], str]
    note: str


def memory_column(fronts: Fronts) -> list[Column]:
    """The distance from the front of standard models with a memory, if there are any."""
    second = fronts.with_memory
    if second is None:
        return []
    return [Column("against the front with a memory", lambda point: against_front(second, point), MEMORY)]


def compute_column(fronts: Fronts) -> list[Column]:
    """The compute multiplier, if there is a curve to read it off."""
    column = Column("compute multiplier", lambda point: str(compute.multiplier(fronts, point) or ""), COMPUTE)
    return [column] if compute.curves(fronts) else []


QUALITY_AND_COST = ["test PPL", "hard PPL", "layers run", "FLOPs/token"]


def microseconds(point: OperatingPoint) -> str:
    """Wall-clock per token with the first seed."""
    clock = point.by_seed[0].get("microseconds")
    return "" if clock is None else f"{clock['median']:.1f} ({clock['low']:.1f} to {clock['high']:.1f})"


def settings(strategy: dict[str, Any]) -> str:
    """A strategy's configuration in short, without the settings that all lines share."""
    shown = []
    for name, value in strategy.items():
        if name.removeprefix("phase1_").removeprefix("phase2_") not in SHARED_SETTINGS:
            parts = value if isinstance(value, list) else [value]
            shown.append(f"{name}={' + '.join(settings(p) if isinstance(p, dict) else str(p) for p in parts)}")
    return f"{strategy['kind'].removesuffix('Config')}({', '.join(shown)})"


# ---------------------------------------------------------------------------------------------------------
# Tables


def summary(fronts: Fronts) -> Table:
    """A row per line: its best operating point on validation, and its distance from the baseline front there."""
    rows, more = [], memory_column(fronts) + compute_column(fronts)
    for name in (*fronts.baselines, *sorted(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name)).mean)):
        point = fronts.full_depth(name) if name in fronts.baselines else fronts.best(name)
        lr = fronts.entries(name)[0]["lr"]
        row = [name, point.routing, "" if lr is None else f"{lr:g}", *quality_and_cost(point)]
        row += [against_front(fronts, point), *(column.cell(point) for column in more)]
        if name in fronts.baselines:
            rows.append([*row, "", ""])
            continue
        rival = fronts.rival(point)
        rows.append([*row, *([rival[0], difference(rival[1])] if rival else ["none", ""])])
    return Table(
        "front",
        f"{fronts.title}: every line at the routing that validation prefers",
        [
            *("line", "routing", "lr", *QUALITY_AND_COST, "against the baseline front"),
            *(*(column.heading for column in more), "best rival", "against the rival"),
        ],
        rows,
        [
            "Negative is better. The baseline front is the straight line, in FLOPs per token and loss, between "
            "standard models of different depths trained with the same FLOPs; the best rival is the other strategy "
            "with the lowest validation loss at the same FLOPs per token. Every evaluation of an output head is "
            "counted.",
            *(column.note for column in more),
            *notes(fronts.data),
        ],
    )


def operating_points(fronts: Fronts) -> Table:
    """A row per operating point on any line's front."""
    more = compute_column(fronts)
    rows = [
        [
            name,
            point.routing,
            *quality_and_cost(point),
            microseconds(point),
            against_front(fronts, point),
            *(column.cell(point) for column in more),
            *against_lines(fronts, point),
        ]
        for name in fronts.shown
        for point in fronts.front(name)
    ]
    header = ["line", "routing", *QUALITY_AND_COST, "µs/token", "against the baseline front"]
    timed = fronts.data["timed"]
    return Table(
        "points",
        f"{fronts.title}: operating points on every front",
        [*header, *(column.heading for column in more), *(f"against {other}" for other in fronts.compared_with)],
        rows,
        [
            f"Microseconds on validation text with seed {timed['seed']}: the median of {timed['rounds']} rounds in "
            f"which all rows are interleaved. {SAME_ROUTING}",
            *notes(fronts.data),
        ],
    )


def budgets(fronts: Fronts) -> Table | None:
    """Standard models at every budget and the other lines that spend another budget, with their compute multipliers."""
    standard, best = fronts.data.get("curve", {}), compute.best_depths(fronts)
    others = [name for name in fronts.other_budgets if name not in standard]
    rows, more = [], compute_column(fronts)
    for name in (*sorted(standard, key=lambda name: standard[name]), *others):
        point = fronts.full_depth(name) if name in standard else fronts.front(name)[-1]
        flops, lr = statistics.mean(compute.used(fronts, point)), fronts.entries(name)[0]["lr"]
        where = "yes" if point in best else "no" if name in standard else ""
        row = [name, point.routing, f"{lr:g}", f"{flops:.3g}", thousands(point.mean("flops_per_token"))]
        rows.append([*row, ppl(point.metric("loss")), where, *(column.cell(point) for column in more)])
    header = ["line", "routing", "lr", "training FLOPs", "FLOPs/token", "test PPL", "best depth of its budget"]
    about = "The best depth of a budget is the one with the lowest validation loss."
    title = f"{fronts.title}: standard models and other lines at several budgets"
    header += [column.heading for column in more]
    notes_ = [about, *(column.note for column in more), *notes(fronts.data)]
    return Table("budgets", title, header, rows, notes_) if fronts.other_budgets else None


def task_metric(name: str, interval: Interval) -> str:
    """A loss in nats, or any other metric as a share in per cent."""
    if name.startswith("loss"):
        return spread(interval, lambda loss: loss, lambda loss: f"{loss:.3f}")
    return spread(interval, lambda share: 100 * share, lambda share: f"{share:.1f}%")


def task_quality(fronts: Fronts) -> Table | None:
    """A task's own metrics for every operating point on any line's front."""
    scored = [point.by_seed[0]["test"] for name in fronts.shown for point in fronts.points[name]]
    metrics = [m for m in fronts.data.get("task_metrics", ()) if all(m in each for each in scored)]
    rows = [
        [
            name,
            point.routing,
            *(task_metric(m, Interval.of(point.metric(m))) for m in metrics),
            f"{point.mean('shallow_ratio'):.0%}",
            thousands(point.mean("flops_per_token")),
        ]
        for name in fronts.shown
        for point in fronts.front(name)
    ]
    header = ["line", "routing", *(f"test {TASK_METRICS.get(m, m)}" for m in metrics), "exit early", "FLOPs/token"]
    about = "Routings are chosen by validation loss; perplexity in other tables is exp of the mean loss of a target."
    if set(metrics) & set(probes.TASK_METRICS):
        about += (
            " A span of the text, such as an identifier or the indentation of a line, is right if each token in it is "
            "the model's most likely one, so that greedy decoding writes it after the text before it."
        )
    title = f"{fronts.title}: task metrics"
    return Table("quality", title, header, rows, [about, *notes(fronts.data)]) if metrics else None


def savings(fronts: Fronts) -> Table | None:
    """The FLOPs that exits save at nearly the loss of the same model's best operating point."""
    rows = []
    for name in fronts.strategies:
        full, *_, best = fronts.full_depth(name), *fronts.front(name)
        limit = best.mean("loss", "val") + SAVING
        point = next(point for point in fronts.front(name) if point.mean("loss", "val") <= limit)
        if not point.candidate.exits:
            continue
        costs = zip(point.metric("flops_per_token"), full.metric("flops_per_token"), strict=True)
        saved = Interval.of([1 - a / b for a, b in costs])
        loss = Interval.of([a - b for a, b in zip(point.metric("loss"), best.metric("loss"), strict=True)])
        share = spread(saved, lambda value: 100 * value, lambda value: f"{signed(value)}%")
        reached = [ppl(each.metric("loss")) for each in (full, best, point)]
        rows.append([name, point.routing, *reached, difference(loss), share])
    about = (
        f"The cheapest routing whose validation loss is at most {SAVING:g} nats above that of the same model's best "
        "one; FLOPs saved are relative to full depth, which evaluates one head. Lines that need full depth for this "
        "are left out."
    )
    header = ["line", "routing", "PPL at full depth", "best PPL", "PPL", "difference", "FLOPs per token saved"]
    title = f"{fronts.title}: what exits save at a loss close to the model's best"
    return Table("savings", title, header, rows, [about, *notes(fronts.data)]) if rows else None


def costs(fronts: Fronts) -> Table:
    """A row per line: training FLOPs, time and memory, and inference cost at full depth."""
    rows, sized = [], all("bytes" in entry for entry in fronts.data["entries"])
    for name in fronts.points:
        entries = fronts.entries(name)
        mean = {key: statistics.mean(entry[key] for entry in entries) for key in ("flops", "seconds", "memory")}
        full = fronts.full_depth(name)
        rows.append(
            [
                name,
                settings(entries[0]["strategy"]),
                f"{mean['flops']:.3g}",
                f"{mean['seconds']:,.0f}",
                f"{mean['memory'] / 2**20:,.0f}",
                *(thousands(entries[0][key]) for key in ("parameters", "bytes") if sized),
                thousands(full.mean("flops_per_token")),
                microseconds(full),
            ]
        )
    return Table(
        "costs",
        f"{fronts.title}: cost of every line",
        [
            *("line", "strategy", "training FLOPs", "training seconds", "peak MiB"),
            *(("parameters", "bytes read/token") if sized else ()),
            *("FLOPs/token at full depth", "µs/token"),
        ],
        rows,
        [
            "Strategy: settings that differ from their defaults, other than budget and schedule. Means over seeds. "
            "FLOPs and seconds include those of the line that a line starts from; seconds were measured while other "
            "work may have run. Peak memory is that of the process during the line's own training, including text and "
            "libraries.",
            *notes(fronts.data),
        ],
    )


def thresholds(fronts: Fronts) -> Table | None:
    """Operating points with fixed thresholds."""
    rows = [
        [name, f"{point.candidate.threshold:g}", *quality_and_cost(point), f"{point.mean('shallow_ratio'):.1%}"]
        for name, points in fronts.points.items()
        for point in sorted(points, key=lambda point: point.candidate.threshold or 0)
        if point.candidate.threshold is not None
    ]
    header = ["line", "threshold", *QUALITY_AND_COST, "exit early"]
    return Table("thresholds", f"{fronts.title}: fixed thresholds", header, rows, notes(fronts.data)) if rows else None


def by_token_group(fronts: Fronts) -> Table | None:
    """Which groups of tokens are hard, and which gain."""
    if not fronts.data["by_token_group"]:
        return None
    name, other = fronts.data["by_token_group"]
    point, reference = fronts.compared(name), fronts.full_depth(other)
    assert point is not None
    groups = [zip(*(seed["groups"] for seed in each.by_seed), strict=True) for each in (point, reference)]
    rows = []
    for own, others in zip(*groups, strict=True):
        ppls = [[g["before"] for g in own], [g["after"] for g in others], [g["after"] for g in own]]
        change = Interval.of([math.log(a / b) for a, b in zip(ppls[2], ppls[1], strict=True)])
        rows.append(
            [
                own[0]["kind"],
                own[0]["group"],
                *(f"{statistics.mean(group[key] for group in own):.1%}" for key in ("share", "hard")),
                *(short(statistics.mean(values)) for values in ppls),
                difference(change),
            ]
        )
    base = fronts.data["base"]
    return Table(
        "tokens",
        f"{fronts.title}: which tokens are hard, and which gain ({name}, {point.routing})",
        ["grouped by", "group", "share of tokens", "hard", f"PPL, {base}", other, name, f"against {other}"],
        rows,
        [
            f"Hard tokens are those with the lowest confidence of {base}'s final model: half of the validation tokens. "
            "Groups are made from the counts of the training text and the token itself.",
            *notes(fronts.data),
        ],
    )


def ablation(fronts: Fronts) -> Table | None:
    """Variants of one line, where half of the tokens continue and at full depth."""
    if fronts.ablated is None:
        return None
    rows = []
    for name in fronts.shown:
        exits = [point for point in fronts.points[name] if point.candidate.share == COMPARED]
        for point in (*exits, fronts.full_depth(name)):
            rows.append([name, point.routing, *quality_and_cost(point), *against_lines(fronts, point)])
    return Table(
        "parts",
        f"{fronts.title}: one component changed at a time",
        ["line", "routing", *QUALITY_AND_COST, *(f"against {other}" for other in fronts.compared_with)],
        rows,
        [f"Negative is better. {SAME_ROUTING}", *notes(fronts.data)],
    )


def in_sample(fronts: Fronts) -> Table | None:
    """The same lines on validation tokens, on which some were trained, and on test tokens."""
    rows = []
    for name in fronts.data["on_validation"]:
        exits = [point for point in fronts.points[name] if point.candidate.share == COMPARED]
        for point in (fronts.full_depth(name), *exits):
            each = [
                ppl([math.log(v) for v in point.metric(metric, split)])
                for split in ("val", "test")
                for metric in ("ppl", "hard_ppl")
            ]
            rows.append([name, point.routing, *each])
    about = (
        "The line called in-sample mined and trained its second phase on the validation tokens, as the original recipe "
        "does, so that its validation metrics are in-sample. All test metrics are held-out. Thresholds are chosen on "
        "validation."
    )
    header = ["line", "routing", "validation PPL", "validation hard PPL", "test PPL", "test hard PPL"]
    title = f"{fronts.title}: in-sample and held-out metrics"
    return Table("leak", title, header, rows, [about, *notes(fronts.data)]) if rows else None
