"""Strategies of a single phase on all tokens: the standard one, and deep supervision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ease.errors import EaseError
from ease.interface import ExitModel
from ease.policy import Policy
from ease.training.config import (
    PhaseOptions,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
)
from ease.training.phases import Data, Phase, SinglePhase


@dataclass(frozen=True, kw_only=True)
class StandardConfig(PhaseOptions):
    """The loss on the last layer only; every token runs every layer."""

    name: ClassVar = "standard"

    num_layers: int = 4
    """Layers of the model."""

    def training(self) -> TrainingConfig:
        """The loss and the routing of the phase."""
        return create_standard_config(self.num_layers)

    def policy(self) -> Policy:
        return self.training().policy

    def phase(self, model: ExitModel, data: Data) -> Phase:
        if model.num_layers != self.num_layers:
            raise EaseError(
                f"num_layers is {self.num_layers} but the model has {model.num_layers}: set it to the model's"
            )
        return Phase("training", self.training(), data.train, data.val, self)

    def strategy(self) -> SinglePhase:
        return SinglePhase(self)


@dataclass(frozen=True, kw_only=True)
class DeepSupervisionConfig(StandardConfig):
    """The loss on every layer (Lee et al. 2015, arXiv:1409.5185), so that every layer can be an exit."""

    name: ClassVar = "deep-supervision"

    weighting: Literal["uniform", "depth"] = "uniform"
    """Weights of the losses: all equal, or proportional to the layer's number."""
    exit_layer: int | Sequence[int] = 1
    """The exit, or several from shallow to deep."""
    routing_threshold: float | Sequence[float] = 0.0
    """Confidence in [0, 1] at which a token leaves, one per exit; 0 means no routing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.training()

    def training(self) -> TrainingConfig:
        weights = create_deep_supervision_config(self.num_layers, self.weighting).weights
        return TrainingConfig(None, self.routing_threshold, self.exit_layer, weights)
