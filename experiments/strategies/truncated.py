"""What exits on a finished model are measured against: the model as it is, and the model without its last layers."""

from __future__ import annotations

from dataclasses import dataclass

import ease
from ease.training.config import create_standard_config
from experiments.harness.scheduler import Trial


@dataclass(frozen=True)
class WholeConfig:
    """A finished model, of which nothing learns."""

    @property
    def num_layers(self) -> None:
        """The model is a finished one and brings its depth."""

    def strategy(self) -> Whole:
        return Whole()


def whole(trial: Trial) -> WholeConfig:
    return WholeConfig()


class Whole:
    """The strategy: no phase."""

    def policy(self) -> ease.Policy:
        return ease.Policy()

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class CutConfig(ease.PhaseOptions):
    """The first layers of a finished model, frozen, under a norm that learns, as an exit's does."""

    num_layers: int
    """Layers that are left."""

    def strategy(self) -> Cut:
        return Cut(self)


@dataclass
class Cut:
    """The strategy: one phase."""

    config: CutConfig
    done: bool = False

    def policy(self) -> ease.Policy:
        return ease.Policy()

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> ease.Phase | None:
        if self.done:
            return None
        self.done = True
        last = model.num_layers
        config = create_standard_config(last)
        return ease.Phase("cut", config, data.train, data.val, self.config, first=last + 1, exits=(last,))
