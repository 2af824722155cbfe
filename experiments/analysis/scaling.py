"""Scaling of a strategy's distance from the baseline front, and its extrapolation to 1B parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import plots
from experiments.analysis.fronts import Fronts
from experiments.analysis.statistics import Fit, Interval
from experiments.analysis.table import Table, difference

MIN_SCALES = 3  # for a fit
BILLION = 6 * 1e9 * 20e9
"""Training FLOPs of 1B parameters at 20 tokens per parameter (Hoffmann et al. 2022, arXiv:2203.15556): 6 N D."""


def gaps(data: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, list[float]]]]:
    """Strategy -> (training FLOPs, loss above the baseline front for every seed) at each scale, from small to large."""
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for fronts in sorted(map(Fronts, data), key=lambda fronts: fronts.data["lab"]["budget"]):
        for name in fronts.strategies:
            above = fronts.above(fronts.best(name))
            if not any(map(math.isnan, above)):
                found.setdefault(name, []).append((fronts.data["lab"]["budget"], above))
    return found


def fits(found: dict[str, list[tuple[float, list[float]]]]) -> dict[str, Fit]:
    """Strategy -> straight line in log10 of training FLOPs through every seed's gap, if there are enough scales."""
    return {
        name: Fit.of(*zip(*((math.log10(flops), gap) for flops, above in seen for gap in above), strict=True))
        for name, seen in found.items()
        if len({flops for flops, _ in seen}) >= MIN_SCALES
    }


def table(data: Sequence[dict[str, Any]], notes: Sequence[str]) -> Table:
    """A row per strategy, from the `test.json` of every scale; `notes` are appended to the table's own."""
    found, fitted = gaps(data), fits(gaps(data))
    budgets = sorted({one["lab"]["budget"] for one in data})
    rows = []
    for name, seen in found.items():
        at = dict(seen)
        fit = fitted.get(name)
        rows.append(
            [
                name,
                *(difference(Interval.of(at[flops])) if flops in at else "" for flops in budgets),
                difference(fit.slope) if fit else "none",
                difference(fit.at(math.log10(BILLION))) if fit else "none",
            ]
        )
    decades = math.log10(BILLION / max(budgets))
    about = (
        f"Least squares over every seed of {len(budgets)} scales, linear in log10 of training FLOPs; the seeds of a "
        f"scale count as independent. The last column is a 95% prediction interval for {BILLION:.1e} training FLOPs "
        f"(1B parameters, 20 tokens per parameter), {decades:.1f} decades beyond the largest scale, and is valid only "
        "if the trend stays linear that far."
        if fitted
        else f"No fit: it needs {MIN_SCALES} scales, and {len(budgets)} are done."
    )
    return Table(
        "scales",
        "Distance of every strategy from the baseline front as scale grows",
        ["line", *(f"{flops:.1e} FLOPs" for flops in budgets), "change per decade", "at 1B parameters"],
        rows,
        ["At the routing that validation prefers; negative is better.", about, *notes],
    )


def picture(data: Sequence[dict[str, Any]], stem: Path) -> None:
    """Plot the strategies over the scales, those that are best at the largest scale in colour."""
    found = gaps(data)
    order = sorted(found, key=lambda name: (-len(found[name]), Interval.of(found[name][-1][1]).mean))
    intervals = {name: [(flops, Interval.of(above)) for flops, above in found[name]] for name in order}
    plots.scales(intervals, fits(found), stem)
