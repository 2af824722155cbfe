"""From `test.json` to tables in Markdown and LaTeX. Nothing is computed from a model here, and nothing from elsewhere.

Differences are of losses, seed by seed, and shown in per cent of perplexity. The line to beat at some inference compute
is the straight line, in FLOPs per token and loss, between the plain models on either side: what a coin that sends some
sequences to the one and the rest to the other reaches. Its corners and every candidate that stands for a strategy are
chosen on validation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from experiments.statistics import Broken, Interval, corners
from experiments.sweeps import COMPARED, Candidate, Point

SAVING = 0.005  # loss (nats) above full depth's on validation that counts as none when a saving is looked for


@dataclass(frozen=True)
class Table:
    """A table and what has to be said with it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)

    def latex(self) -> str:
        """A `table` that needs no package."""
        rows = [" & ".join(map(tex, row)) + r" \\" for row in self.rows]
        notes = [rf"\par\raggedright\footnotesize {tex(note)}" for note in self.notes]
        head = " & ".join(map(tex, self.header)) + r" \\"
        start = [r"\begin{table}", rf"\caption{{{tex(self.title)}}}", r"\centering\small"]
        columns = "l" + "r" * (len(self.header) - 1)
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}"]
        return "\n".join([*start, *body, *notes, r"\end{table}"]) + "\n"


ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "µ": r"$\mu$",
}


def tex(text: str) -> str:
    return "".join(ESCAPES.get(c, c) for c in text)


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
        """Lines other than plain models."""
        return [name for name in self.places if name not in self.data["plain"]]

    @cached_property
    def corners(self) -> list[Place]:
        """The plain models that the line to beat goes through."""
        plain = [self.full_depth(name) for name in self.data["plain"]]
        return [plain[i] for i in corners([(p.mean("flops_per_token", "val"), p.mean("loss", "val")) for p in plain])]

    def plain(self, split: str = "test") -> list[Broken]:
        """The line to beat, of every seed."""
        return self.broken(self.corners, split)

    def broken(self, places: Sequence[Place], split: str = "test") -> list[Broken]:
        return [
            Broken(
                tuple(place.figure("flops_per_token", split)[seed] for place in places),
                tuple(place.figure("loss", split)[seed] for place in places),
            )
            for seed in range(len(self.data["seeds"]))
        ]

    def against(self, place: Place, lines: Sequence[Broken], split: str = "test") -> Interval:
        """Loss above lines of straight pieces at the same FLOPs per token, seed by seed."""
        cost, loss = place.figure("flops_per_token", split), place.figure("loss", split)
        return Interval.of([b - line.at(a) for a, b, line in zip(cost, loss, lines, strict=True)])

    def gap(self, place: Place, split: str = "test") -> Interval:
        """Loss above the line to beat."""
        return self.against(place, self.plain(split), split)

    def stands(self, place: Place) -> str:
        """How a candidate stands against the line to beat, in words."""
        return "corner" if place in self.corners else difference(self.gap(place))

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

    def beside(self, place: Place, name: str) -> Interval:
        """Loss above another line's at full depth, seed by seed."""
        other = self.full_depth(name).figure("loss")
        return Interval.of([a - b for a, b in zip(place.figure("loss"), other, strict=True)])

    def entries(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.data["entries"] if entry["line"] == name]


def notes(data: dict[str, Any]) -> list[str]:
    """The configuration and the seeds behind a table."""
    lab, about = data["lab"], data["machine"]
    text = ", ".join(f"{count:,} {split}" for split, count in lab["tokens"].items())
    seeds = ", ".join(map(str, data["seeds"]))
    several = len(data["seeds"]) > 1
    found = [
        f"{lab['corpus']} (tokens: {text}), vocabulary {lab['vocab_size']:,}, dim {lab['dim']}, {lab['heads']} heads, "
        f"sequences of {lab['seq']}, batches of {lab['batch']}, {'tied' if lab['tie_embeddings'] else 'untied'} head, "
        f"dropout {lab['dropout']:g}; {lab['budget']:.3g} training FLOPs for every line; learning rates "
        f"{', '.join(f'{lr:g}' for lr in lab['lrs'])} tried with the first seed and chosen on validation, cosine "
        f"schedule in each phase; seeds {seeds}.",
        f"In brackets: 95% intervals over {len(data['seeds'])} seeds (Student's t), differences paired by seed; none "
        "is corrected for the number of rows."
        if several
        else "One seed: nothing here is known to lie outside the noise.",
        f"{about['cpu']}, {about['device']}, one thread, torch {about['torch']}, Python {about['python']}. "
        f"Made by `{data['command']}`.",
    ]
    rates = [entry["lr"] for entry in data["entries"] if entry["seed"] == data["seeds"][0]]
    if len(lab["lrs"]) > 1:
        high, low = rates.count(max(lab["lrs"])), rates.count(min(lab["lrs"]))
        found[0] += f" Of {len(rates)} lines {high} chose the highest rate and {low} the lowest."
    if data["missing"]:
        found.append(f"Not trained yet: {', '.join(data['missing'])}.")
    return found


def percent(loss: float) -> float:
    """A difference of losses as one of perplexities, in per cent."""
    return 100 * math.expm1(loss)


def short(value: float, digits: int = 4) -> str:
    """A number with so many digits that mean something."""
    if not math.isfinite(value):
        return "none"
    whole = len(f"{abs(value):.0f}")
    return f"{value:,.{max(0, digits - whole)}f}"


def spread(interval: Interval, to: Callable[[float], float], show: Callable[[float], str]) -> str:
    """Mean and interval."""
    if math.isnan(interval.mean):
        return "none"
    if interval.low is None or interval.high is None:
        return show(to(interval.mean))
    return f"{show(to(interval.mean))} ({show(to(interval.low))} to {show(to(interval.high))})"


def signed(value: float) -> str:
    return f"{value:+.1f}"


def ppl(losses: Sequence[float]) -> str:
    return spread(Interval.of(losses), math.exp, short)


def difference(interval: Interval) -> str:
    """In per cent of perplexity; what lies inside the noise says so."""
    told = spread(interval, percent, lambda value: f"{signed(value)}%")
    return told if interval.low is None or math.isnan(interval.mean) or not interval.noise else f"{told}, noise"


def k(value: float) -> str:
    return f"{value / 1e3:,.1f}k"


def cells(fronts: Fronts, place: Place) -> list[str]:
    """What every table says of a candidate."""
    hard = ppl([math.log(value) for value in place.figure("hard_ppl")])
    return [ppl(place.figure("loss")), hard, f"{place.mean('compute_cost'):.2f}", k(place.mean("flops_per_token"))]


def summary(fronts: Fronts) -> Table:
    """A row per strategy: where validation likes it best against the line to beat, and how it stands there."""
    rows = []
    order = [*fronts.data["plain"], *sorted(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name)).mean)]
    for name in order:
        place = fronts.full_depth(name) if name in fronts.data["plain"] else fronts.best(name)
        row = [name, place.routing, f"{fronts.entries(name)[0]['lr']:g}", *cells(fronts, place)]
        if name in fronts.data["plain"]:
            rows.append([*row, fronts.stands(place), "", ""])
            continue
        rival = fronts.rival(place)
        rows.append(
            [
                *row,
                fronts.stands(place),
                rival[0] if rival else "none",
                difference(rival[1]) if rival else "",
            ]
        )
    header = ["line", "routing", "lr", "test PPL", "hard PPL", "layers run", "FLOPs/token"]
    return Table(
        f"{fronts.data['title']}: every strategy where it stands best against plain models",
        [*header, "against plain models", "best rival there", "against it"],
        rows,
        [
            'Negative is better. "Against plain models" is the difference in perplexity to the straight line, in FLOPs '
            'per token and loss, between the plain models of the same training FLOPs; "best rival" the other strategy '
            "that validation prefers at the same FLOPs per token. Every head is counted.",
            *notes(fronts.data),
        ],
    )


def every(fronts: Fronts) -> Table:
    """A row per candidate of every front."""
    rows = [
        [
            name,
            place.routing,
            *cells(fronts, place),
            clock(place),
            fronts.stands(place),
            *(difference(fronts.beside(place, other)) for other in fronts.data["beside"]),
        ]
        for name in fronts.places
        for place in fronts.front(name)
    ]
    header = [
        "line",
        "routing",
        "test PPL",
        "hard PPL",
        "layers run",
        "FLOPs/token",
        "µs/token",
        "against plain models",
    ]
    return Table(
        f"{fronts.data['title']}: fronts",
        [*header, *(f"against {other}" for other in fronts.data["beside"])],
        rows,
        [
            f"Microseconds on validation text with seed {fronts.data['timed']['seed']}: the median of "
            f"{fronts.data['timed']['rounds']} rounds in which all rows take turns.",
            *notes(fronts.data),
        ],
    )


def clock(place: Place) -> str:
    seen = place.points[0].get("microseconds")
    if seen is None:
        return ""
    return f"{seen['median']:.1f} ({seen['low']:.1f} to {seen['high']:.1f})"


def savings(fronts: Fronts) -> Table:
    """What exits save of the same model's full depth at next to no loss."""
    rows = []
    for name in fronts.strategies:
        full = fronts.full_depth(name)
        limit = full.mean("loss", "val") + SAVING
        cheap = [p for p in fronts.front(name) if p.candidate.exits and p.mean("loss", "val") <= limit]
        if not cheap:
            continue
        place = cheap[0]
        costs = zip(place.figure("flops_per_token"), full.figure("flops_per_token"), strict=True)
        saved = Interval.of([1 - a / b for a, b in costs])
        loss = Interval.of([a - b for a, b in zip(place.figure("loss"), full.figure("loss"), strict=True)])
        share = spread(saved, lambda value: 100 * value, lambda value: f"{signed(value)}%")
        rows.append([name, place.routing, ppl(full.figure("loss")), ppl(place.figure("loss")), difference(loss), share])
    return Table(
        f"{fronts.data['title']}: what exits save at next to no loss",
        ["line", "routing", "PPL at full depth", "PPL", "difference", "FLOPs per token saved"],
        rows,
        [
            f"The cheapest routing whose validation loss is at most {SAVING:g} nats above that of the same model at "
            "full depth, which asks one head; lines without one are left out.",
            *notes(fronts.data),
        ],
    )


def costs(fronts: Fronts) -> Table:
    """What every line took."""
    rows = []
    for name in fronts.places:
        entries = fronts.entries(name)
        mean = {key: statistics.mean(entry[key] for entry in entries) for key in ("flops", "seconds", "memory")}
        full = fronts.full_depth(name)
        rows.append(
            [
                name,
                f"{mean['flops']:.3g}",
                f"{mean['seconds']:,.0f}",
                f"{mean['memory'] / 2**20:,.0f}",
                k(full.mean("flops_per_token")),
                clock(full),
            ]
        )
    return Table(
        f"{fronts.data['title']}: what every line took",
        ["line", "training FLOPs", "training seconds", "peak MiB", "FLOPs/token at full depth", "µs/token"],
        rows,
        [
            "Means over seeds. FLOPs and seconds hold those of the line that it goes on from; seconds were taken while "
            "other work may have run. Peak memory is the process's while the line itself was trained, text and "
            "libraries included.",
            *notes(fronts.data),
        ],
    )


def thresholds(fronts: Fronts) -> Table | None:
    """Fixed thresholds."""
    rows = [
        [name, f"{place.candidate.threshold:g}", *cells(fronts, place), f"{place.mean('shallow_ratio'):.1%}"]
        for name, places in fronts.places.items()
        for place in sorted(places, key=lambda place: place.candidate.threshold or 0)
        if place.candidate.threshold is not None
    ]
    header = ["line", "threshold", "test PPL", "hard PPL", "layers run", "FLOPs/token", "leave early"]
    title = f"{fronts.data['title']}: fixed thresholds"
    return Table(title, header, rows, notes(fronts.data)) if rows else None


def explained(fronts: Fronts) -> Table | None:
    """Which tokens are hard, and which gain."""
    name = fronts.data["explained"]
    if name is None:
        return None
    place = next(p for p in fronts.places[name] if p.candidate.share == COMPARED)
    rows = []
    for same in zip(*(point["groups"] for point in place.points), strict=True):
        mean = {key: statistics.mean(group[key] for group in same) for key in ("share", "hard", "before", "after")}
        change = Interval.of([math.log(group["after"] / group["before"]) for group in same])
        rows.append(
            [
                same[0]["kind"],
                same[0]["group"],
                f"{mean['share']:.1%}",
                f"{mean['hard']:.1%}",
                short(mean["before"]),
                short(mean["after"]),
                difference(change),
            ]
        )
    return Table(
        f"{fronts.data['title']}: what makes a token hard, and which tokens gain ({name}, {place.routing})",
        ["kind", "group", "share of tokens", "hard", f"PPL, {fronts.data['base']}", f"PPL, {name}", "change"],
        rows,
        [
            f"Hard are the tokens that {fronts.data['base']}'s final model is least sure of: half of the validation "
            "tokens. Groups come from the training text's counts and the token itself.",
            *notes(fronts.data),
        ],
    )


def all_tables(data: dict[str, Any]) -> list[Table]:
    fronts = Fronts(data)
    made: Iterable[Table | None] = (
        summary(fronts),
        every(fronts),
        savings(fronts),
        thresholds(fronts),
        explained(fronts),
        costs(fronts),
    )
    return [table for table in made if table is not None]
