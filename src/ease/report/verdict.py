"""The verdict of a run: a sentence that compares the last phase with the baselines."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ease.report.formats import SPLITS, format_ppl, format_share, leaving_early, number

# Perplexities closer than this (relative) are called even: a single seed cannot order them.
EVEN = 0.01

# Speeds closer than this (relative) are called even: rounds of one measurement differ by as much.
EVEN_SPEED = 0.03

# Suffix of a line's name if the same model is scored without routing.
UNROUTED = ", no routing"

# Training FLOPs closer than this (relative) are called equal: a budget ends on a whole step.
EQUAL_FLOPS = 0.02


@dataclass(frozen=True)
class Verdict:
    """A verdict on the last phase of a run, in words.

    Attributes:
        tone: "better", "worse", "mixed", "even", or "none" if the metrics allow no fair comparison.
        headline: one or two sentences, the verdict itself and the best line.
        detail: the numbers behind it.
        line: name of the judged line.
        against: name of the line it is compared with, or None.
        split: "test" or "val", the split of the metrics; None without metrics.
    """

    tone: str
    headline: str
    detail: str
    line: str
    against: str | None
    split: str | None


def verdict(summary: dict[str, Any]) -> Verdict:
    """Compare the last phase with the line named "... continued" and name the best line at equal training FLOPs.

    If the run has the same model with the suffix ", no routing", the verdict is on what routing saves and costs.

    Better or worse means that perplexities differ by at least 1%. Lines whose training FLOPs differ by more than 2%, or
    were not recorded, get no verdict. If another line is better than the last phase at equal training FLOPs, the tone
    is at best "mixed".

    Args:
        summary: content of a run's summary.json.

    Returns:
        The verdict.
    """
    lines = summary["lines"]
    names = {line["name"]: line for line in lines}
    routed = next((line for line in lines if f"{line['name']}{UNROUTED}" in names), None)
    if routed is not None:
        return _judge_routing(routed, names[f"{routed['name']}{UNROUTED}"])
    # The first line is the result of phase 1, which later phases are built on; it is never judged.
    later = [line for line in lines[1:] if re.fullmatch(r"phase \d+", line["name"].lower())]
    continued = [line for line in lines if line["name"].lower().endswith("continued")]
    line = (later or lines)[-1]
    # Of several continued lines, the fair one is the closest in training FLOPs.
    against = min(continued, key=lambda each: _difference(each, line), default=None)
    if not later or against is None:
        split = next((s for s in SPLITS if number(line, s, "ppl") is not None), None)
        headline = "No metrics were recorded."
        if split:
            headline = f"{_capital(line['name'])} reaches {_all_metrics(line, split)}."
        lacks = "line that continues phase 1 with the same training FLOPs" if later else "later phase to judge"
        return Verdict("none", headline, f"No verdict on phases: this run has no {lacks}.", line["name"], None, split)

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
    fair = [each for each in lines if _difference(each, line) <= EQUAL_FLOPS and number(each, split, "ppl")]
    best = min(fair, key=lambda each: each[split]["ppl"], default=line)
    if tone != "none" and len(fair) > 2:
        tone, sentence = _with_best(tone, _capital(sentence), line, best, len(fair), split)
    for other in [against] if best is line or best is against else [against, best]:
        cost = _relative(line, other, split, "flops_per_token")
        if cost is not None:
            detail.append(f"A token costs {1 + cost:.2f} times the FLOPs of a token of {other['name']}.")
    detail.append("One random seed: differences under 1% count as even.")
    return Verdict(tone, _capital(sentence), " ".join(detail), line["name"], against["name"], split)


def _with_best(
    tone: str, sentence: str, line: dict[str, Any], best: dict[str, Any], count: int, split: str
) -> tuple[str, str]:
    """The tone and the sentence, with the best of the lines at equal training FLOPs."""
    if best is line:
        return tone, f"{sentence} It is the best of {count} lines."
    relative = _relative(line, best, split, "ppl") or 0.0
    named = f"The best of {count} lines is {best['name']}: perplexity {format_ppl(best[split]['ppl'])}"
    if relative < EVEN:
        return tone, f"{sentence} {named}, even with {format_ppl(line[split]['ppl'])}."
    higher = f"{line['name']} is {relative:.1%} higher"
    return "mixed" if tone == "better" else tone, f"{sentence} {named}; {higher}."


def _judge_routing(line: dict[str, Any], bare: dict[str, Any]) -> Verdict:
    """A verdict on what routing saves in FLOPs and costs in perplexity."""
    split = next((s for s in SPLITS if all(number(each, s, "ppl") for each in (line, bare))), None)
    flops, ppl = (_relative(line, bare, split, key) for key in ("flops_per_token", "ppl"))
    if split is None or flops is None or ppl is None:
        return Verdict("none", "No metrics were recorded.", "", line["name"], bare["name"], split)
    saved = f"saves {-flops:.1%} of the FLOPs per token" if flops < 0 else f"costs {flops:.1%} more FLOPs per token"
    higher = f"at {abs(ppl):.1%} {'higher' if ppl > 0 else 'lower'} perplexity"
    quality = "at even perplexity" if abs(ppl) < EVEN else higher
    tone = "worse" if flops >= 0 else "better" if ppl < EVEN else "mixed"
    detail = (
        f"{format_share(leaving_early(line, split))} of the tokens exit early. "
        f"{_compared('Perplexity', line, bare, split, 'ppl')}, on {SPLITS[split]}; FLOPs include every head. "
        "The report shows other thresholds."
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
    value, reference, relative = line[split][key], against[split][key], _relative(line, against, split, key)
    assert relative is not None
    lower = "lower" if relative < 0 else "higher"
    return f"{what} {format_ppl(value)} against {format_ppl(reference)} ({abs(relative):.1%} {lower})".strip()


def _all_metrics(line: dict[str, Any], split: str) -> str:
    accuracy = number(line, split, "acc")
    also = f" and accuracy {accuracy:.1%}" if accuracy is not None else ""
    return f"perplexity {format_ppl(line[split]['ppl'])}{also} on {SPLITS[split]}"


def _relative(line: dict[str, Any], against: dict[str, Any], split: str | None, key: str) -> float | None:
    path = (split, key) if split else (key,)
    value, reference = number(line, *path), number(against, *path)
    return value / reference - 1 if value is not None and reference else None


def _difference(line: dict[str, Any], other: dict[str, Any]) -> float:
    relative = _relative(line, other, None, "train_flops")
    return math.inf if relative is None else abs(relative)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
