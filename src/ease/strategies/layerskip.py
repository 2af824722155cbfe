"""LayerSkip's training: layer dropout that increases with depth, and a loss at every exit, under a curriculum.

Elhoushi et al. 2024 (arXiv:2404.16710), sections 4.1.1 and 4.1.2. In contrast to the paper, every exit has its own
norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ease.errors import EaseError, check_choice, check_counts
from ease.interface import ExitModel
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.phases import Data, Phase, SinglePhase, Step


@dataclass(frozen=True, kw_only=True)
class LayerSkipConfig(PhaseOptions):
    """One phase on all tokens, from scratch or from a checkpoint."""

    name: ClassVar = "layerskip"

    num_layers: int = 4
    """Layers of a new model; a checkpoint has its own depth."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep. The first layer has no loss."""
    routing_threshold: float | Sequence[float] = 0.9
    """Confidence in [0, 1] at which a token leaves, one per exit."""
    layer_dropout: float = 0.1
    """Probability that a sequence skips the last layer; it falls towards lower layers, and is 0 for the first."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """Layer dropout over the phase: constant, which suits a checkpoint, or increasing, which suits a new model."""
    exit_scale: float = 0.2
    """Weight of the losses of early exits relative to the last one's."""
    curriculum: Literal["none", "rotational", "gradual"] = "rotational"
    """Exits with a loss in a step: all, every `rotation`-th in turn, or increasingly many from the last one down."""
    rotation: int = 2
    """Steps after which the rotational curriculum has used every exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dropout_schedule", self.dropout_schedule, ("constant", "exponential"))
        check_choice("curriculum", self.curriculum, ("none", "rotational", "gradual"))
        if not 0 <= self.layer_dropout < 1:
            raise EaseError(f"layer_dropout must lie in [0, 1), got {self.layer_dropout}")
        if not 0 < self.exit_scale <= 1:
            raise EaseError(f"exit_scale must lie in (0, 1], got {self.exit_scale}")
        check_counts(1, rotation=self.rotation)
        self.policy()

    def policy(self) -> Policy:
        return Policy.of(self.exit_layer, self.routing_threshold)

    def phase(self, model: ExitModel, data: Data) -> Phase:
        last = model.num_layers
        # The weights without a curriculum, so that the phase names every exit that a step may use.
        weights = {layer: w for layer, w in self.weights(last).items() if w > 0} if last > 1 else {1: 1.0}
        config = TrainingConfig(None, self.routing_threshold, self.exit_layer, weights)
        curriculum = lambda steps, fraction: self.step(last, steps, fraction)  # noqa: E731
        return Phase("layerskip", config, data.train, data.val, self, curriculum=curriculum)

    def strategy(self) -> SinglePhase:
        return SinglePhase(self)

    def weights(self, last: int) -> dict[int, float]:
        """Layer -> weight of its loss if all exits have one: it increases with depth, and the last is by far the
        largest."""
        early = {layer: self.exit_scale * layer * (layer - 1) / 2 for layer in range(1, last)}
        return {**early, last: last - 1 + self.exit_scale * (last - 1) * (last - 2) / 2}

    def step(self, last: int, steps: int, progress: float) -> Step:
        """Loss weights and layer dropout of one step in a model of `last` layers."""
        weights = self.weights(last) if last > 1 else {1: 1.0}
        if self.curriculum == "rotational":
            weights = {k: w for k, w in weights.items() if k == last or k % self.rotation == steps % self.rotation}
        elif self.curriculum == "gradual":  # all exits have a loss from the middle of the phase on
            lowest = last - int(2 * progress * last)
            weights = {k: w for k, w in weights.items() if k >= lowest}
        total = sum(weights.values())
        strength = self.layer_dropout
        if self.dropout_schedule == "exponential":
            strength *= math.exp(progress * math.log(2)) - 1
        depth = {k: math.exp((k - 1) / max(1, last - 1) * math.log(2)) - 1 for k in range(1, last + 1)}
        skip = {k: strength * share for k, share in depth.items() if strength * share > 0}
        return Step({k: w / total for k, w in weights.items() if w > 0}, skip)
