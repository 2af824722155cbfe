"""Deep models: growth saves early steps, whose share of the FLOPs rises with the depth of the finished model.

Learning rates are tried at an eighth of the budget, by a standard model and by a grown one, and taken over by the other
lines of each kind and by the larger budgets.
"""

from __future__ import annotations

from dataclasses import replace

import ease
from experiments.harness.line import Line, at_budget, make, standard_name, standard_names

DEPTHS = (4, 8, 12)
EIGHTH, QUARTER = 0.125, 0.25
"""Shares of the budget."""


BASE = at_budget(standard_name(DEPTHS[0]), EIGHTH)
"""The line whose final model determines the hard tokens."""
STANDARD, GROWN = standard_name(12), "progressive growth 3-6-12"
"""The lines that try the learning rates."""


def _lines() -> dict[str, Line]:
    """The lines in the order of what they tell."""
    standard = {standard_name(k): Line(make(ease.StandardConfig, num_layers=k)) for k in DEPTHS}
    grown = {
        GROWN: Line(make(ease.GrowthConfig, layers=(3, 6, 12))),
        "progressive growth 2-4-8-12": Line(make(ease.GrowthConfig, layers=(2, 4, 8, 12))),
        "progressive growth 3-6-12, late": Line(make(ease.GrowthConfig, layers=(3, 6, 12), shares=(1 / 3,) * 3)),
        "progressive growth 2-4-8-12, late": Line(make(ease.GrowthConfig, layers=(2, 4, 8, 12), shares=(1 / 4,) * 4)),
        "gated, grown": Line(
            make(ease.GatedConfig, deep_layers=12, exit_layer=(4, 8), growth=(2,), keep=0.5, first_share=0.3)
        ),
    }
    few = [STANDARD, GROWN, *standard_names(DEPTHS[:2])]
    most = [GROWN, *standard_names(DEPTHS), "progressive growth 2-4-8-12", "gated, grown"]
    most += [name for name in grown if name not in most]
    found = {}
    for share, names in ((EIGHTH, few), (QUARTER, most), (1.0, most)):
        for name in names:
            line, first = (grown[name], GROWN) if name in grown else (standard[name], STANDARD)
            own, source = at_budget(name, share), at_budget(first, EIGHTH)
            found[own] = replace(line, share=share, rate_of=None if own == source else source)
    return found


LINES = _lines()
