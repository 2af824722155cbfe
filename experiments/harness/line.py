"""The lines of an experiment: each is one way to spend the training budget.

A line is a strategy of the library, made by a function of a `Trial`, and trained through `ease.train`; it starts from a
new model or from another line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ease
from experiments.harness.lab import Lab

ENDLESS = 1_000_000  # epochs: budgets are in FLOPs


class Trial(NamedTuple):
    """The setting that a strategy is configured for."""

    lab: Lab
    seed: int
    lr: float
    flops: float
    """The part of the line's budget that is left."""
    reference: ease.StandardTransformer | None = None
    """The model of the line's reference."""

    @property
    def options(self) -> dict[str, Any]:
        """Optimizer settings and end of a phase, the same for every line."""
        ends = {"patience": None, "max_epochs": ENDLESS, "max_flops": self.flops}
        return {"lr": self.lr, "schedule": "cosine", "warmup": 0.05, **ends}


Make = Callable[[Trial], Any]
"""Makes a line's strategy: a configuration that `ease.STRATEGIES` lists or one with the same interface. A strategy that
trains no phase has `apply(model, data)` instead of `next_phase`."""


def make(kind: Callable[..., Any], **settings: Any) -> Make:
    """A strategy whose configuration takes the options of a phase in addition to its own settings."""
    return partial(_make, kind, settings)


def _make(kind: Callable[..., Any], settings: dict[str, Any], trial: Trial) -> Any:
    return kind(**settings, **trial.options)


def grow(layers: int, **settings: Any) -> Make:
    """ASHEM's second phase on a finished first one: new layers on the frozen brick, trained on its hard tokens."""
    return partial(_grow, layers, settings)


def _grow(layers: int, settings: dict[str, Any], trial: Trial) -> ease.ASHEMConfig:
    options = trial.options
    own = {f"phase2_{name}": options.pop(name) for name in ("lr", "patience", "max_epochs", "max_flops")}
    lab = trial.lab
    config = {"phase1_layers": lab.brick, "phase2_layers": layers, "mine_epochs": lab.mine_epochs, "seed": trial.seed}
    return ease.ASHEMConfig(**{**config, **own, **options, "pretrained": True, **settings})


@dataclass(frozen=True)
class Line:
    """One way to spend the budget."""

    strategy: Make
    on: str | None = None
    """The line whose model this one starts from; its FLOPs count as part of this line's."""
    share: float = 1.0
    """Share of the budget that the line has spent when it is done; not 1 where other lines start from it, and for lines
    of another budget."""
    part: tuple[float, float] = (0.0, 1.0)
    """The part of the training text that the line reads."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """The model's settings that differ from the lab's."""
    reference: str | None = None
    """A line whose model the strategy evaluates without starting from it; its FLOPs are not counted."""
    thresholds: tuple[float, ...] = ()
    """Fixed thresholds that are measured in addition to quantiles."""
    rates: bool = True
    """Whether the line tries the lab's learning rates; False for a line that has no learning rate."""
    rate_of: str | None = None
    """A line whose chosen learning rate this one takes over instead of trying the lab's."""


BASE = "phase 1"
PART = 0.6  # of the budget for phase 1, where lines start from it
CONTINUED = "phase 1 continued"


def standard_name(layers: int) -> str:
    """The name of the line that trains a standard model."""
    return f"standard, {layers} layer{'' if layers == 1 else 's'}"


def at_budget(name: str, share: float) -> str:
    """The name of a line that spends another budget than the lab's."""
    return name if share == 1 else f"{name}, {share:g}x the budget"


def curve_names(curve: Mapping[float, Sequence[int]]) -> dict[str, float]:
    """Names of the lines that train standard models at several budgets, with the share of the budget."""
    return {at_budget(standard_name(k), share): share for share, depths in curve.items() for k in depths}


def curve(budgets: Mapping[float, Sequence[int]]) -> dict[str, Line]:
    """Standard models at other budgets than the lab's: share of the budget -> depths.

    They take over the learning rate that the model of their depth chose at the lab's budget.
    """
    return {
        at_budget(standard_name(k), share): Line(
            make(ease.StandardConfig, num_layers=k), share=share, rate_of=standard_name(k)
        )
        for share, depths in budgets.items()
        for k in depths
    }


def standard_names(depths: Sequence[int]) -> tuple[str, ...]:
    return tuple(map(standard_name, depths))


def baselines(depths: Sequence[int]) -> dict[str, Line]:
    """Phase 1, from which other lines start; standard models of every depth; and phase 1 continued."""
    shallow = make(ease.StandardConfig, num_layers=depths[0])
    models = [Line(make(ease.StandardConfig, num_layers=k)) for k in depths]
    return {
        BASE: Line(shallow, share=PART),
        **dict(zip(standard_names(depths), models, strict=True)),
        CONTINUED: Line(shallow, on=BASE),
    }
