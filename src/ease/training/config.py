"""Training configuration: loss weights, routing, token selection, and per-phase optimizer settings.

- `TrainingConfig` holds the two core options, `stages` and `routing_threshold`.
- `PhaseOptions` holds optimizer settings, the learning rate schedule, and the limits that end a phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ease.errors import EaseError, check_choice, check_counts, check_fields, check_integer, check_number, checked
from ease.policy import Policy
from ease.training.losses import CrossEntropy, Objective
from ease.training.selection import AllTokens, TokenSelection


@dataclass(frozen=True)
class StageConfig:
    """A contiguous run of layers, one brick, with a weight on the loss at every layer of it.

    Args:
        layers: (first, last), counted from 1, both included; 0 stands for embedding and memory.
        loss_weight: weight of the loss at each of these layers; with 0 the exit's head is never evaluated.

    Raises:
        EaseError: the layers are reversed or below 0.
    """

    layers: tuple[int, int]
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("loss_weight", self.loss_weight)
        if not isinstance(self.layers, Sequence) or len(self.layers) != 2:
            raise EaseError(f"stage layers must be two layers, first and last, got {self.layers!r}")
        first, last = self.layers
        check_integer("the first layer of a stage", first, least=-(2**63))
        check_integer("the last layer of a stage", last, least=-(2**63))
        if first < 0:
            raise EaseError(f"stage layers {tuple(self.layers)}: layers are counted from 1 (0: embedding and memory)")
        if first > last:
            raise EaseError(f"stage layers {tuple(self.layers)} are reversed: write ({last}, {first})")


@dataclass(frozen=True)
class TrainingConfig:
    """Losses, routing, and token selection of training.

    Args:
        stages: bricks; where they overlap, their loss weights add up.
        routing_threshold: confidence in [0, 1] at which a token leaves in evaluation, one per exit; 0.0 means no
            routing, and `exit_layer` is then ignored.
        exit_layer: the exit, or a sequence of exits from shallow to deep.
        layer_weights: layer -> weight of its loss, as an alternative to `stages`.
        objective: the loss of a token at exits below the last one, where it is always cross entropy.
        selection: which tokens continue past an exit in training; all by default. A token that leaves has no teacher,
            so it learns from the text.
        layer_lr_scales: layer -> factor, above 0, of the learning rate of the layer's block, exit norm, and adapter;
            layer 1's also holds for the embedding. The shared head, even if tied to the embedding, and layers that are
            not named learn at factor 1.

    Raises:
        EaseError: weights, exits, thresholds, or scales that no model could be trained with.

    Example:
        >>> TrainingConfig(stages=[StageConfig(layers=(1, 2), loss_weight=0.5)], routing_threshold=0.9, exit_layer=1)
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
        check_fields(self)
        if (self.stages is None) == (self.layer_weights is None):
            raise EaseError("give either stages or layer_weights, and not both")
        weights: dict[int, float] = {}
        for stage in self.stages or ():
            for layer in range(stage.layers[0], stage.layers[1] + 1):
                weights[layer] = weights.get(layer, 0.0) + stage.loss_weight
        weights = dict(sorted((self.layer_weights or weights).items()))
        if any(layer < 0 for layer in weights):
            raise EaseError(f"layer_weights names layer {min(weights)}: layers are counted from 1 (0: memory)")
        parts = [stage.loss_weight for stage in self.stages or ()] + list(weights.values())
        if any(not (w >= 0 and math.isfinite(w)) for w in parts):
            raise EaseError(f"loss weights must be finite and not negative, got {parts}: use 0 to leave a layer out")
        if not any(weights.values()):
            raise EaseError("every loss weight is 0, so nothing would be trained: give one layer a weight above 0")
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
        """Layer -> weight, from shallow to deep, for the layers with a weight above 0."""
        return {layer: w for layer, w in self._weights.items() if w > 0}

    @property
    def policy(self) -> Policy:
        return Policy.of(self.exit_layer, self.routing_threshold)

    def check(self, num_layers: int, first: int = 0, first_exit: int = 0) -> None:
        """Raises `EaseError` if a model of `num_layers` layers, of which `first` and up learn, does not fit."""
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
        if min([*self.weights, *self.selection.keep]) < first_exit:
            raise EaseError(
                "a loss or a selection at layer 0 needs a model with a memory: set memory_orders, or leave layer 0 out"
            )
        self.policy.check(num_layers, first_exit)

    def describe(self) -> str:
        """A description in a few lines of text."""
        lines = [f"loss at layer {layer}: weight {w:g}" for layer, w in self.weights.items()]
        pairs = zip(self.policy.exits, self.policy.thresholds, strict=True)
        lines += [f"a token leaves after layer {e} when its confidence is at least {t:g}" for e, t in pairs]
        lines += [] if self.policy.exits else ["no routing: every token runs every layer"]
        lines += [
            f"in training the least confident {s:.0%} continue past exit {e}" for e, s in self.selection.keep.items()
        ]
        return "\n".join(lines)


@checked
def create_standard_config(num_layers: int) -> TrainingConfig:
    """A configuration with the loss on the last layer only."""
    return TrainingConfig(stages=[StageConfig((num_layers, num_layers))])


@checked
def create_deep_supervision_config(
    num_layers: int, weighting: Literal["uniform", "depth"] = "uniform"
) -> TrainingConfig:
    """A configuration with a loss on every layer (Lee et al. 2015, arXiv:1409.5185).

    Args:
        num_layers: layers of the model.
        weighting: "uniform" for equal weights, "depth" for weights proportional to the layer's number; they sum to 1.
    """
    check_choice("weighting", weighting, ("uniform", "depth"))
    sizes = {k: k if weighting == "depth" else 1 for k in range(1, num_layers + 1)}
    return TrainingConfig(stages=[StageConfig((k, k), size / sum(sizes.values())) for k, size in sizes.items()])


def check_budget(work: str, flops: float, limit: float | None) -> None:
    """Raises `EaseError` if work before the first step of a phase leaves nothing of the phase's maximum FLOPs."""
    if limit is not None and flops >= limit:
        raise EaseError(
            f"{work} takes {flops:.3g} FLOPs and the phase may take {limit:.3g} in all: raise max_flops, or use less "
            "text for it (mine_epochs, epoch_batches, eval_batches)"
        )


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """Optimizer settings of a phase and the limits that end it, whichever is reached first."""

    lr: float = 1e-3
    """Learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the phase: constant, or falling to a twentieth along a cosine."""
    warmup: float = 0.0
    """Share of the phase, in [0, 1), in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, for matrices only."""
    patience: int | None = 3
    """Epochs without a better (routed) validation loss after which the phase ends; None for no such limit."""
    max_epochs: int = 100
    """Maximum number of epochs."""
    max_flops: float | None = None
    """Maximum FLOPs, including validation and mining."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of schedule and warmup that the phase covers, if several phases share one schedule."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(1, max_epochs=self.max_epochs, patience=self.patience)
        check_number("weight_decay", self.weight_decay, 0)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise EaseError(f"lr must be above 0, got {self.lr}")
        if self.max_flops is not None and not 0 < self.max_flops < math.inf:
            raise EaseError(f"max_flops must be above 0 and finite, got {self.max_flops}: use None for no such limit")
        if not 0 <= self.warmup < 1:
            raise EaseError(f"warmup is a share of the phase in [0, 1), got {self.warmup}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise EaseError(f"span must be two increasing numbers in [0, 1], got {self.span}")

    def check_phases(self, number: int) -> None:
        """Raises `EaseError` if the epochs cannot be divided among this number of phases, each of which needs one."""
        if self.max_epochs < number:
            raise EaseError(
                f"max_epochs is {self.max_epochs}, and each of the {number} phases needs an epoch: "
                "raise it, or limit the phases by max_flops"
            )

    def part(self, share: float, lr: float | None = None, *, after: float | None = None) -> PhaseOptions:
        """Options of one of several phases.

        Args:
            share: share in (0, 1] of the epochs (at least one) and of the FLOPs.
            lr: learning rate (the same by default).
            after: share of the phases before, if one schedule spans all phases; None if each phase has its own.
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
        """Factor of the learning rate at `progress` in [0, 1] of the phase."""
        progress = self.span[0] + progress * (self.span[1] - self.span[0])
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-2)
        if self.schedule == "constant":
            return 1.0
        done = (progress - self.warmup) / (1 - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
