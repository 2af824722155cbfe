"""ease.runs.lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ease.models import StandardTransformer
from ease.policy import Policy
from ease.training.phases import History, Phase


class Line(NamedTuple):
    """One trained model with its policy, and what training it took in all."""

    name: str
    model: StandardTransformer
    policy: Policy
    curve: list[dict[str, Any]]
    flops: Mapping[str, float]
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def then(self, name: str, phase: Phase, history: History, model: StandardTransformer) -> Line:
        """The line that goes on from this one by one phase."""
        rows = [
            {
                **row,
                "phase": phase.name,
                "flops": row["flops"] + self.total,
                "seconds": row["seconds"] + self.seconds,
            }
            for row in history.rows
        ]
        flops = {k: self.flops.get(k, 0.0) + history.flops.get(k, 0.0) for k in {**self.flops, **history.flops}}
        return Line(name, model, phase.config.policy, self.curve + rows, flops, self.seconds + history.seconds)
