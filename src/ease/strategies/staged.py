"""N-stage training: bricks of layers, each trained on the tokens that the bricks below are not confident of.

Phase 1 trains the first brick on all tokens. Every later phase mines hard tokens among those that are still active,
adds new layers, freezes everything else (embedding, lower layers, their exits, the shared head), and trains the new
layers on the hard tokens only, each in its full sequence. At inference there are N exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ease.errors import EaseError, check_choice, check_counts, check_fields, check_number
from ease.interface import Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import ProgressBatches
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.mining import MinedBatches, check_ratio
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(PhaseOptions):
    """One phase of N-stage training."""

    layers: int
    """Depth of the model in this phase."""
    ratio: float = 1.0
    """Hard tokens as a share of all training tokens, in (0, 1]; 1 in the first phase."""
    supervise: Literal["last", "every"] = "last"
    """The loss at the last layer of the phase's brick, or at every layer of it (staged deep supervision)."""
    mine_epochs: int = 1
    """Epochs of training batches to mine; if an epoch is a slice of the text, more epochs cover more of it."""
    grow_init: Literal["identity", "copy"] = "identity"
    """New layers start as the identity or as copies of trained layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        check_counts(1, mine_epochs=self.mine_epochs)
        check_choice("supervise", self.supervise, ("last", "every"))
        check_choice("grow_init", self.grow_init, ("identity", "copy"))


@dataclass(frozen=True)
class StagedConfig:
    """Two or more phases of growing depth."""

    name: ClassVar = "staged"

    phases: tuple[PhaseConfig, ...] = (
        PhaseConfig(layers=2),
        PhaseConfig(layers=4, ratio=0.5, lr=3e-4),
        PhaseConfig(layers=6, ratio=0.2, lr=3e-4),
    )
    """From shallow to deep."""
    trunk_budget: float = 2e9
    """Maximum bytes of the frozen trunk's states to keep in memory; the remaining ones are recomputed."""
    seed: int = 0
    """Random seed of the order of mined batches."""
    pretrained: bool = False
    """The model passed to training has finished phase 1; training starts with phase 2."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.phases:
            raise EaseError("N-stage training needs at least one phase")
        check_number("trunk_budget", self.trunk_budget, 0, finite=False)
        if self.pretrained and len(self.phases) < 2:
            raise EaseError("a pretrained model has finished phase 1: add a second phase, or set pretrained to False")
        if self.phases[0].ratio != 1:
            raise EaseError(f"the first phase is trained on all tokens: set its ratio to 1, got {self.phases[0].ratio}")
        for number, (below, phase) in enumerate(zip(self.phases, self.phases[1:], strict=False), 1):
            if phase.layers <= below.layers:
                raise EaseError(
                    f"phase {number + 1} must be deeper than phase {number}: "
                    f"got {phase.layers} layers after {below.layers}"
                )

    def strategy(self) -> Staged:
        return Staged(self, done=int(self.pretrained))

    @property
    def num_layers(self) -> int:
        """Depth of the model when training starts."""
        return self.phases[0].layers


@dataclass
class Staged:
    """The strategy. Its state is the exits and thresholds mined so far."""

    config: StagedConfig
    done: int = 0
    exits: list[int] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    mined: list[dict[str, Any]] = field(default_factory=list)

    def policy(self) -> Policy:
        """The exits mined so far, with their thresholds."""
        return Policy.of(self.exits, self.thresholds)

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        if self.done == len(self.config.phases):
            return None
        below, plan = self.config.phases[max(0, self.done - 1)], self.config.phases[self.done]
        if model.num_layers != below.layers:
            raise EaseError(
                f"phase {self.done + 1} starts from {below.layers} layers but the model has {model.num_layers}: plan "
                f"phase {max(1, self.done)} with {model.num_layers} layers (phase{max(1, self.done)}-layers of ASHEM)"
            )
        first, batches, spent = 0, data.train, {}
        if self.done:
            first = model.num_layers + 1
            mined = MinedBatches(
                model,
                ProgressBatches(data.train, data.progress("mining"), plan.mine_epochs),
                self.policy(),
                plan.ratio,
                epochs=plan.mine_epochs,
                budget=self.config.trunk_budget,
                max_flops=plan.max_flops,
                seed=self.config.seed,
            )
            self.exits.append(model.num_layers)
            self.thresholds.append(mined.threshold)
            self.mined.append({"threshold": mined.threshold, "count": mined.hard, "of": mined.total})
            model.grow(plan.layers, plan.grow_init)
            batches, spent = mined, {"mining": mined.flops}
        return self._phase(plan, first, batches, data, spent=spent)

    def _phase(self, plan: PhaseConfig, first: int, batches: Batches, data: Data, **options: Any) -> Phase:
        """The next phase: layers `first` and up learn from `batches`; validation routes at the exits mined so far."""
        self.done += 1
        every = range(min(max(1, first), plan.layers), plan.layers + 1)
        brick: Sequence[int] = every if plan.supervise == "every" else (plan.layers,)
        config = TrainingConfig(
            layer_weights={layer: 1 / len(brick) for layer in brick},
            exit_layer=tuple(self.exits) or 1,
            routing_threshold=tuple(self.thresholds) or 0.0,
        )
        return Phase(f"phase {self.done}", config, batches, data.val, plan, first=first, **options)
