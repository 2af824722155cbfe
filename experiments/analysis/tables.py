"""From `test.json` to tables in Markdown and LaTeX, each with the configuration and the seeds behind it.

Nothing is computed from a model here, and no figure comes from elsewhere. Differences of losses are shown in per cent
of perplexity; one that may be none is called noise.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.analysis.fronts import Fronts, Place
from experiments.analysis.statistics import Interval
from experiments.harness.candidates import COMPARED

SAVING = 0.005  # loss (nats) above full depth's on validation that counts as none when a saving is looked for


@dataclass(frozen=True)
class Table:
    """A table and what has to be said with it."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)

    def latex(self) -> str:
        """A `table`, no wider than the line; it needs graphicx."""
        rows = [" & ".join(map(tex, row)) + r" \\" for row in self.rows]
        notes = [rf"\par\smallskip\raggedright\footnotesize {tex(note)}" for note in self.notes]
        head = " & ".join(map(tex, self.header)) + r" \\"
        start = [r"\begin{table}", rf"\caption{{{tex(self.title)}}}", r"\centering\small"]
        columns = "l" + "r" * (len(self.header) - 1)
        start += [rf"\sbox0{{\begin{{tabular}}{{{columns}}}"]
        body = [r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}}%"]
        fit = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
        return "\n".join([*start, *body, fit, *notes, r"\end{table}"]) + "\n"


ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "µ": r"$\mu$",
}


def tex(text: str) -> str:
    escaped = "".join(ESCAPES.get(c, c) for c in text).replace("--", "-{}-")  # which would become a dash
    return re.sub('"([^"]*)"', r"``\1''", re.sub("`([^`]*)`", r"\\texttt{\1}", escaped))


def notes(data: dict[str, Any]) -> list[str]:
    """The configuration and the seeds behind a table."""
    lab, about = data["lab"], data["machine"]
    text = ", ".join(f"{count:,} {split}" for split, count in lab["tokens"].items())
    seeds = ", ".join(map(str, data["seeds"]))
    several = len(data["seeds"]) > 1
    spent = {e["line"]: e["flops"] / lab["budget"] for e in data["entries"]}
    bare = {e["line"] for e in data["entries"] if e["lr"] is None}
    other = {n: f"{share:.0%}" for n, share in spent.items() if n in bare or n in data["unfinished"] or not share}
    shares = {share: [name for name, its in other.items() if its == share] for share in other.values()}
    less = "".join(f" ({'; '.join(names)}: {share} of it)" for share, names in shares.items())
    some = [f"{n} of {split}" for n, split in zip(lab["eval_batches"], ("validation", "test")) if n]
    scored = f" Scored are the first batches of a split: {' and '.join(some)}." if some else ""
    found = [
        f"{lab['corpus']} (tokens: {text}), vocabulary {lab['vocab_size']:,}, dim {lab['dim']}, {lab['heads']} heads, "
        f"sequences of {lab['seq']}, batches of {lab['batch']}, {'tied' if lab['tie_embeddings'] else 'untied'} head, "
        f"dropout {lab['dropout']:g}; {lab['budget']:.3g} training FLOPs for every line{less}; learning rates "
        f"{', '.join(f'{lr:g}' for lr in lab['lrs'])} tried with the first seed and chosen on validation, a cosine "
        f"schedule in each phase, or one through all where the strategy has it so; seeds {seeds}.{scored}",
        f"In brackets: 95% intervals over {len(data['seeds'])} seeds (Student's t), differences paired by seed; none "
        "is corrected for the number of rows, and none says how another text would differ."
        if several
        else "One seed: nothing here is known to lie outside the noise.",
        f"{about['cpu']}, {about['device']}, one thread, torch {about['torch']}, Python {about['python']}. "
        f"Made by `{data['command']}`.",
    ]
    first = [entry for entry in data["entries"] if entry["seed"] == data["seeds"][0]]
    rates = [entry["lr"] for entry in first if entry["lr"] is not None]
    if len(lab["lrs"]) > 1:
        high, low = rates.count(max(lab["lrs"])), rates.count(min(lab["lrs"]))
        found[0] += f" Of {len(rates)} lines with a rate {high} chose the highest and {low} the lowest."
    if data["missing"]:
        found.append(f"Not trained yet: {'; '.join(data['missing'])}.")
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


def stands(fronts: Fronts, place: Place) -> str:
    """How a candidate stands against the line to beat."""
    return "corner" if place in fronts.corners else difference(fronts.gap(place))


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
        lr = fronts.entries(name)[0]["lr"]
        row = [name, place.routing, "" if lr is None else f"{lr:g}", *cells(fronts, place)]
        if name in fronts.data["plain"]:
            rows.append([*row, stands(fronts, place), "", ""])
            continue
        rival = fronts.rival(place)
        rows.append(
            [
                *row,
                stands(fronts, place),
                rival[0] if rival else "none",
                difference(rival[1]) if rival else "",
            ]
        )
    header = ["line", "routing", "lr", "test PPL", "hard PPL", "layers run", "FLOPs/token"]
    return Table(
        "front",
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
            stands(fronts, place),
            *compared(fronts, place),
        ]
        for name in (*fronts.data["unfinished"], *fronts.data["plain"], *fronts.strategies)
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
        "points",
        f"{fronts.data['title']}: fronts",
        [*header, *(f"against {other}" for other in fronts.data["beside"])],
        rows,
        [
            f"Microseconds on validation text with seed {fronts.data['timed']['seed']}: the median of "
            f"{fronts.data['timed']['rounds']} rounds in which all rows take turns. {ALIKE}",
            *notes(fronts.data),
        ],
    )


ALIKE = (
    "Against another line: routed alike, or nothing is said; where only one of the two has exits, it stands where "
    f"{COMPARED:.0%} go on or at the other's full depth."
)


def compared(fronts: Fronts, place: Place) -> list[str]:
    """A candidate against the lines that all are compared with."""
    against = [fronts.beside(place, other) for other in fronts.data["beside"]]
    return [difference(interval) if interval else "" for interval in against]


def clock(place: Place) -> str:
    seen = place.points[0].get("microseconds")
    if seen is None:
        return ""
    return f"{seen['median']:.1f} ({seen['low']:.1f} to {seen['high']:.1f})"


MEASURES = {"acc": "accuracy", "f1": "macro F1", "rouge_l": "ROUGE-L"}


def quality(fronts: Fronts) -> Table | None:
    """What a task is judged by, beside what it costs, for every candidate of every front."""
    measures = fronts.data.get("measures", ())
    rows = [
        [
            name,
            place.routing,
            *(spread(Interval.of(place.figure(m)), lambda share: 100 * share, lambda p: f"{p:.1f}%") for m in measures),
            f"{place.mean('shallow_ratio'):.0%}",
            k(place.mean("flops_per_token")),
        ]
        for name in (*fronts.data["unfinished"], *fronts.data["plain"], *fronts.strategies)
        for place in fronts.front(name)
    ]
    header = ["line", "routing", *(f"test {MEASURES[m]}" for m in measures), "leave early", "FLOPs/token"]
    told = "Routings are chosen by their loss on validation; perplexity elsewhere is exp of the mean loss of a target."
    title = f"{fronts.data['title']}: quality of the task"
    return Table("quality", title, header, rows, [told, *notes(fronts.data)]) if measures else None


def savings(fronts: Fronts) -> Table | None:
    """What exits save of the same model's full depth at next to no loss against the best that it can do."""
    rows = []
    for name in fronts.strategies:
        full, *_, best = fronts.full_depth(name), *fronts.front(name)
        limit = best.mean("loss", "val") + SAVING
        place = next(place for place in fronts.front(name) if place.mean("loss", "val") <= limit)
        if not place.candidate.exits:
            continue
        costs = zip(place.figure("flops_per_token"), full.figure("flops_per_token"), strict=True)
        saved = Interval.of([1 - a / b for a, b in costs])
        loss = Interval.of([a - b for a, b in zip(place.figure("loss"), best.figure("loss"), strict=True)])
        share = spread(saved, lambda value: 100 * value, lambda value: f"{signed(value)}%")
        reached = [ppl(full.figure("loss")), ppl(best.figure("loss")), ppl(place.figure("loss"))]
        rows.append([name, place.routing, *reached, difference(loss), share])
    told = (
        f"The cheapest routing whose validation loss is at most {SAVING:g} nats above that of the same model's best "
        "one; what it saves is of full depth, which asks one head. Lines that need full depth are left out."
    )
    header = ["line", "routing", "PPL at full depth", "best PPL", "PPL", "difference", "FLOPs per token saved"]
    title = f"{fronts.data['title']}: what exits save at next to no loss"
    return Table("savings", title, header, rows, [told, *notes(fronts.data)]) if rows else None


COMMON = ("kind", "lr", "schedule", "warmup", "patience", "max_epochs", "max_flops", "seed", "pretrained")


def settings(strategy: dict[str, Any]) -> str:
    """A configuration in short: what every line of a lab has alike is left out."""
    told = []
    for name, value in strategy.items():
        if name.removeprefix("phase1_").removeprefix("phase2_") not in COMMON:
            parts = value if isinstance(value, list) else [value]
            shown = [settings(part) if isinstance(part, dict) else str(part) for part in parts]
            told.append(f"{name}={' + '.join(shown)}")
    return f"{strategy['kind'].removesuffix('Config')}({', '.join(told)})"


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
                settings(entries[0]["strategy"]),
                f"{mean['flops']:.3g}",
                f"{mean['seconds']:,.0f}",
                f"{mean['memory'] / 2**20:,.0f}",
                k(full.mean("flops_per_token")),
                clock(full),
            ]
        )
    return Table(
        "costs",
        f"{fronts.data['title']}: what every line took",
        ["line", "strategy", "training FLOPs", "training seconds", "peak MiB", "FLOPs/token at full depth", "µs/token"],
        rows,
        [
            "The strategy with what differs from its defaults, beside budget and schedule. Means over seeds. FLOPs and "
            "seconds hold those of the line that it goes on from; seconds were taken while other work may have run. "
            "Peak memory is the process's while the line itself was trained, text and libraries included.",
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
    return Table("thresholds", title, header, rows, notes(fronts.data)) if rows else None


def explained(fronts: Fronts) -> Table | None:
    """Which tokens are hard, and which gain."""
    if not fronts.data["explained"]:
        return None
    name, other = fronts.data["explained"]
    place, beside = next(p for p in fronts.places[name] if p.candidate.share == COMPARED), fronts.full_depth(other)
    groups = [zip(*(point["groups"] for point in line.points), strict=True) for line in (place, beside)]
    rows = []
    for same, at_other in zip(*groups, strict=True):
        ppls = [[g["before"] for g in same], [g["after"] for g in at_other], [g["after"] for g in same]]
        change = Interval.of([math.log(a / b) for a, b in zip(ppls[2], ppls[1], strict=True)])
        rows.append(
            [
                same[0]["kind"],
                same[0]["group"],
                *(f"{statistics.mean(group[key] for group in same):.1%}" for key in ("share", "hard")),
                *(short(statistics.mean(values)) for values in ppls),
                difference(change),
            ]
        )
    return Table(
        "tokens",
        f"{fronts.data['title']}: what makes a token hard, and which tokens gain ({name}, {place.routing})",
        ["kind", "group", "share of tokens", "hard", f"PPL, {fronts.data['base']}", other, name, f"against {other}"],
        rows,
        [
            f"Hard are the tokens that {fronts.data['base']}'s final model is least sure of: half of the validation "
            "tokens. Groups come from the training text's counts and the token itself.",
            *notes(fronts.data),
        ],
    )


def parts(fronts: Fronts) -> Table | None:
    """Variants of one line, where as many tokens go on and at full depth."""
    original = fronts.data["original"]
    if original is None:
        return None
    rows = []
    for name in (*fronts.data["unfinished"], *fronts.data["plain"], *fronts.strategies):
        exits = [place for place in fronts.places[name] if place.candidate.share == COMPARED]
        for place in (*exits, fronts.full_depth(name)):
            rows.append([name, place.routing, *cells(fronts, place), *compared(fronts, place)])
    header = ["line", "routing", "test PPL", "hard PPL", "layers run", "FLOPs/token"]
    return Table(
        "parts",
        f"{fronts.data['title']}: one part at a time",
        [*header, *(f"against {other}" for other in fronts.data["beside"])],
        rows,
        [f"Negative is better. {ALIKE}", *notes(fronts.data)],
    )


def leak(fronts: Fronts) -> Table | None:
    """The same lines on validation tokens, which some were trained on, and on test tokens."""
    rows = []
    for name in fronts.data["both"]:
        exits = [place for place in fronts.places[name] if place.candidate.share == COMPARED]
        for place in (fronts.full_depth(name), *exits):
            seen = [
                ppl([math.log(v) for v in place.figure(f, s)]) for s in ("val", "test") for f in ("ppl", "hard_ppl")
            ]
            rows.append([name, place.routing, *seen])
    header = ["line", "routing", "validation PPL", "validation hard PPL", "test PPL", "test hard PPL"]
    told = [
        "The line called in-sample mined and trained its second phase on the validation tokens, as the original recipe "
        "does: its validation figures are in-sample. All test figures are held-out. Thresholds come from validation."
    ]
    title = f"{fronts.data['title']}: what the leak is worth"
    return Table("leak", title, header, rows, [*told, *notes(fronts.data)]) if rows else None


def all_tables(data: dict[str, Any]) -> list[Table]:
    fronts = Fronts(data)
    made: Iterable[Table | None] = (
        parts(fronts),
        summary(fronts),
        every(fronts),
        savings(fronts),
        quality(fronts),
        thresholds(fronts),
        explained(fronts),
        leak(fronts),
        costs(fronts),
    )
    return [table for table in made if table is not None]
