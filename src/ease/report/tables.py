"""Tables for a terminal of 80 columns: the lines of a run, decoding speed, and evaluations at several thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ease.report.formats import (
    SPLITS,
    format_flops,
    format_ppl,
    format_share,
    leaving_early,
    number,
    plural,
)
from ease.report.verdict import EVEN_SPEED

if TYPE_CHECKING:
    from rich.table import Table


def text_table(summary: dict[str, Any]) -> Table:
    """The lines of a run as a table for the terminal, one row per line, measured on the test split.

    Columns: perplexity, accuracy, hard-token perplexity, share of tokens that exit before the last layer, layers run
    per token as a share of full depth, FLOPs per token, and training FLOPs. A metric that was not recorded is a dash.

    Args:
        summary: content of a run's summary.json.

    Returns:
        A rich table at most 80 columns wide; long names wrap.
    """
    from rich.markup import escape

    split = "test" if any(number(line, "test", "ppl") for line in summary["lines"]) else "val"
    title = f"{summary.get('name') or 'run'}: {summary.get('strategy') or ''}".rstrip(": ")
    head = number(summary, "head_in_layers")
    cost = (
        "" if head is None else f"; one head costs as much as {plural(head, 'layer', '.2g')} and is included in FLOPs"
    )
    table = _table(title, f"measured on {SPLITS[split]}{cost}", "line")
    for column in ("ppl", "acc", "hard\nppl", "exit\nearly", "layers\nrun", "FLOPs\n/token", "training\nFLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in summary["lines"]:
        table.add_row(
            escape(line["name"]),
            format_ppl(number(line, split, "ppl")),
            format_share(number(line, split, "acc")),
            format_ppl(number(line, split, "hard_ppl")),
            format_share(leaving_early(line, split)),
            format_share(number(line, split, "compute_cost")),
            format_flops(number(line, split, "flops_per_token")),
            format_flops(number(line, "train_flops")),
        )
    return table


def evaluation_table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Evaluations of one run at several thresholds as a table for the terminal.

    Args:
        name: name of the run.
        rows: metrics as `ease.runs.reopen.evaluate` returns them.

    Returns:
        A rich table at most 80 columns wide; long lists of thresholds wrap.
    """
    from rich.markup import escape

    table = _table(name, f"measured on the {rows[0]['split']}", "threshold")
    for column in ("ppl", "acc", "exit\nearly", "layers\nrun", "FLOPs\n/token", "FLOPs\n/full", "time\n/full"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(", ".join(f"{t:.4g}" for t in row["thresholds"]) or "no routing"),
            format_ppl(number(row, "ppl")),
            format_share(number(row, "acc")),
            format_share(number(row, "shallow_ratio")),
            format_share(number(row, "compute_cost")),
            format_flops(number(row, "flops_per_token")),
            format_share(number(row, "flops_share")),
            format_share(number(row, "time_share")),
        )
    return table


def calibration_table(name: str, target: str, record: dict[str, Any]) -> Table:
    """The candidates of a calibration as a table for the terminal, the best first; an asterisk marks the one stored.

    Args:
        name: name of the run.
        target: the target in words.
        record: content of policy.json.

    Returns:
        A rich table at most 80 columns wide.
    """
    from rich.markup import escape

    where, machine = plural(record["calibration"]["sequences"], "sequence"), record.get("machine") or {}
    table = _table(
        f"{name}: {target}",
        f"measured on the {where} that decide; time is that of routed decoding, one row on {machine.get('cpu')}, "
        f"{plural(machine.get('threads'), 'thread')}; FLOPs and time are shares of full depth's, whose perplexity is "
        f"{format_ppl(number(record['best'], 'ppl_full'))}",
        "exits",
    )
    table.add_column("measure", no_wrap=True, vertical="bottom")
    for column in ("exit\nearly", "agreement", "ppl", "FLOPs", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in record["table"]:
        missed = "" if row["reached"] else " misses the target"
        mark = " *" if record["installed"] and row == record["best"] else ""
        table.add_row(
            escape(", ".join(map(str, row["exits"])) + mark + missed),
            escape(row["measure"]),
            format_share(number(row, "shallow_ratio")),
            f"{row['agreement']:.2%}",
            format_ppl(number(row, "ppl")),
            format_share(number(row, "flops_share")),
            format_share(number(row, "time_share")),
        )
    return table


def calibration_sentence(target: str, record: dict[str, Any]) -> str:
    """What a calibration stored, and what that saves on sequences that chose nothing; or why full depth stays.

    Args:
        target: the target in words.
        record: content of policy.json.
    """
    best, unseen, policy = record["best"], record["held_out"], record["policy"]
    exits = (
        f"{best['measure']} at {plural(len(best['exits']), 'layer').split()[1]} {', '.join(map(str, best['exits']))}"
    )
    if not record["installed"]:
        return (
            f"Full depth stays: no policy with {target} saves both FLOPs and time, and the best, {exits}, lets "
            f"{best['shallow_ratio']:.1%} of the tokens exit early for {best['flops_share']:.1%} of the FLOPs and "
            f"{best['time_share']:.0%} of the time of full depth."
        )
    thresholds = zip(policy["exits"], policy["thresholds"], strict=True)
    return (
        f"Thresholds for {target} with {best['measure']}: "
        + ", ".join(f"{threshold:.4g} at layer {exit}" for exit, threshold in thresholds)
        + f"\nOn the {unseen['sequences']} test sequences that were not used to choose them: "
        f"{unseen['shallow_ratio']:.1%} of the tokens exit early, {unseen['flops_share']:.1%} of the FLOPs, "
        f"agreement {unseen['agreement']:.2%}, perplexity {unseen['ppl']:.2f} ({unseen['ppl_full']:.2f} at full "
        f"depth). Decoding takes {best['time_share']:.0%} of the time of full depth."
    )


def decoding_table(summary: dict[str, Any]) -> Table | None:
    """Decoding speed in every mode as a table for the terminal.

    Args:
        summary: content of a run's summary.json.

    Returns:
        A rich table at most 80 columns wide, or None if decoding was not timed.
    """
    from rich.markup import escape

    rows = _decoding_rows(summary)
    if not rows:
        return None
    decoding, machine = summary["generation"], summary.get("machine") or {}
    threads, rounds = plural(machine.get("threads"), "thread"), plural(decoding.get("rounds"), "round")
    where = f"times full: median and range of {rounds} on {machine.get('cpu')}, {threads}"
    table = _table(f"{decoding.get('line')}, {plural(decoding.get('new_tokens'), 'new token')} per row", where, "mode")
    for column in ("rows", "tokens/s", "times\nfull", "range", "layers\n/token", "same\ntokens", "drafts\naccepted"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        speed, layers = number(row, "tokens_per_second"), number(row, "layers_per_token")
        ratio, low, high = (number(row, key) for key in ("ratio", "low", "high"))
        table.add_row(
            escape(str(row.get("way"))),
            str(row.get("batch")),
            "–" if speed is None else f"{speed:.0f}",
            "–" if ratio is None else f"{ratio:.2f}",
            "–" if low is None or high is None else f"{low:.2f}–{high:.2f}",
            "–" if layers is None else f"{layers:.2f}",
            format_share(number(row, "same_tokens")),
            format_share(number(row, "acceptance")),
        )
    return table


def decoding_sentence(summary: dict[str, Any]) -> str | None:
    """Decoding speed of routed and exact decoding compared with full decoding, in one sentence.

    A speed counts as even if it differs from full decoding by less than 3%, or if its range over the rounds contains 1.

    Args:
        summary: content of a run's summary.json.

    Returns:
        The sentence, or None if decoding was not timed.
    """
    parts: dict[Any, list[str]] = {}
    for row in _decoding_rows(summary):
        mode, ratio = str(row.get("way")).split(",")[0], number(row, "ratio")
        # Exact decoding is represented by its default, which finds the draft exit during decoding.
        if ratio is None or mode == "full" or (mode == "exact" and row.get("way") != "exact, auto"):
            continue
        low, high = number(row, "low"), number(row, "high")
        even = abs(ratio - 1) < EVEN_SPEED or (low is not None and high is not None and low <= 1 <= high)
        mark = "even" if even else "faster" if ratio > 1 else "slower"
        parts.setdefault(row.get("batch"), []).append(f"{mode} at {ratio:.2f} times ({mark})")
    batches = [f"with {plural(n, 'row')}, {' and '.join(speeds)}" for n, speeds in parts.items()]
    return f"Speed compared with full decoding: {'; '.join(batches)}." if batches else None


def drafts_sentence(summary: dict[str, Any]) -> str | None:
    """How often the draft brick of a run agrees with the full model; None without one."""
    found = summary.get("drafts")
    if not isinstance(found, dict):
        return None
    one, two, three = (format_share(number(found, name)) for name in ("agreement", "agreement_2", "agreement_3"))
    return (
        f"The draft brick predicts the full model's token at {one} of the places of the test split, "
        f"the next 2 at {two}, and the next 3 at {three}."
    )


def _table(title: str, caption: str, first: str) -> Table:
    """An empty table that fits 80 columns: no frame, and only the first column wraps."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), caption=escape(caption), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold", vertical="bottom")
    return table


def _decoding_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    decoding = summary.get("generation")
    rows = decoding.get("rows") if isinstance(decoding, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
