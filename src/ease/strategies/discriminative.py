"""Discriminative fine-tuning: each layer has its own learning rate, lower layers a lower one.

Howard and Ruder 2018 (ULMFiT, arXiv:1801.06146), section 3.2: the rate of a layer is that of the layer above divided by
2.6. Their slanted triangular schedule is a warmup here, and layers are not unfrozen one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ease.errors import EaseError
from ease.interface import ExitModel
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.phases import Data, Phase, SinglePhase


@dataclass(frozen=True, kw_only=True)
class DiscriminativeConfig(PhaseOptions):
    """One phase on all tokens with the loss on the last layer, from a checkpoint or from scratch."""

    name: ClassVar = "discriminative"

    num_layers: int = 4
    """Layers of a new model; a checkpoint has its own depth."""
    decay: float = 1 / 2.6
    """Learning rate of a layer as a share of that of the layer above; the last layer and the head learn at `lr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise EaseError(f"decay must lie in (0, 1], got {self.decay}: 1 gives every layer the same rate")

    def policy(self) -> Policy:
        return Policy()

    def phase(self, model: ExitModel, data: Data) -> Phase:
        last = model.num_layers
        scales = {layer: self.decay ** (last - layer) for layer in range(1, last + 1)}
        config = TrainingConfig(layer_weights={last: 1.0}, layer_lr_scales=scales)
        return Phase("discriminative", config, data.train, data.val, self)

    def strategy(self) -> SinglePhase:
        return SinglePhase(self)
