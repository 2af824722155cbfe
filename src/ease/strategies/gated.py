"""Gated training: conditional depth in training as at inference, chosen by a classifier at each exit.

The phases before the last train the layers up to the first exit on all tokens, if need be growing up to there. The last
phase grows the other layers and continues the same schedule. At each exit the share `keep` of the arriving tokens to
which the exit's classifier gives the lowest confidence continues; the others leave, and each token is scored once, at
the exit that it takes. Training therefore does what inference does, at the same cost, with one head per token.

Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258) lets a share of the tokens through single blocks, with a router
that learns through its product with the block. Here the classifier predicts the probability that the exit gives to the
target, as a confidence does, and a token that has left does not return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ease.errors import EaseError
from ease.evaluation.shares import policy_for_shares
from ease.interface import Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy, exits_named
from ease.training.config import PhaseOptions, TrainingConfig, create_standard_config
from ease.training.mining import check_ratio
from ease.training.phases import Data, Phase
from ease.training.selection import LearnedGate


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PhaseOptions):
    """Two phases or more; the limits on epochs and FLOPs and the schedule span all of them."""

    name: ClassVar = "gated"

    deep_layers: int = 4
    """Layers after growth."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep; the phases on all tokens end at the first of them."""
    keep: float | Sequence[float] = 0.5
    """Share in (0, 1) of the tokens arriving at an exit that continue; one for all exits, or one each."""
    classifier_weight: float = 0.3
    """Weight, above 0, of the classifiers' loss, whose gradient reaches the layers too."""
    first_share: float = 0.3
    """Share of the limits for the phases before the last; 0 for a single phase with all layers from the start."""
    growth: Sequence[int] = ()
    """Depths trained before that of the first exit; these phases divide `first_share` in proportion to their depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Policy.of(self.exits, (1.0,) * len(self.exits)).check(self.deep_layers)
        if len(self.shares) != len(self.exits) or not self.exits:
            raise EaseError(
                f"keep is {self.keep} for exits {list(self.exits)}: "
                "name at least one exit, and give one share, or one per exit"
            )
        for share in self.shares:
            check_ratio(share)
        if not self.classifier_weight > 0:
            raise EaseError(f"classifier_weight must be above 0, got {self.classifier_weight}: the classifiers choose")
        if not 0 <= self.first_share < 1:
            raise EaseError(f"first_share must lie in [0, 1), got {self.first_share}: the last phase needs a share")
        if not self.first_share and self.growth:
            raise EaseError("growth needs phases before the last: set first_share above 0")
        if list(self.bricks) != sorted(set(self.bricks)) or min(self.bricks, default=0) < 0:
            raise EaseError(f"growth must name depths below exit {self.exits[0]}, from shallow to deep")
        self.check_phases(len(self.bricks) + 1)
        self.gates()

    @property
    def num_layers(self) -> int:
        """Depth of a new model when training starts."""
        return (*self.bricks, self.deep_layers)[0]

    @property
    def bricks(self) -> tuple[int, ...]:
        """Depth in each phase on all tokens."""
        return (*self.growth, self.exits[0]) if self.first_share else ()

    @property
    def exits(self) -> tuple[int, ...]:
        return exits_named(self.exit_layer)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share that continues, per exit."""
        return (self.keep,) * len(self.exits) if isinstance(self.keep, int | float) else tuple(self.keep)

    def gates(self) -> TrainingConfig:
        """Loss and selection of the last phase; all tokens have the same weight."""
        weights = dict.fromkeys((*self.exits, self.deep_layers), 1.0)
        keep = dict(zip(self.exits, self.shares, strict=True))
        return TrainingConfig(layer_weights=weights, selection=LearnedGate(keep, self.classifier_weight))

    def strategy(self) -> Gated:
        return Gated(self)


@dataclass
class Gated:
    """The strategy. Its state is the number of phases done and the policy found last."""

    config: GatedConfig
    done: int = 0
    found: Policy = field(default_factory=lambda: Policy(confidence="classifier"))

    def policy(self) -> Policy:
        """The exits, with thresholds under which the configured shares of the validation tokens continue."""
        return self.found

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        c, number = self.config, self.done
        bricks = c.bricks
        if number > len(bricks):  # thresholds for inference, as `ease calibrate` would choose them: no training FLOPs
            self.found, _ = self.route(model, data.val)
            return None
        depth = (*bricks, c.deep_layers)[number]
        before = bricks[number - 1] if number else bricks[0] if bricks else c.exits[0]
        if model.num_layers not in {before, depth}:
            expected = " or ".join(map(str, sorted({before, depth})))
            raise EaseError(f"gated training starts from {expected} layers but the model has {model.num_layers}")
        if model.num_layers < depth:
            model.grow(depth)
        self.done += 1
        name = f"phase {self.done}"
        if number < len(bricks):
            share = c.first_share / sum(bricks)
            options = c.part(share * depth, after=share * sum(bricks[:number]))
            return Phase(name, create_standard_config(depth), data.train, data.val, options)
        new = set(c.exits) - set(model.config.classifier_exits)
        model.set_classifiers({exit: torch.zeros(model.config.dim + 1) for exit in new})
        options = c.part(1 - c.first_share, after=c.first_share)
        route = lambda model: self.route(model, data.val)  # noqa: E731
        return Phase(name, c.gates(), data.train, data.val, options, route=route)

    def route(self, model: ExitModel, val: Batches) -> tuple[Policy, float]:
        """The policy under which the configured shares of the validation tokens continue, and its FLOPs."""
        return policy_for_shares(model, val, self.config.exits, self.config.shares, "classifier")
