"""A table as Markdown and LaTeX, and the formatting of numbers in it.

Differences of losses are shown in per cent of perplexity; one whose interval contains zero is marked as noise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis.statistics import Interval


@dataclass(frozen=True)
class Table:
    """A table and its notes."""

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
        """A `table` environment no wider than the text; it requires graphicx."""
        rows = [" & ".join(map(tex, row)) + r" \\" for row in self.rows]
        notes = [rf"\par\smallskip\raggedright\footnotesize {tex(note)}" for note in self.notes]
        head = " & ".join(map(tex, self.header)) + r" \\"
        start = [r"\begin{table}", rf"\caption{{{tex(self.title)}}}", r"\centering\small"]
        columns = "l" + "r" * (len(self.header) - 1)
        start += [rf"\sbox0{{\begin{{tabular}}{{{columns}}}"]
        body = [r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}}%"]
        fit = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
        return "\n".join([*start, *body, fit, *notes, r"\end{table}"]) + "\n"


def cells_of(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def write_tables(tables: Sequence[Table], folder: Path, name: str) -> None:
    """Write all tables to one Markdown page, and each as LaTeX to a file with the table's name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
    for table in tables:
        (folder / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")


ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "µ": r"$\mu$",
}


def tex(text: str) -> str:
    """Text as LaTeX, with code in backticks as typewriter."""
    escaped = "".join(ESCAPES.get(c, c) for c in text).replace("--", "-{}-")  # two hyphens would become a dash
    return re.sub('"([^"]*)"', r"``\1''", re.sub("`([^`]*)`", r"\\texttt{\1}", escaped))


# ---------------------------------------------------------------------------------------------------------
# Numbers


def percent(loss: float) -> float:
    """A difference of losses as a difference of perplexities in per cent."""
    return 100 * math.expm1(loss)


def short(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits."""
    if not math.isfinite(value):
        return "none"
    whole = len(f"{abs(value):.0f}")
    return f"{value:,.{max(0, digits - whole)}f}"


def signed(value: float) -> str:
    return f"{value:+.1f}"


def thousands(value: float) -> str:
    return f"{value / 1e3:,.1f}k"


def spread(interval: Interval, to: Callable[[float], float], show: Callable[[float], str]) -> str:
    """Mean and interval, each converted by `to` and printed by `show`."""
    if math.isnan(interval.mean):
        return "none"
    if interval.low is None or interval.high is None:
        return show(to(interval.mean))
    return f"{show(to(interval.mean))} ({show(to(interval.low))} to {show(to(interval.high))})"


def ppl(losses: Sequence[float]) -> str:
    """Perplexity, from a mean loss per seed."""
    return spread(Interval.of(losses), math.exp, short)


def difference(interval: Interval) -> str:
    """A difference of losses in per cent of perplexity, marked as noise if its interval contains zero."""
    text = spread(interval, percent, lambda value: f"{signed(value)}%")
    return text if interval.low is None or math.isnan(interval.mean) or not interval.noise else f"{text}, noise"
