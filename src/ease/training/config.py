"""What training is told: the two core options, `stages` and `routing_threshold`, and how a phase learns.

- A `TrainingConfig` says which exits have a loss, and who leaves where when routing is on.
- `PhaseOptions` are the optimizer's, its schedule's, and the rule that ends a phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ease.errors import EaseError, check_choice, check_least
from ease.policy import Policy
from ease.training.losses import CrossEntropy, Objective
from ease.training.selection import AllTokens, TokenSelection


@dataclass(frozen=True)
class StageConfig:
    """A contiguous run of layers, one brick, with a weight on the loss at every layer of it.

    Args:
        layers: (first, last), counted from 1, both included.
        loss_weight: weight of the loss at each of these layers; 0 means the exit's head is never computed.
    """

    layers: tuple[int, int]
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        first, last = self.layers
        if first < 1:
            raise EaseError(f"stage layers {tuple(self.layers)}: layers are counted from 1")
        if first > last:
            raise EaseError(f"stage layers {tuple(self.layers)} are reversed: write ({last}, {first})")


@dataclass(frozen=True)
class TrainingConfig:
    """The two core options, `stages` and `routing_threshold`, and where routing leaves.

    Args:
        stages: bricks whose loss weights add up, layer by layer.
        routing_threshold: confidence in [0, 1] at which a token leaves; 0.0 means no routing, and `exit_layer`
            is then ignored. For N exits, a sequence as long as `exit_layer`.
        exit_layer: the exit, or a sequence of exits from shallow to deep.
        layer_weights: layer -> weight of its loss, stated directly instead of `stages`.
        objective: what a token's loss is at the exits below the last one; there it is always cross entropy.
        selection: which tokens continue past an exit in training; all by default. A token that leaves has no teacher,
            so it learns from the text.
        layer_lr_scales: layer -> what the learning rate is multiplied by, above 0, in the layer's block and in its
            exit's norm and adapter; layer 1's holds for the embedding too. The shared head learns at 1, also where it
            is the embedding, and so do layers that are not named.
    """

    stages: Sequence[StageConfig] | None = None
    routing_threshold: float | Sequence[float] = 0.0
    exit_layer: int | Sequence[int] = 1
    layer_weights: Mapping[int, float] | None = None
    objective: Objective = field(default=CrossEntropy())
    selection: TokenSelection = field(default=AllTokens())
    layer_lr_scales: Mapping[int, float] = field(default_factory=dict)
    _weights: dict[int, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.stages is None) == (self.layer_weights is None):
            raise EaseError("give either stages or layer_weights, and not both")
        weights: dict[int, float] = {}
        for stage in self.stages or ():
            for layer in range(stage.layers[0], stage.layers[1] + 1):
                weights[layer] = weights.get(layer, 0.0) + stage.loss_weight
        weights = dict(sorted((self.layer_weights or weights).items()))
        if any(layer < 1 for layer in weights):
            raise EaseError(f"layer_weights names layer {min(weights)}: layers are counted from 1")
        parts = [stage.loss_weight for stage in self.stages or ()] + list(weights.values())
        if any(not (w >= 0 and math.isfinite(w)) for w in parts):
            raise EaseError(f"loss weights must be finite and not negative, got {parts}: use 0 to leave a layer out")
        if not any(weights.values()):
            raise EaseError("every loss weight is 0, so nothing would learn: give one layer a weight above 0")
        object.__setattr__(self, "_weights", weights)
        deepest = max(self.weights)
        self.selection.check(deepest, self.objective)
        for layer, scale in self.layer_lr_scales.items():
            if layer < 1 or not (scale > 0 and math.isfinite(scale)):
                raise EaseError(
                    f"layer_lr_scales has {scale} for layer {layer}: layers are counted from 1 and scales lie above 0"
                )
        Policy.of(self.exit_layer, self.routing_threshold)

    @property
    def weights(self) -> dict[int, float]:
        """Layer -> weight, from shallow to deep, for the layers whose loss counts."""
        return {layer: w for layer, w in self._weights.items() if w > 0}

    @property
    def policy(self) -> Policy:
        return Policy.of(self.exit_layer, self.routing_threshold)

    def check(self, num_layers: int, first: int = 1) -> None:
        """Refuses a configuration that a model of `num_layers` layers, of which `first` and up learn, cannot follow."""
        deepest = max(self._weights)
        if deepest > num_layers:
            raise EaseError(
                f"a stage reaches layer {deepest} but the model has {num_layers}: "
                "shorten the stage or use a deeper model"
            )
        if max(self.layer_lr_scales, default=0) > num_layers:
            raise EaseError(
                f"layer_lr_scales names layer {max(self.layer_lr_scales)} but the model has {num_layers}: "
                "leave it out or use a deeper model"
            )
        if min(self.selection.keep, default=first) < first:
            raise EaseError(
                f"the selection chooses at exit {min(self.selection.keep)}, in the frozen trunk below layer {first}, "
                "which runs all tokens: choose an exit from there up, or mine the tokens (ease.MinedBatches)"
            )
        self.policy.check(num_layers)

    def describe(self) -> str:
        """A few lines for people."""
        lines = [f"loss at layer {layer}: weight {w:g}" for layer, w in self.weights.items()]
        pairs = zip(self.policy.exits, self.policy.thresholds, strict=True)
        lines += [f"a token leaves after layer {e} when its confidence is at least {t:g}" for e, t in pairs]
        lines += [] if self.policy.exits else ["no routing: every token runs every layer"]
        lines += [
            f"in training the least confident {s:.0%} continue past exit {e}" for e, s in self.selection.keep.items()
        ]
        return "\n".join(lines)


def create_standard_config(num_layers: int) -> TrainingConfig:
    """The loss on the last layer only."""
    return TrainingConfig(stages=[StageConfig((num_layers, num_layers))])


def create_deep_supervision_config(
    num_layers: int, weighting: Literal["uniform", "depth"] = "uniform"
) -> TrainingConfig:
    """The loss on every layer (Lee et al. 2015), with weights that sum to 1: all equal, or w_k in proportion to k."""
    check_choice("weighting", weighting, ("uniform", "depth"))
    sizes = {k: k if weighting == "depth" else 1 for k in range(1, num_layers + 1)}
    return TrainingConfig(stages=[StageConfig((k, k), size / sum(sizes.values())) for k, size in sizes.items()])


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """How a phase learns, and the rule that ends it, whichever limit comes first."""

    lr: float = 1e-3
    """Learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate over the phase: as it is, or falling to a twentieth."""
    warmup: float = 0.0
    """Share of the phase in which the learning rate rises from nothing."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices only."""
    patience: int | None = 3
    """Epochs without a better (routed) validation loss before the phase ends; None: never for that reason."""
    max_epochs: int = 100
    """At most that many epochs."""
    max_flops: float | None = None
    """At most that many FLOPs, validation and mining included."""
    span: tuple[float, float] = (0.0, 1.0)
    """The stretch of schedule and warmup that the phase goes through, where several phases share one."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise EaseError(f"lr must be above 0, got {self.lr}")
        check_choice("schedule", self.schedule, ("constant", "cosine"))
        if self.max_flops is not None and not self.max_flops > 0:
            raise EaseError(f"max_flops must be above 0, got {self.max_flops}: use None for no such limit")
        if not 0 <= self.warmup < 1:
            raise EaseError(f"warmup is a share of the phase in [0, 1), got {self.warmup}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise EaseError(f"span is {self.span}: give where in the schedule the phase begins and ends, in [0, 1]")
        check_least(0, weight_decay=self.weight_decay)
        check_least(1, max_epochs=self.max_epochs, patience=self.patience)

    def part(self, share: float, lr: float | None = None, *, after: float | None = None) -> PhaseOptions:
        """For one of several phases: a share in (0, 1] of epochs (at least one) and FLOPs, perhaps its own rate.

        Args:
            after: the share that came before, where one schedule goes through all phases; None: each has its own.
        """
        own = {part.name: getattr(self, part.name) for part in fields(PhaseOptions)}
        own["lr"] = self.lr if lr is None else lr
        own["max_epochs"] = max(1, round(share * self.max_epochs))
        own["max_flops"] = self.max_flops and share * self.max_flops
        begin, width = self.span[0], self.span[1] - self.span[0]
        if after is not None:
            own["span"] = (begin + after * width, begin + min(1.0, after + share) * width)
        return PhaseOptions(**own)

    def lr_factor(self, progress: float) -> float:
        """What the learning rate is multiplied by at `progress` in [0, 1] of the phase."""
        progress = self.span[0] + progress * (self.span[1] - self.span[0])
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-2)
        if self.schedule == "constant":
            return 1.0
        done = (progress - self.warmup) / (1 - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
