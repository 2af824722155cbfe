"""Exit tuning: exits for a finished model, whose backbone stays as it is bit for bit.

What learns per exit is its norm and, by choice, a small adapter in front of the shared head. The backbone runs once per
batch for all exits, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ease.errors import EaseError, check_choice, check_least
from ease.flops import exit_flops, run_flops
from ease.interface import IGNORE, Batch, Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import ProgressBatches
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.losses import Objective, objective_named
from ease.training.mining import Quantile, check_ratio, read_states
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class TuneConfig(PhaseOptions):
    """Exits to be tuned, and on what."""

    name: ClassVar = "tune"

    exits: tuple[int, ...] = ()
    """Layers after which a token may leave, from shallow to deep (a third and two thirds of the depth by default)."""
    adapter: Literal["none", "mlp"] = "none"
    """What learns beside an exit's norm: nothing, or a residual network in front of the head."""
    adapter_dim: int | None = None
    """Units of the adapter (a quarter of the model's width by default)."""
    objective: Literal["cross-entropy", "distillation", "both"] = "cross-entropy"
    """Learn from the text, from the last exit's distribution, or from both in equal parts."""
    temperature: float = 1.0
    """At which distillation compares distributions."""
    tokens: Literal["all", "hard", "kept"] = "all"
    """Learn from all tokens, from those that `select_exit` is unsure of, or from those that it would keep."""
    select_exit: int | None = None
    """The exit whose confidence selects (the model's last by default)."""
    hard_ratio: float = 0.5
    """Hard tokens as a share of all; the rest is kept."""
    select_epochs: int = 1
    """Epochs of training batches that are selected from; where an epoch is a slice of the text, more bring more."""
    routing_threshold: float = 0.9
    """Confidence in [0, 1] at which a token leaves, at every exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adapter", self.adapter, ("none", "mlp"))
        check_choice("tokens", self.tokens, ("all", "hard", "kept"))
        check_ratio(self.hard_ratio)
        check_least(1, select_epochs=self.select_epochs, select_exit=self.select_exit, adapter_dim=self.adapter_dim)
        if self.adapter == "none" and self.adapter_dim is not None:
            raise EaseError(
                f"adapter_dim {self.adapter_dim} belongs to an adapter: set adapter to mlp, or leave it out"
            )
        selecting = ("select_exit", "hard_ratio", "select_epochs")
        idle = [name for name in selecting if getattr(self, name) != getattr(TuneConfig, name)]
        if self.tokens == "all" and idle:
            raise EaseError(f"{idle[0]} belongs to a selection: set tokens to hard or kept, or leave it out")
        Policy.of(self.exits, (self.routing_threshold,) * len(self.exits))
        self.loss()

    @property
    def num_layers(self) -> None:
        """The model is a finished one and brings its depth."""

    def loss(self) -> Objective:
        """What a token's loss is."""
        return objective_named(self.objective, self.temperature)

    def strategy(self) -> Tune:
        return Tune(self)


@dataclass
class Tune:
    """The strategy: one phase in which exits learn."""

    config: TuneConfig
    exits: tuple[int, ...] = ()

    def policy(self) -> Policy:
        """Every exit at the same threshold."""
        return Policy.of(self.exits, (self.config.routing_threshold,) * len(self.exits))

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        if self.exits:
            return None
        c, last = self.config, model.num_layers
        self.exits = c.exits or tuple(sorted({max(1, last // 3), max(1, 2 * last // 3)}))
        Policy.of(self.exits, (1.0,) * len(self.exits)).check(last)
        train, spent = data.train, 0.0
        exit = last if c.select_exit is None else c.select_exit
        if exit > last:
            raise EaseError(f"select_exit is {exit} and the model has {last} layers: choose one of 1..{last}")
        if c.tokens != "all":
            watched = ProgressBatches(data.train, data.progress("selecting"), c.select_epochs)
            train, spent = select(model, [watched] * c.select_epochs, exit, c.hard_ratio, c.tokens)
        if c.adapter == "mlp":
            dim = max(1, model.config.dim // 4) if c.adapter_dim is None else c.adapter_dim
            model.add_adapters(self.exits, dim)
        config = TrainingConfig(
            layer_weights={exit: 1 / len(self.exits) for exit in self.exits},
            exit_layer=self.exits,
            routing_threshold=(c.routing_threshold,) * len(self.exits),
            objective=c.loss(),
        )
        spent_on = {"selecting": spent}
        return Phase("exit tuning", config, train, data.val, c, first=last + 1, exits=self.exits, spent=spent_on)


@torch.no_grad()
def select(
    model: ExitModel, epochs: Sequence[Batches], exit: int, ratio: float, tokens: Literal["hard", "kept"]
) -> tuple[list[Batch], float]:
    """The batches with targets left for the tokens wanted alone, and the FLOPs that it took.

    Hard is the share `ratio` of all scored tokens that `exit` is least sure of; kept are the others.
    """
    found, quantile, flops = [], Quantile(), 0.0
    for batches in epochs:
        for batch, _, confidence in read_states(model, batches, None, exit):
            quantile.add(confidence[batch.scored])
            found.append((batch, confidence))
            flops += run_flops(model.config, exit, batch.running, batch.layout)
            flops += exit_flops(model.config, int(batch.running.sum()), exit)
    threshold = quantile(ratio)
    return [
        batch._replace(y=batch.y.masked_fill((confidence < threshold) != (tokens == "hard"), IGNORE))
        for batch, confidence in found
    ], flops
