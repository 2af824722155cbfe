"""How a strategy's distance from plain models moves with scale, and what a straight line would have it be at 1B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import plots as draw
from experiments.analysis.fronts import Fronts
from experiments.analysis.statistics import Fit, Interval
from experiments.analysis.tables import Table, difference

LEAST = 3  # scales for a fit
BILLION = 6 * 1e9 * 20e9
"""Training FLOPs of 1B parameters on 20 tokens for each (Hoffmann et al. 2022, arXiv:2203.15556): 6 N D."""


def gaps(data: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, list[float]]]]:
    """Strategy -> (training FLOPs, loss above the plain models of every seed) at each scale, from small to large."""
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for fronts in sorted(map(Fronts, data), key=lambda fronts: fronts.data["lab"]["budget"]):
        for name in fronts.strategies:
            above = fronts.above(fronts.best(name))
            if not any(map(math.isnan, above)):
                found.setdefault(name, []).append((fronts.data["lab"]["budget"], above))
    return found


def fits(found: dict[str, list[tuple[float, list[float]]]]) -> dict[str, Fit]:
    """A straight line in log10 of training FLOPs through every seed's gap, where there are enough scales."""
    return {
        name: Fit.of(*zip(*((math.log10(flops), gap) for flops, above in seen for gap in above), strict=True))
        for name, seen in found.items()
        if len({flops for flops, _ in seen}) >= LEAST
    }


def table(data: Sequence[dict[str, Any]], notes: Sequence[str]) -> Table:
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
    told = (
        f"Least squares through every seed of {len(budgets)} scales, straight in log10 of training FLOPs; the seeds of "
        f"a scale count as independent. The last column is a 95% prediction interval for {BILLION:.1e} training FLOPs "
        f"(1B parameters, 20 tokens for each), {decades:.1f} decades beyond the largest scale, and holds only if the "
        "line stays straight that far."
        if fitted
        else f"No fit: it needs {LEAST} scales, and {len(budgets)} are done."
    )
    return Table(
        "scales",
        "How far each strategy lies from plain models as scale grows",
        ["line", *(f"{flops:.1e} FLOPs" for flops in budgets), "change per decade", "at 1B parameters"],
        rows,
        ["Where validation likes each best; negative is better.", told, *notes],
    )


def picture(data: Sequence[dict[str, Any]], stem: Path) -> None:
    """The strategies that are best at the largest scale, over the scales."""
    found = gaps(data)
    order = sorted(found, key=lambda name: (-len(found[name]), Interval.of(found[name][-1][1]).mean))
    seen = {name: [(flops, Interval.of(above)) for flops, above in found[name]] for name in order}
    draw.scales(seen, fits(found), stem)
