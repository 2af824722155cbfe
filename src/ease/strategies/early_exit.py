"""Early exits trained jointly with the last layer (BranchyNet, Teerapittayanon et al. 2016, arXiv:1709.01686).

Every named exit has a loss in addition to that of the last layer. The exits learn from the text, from the last exit's
distribution, or from both (self-distillation). At inference a token leaves at the first exit that is confident;
BranchyNet decides by entropy, this implementation by the policy's confidence measure.
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
from ease.training.phases import Data, Phase, SinglePhase


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(PhaseOptions):
    """One phase on all tokens, from scratch or from a checkpoint."""

    name: ClassVar = "early-exit"

    num_layers: int = 4
    """Layers of a new model; a checkpoint has its own depth."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep; each has a loss, even if no token leaves there."""
    routing_threshold: float | Sequence[float] = 0.9
    """Confidence in [0, 1] at which a token leaves, one per exit; 0 means no routing."""
    exit_weight: float | Sequence[float] = 1.0
    """Weight of an exit's loss relative to the last layer's, one for all exits or one each; normalized to sum to 1."""
    objective: Literal["cross-entropy", "distillation", "both"] = "cross-entropy"
    """The exits learn from the text, from the last exit's distribution, or from both in equal parts."""
    temperature: float = 1.0
    """Temperature at which distillation compares distributions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Policy.of(self.exits, (1.0,) * len(self.exits))
        self.policy()
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
        """Weight of each exit's loss, before normalization."""
        if isinstance(self.exit_weight, int | float):
            return (self.exit_weight,) * len(self.exits)
        return tuple(self.exit_weight)

    def loss(self) -> Objective:
        """The objective at the exits."""
        return objective_named(self.objective, self.temperature)

    def policy(self) -> Policy:
        return Policy.of(self.exit_layer, self.routing_threshold)

    def phase(self, model: ExitModel, data: Data) -> Phase:
        last = model.num_layers
        Policy.of(self.exits, (1.0,) * len(self.exits)).check(last)
        weights = {**dict(zip(self.exits, self.weights, strict=True)), last: 1.0}
        weights = {layer: weight / sum(weights.values()) for layer, weight in weights.items()}
        config = TrainingConfig(None, self.routing_threshold, self.exit_layer, weights, self.loss())
        return Phase("early exit", config, data.train, data.val, self)

    def strategy(self) -> SinglePhase:
        return SinglePhase(self)
