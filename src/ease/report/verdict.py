"""ease.report.verdict."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ease.report.formats import SPLITS, format_ppl, format_share, leaving_early, number

if TYPE_CHECKING:
    pass

# Perplexities closer than this (relative) are called even: a single seed cannot order them.
EVEN = 0.01

# Speeds closer than this (relative) are called even: rounds of one measurement lie that far apart.
EVEN_SPEED = 0.03

# What follows the name of a line where the same model is scored without routing.
UNROUTED = ", no routing"

# Training FLOPs closer than this (relative) are called equal: a budget ends on a whole step.
EQUAL_FLOPS = 0.02


@dataclass(frozen=True)
class Verdict:
    """What a run's figures say about its last phase, in words.

    Attributes:
        tone: "better", "worse", "mixed", "even", or "none" when the figures allow no fair comparison.
        headline: one sentence, the verdict itself.
        detail: the figures behind it.
        line: name of the judged line.
        against: name of the line it is judged against, or None.
        split: "test" or "val": what the figures were measured on; None without figures.
    """

    tone: str
    headline: str
    detail: str
    line: str
    against: str | None
    split: str | None


def verdict(summary: dict[str, Any]) -> Verdict:
    """Judge the last phase against the line named "... continued", which got the same training FLOPs.

    Where a line stands beside the same model "no routing", what routing saves and costs is judged instead.

    Better or worse means a perplexity at least 1% apart; training FLOPs more than 2% apart, or not
    recorded, are no fair comparison and get no verdict.

    Args:
        summary: what a run's `summary.json` holds.
    """
    lines = summary["lines"]
    names = {line["name"]: line for line in lines}
    routed = next((line for line in lines if f"{line['name']}{UNROUTED}" in names), None)
    if routed is not None:
        return _judge_routing(routed, names[f"{routed['name']}{UNROUTED}"])
    # The first line is where phase 1 ended: it is what later phases build on, never the one judged.
    later = [line for line in lines[1:] if re.fullmatch(r"phase \d+", line["name"].lower())]
    continued = [line for line in lines if line["name"].lower().endswith("continued")]
    line = (later or lines)[-1]
    # Of several that were trained on, the one closest in training FLOPs is the fair opponent.
    against = min(continued, key=lambda each: _apart(each, line), default=None)
    if not later or against is None:
        split = next((s for s in SPLITS if number(line, s, "ppl") is not None), None)
        figures = (
            f"{_capital(line['name'])} reaches {_all_figures(line, split)}." if split else "No figures were recorded."
        )
        lacks = "line that continues phase 1 on the same training FLOPs" if later else "later phase to judge"
        return Verdict("none", figures, f"No verdict on phases: this run has no {lacks}.", line["name"], None, split)

    pair = f"{line['name']} against {against['name']}"
    split = next((s for s in SPLITS if all(number(each, s, "ppl") for each in (line, against))), None)
    if split is None:
        return Verdict("none", f"No verdict: no perplexity was recorded for {pair}.", "", line["name"], None, None)

    overall, hard = (_relative(line, against, split, key) for key in ("ppl", "hard_ppl"))
    flops = _relative(line, against, None, "train_flops")
    tone, sentence = _judge(line["name"], against["name"], overall, hard, flops)
    detail = [_compared("Perplexity", line, against, split, "ppl") + " overall"]
    if hard is not None:
        detail[0] += ", " + _compared("", line, against, split, "hard_ppl") + " on hard tokens"
    detail[0] += f", on {SPLITS[split]}."
    cost = _relative(line, against, split, "flops_per_token")
    if cost is not None:
        detail.append(f"Its tokens cost {1 + cost:.2f} times the FLOPs of those of {against['name']}.")
    best = min(lines, key=lambda each: number(each, split, "ppl") or math.inf)
    if best is not line and best is not against:
        detail.append(
            f"The lowest perplexity of all lines is that of {best['name']}: {format_ppl(best[split]['ppl'])}."
        )
    detail.append("One seed: differences under 1% count as even.")
    return Verdict(tone, _capital(sentence), " ".join(detail), line["name"], against["name"], split)


def _judge_routing(line: dict[str, Any], bare: dict[str, Any]) -> Verdict:
    """What routing saves, and what it costs in perplexity."""
    split = next((s for s in SPLITS if all(number(each, s, "ppl") for each in (line, bare))), None)
    flops, ppl = (_relative(line, bare, split, key) for key in ("flops_per_token", "ppl"))
    if split is None or flops is None or ppl is None:
        return Verdict("none", "No figures were recorded.", "", line["name"], bare["name"], split)
    saved = f"saves {-flops:.1%} of the FLOPs per token" if flops < 0 else f"costs {flops:.1%} more FLOPs per token"
    higher = f"at {abs(ppl):.1%} {'higher' if ppl > 0 else 'lower'} perplexity"
    quality = "at even perplexity" if abs(ppl) < EVEN else higher
    tone = "worse" if flops >= 0 else "better" if ppl < EVEN else "mixed"
    detail = (
        f"{format_share(leaving_early(line, split))} of the tokens leave early. "
        f"{_compared('Perplexity', line, bare, split, 'ppl')}, on {SPLITS[split]}; every head is counted in the FLOPs. "
        "Other thresholds stand in the report."
    )
    return Verdict(tone, f"Routing {saved}, {quality}.", detail, line["name"], bare["name"], split)


def _judge(line: str, against: str, overall: float | None, hard: float | None, flops: float | None) -> tuple[str, str]:
    """The tone and the sentence; arguments are relative differences, negative where `line` is lower."""
    assert overall is not None
    if flops is None:
        return "none", f"No verdict: training FLOPs were not recorded for both {line} and {against}."
    if abs(flops) > EQUAL_FLOPS:
        more = "more" if flops > 0 else "fewer"
        return "none", f"No fair verdict: {line} had {abs(flops):.0%} {more} training FLOPs than {against}."
    marks = {"overall": _mark(overall)} | ({"on hard tokens": _mark(hard)} if hard is not None else {})
    where, equal = " and ".join(marks), "at equal training FLOPs"
    if set(marks.values()) == {"better"}:
        return "better", f"{line} beats {against} {where}, {equal}."
    if set(marks.values()) == {"even"}:
        return "even", f"{line} and {against} are even {where}, {equal}."
    # The better one first: "better on hard tokens but worse overall".
    parts = sorted((f"{mark} {place}" for place, mark in marks.items()), key=lambda part: part[:6] != "better")
    if "better" in marks.values():
        return "mixed", f"Mixed: compared with {against}, {equal}, {line} is {' but '.join(parts)}."
    return "worse", f"{line} does not beat {against}: {equal} it is {' and '.join(parts)}."


def _mark(relative: float) -> str:
    return "even" if abs(relative) < EVEN else "better" if relative < 0 else "worse"


def _compared(what: str, line: dict[str, Any], against: dict[str, Any], split: str, key: str) -> str:
    ours, theirs, relative = line[split][key], against[split][key], _relative(line, against, split, key)
    assert relative is not None
    lower = "lower" if relative < 0 else "higher"
    return f"{what} {format_ppl(ours)} against {format_ppl(theirs)} ({abs(relative):.1%} {lower})".strip()


def _all_figures(line: dict[str, Any], split: str) -> str:
    accuracy = number(line, split, "acc")
    also = f" and accuracy {accuracy:.1%}" if accuracy is not None else ""
    return f"perplexity {format_ppl(line[split]['ppl'])}{also} on {SPLITS[split]}"


def _relative(line: dict[str, Any], against: dict[str, Any], split: str | None, key: str) -> float | None:
    path = (split, key) if split else (key,)
    ours, theirs = number(line, *path), number(against, *path)
    return ours / theirs - 1 if ours is not None and theirs else None


def _apart(line: dict[str, Any], other: dict[str, Any]) -> float:
    relative = _relative(line, other, None, "train_flops")
    return math.inf if relative is None else abs(relative)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
