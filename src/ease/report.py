"""The report of a run: one HTML file that opens offline, and the same table for a terminal.

Notable in it:

- The file holds all it needs: the runs' figures as JSON, one style sheet, one script. Its content security
  policy forbids every request.
- What a run's files say (names, notes, token texts) enters the page as JSON only and is shown as text, so
  nothing in it can become markup.
- The verdict is worded here, not in the page: the terminal and the report say the same sentence.
- Figures that are absent show as a dash; a report never fills a gap.
"""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EaseError

if TYPE_CHECKING:
    from rich.table import Table

# Perplexities closer than this (relative) are called even: a single seed cannot order them.
EVEN = 0.01
# Speeds closer than this (relative) are called even: rounds of one measurement lie that far apart.
EVEN_SPEED = 0.03
# What follows the name of a line where the same model is scored without routing.
UNROUTED = ", no routing"
# Training FLOPs closer than this (relative) are called equal: a budget ends on a whole step.
EQUAL_FLOPS = 0.02

# The page's script, in the order its parts build on each other.
SCRIPTS = ("ui.js", "charts.js", "sections.js", "decoding.js", "explorer.js", "page.js")

SPLITS = {"test": "held-out test tokens", "val": "validation tokens (choices were made on them)"}


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
        split = next((s for s in SPLITS if _number(line, s, "ppl") is not None), None)
        figures = (
            f"{_capital(line['name'])} reaches {_all_figures(line, split)}." if split else "No figures were recorded."
        )
        lacks = "line that continues phase 1 on the same training FLOPs" if later else "later phase to judge"
        return Verdict("none", figures, f"No verdict on phases: this run has no {lacks}.", line["name"], None, split)

    pair = f"{line['name']} against {against['name']}"
    split = next((s for s in SPLITS if all(_number(each, s, "ppl") for each in (line, against))), None)
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
    best = min(lines, key=lambda each: _number(each, split, "ppl") or math.inf)
    if best is not line and best is not against:
        detail.append(f"The lowest perplexity of all lines is that of {best['name']}: {_ppl(best[split]['ppl'])}.")
    detail.append("One seed: differences under 1% count as even.")
    return Verdict(tone, _capital(sentence), " ".join(detail), line["name"], against["name"], split)


def _judge_routing(line: dict[str, Any], bare: dict[str, Any]) -> Verdict:
    """What routing saves, and what it costs in perplexity."""
    split = next((s for s in SPLITS if all(_number(each, s, "ppl") for each in (line, bare))), None)
    flops, ppl = (_relative(line, bare, split, key) for key in ("flops_per_token", "ppl"))
    if split is None or flops is None or ppl is None:
        return Verdict("none", "No figures were recorded.", "", line["name"], bare["name"], split)
    saved = f"saves {-flops:.1%} of the FLOPs per token" if flops < 0 else f"costs {flops:.1%} more FLOPs per token"
    higher = f"at {abs(ppl):.1%} {'higher' if ppl > 0 else 'lower'} perplexity"
    quality = "at even perplexity" if abs(ppl) < EVEN else higher
    tone = "worse" if flops >= 0 else "better" if ppl < EVEN else "mixed"
    detail = (
        f"{_share(_leaving_early(line, split))} of the tokens leave early. "
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
    return f"{what} {_ppl(ours)} against {_ppl(theirs)} ({abs(relative):.1%} {lower})".strip()


def _all_figures(line: dict[str, Any], split: str) -> str:
    accuracy = _number(line, split, "acc")
    also = f" and accuracy {accuracy:.1%}" if accuracy is not None else ""
    return f"perplexity {_ppl(line[split]['ppl'])}{also} on {SPLITS[split]}"


def _relative(line: dict[str, Any], against: dict[str, Any], split: str | None, key: str) -> float | None:
    path = (split, key) if split else (key,)
    ours, theirs = _number(line, *path), _number(against, *path)
    return ours / theirs - 1 if ours is not None and theirs else None


def _apart(line: dict[str, Any], other: dict[str, Any]) -> float:
    relative = _relative(line, other, None, "train_flops")
    return math.inf if relative is None else abs(relative)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


# ---------------------------------------------------------------------------------------------------------
# The terminal


def text_table(summary: dict[str, Any]) -> Table:
    """The lines of a run as a table for the terminal, one row a line, measured on the test split.

    Columns: perplexity, accuracy, hard-token perplexity, share of tokens leaving before the last exit,
    compute by formula (share of full depth), FLOPs per token and training FLOPs. A dash stands for a
    figure that was not recorded.

    Args:
        summary: what a run's `summary.json` holds.
    """
    from rich.markup import escape
    from rich.table import Table

    figures = "test" if any(_number(line, "test", "ppl") for line in summary["lines"]) else "val"
    title = f"{summary.get('name') or 'run'}: {summary.get('strategy') or ''}".rstrip(": ")
    head = _number(summary, "head_in_layers")
    cost = "" if head is None else f"; one head costs as much as {head:.2g} layers, and FLOPs have every head in them"
    table = Table(title=escape(title), caption=f"measured on {SPLITS[figures]}{cost}")
    table.add_column("line")
    for column in ("ppl", "acc", "hard ppl", "leaving early", "compute", "FLOPs/token", "training FLOPs"):
        table.add_column(column, justify="right")
    for line in summary["lines"]:
        row = [
            _ppl(_number(line, figures, "ppl")),
            _share(_number(line, figures, "acc")),
            _ppl(_number(line, figures, "hard_ppl")),
            _share(_leaving_early(line, figures)),
            _share(_number(line, figures, "compute_cost")),
            _flops(_number(line, figures, "flops_per_token")),
            _flops(_number(line, "train_flops")),
        ]
        table.add_row(escape(line["name"]), *row)
    return table


def decoding_table(summary: dict[str, Any]) -> Table | None:
    """The ways to decode, side by side, as a table for the terminal; None where they were not measured.

    Args:
        summary: what a run's `summary.json` holds.
    """
    from rich.markup import escape
    from rich.table import Table

    rows = _ways(summary)
    if not rows:
        return None
    told, about = summary["generation"], summary.get("machine") or {}
    where = f"median of {told.get('rounds')} rounds on {about.get('cpu')}, {about.get('threads')} thread(s)"
    table = Table(title=escape(f"{told.get('line')}, {told.get('new_tokens')} new tokens a row"), caption=escape(where))
    table.add_column("way")
    for column in ("rows", "tokens/s", "times full", "layers/token", "same tokens", "drafts accepted"):
        table.add_column(column, justify="right")
    for row in rows:
        speed, ratio, layers = (_number(row, key) for key in ("tokens_per_second", "ratio", "layers_per_token"))
        table.add_row(
            escape(str(row.get("way"))),
            str(row.get("batch")),
            "–" if speed is None else f"{speed:.0f}",
            "–" if ratio is None else f"{ratio:.2f}",
            "–" if layers is None else f"{layers:.2f}",
            _share(_number(row, "same_tokens")),
            _share(_number(row, "acceptance")),
        )
    return table


def decoding(summary: dict[str, Any]) -> str | None:
    """How routed and exact decoding compare with full, in words; None where they were not measured.

    Args:
        summary: what a run's `summary.json` holds.
    """
    said: dict[Any, list[str]] = {}
    for row in _ways(summary):
        way, ratio = str(row.get("way")).split(",")[0], _number(row, "ratio")
        # Exact decoding stands for itself as it comes: with the draft exit that it finds on the way.
        if ratio is None or way == "full" or (way == "exact" and row.get("way") != "exact, auto"):
            continue
        mark = "even" if abs(ratio - 1) < EVEN_SPEED else "faster" if ratio > 1 else "slower"
        said.setdefault(row.get("batch"), []).append(f"{way} at {ratio:.2f} times ({mark})")
    each = [f"with {n} row{'' if n == 1 else 's'}, {' and '.join(parts)}" for n, parts in said.items()]
    return f"Speed beside full decoding: {'; '.join(each)}." if each else None


def _ways(summary: dict[str, Any]) -> list[dict[str, Any]]:
    told = summary.get("generation")
    rows = told.get("rows") if isinstance(told, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _leaving_early(line: dict[str, Any], split: str) -> float | None:
    """The share of tokens that leave before the line's last layer."""
    shares, layers = (line.get(split) or {}).get("exit_shares"), _number(line, "num_layers")
    if not isinstance(shares, dict) or layers is None:
        return _number(line, split, "shallow_ratio")
    return sum(_number(shares, exit) or 0.0 for exit in shares if int(exit) < layers)


def _ppl(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _flops(value: float | None) -> str:
    """A count with a metric prefix: 1.21e13 is "12.1 T"."""
    if value is None:
        return "–"
    prefix = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**prefix:.3g} {' KMGTPE'[prefix]}".rstrip()


# ---------------------------------------------------------------------------------------------------------
# The page


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the report of one run, or of several side by side, as one HTML file that opens offline.

    Args:
        runs: run folders; each holds a `summary.json` and may hold an `explorer.json`.
        out: the file to write; its folder is made where it is missing.

    Returns:
        `out`.

    Raises:
        EaseError: no folders given, a folder is no run folder or its files are damaged, or `out`
            cannot be written.
    """
    if not runs:
        raise EaseError("No run folder was given: name at least one folder that holds a summary.json.")
    loaded = [_load(Path(run)) for run in runs]
    names = [run["summary"].get("name") or run["folder"] for run in loaded]
    for run, name in zip(loaded, names, strict=True):
        # Runs that share a name (seeds of one recipe, say) are told apart by their folders.
        run["label"] = name if names.count(name) == 1 else f"{name} ({run['folder']})"
    title = loaded[0]["label"] if len(loaded) == 1 else f"{len(loaded)} runs compared"
    assets = files("ease") / "report_assets"
    read = {name: (assets / name).read_text("utf-8") for name in ("page.html", "style.css", *SCRIPTS)}
    # One pass over the placeholders, so that text a run brought in is never searched for one.
    parts = {
        "TITLE": html.escape(str(title)),
        "STYLE": read["style.css"],
        "DATA": _embedded({"title": str(title), "runs": loaded}),
        "SCRIPT": "\n".join(read[name] for name in SCRIPTS),
    }
    page = re.sub("|".join(f"@@{name}@@" for name in parts), lambda hit: parts[hit[0].strip("@")], read["page.html"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate in a name is the one thing UTF-8 cannot hold.
        out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise EaseError(f"The report cannot be written to {out} ({error.strerror}): name another file.") from error
    return out


def _load(folder: Path) -> dict[str, Any]:
    summary = _read(folder / "summary.json")
    if summary is None:
        raise EaseError(f"{folder} is not a run folder: it holds no summary.json.")
    if summary.get("format") != 1:
        raise EaseError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r} and this version of ease reads "
            "format 1: use the version that wrote it."
        )
    lines = summary.get("lines")
    sound = isinstance(lines, list) and all(
        isinstance(line, dict)
        and isinstance(line.get("name"), str)
        and all(isinstance(line.get(split), dict | None) for split in SPLITS)
        for line in lines
    )
    if not sound or not lines:
        raise EaseError(f"{folder / 'summary.json'} is damaged (its lines cannot be read): run it again.")
    explorer = _read(folder / "explorer.json")
    told = {"verdict": asdict(verdict(summary)), "decoding": decoding(summary)}
    return {"folder": folder.resolve().name, "summary": summary, "explorer": explorer, **told}


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EaseError(f"{path} is damaged or cannot be read: run it again.") from error
    if not isinstance(value, dict):
        raise EaseError(f"{path} is damaged (it holds no JSON object): run it again.")
    return value


def _embedded(value: object) -> str:
    """JSON that no HTML parser can mistake for markup, in plain ASCII."""
    text = json.dumps(_plain(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """Figures to six digits, and None for those that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _number(value: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if sound else None
