"""Bar charts of the results page, made from the tables in docs/data: `python -m experiments.analysis.charts`.

This file holds no measured number: each bar names a row and a column of a table, so that charts follow their tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from experiments.analysis.table import cells_of

DATA = Path(__file__).resolve().parents[2] / "docs" / "data"
COLOURS = ("#0072B2", "#E69F00")  # Okabe and Ito
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "ease",  # the same numbers make the same file
    "svg.fonttype": "none",
}


class Cell(NamedTuple):
    """A table's cell: how its row begins, and its column, counted from 0 (headings repeat)."""

    row: tuple[str, ...]
    column: int


class Chart(NamedTuple):
    """Grouped horizontal bars from one file."""

    title: str
    label: str
    """The label of the axis."""
    series: tuple[str, str]
    bars: dict[str, tuple[Cell | None, Cell | None]]
    """Name of a group -> the cells of both series; None: not measured."""
    mark: float | None = None
    """The value of the reference, marked by a line."""


def exits(run: str) -> tuple[Cell, Cell]:
    return Cell((run, "8"), 5), Cell((run, "8"), 8)


def measure(name: str) -> tuple[Cell, Cell]:
    return Cell((name,), 3), Cell((name,), 4)


def decoding(single: str, batch: str | None) -> tuple[Cell, Cell | None]:
    return Cell((single, "1"), 3), Cell((batch, "8"), 3) if batch else None


def training(comparison: str) -> tuple[Cell, Cell]:
    return Cell((comparison, "a"), 4), Cell((comparison, "b"), 4)


CHARTS = {
    "original-recipe": Chart(
        "The original recipe: perplexity of hard tokens",
        "perplexity of hard tokens (lower is better)",
        ("phase 1", "with phase 2"),
        {
            "in-sample": (
                Cell(("in-sample hard PPL, each token alone as trained",), 1),
                Cell(("in-sample hard PPL, each token alone as trained",), 2),
            ),
            "held-out": (Cell(("held-out hard PPL (test)",), 1), Cell(("held-out hard PPL (test)",), 2)),
        },
    ),
    "exits": Chart(
        "Exit 8 of 12 on a finished model: FLOPs that remain",
        "inference FLOPs, % of full depth (lower is better)",
        ("95% agreement with the last exit", "99% agreement"),
        {
            "joint training": exits("deep-joint"),
            "adapter, model frozen": exits("deep-adapter"),
            "distillation, model frozen": exits("deep-distilled"),
        },
        100,
    ),
    "measures": Chart(
        "Confidence measures: how well they predict agreement with the last exit",
        "AUROC (0.5: chance)",
        ("exit 4", "exit 8"),
        {
            "largest probability": measure("max-probability"),
            "margin": measure("margin"),
            "entropy": measure("entropy"),
            "classifier": measure("classifier"),
            "steadiness": measure("steadiness"),
        },
        0.5,
    ),
    "decoding": Chart(
        "Decoding speed relative to full decoding",
        "tokens per second, relative to full decoding (higher is better)",
        ("1 row", "8 rows"),
        {
            "full": decoding("full", "full"),
            "exact, source chosen while decoding": decoding("exact, auto", "exact, auto"),
            "exact, lookup and table": decoding("exact, lookup and table", "exact, lookup and table"),
            "exact, drafts from exit 8": decoding("exact, exit 8", "exact, exit 8"),
            "routed": decoding("routed, own policy", "routed, own policy"),
            "transformers, full": decoding("transformers, full", "transformers, full"),
            "transformers, assistant_early_exit=8": decoding("transformers, assistant_early_exit=8", None),
        },
        1,
    ),
    "training": Chart(
        "Training cost of other implementations relative to ease",
        "relative to ease (higher: ease needs less)",
        ("vocabulary 16,384, dim 64, 4 layers", "vocabulary 4,096, dim 256, 8 layers"),
        {
            "time of a step, transformers' Llama": training("step: transformers Llama / ease"),
            "time of a step, every head computed": training("weights 0, ..., 0, 1: every head / ease"),
            "peak memory of the process, all logits": training(
                "peak memory, whole process: all logits of every layer / ease"
            ),
        },
        1,
    ),
}


def number(text: str, cell: Cell) -> str:
    """The first number in a cell of the tables in `text`, as it is written there."""
    for line in text.splitlines():
        cells = cells_of(line)
        if line.startswith("|") and tuple(cells[: len(cell.row)]) == cell.row:
            found = re.search(r"\d[\d,]*(?:\.\d+)?", cells[cell.column])
            if found:
                return found[0]
    raise LookupError(f"no table has a number in column {cell.column} of the row {cell.row}")


def draw(chart: Chart, text: str, path: Path) -> None:
    """Writes `chart` as SVG, from the tables in `text`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, ax = pyplot.subplots(figsize=(6.4, 0.8 + 0.42 * len(chart.bars)), layout="constrained")
        for offset, colour, name, which in zip((-0.19, 0.19), COLOURS, chart.series, (0, 1), strict=True):
            cells = {place: cells[which] for place, cells in enumerate(chart.bars.values())}
            shown = {place: number(text, cell) for place, cell in cells.items() if cell is not None}
            values = [float(value.replace(",", "")) for value in shown.values()]
            bars = ax.barh([place + offset for place in shown], values, 0.36, color=colour, label=name)
            ax.bar_label(bars, list(shown.values()), padding=2, fontsize=7)
        if chart.mark is not None:
            ax.axvline(chart.mark, color="black", linewidth=0.8, linestyle=":", zorder=0)
        ax.set_yticks(range(len(chart.bars)), list(chart.bars))
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.set_xlabel(chart.label)
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(path, metadata={"Date": None, "Title": chart.title})
        pyplot.close(figure)


def main() -> None:
    for name, chart in CHARTS.items():
        draw(chart, (DATA / f"{name}.md").read_text(encoding="utf-8"), DATA / f"{name}.svg")


if __name__ == "__main__":
    main()
