"""Depth for the tokens that need it, in training as at inference: exits choose by a classifier that learns along.

The first phase trains the layers up to the first exit on all tokens, or several phases do, growing up to there. The
last one grows the other layers and goes on under the same schedule. Of every batch's tokens each exit sends the share
on that its classifier is least sure of; the others leave, and each token is scored once, at the exit it takes. So
training does what inference will do, costs what it costs, and pays for one head a token. Mixture-of-Depths (Raposo et
al. 2024, arXiv:2404.02258) sends a share through single blocks by a router that is learned through its product with the
block; here what chooses foretells how likely the exit's prediction is right, as a confidence does, and a token that has
left stays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ease.errors import EaseError
from ease.evaluation.scoring import score
from ease.interface import Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy, exits_named
from ease.training.config import PhaseOptions, TrainingConfig, create_standard_config
from ease.training.mining import Quantile, check_ratio
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PhaseOptions):
    """Two phases or more; the limits on epochs and FLOPs and the schedule are those of all together."""

    name: ClassVar = "gated"

    deep_layers: int = 4
    """Layers after growth."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep; the first of them is where the phases on all tokens end."""
    going_on: float | Sequence[float] = 0.5
    """Of the tokens that arrive at an exit, the share in (0, 1) that goes on; one for all exits, or one per exit."""
    classifier_weight: float = 0.3
    """Weight, above 0, of what the classifiers learn, whose gradient reaches the layers too."""
    first_share: float = 0.3
    """Share of the limits before the last phase; 0: it is the only one, and a new model has all its layers at once."""
    growth: Sequence[int] = ()
    """Depths that are trained before the first exit's; these phases share what `first_share` gives by their depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Policy.of(self.exits, (1.0,) * len(self.exits)).check(self.deep_layers)
        if len(self.shares) != len(self.exits) or not self.exits:
            raise EaseError(
                f"going_on is {self.going_on} for exits {list(self.exits)}: "
                "name at least one exit, and give one share, or one per exit"
            )
        for share in self.shares:
            check_ratio(share)
        if not self.classifier_weight > 0:
            raise EaseError(f"classifier_weight must be above 0, got {self.classifier_weight}: it is what chooses")
        if not 0 <= self.first_share < 1:
            raise EaseError(f"first_share must lie in [0, 1), got {self.first_share}: phase 2 needs some of the limits")
        if not self.first_share and self.growth:
            raise EaseError("growth without a first_share: give the phases before the last some of the limits")
        if list(self.bricks) != sorted(set(self.bricks)) or min(self.bricks, default=1) < 1:
            raise EaseError(f"growth must name depths below exit {self.exits[0]}, from shallow to deep")
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
        """One per exit."""
        return (self.going_on,) * len(self.exits) if isinstance(self.going_on, int | float) else tuple(self.going_on)

    def gates(self) -> TrainingConfig:
        """The choice at the exits, and weights under which every token counts alike."""
        weights = dict.fromkeys((*self.exits, self.deep_layers), 1.0)
        going_on = dict(zip(self.exits, self.shares, strict=True))
        return TrainingConfig(layer_weights=weights, going_on=going_on, classifier_weight=self.classifier_weight)

    def strategy(self) -> Gated:
        return Gated(self)


@dataclass
class Gated:
    """The strategy. Its state is the policy found last."""

    config: GatedConfig
    done: int = 0
    found: Policy = field(default_factory=lambda: Policy(confidence="classifier"))

    def policy(self) -> Policy:
        """The exits, and thresholds under which the shares of the validation tokens go on."""
        return self.found

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        c, number = self.config, self.done
        bricks = c.bricks
        if number > len(bricks):  # inference's thresholds, found as `ease calibrate` would; no training FLOPs
            self.found, _ = self.route(model, data.val)
            return None
        depth = (*bricks, c.deep_layers)[number]
        before = bricks[number - 1] if number else bricks[0] if bricks else c.exits[0]
        if model.num_layers not in {before, depth}:
            wanted = " or ".join(map(str, sorted({before, depth})))
            raise EaseError(f"gated training starts from {wanted} layers but the model has {model.num_layers}")
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
        """The policy that sends the shares of the validation tokens on, exit by exit, and the FLOPs of finding it."""
        thresholds: tuple[float, ...] = ()
        flops = 0.0
        for number, (exit, share) in enumerate(zip(self.config.exits, self.config.shares, strict=True), 1):
            # Everyone leaves at the exit that is looked at, with the confidence that it has.
            scores = score(model, val, Policy(self.config.exits[:number], (*thresholds, 1e-9), "classifier"))
            quantile = Quantile()
            quantile.add(scores.confidences[scores.exits == exit])
            # Where a threshold on the way is a tie nobody may arrive.
            thresholds, flops = (*thresholds, quantile(share) if quantile.count else 1.0), flops + scores.flops
        return Policy(self.config.exits, thresholds, "classifier"), flops
