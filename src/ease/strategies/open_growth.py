"""Open growth: the shallow loss on all tokens and the deep loss on hard tokens, with all layers learning.

Phase 1 trains the shallow brick on all tokens. Phase 2 grows it and freezes nothing: in every batch only the share of
the tokens with the lowest confidence at the shallow exit runs the new layers and is scored at the last one, while the
shallow loss continues on all tokens. The brick keeps learning, so every step selects its hard tokens anew. Without a
phase 1 the model is trained this way from the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ease.errors import EaseError, check_choice
from ease.evaluation.shares import policy_for_shares
from ease.interface import Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig, create_standard_config
from ease.training.mining import check_ratio
from ease.training.phases import Data, Phase
from ease.training.selection import LeastConfident


@dataclass(frozen=True, kw_only=True)
class OpenGrowthConfig(PhaseOptions):
    """Two phases; the limits on epochs and FLOPs span both."""

    name: ClassVar = "open-growth"

    shallow_layers: int = 2
    """Layers of the brick, and the exit."""
    deep_layers: int = 4
    """Layers after growth."""
    hard_ratio: float = 0.5
    """Hard tokens as a share of a batch; at inference the same share continues past the exit."""
    shallow_weight: float = 0.5
    """Weight of the shallow loss in phase 2, in (0, 1); the deep loss has the remaining weight."""
    first_share: float = 0.5
    """Share of the limits for phase 1; 0 for no phase 1 and a new model with all layers from the start."""
    grow_init: Literal["identity", "copy"] = "identity"
    """How new layers start."""
    deep_lr: float | None = None
    """Learning rate of phase 2 (lr by default)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shallow_layers < self.deep_layers:
            raise EaseError(
                f"deep_layers ({self.deep_layers}) must be more than shallow_layers ({self.shallow_layers}), at least 0"
            )
        check_ratio(self.hard_ratio)
        check_choice("grow_init", self.grow_init, ("identity", "copy"))
        if not 0 < self.shallow_weight < 1:
            raise EaseError(f"shallow_weight must lie in (0, 1), got {self.shallow_weight}: both losses need a weight")
        if not 0 <= self.first_share < 1:
            raise EaseError(f"first_share must lie in [0, 1), got {self.first_share}: phase 2 needs a share")
        self.check_phases(2 if self.first_share else 1)
        self.second()

    @property
    def num_layers(self) -> int:
        """Depth of a new model when training starts."""
        return self.shallow_layers if self.first_share else self.deep_layers

    def second(self) -> PhaseOptions:
        """How phase 2 learns."""
        return self.part(1 - self.first_share, self.deep_lr)

    def strategy(self) -> OpenGrowth:
        return OpenGrowth(self, done=int(not self.first_share))


@dataclass
class OpenGrowth:
    """The strategy. Its state is the number of phases done and the policy found last."""

    config: OpenGrowthConfig
    done: int = 0
    found: Policy = field(default_factory=Policy)

    def policy(self) -> Policy:
        """The shallow exit, with the threshold under which the hard share of the validation tokens continues."""
        return self.found

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        c = self.config
        if self.done == 2:  # the threshold for inference, as `ease calibrate` would choose it: no training FLOPs
            self.found, _ = self.route(model, data.val)
            return None
        depths = (c.shallow_layers,) if c.first_share else (c.shallow_layers, c.deep_layers)
        if model.num_layers not in depths:
            expected = " or ".join(map(str, depths))
            raise EaseError(f"open growth starts from {expected} layers but the model has {model.num_layers}")
        self.done += 1
        if self.done == 1:
            options = c.part(c.first_share)
            return Phase("phase 1", create_standard_config(c.shallow_layers), data.train, data.val, options)
        if model.num_layers < c.deep_layers:
            model.grow(c.deep_layers, c.grow_init)
        weights = {c.shallow_layers: c.shallow_weight, c.deep_layers: 1 - c.shallow_weight}
        config = TrainingConfig(layer_weights=weights, selection=LeastConfident({c.shallow_layers: c.hard_ratio}))
        route = lambda model: self.route(model, data.val)  # noqa: E731
        return Phase("phase 2", config, data.train, data.val, c.second(), route=route)

    def route(self, model: ExitModel, val: Batches) -> tuple[Policy, float]:
        """The policy under which the hard share of the validation tokens continues, and its FLOPs."""
        return policy_for_shares(model, val, (self.config.shallow_layers,), (self.config.hard_ratio,))
