"""Early exits trained jointly with the last layer, as in BranchyNet (Teerapittayanon et al. 2016, arXiv:1709.01686).

Every exit named has a loss beside the last one's; by choice the exits learn from the last one's distribution instead of
the text, or from both (self-distillation). At inference a token leaves at the first exit that is sure of it; there that
is told by entropy, here by the policy's measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ease.errors import EaseError
from ease.interface import ExitModel
from ease.policy import Policy, exits_named
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.losses import Objective, objective_named
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(PhaseOptions):
    """One phase on all tokens, from scratch or from a checkpoint."""

    name: ClassVar = "early-exit"

    num_layers: int = 4
    """Layers of the model; a checkpoint brings its own."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep; each has a loss, whether tokens leave there or not."""
    routing_threshold: float | Sequence[float] = 0.9
    """Confidence in [0, 1] at which a token leaves, one per exit; 0 means no routing."""
    exit_weight: float | Sequence[float] = 1.0
    """Weight of an exit's loss against the last layer's: one for all, or one per exit. In training they sum to 1."""
    objective: Literal["cross-entropy", "distillation", "both"] = "cross-entropy"
    """The exits learn from the text, from the last exit's distribution, or from both in equal parts."""
    temperature: float = 1.0
    """At which distillation compares distributions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Policy.of(self.exits, (1.0,) * len(self.exits))
        Policy.of(self.exit_layer, self.routing_threshold)
        if len(self.weights) != len(self.exits) or not self.exits or not all(w > 0 for w in self.weights):
            raise EaseError(
                f"exit_weight is {self.exit_weight} for exits {list(self.exits)}: "
                "name at least one exit, and give one weight above 0, or one per exit"
            )
        self.loss()

    @property
    def exits(self) -> tuple[int, ...]:
        return exits_named(self.exit_layer)

    @property
    def weights(self) -> tuple[float, ...]:
        """One per exit."""
        if isinstance(self.exit_weight, int | float):
            return (self.exit_weight,) * len(self.exits)
        return tuple(self.exit_weight)

    def loss(self) -> Objective:
        """What a token's loss is at the exits."""
        return objective_named(self.objective, self.temperature)

    def strategy(self) -> EarlyExit:
        return EarlyExit(self)


@dataclass
class EarlyExit:
    """The strategy: one phase."""

    config: EarlyExitConfig
    done: bool = False

    def policy(self) -> Policy:
        return Policy.of(self.config.exit_layer, self.config.routing_threshold)

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if self.done:
            return None
        self.done = True
        c, last = self.config, model.num_layers
        Policy.of(c.exits, (1.0,) * len(c.exits)).check(last)
        weights = {**dict(zip(c.exits, c.weights, strict=True)), last: 1.0}
        weights = {layer: weight / sum(weights.values()) for layer, weight in weights.items()}
        config = TrainingConfig(None, c.routing_threshold, c.exit_layer, weights, c.loss())
        return Phase("early exit", config, data.train, data.val, c)
