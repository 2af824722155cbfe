"""Lines with a memory, brick 0, beside lines without: what tables give at no FLOPs, and what bricks add to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import ease
from experiments.harness.line import BASE, CONTINUED, Line, Trial, make

SHAPE = {"memory_orders": (2, 3, 4, 6)}
"""Settings of a model with a memory."""
SHARE = 0.1
"""Share of ASHEM's budget for the memory, its phase 1."""


def named(name: str) -> str:
    """The name of a line on a memory."""
    return f"memory, {name}"


def lines(plain: Mapping[str, Line], brick: int, deep: int) -> dict[str, Line]:
    """Standard models and growth without a memory, and lines on one, the most informative first.

    Args:
        plain: every line without a memory.
        brick, deep: layers of phase 1, after which tokens may exit, and of the models with an exit.
    """
    twins = {
        named(name): replace(line, shape={**line.shape, **SHAPE}, on=line.on and named(line.on))
        for name, line in plain.items()
    }
    standard = [name for name in plain if name.startswith("standard, ") and "tuning" not in name]
    curve = [name for name in standard if plain[name].share != 1]
    grown_plain = next(name for name in plain if name.startswith("progressive growth"))
    without = [*(name for name in standard if name not in curve), grown_plain]
    exits = {"num_layers": deep, "exit_layer": (0, brick), "routing_threshold": (0.0, 0.0)}
    first = make(ease.StandardConfig, num_layers=0)
    grown = make(ease.GrowthConfig, layers=(0, brick, deep), shares=(0.05, 0.3, 0.65))
    own = {
        "standard, 0 layers": first,
        f"progressive growth 0-{brick}-{deep}": grown,
        "ASHEM on brick 0": partial(ashem, deep),
        "early exit, exit 0 too": make(ease.EarlyExitConfig, **exits),
    }
    made = twins | {named(name): Line(strategy, shape=SHAPE) for name, strategy in own.items()}
    first_half = [*without, "standard, 0 layers", "gated", "ASHEM on brick 0", "early exit, exit 0 too"]
    second_half = [f"progressive growth 0-{brick}-{deep}", "gated, grown", "early exit", BASE, CONTINUED, "ASHEM"]
    return {
        BASE: plain[BASE],
        **{name: plain[name] for name in without},
        **{named(name): made[named(name)] for name in (*first_half, *second_half)},
        **{name: plain[name] for name in curve},
    }


def ashem(layers: int, trial: Trial) -> ease.ASHEMConfig:
    """ASHEM whose phase 1 is the memory."""
    options = trial.options
    by_phase = {name: options.pop(name) for name in ("lr", "patience", "max_epochs", "max_flops")}
    own = {f"phase{phase}_{name}": value for phase in (1, 2) for name, value in by_phase.items()}
    own |= {"phase1_max_flops": SHARE * trial.flops, "phase2_max_flops": (1 - SHARE) * trial.flops}
    return ease.ASHEMConfig(
        phase1_layers=0, phase2_layers=layers, mine_epochs=trial.lab.mine_epochs, seed=trial.seed, **own, **options
    )
