"""Progressive growth: a shallow model is trained, new layers are added on top, and all layers continue to learn.

Nothing is frozen, every token is trained on in every phase, the loss is on the last layer, and one schedule spans all
phases. The gain is in the first steps: in a deep model most of their FLOPs go to layers whose input is not useful yet.
New layers start as the identity, or as copies of the layers below (progressive stacking, Gong et al. 2019, Efficient
Training of BERT by Progressively Stacking, ICML). By choice the last layers of earlier phases keep a loss, so that
tokens may leave there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ease.errors import EaseError, check_choice
from ease.interface import ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class GrowthConfig(PhaseOptions):
    """Two or more phases; the limits on epochs and FLOPs and the schedule span all of them."""

    name: ClassVar = "growth"

    layers: tuple[int, ...] = (2, 4)
    """Depth of the model in each phase."""
    shares: tuple[float, ...] = ()
    """Share of the limits for each phase; they sum to 1 (by default in proportion to depth; no layers count as one)."""
    grow_init: Literal["identity", "copy"] = "identity"
    """New layers start as the identity or as copies of trained layers."""
    exit_weight: float = 0.0
    """Total weight, in [0, 1), of the losses at the last layers of earlier phases; above 0 tokens may leave there."""
    routing_threshold: float = 0.9
    """Confidence in [0, 1] at which a token leaves, at each of these exits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) < 2 or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise EaseError(f"layers must name two or more depths, from shallow to deep, got {list(self.layers)}")
        shares = self.shares
        if shares and (len(shares) != len(self.layers) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6):
            raise EaseError(f"shares must be one above 0 per phase and sum to 1, got {list(shares)}")
        check_choice("grow_init", self.grow_init, ("identity", "copy"))
        if not 0 <= self.exit_weight < 1:
            raise EaseError(f"exit_weight must lie in [0, 1), got {self.exit_weight}: the last layer needs a weight")
        self.check_phases(len(self.layers))
        self.training(1)
        self.options(1)

    @property
    def num_layers(self) -> int:
        """Depth of the model when training starts."""
        return self.layers[0]

    def training(self, phase: int) -> TrainingConfig:
        """Loss and routing of phase number `phase`, counted from 0."""
        exits = self.layers[:phase] if self.exit_weight else ()
        weights = {exit: self.exit_weight / len(exits) for exit in exits}
        weights[self.layers[phase]] = 1 - sum(weights.values())
        return TrainingConfig(None, (self.routing_threshold,) * len(exits), exits, weights)

    def options(self, phase: int) -> PhaseOptions:
        """Optimizer settings and limits of phase number `phase`, counted from 0."""
        sizes = [max(1, depth) for depth in self.layers]
        shares = self.shares or [size / sum(sizes) for size in sizes]
        return self.part(shares[phase], after=sum(shares[:phase]))

    def strategy(self) -> Growth:
        return Growth(self)


@dataclass
class Growth:
    """The strategy. Its state is the number of phases done."""

    config: GrowthConfig
    done: int = 0

    def policy(self) -> Policy:
        """Exits at the last layers of earlier phases, if they have a loss."""
        return self.config.training(len(self.config.layers) - 1).policy

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        c, phase = self.config, self.done
        if phase == len(c.layers):
            return None
        below = c.layers[max(0, phase - 1)]
        if model.num_layers != below:
            raise EaseError(f"phase {phase + 1} starts from {below} layers but the model has {model.num_layers}")
        self.done += 1
        if phase:
            model.grow(c.layers[phase], c.grow_init)
        return Phase(f"phase {self.done}", c.training(phase), data.train, data.val, c.options(phase))
