"""ease.report.tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ease.report.formats import SPLITS, format_flops, format_ppl, format_share, leaving_early, number
from ease.report.verdict import (
    EVEN_SPEED,
)

if TYPE_CHECKING:
    from rich.table import Table


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

    figures = "test" if any(number(line, "test", "ppl") for line in summary["lines"]) else "val"
    title = f"{summary.get('name') or 'run'}: {summary.get('strategy') or ''}".rstrip(": ")
    head = number(summary, "head_in_layers")
    cost = "" if head is None else f"; one head costs as much as {head:.2g} layers, and FLOPs have every head in them"
    table = Table(title=escape(title), caption=f"measured on {SPLITS[figures]}{cost}")
    table.add_column("line")
    for column in ("ppl", "acc", "hard ppl", "leaving early", "compute", "FLOPs/token", "training FLOPs"):
        table.add_column(column, justify="right")
    for line in summary["lines"]:
        row = [
            format_ppl(number(line, figures, "ppl")),
            format_share(number(line, figures, "acc")),
            format_ppl(number(line, figures, "hard_ppl")),
            format_share(leaving_early(line, figures)),
            format_share(number(line, figures, "compute_cost")),
            format_flops(number(line, figures, "flops_per_token")),
            format_flops(number(line, "train_flops")),
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
        speed, ratio, layers = (number(row, key) for key in ("tokens_per_second", "ratio", "layers_per_token"))
        table.add_row(
            escape(str(row.get("way"))),
            str(row.get("batch")),
            "–" if speed is None else f"{speed:.0f}",
            "–" if ratio is None else f"{ratio:.2f}",
            "–" if layers is None else f"{layers:.2f}",
            format_share(number(row, "same_tokens")),
            format_share(number(row, "acceptance")),
        )
    return table


def decoding(summary: dict[str, Any]) -> str | None:
    """How routed and exact decoding compare with full, in words; None where they were not measured.

    Args:
        summary: what a run's `summary.json` holds.
    """
    said: dict[Any, list[str]] = {}
    for row in _ways(summary):
        way, ratio = str(row.get("way")).split(",")[0], number(row, "ratio")
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
