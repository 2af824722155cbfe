"""Discriminative fine-tuning: every layer learns at a rate of its own, the lower the slower.

Howard and Ruder 2018 (ULMFiT, arXiv:1801.06146), section 3.2: the rate of a layer is that of the layer above it divided
by 2.6. Their slanted triangular schedule is, here, a warmup; layers are not unfrozen one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ease.errors import EaseError
from ease.interface import ExitModel
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class DiscriminativeConfig(PhaseOptions):
    """One phase on all tokens with the loss on the last layer, from a checkpoint or from scratch."""

    name: ClassVar = "discriminative"

    num_layers: int = 4
    """Layers of the model; a checkpoint brings its own."""
    decay: float = 1 / 2.6
    """Learning rate of a layer as a share of that of the layer above it; the last one's and the head's is lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise EaseError(f"decay must lie in (0, 1], got {self.decay}: 1 gives every layer the same rate")

    def strategy(self) -> Discriminative:
        return Discriminative(self)


@dataclass
class Discriminative:
    """The strategy: one phase."""

    config: DiscriminativeConfig
    done: bool = False

    def policy(self) -> Policy:
        """Every token runs every layer."""
        return Policy()

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if self.done:
            return None
        self.done = True
        last = model.num_layers
        scales = {layer: self.config.decay ** (last - layer) for layer in range(1, last + 1)}
        config = TrainingConfig(layer_weights={last: 1.0}, layer_lr_scales=scales)
        return Phase("discriminative", config, data.train, data.val, self.config)
