"""Depth for the tokens that need it, from the first step on: exits choose by a classifier that learns along.

Of every batch's tokens each exit sends the share on that its classifier is least sure of; the others leave, and each
token is scored once, at the exit it takes. So training does what inference will do, costs what it costs, and pays for
one head a token. Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258) sends a share through single blocks by a
router that is learned through its product with the block; here what chooses foretells how likely the exit's prediction
is right, as a confidence does, and a token that has left stays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ease.errors import EaseError
from ease.evaluation import score
from ease.exits import Policy
from ease.mining import Quantile, check_ratio
from ease.models import StandardTransformer
from ease.seam import ExitModel
from ease.trainer import Batches, Data, Phase, PhaseOptions, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PhaseOptions):
    """One phase, from scratch or from a checkpoint."""

    num_layers: int = 4
    """Layers of the model; a checkpoint brings its own."""
    exit_layer: int | Sequence[int] = 2
    """The exit, or several from shallow to deep."""
    going_on: float | Sequence[float] = 0.5
    """Of the tokens that arrive at an exit, the share in (0, 1) that goes on; one for all exits, or one per exit."""
    classifier_weight: float = 0.3
    """Weight, above 0, of what the classifiers learn, whose gradient reaches the layers too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Policy.of(self.exits, (1.0,) * len(self.exits))
        if len(self.shares) != len(self.exits) or not self.exits:
            raise EaseError(
                f"going_on is {self.going_on} for exits {list(self.exits)}: "
                "name at least one exit, and give one share, or one per exit"
            )
        for share in self.shares:
            check_ratio(share)
        if not self.classifier_weight > 0:
            raise EaseError(f"classifier_weight must be above 0, got {self.classifier_weight}: it is what chooses")

    @property
    def exits(self) -> tuple[int, ...]:
        return (self.exit_layer,) if isinstance(self.exit_layer, int) else tuple(self.exit_layer)

    @property
    def shares(self) -> tuple[float, ...]:
        """One per exit."""
        return (self.going_on,) * len(self.exits) if isinstance(self.going_on, int | float) else tuple(self.going_on)

    def training(self, last: int) -> TrainingConfig:
        """The choice at the exits of a model of `last` layers, and weights under which every token counts alike."""
        weights, arriving = {}, 1.0
        for exit, share in zip(self.exits, self.shares, strict=True):
            weights[exit], arriving = arriving * (1 - share), arriving * share
        going_on = dict(zip(self.exits, self.shares, strict=True))
        weights[last] = arriving
        return TrainingConfig(layer_weights=weights, going_on=going_on, classifier_weight=self.classifier_weight)

    def strategy(self) -> Gated:
        return Gated(self)


@dataclass
class Gated:
    """The strategy: one phase. Its state is the policy found last."""

    config: GatedConfig
    done: bool = False
    found: Policy = field(default_factory=lambda: Policy(confidence="classifier"))

    def policy(self) -> Policy:
        """The exits, and thresholds under which the shares of the validation tokens go on."""
        return self.found

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        c = self.config
        if self.done:  # inference's thresholds, found as `ease calibrate` would; no training FLOPs
            self.found, _ = self.route(model, data.val)
            return None
        self.done = True
        Policy.of(c.exits, (1.0,) * len(c.exits)).check(model.num_layers)
        new = set(c.exits) - set(model.config.classifier_exits)
        model.set_classifiers({exit: torch.zeros(model.config.dim + 1) for exit in new})
        route = lambda model: self.route(model, data.val)  # noqa: E731
        return Phase("gated", c.training(model.num_layers), data.train, data.val, c, route=route)

    def route(self, model: ExitModel, val: Batches) -> tuple[Policy, float]:
        """The policy that sends the shares of the validation tokens on, exit by exit, and the FLOPs of finding it."""
        thresholds: tuple[float, ...] = ()
        flops = 0.0
        for number, (exit, share) in enumerate(zip(self.config.exits, self.config.shares, strict=True), 1):
            # Everyone leaves at the exit that is looked at, with the confidence that it has.
            scores = score(model, val, Policy(self.config.exits[:number], (*thresholds, 1e-9), "classifier"))
            quantile = Quantile()
            quantile.add(scores.confidences[scores.exits == exit])
            thresholds, flops = (*thresholds, quantile(share)), flops + scores.flops
        return Policy(self.config.exits, thresholds, "classifier"), flops
