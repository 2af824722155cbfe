"""Baselines for exits on a finished model: the model as it is, and the model truncated to its first layers."""

from __future__ import annotations

from dataclasses import dataclass

import ease
from ease.training.config import create_standard_config
from experiments.harness.line import Trial


@dataclass(frozen=True)
class UnchangedConfig:
    """A finished model without any training."""

    @property
    def num_layers(self) -> None:
        """None: the finished model has its own depth."""

    def strategy(self) -> Unchanged:
        return Unchanged()


def unchanged(trial: Trial) -> UnchangedConfig:
    """The strategy of a line."""
    return UnchangedConfig()


class Unchanged:
    """The strategy, which has no phase."""

    def policy(self) -> ease.Policy:
        return ease.Policy()

    def apply(self, model: ease.ExitModel, data: ease.Data) -> None:
        """Leave the model as it is."""


@dataclass(frozen=True, kw_only=True)
class TruncatedConfig(ease.PhaseOptions):
    """The first layers of a finished model, frozen, with a trained norm before the head, as an exit has."""

    num_layers: int
    """The number of layers that remain."""

    def strategy(self) -> Truncated:
        return Truncated(self)


@dataclass
class Truncated:
    """The strategy: one phase."""

    config: TruncatedConfig
    done: bool = False

    def policy(self) -> ease.Policy:
        return ease.Policy()

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> ease.Phase | None:
        if self.done:
            return None
        self.done = True
        last = model.num_layers
        config = create_standard_config(last)
        return ease.Phase("truncated", config, data.train, data.val, self.config, first=last + 1, exits=(last,))
