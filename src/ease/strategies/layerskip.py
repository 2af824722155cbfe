"""LayerSkip's training: layer dropout that rises with depth and a loss at every exit, brought in by a curriculum.

Elhoushi et al. 2024, arXiv:2404.16710, sections 4.1.1 and 4.1.2. Unlike there, every exit has its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ease.errors import EaseError, check_choice, check_least
from ease.interface import ExitModel
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.phases import Data, Phase, Step


@dataclass(frozen=True, kw_only=True)
class LayerSkipConfig(PhaseOptions):
    """One phase on all tokens, from scratch or from a checkpoint."""

    name: ClassVar = "layerskip"

    num_layers: int = 4
    """Layers of the model; a checkpoint brings its own."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep; the loss leaves out the first layer."""
    routing_threshold: float | Sequence[float] = 0.9
    """Confidence in [0, 1] at which a token leaves, one per exit."""
    layer_dropout: float = 0.1
    """Chance that a sequence skips the last layer; lower layers are skipped less, the first never."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """Of layer dropout over the phase: as it is, which suits a checkpoint, or rising, which suits a new model."""
    exit_scale: float = 0.2
    """How much the losses of early exits weigh against the last one's."""
    curriculum: Literal["none", "rotational", "gradual"] = "rotational"
    """Exits whose loss counts in a step: all, every `rotation`-th in turn, or more and more from the last one down."""
    rotation: int = 2
    """Steps in which the rotational curriculum comes round to every exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dropout_schedule", self.dropout_schedule, ("constant", "exponential"))
        check_choice("curriculum", self.curriculum, ("none", "rotational", "gradual"))
        if not 0 <= self.layer_dropout < 1:
            raise EaseError(f"layer_dropout must lie in [0, 1), got {self.layer_dropout}")
        if not 0 < self.exit_scale <= 1:
            raise EaseError(f"exit_scale must lie in (0, 1], got {self.exit_scale}")
        check_least(1, rotation=self.rotation)
        Policy.of(self.exit_layer, self.routing_threshold)

    def strategy(self) -> LayerSkip:
        return LayerSkip(self)

    def weights(self, last: int) -> dict[int, float]:
        """Layer -> weight of its loss when all exits count: growing with depth, the last one's by far the largest."""
        early = {layer: self.exit_scale * layer * (layer - 1) / 2 for layer in range(1, last)}
        return {**early, last: last - 1 + self.exit_scale * (last - 1) * (last - 2) / 2}

    def step(self, last: int, steps: int, progress: float) -> Step:
        """Loss weights and layer dropout of one step in a model of `last` layers."""
        weights = self.weights(last) if last > 1 else {1: 1.0}
        if self.curriculum == "rotational":
            weights = {k: w for k, w in weights.items() if k == last or k % self.rotation == steps % self.rotation}
        elif self.curriculum == "gradual":  # all are in by the middle of the phase
            lowest = last - int(2 * progress * last)
            weights = {k: w for k, w in weights.items() if k >= lowest}
        total = sum(weights.values())
        strength = self.layer_dropout
        if self.dropout_schedule == "exponential":
            strength *= math.exp(progress * math.log(2)) - 1
        depth = {k: math.exp((k - 1) / max(1, last - 1) * math.log(2)) - 1 for k in range(1, last + 1)}
        skip = {k: strength * share for k, share in depth.items() if strength * share > 0}
        return Step({k: w / total for k, w in weights.items() if w > 0}, skip)


@dataclass
class LayerSkip:
    """The strategy: one phase."""

    config: LayerSkipConfig
    done: bool = False

    def policy(self) -> Policy:
        return Policy.of(self.config.exit_layer, self.config.routing_threshold)

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if self.done:
            return None
        self.done = True
        c, last = self.config, model.num_layers
        # Without a curriculum, so that every exit that a step may ask for is known.
        weights = {layer: w for layer, w in c.weights(last).items() if w > 0} if last > 1 else {1: 1.0}
        config = TrainingConfig(None, c.routing_threshold, c.exit_layer, weights)
        return Phase("layerskip", config, data.train, data.val, c, step=lambda done, at: c.step(last, done, at))
