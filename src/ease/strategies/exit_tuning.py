"""Exit tuning: exits for a finished model, whose backbone stays bit for bit the same.

Each exit trains its norm and, by choice, a small adapter in front of the shared head. The backbone runs once per batch
for all exits, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ease.errors import EaseError, check_choice, check_counts
from ease.interface import IGNORE, Batch, Batches, ExitModel
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import ProgressBatches
from ease.training.config import PhaseOptions, TrainingConfig
from ease.training.distributed import total
from ease.training.losses import Objective, objective_named
from ease.training.mining import Quantile, check_ratio, lowest, read_states
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class TuneConfig(PhaseOptions):
    """The exits to tune, and the tokens to tune them on."""

    name: ClassVar = "tune"

    exits: tuple[int, ...] = ()
    """Layers after which a token may leave, from shallow to deep (a third and two thirds of the depth by default)."""
    adapter: Literal["none", "mlp"] = "none"
    """Trained in addition to an exit's norm: nothing, or a residual MLP in front of the head."""
    adapter_dim: int | None = None
    """Hidden units of the adapter (a quarter of the model's width by default)."""
    objective: Literal["cross-entropy", "distillation", "both"] = "cross-entropy"
    """The exits learn from the text, from the last exit's distribution, or from both in equal parts."""
    temperature: float = 1.0
    """Temperature at which distillation compares distributions."""
    tokens: Literal["all", "hard", "kept"] = "all"
    """Train on all tokens, on the `hard_ratio` with the lowest confidence at `select_exit`, or on the other ones."""
    select_exit: int | None = None
    """The exit whose confidence selects (the model's last by default)."""
    hard_ratio: float = 0.5
    """Hard tokens as a share of all tokens."""
    select_epochs: int = 1
    """Epochs of training batches to select from; if an epoch is a slice of the text, more epochs cover more of it."""
    routing_threshold: float = 0.9
    """Confidence in [0, 1] at which a token leaves, at every exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adapter", self.adapter, ("none", "mlp"))
        check_choice("tokens", self.tokens, ("all", "hard", "kept"))
        check_ratio(self.hard_ratio)
        check_counts(1, select_epochs=self.select_epochs, select_exit=self.select_exit, adapter_dim=self.adapter_dim)
        if self.adapter == "none" and self.adapter_dim is not None:
            raise EaseError(
                f"adapter_dim {self.adapter_dim} is the size of an adapter: set adapter to mlp, or leave it out"
            )
        selecting = ("select_exit", "hard_ratio", "select_epochs")
        idle = [name for name in selecting if getattr(self, name) != getattr(TuneConfig, name)]
        if self.tokens == "all" and idle:
            raise EaseError(f"{idle[0]} is used only in a selection: set tokens to hard or kept, or leave it out")
        Policy.of(self.exits, (self.routing_threshold,) * len(self.exits))
        self.loss()

    @property
    def num_layers(self) -> None:
        """None: the strategy needs a finished model."""

    def loss(self) -> Objective:
        """The objective at the exits."""
        return objective_named(self.objective, self.temperature)

    def strategy(self) -> Tune:
        return Tune(self)


@dataclass
class Tune:
    """The strategy: one phase in which exits are trained."""

    config: TuneConfig
    exits: tuple[int, ...] = ()

    def policy(self) -> Policy:
        """All exits with the same threshold."""
        return Policy.of(self.exits, (self.config.routing_threshold,) * len(self.exits))

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        assert isinstance(model, StandardTransformer)
        if self.exits:
            return None
        c, last = self.config, model.num_layers
        self.exits = c.exits or tuple(sorted({max(1, last // 3), max(1, 2 * last // 3)}))
        model.check_policy(Policy.of(self.exits, (1.0,) * len(self.exits)))
        train, spent = data.train, 0.0
        exit = last if c.select_exit is None else c.select_exit
        if exit > last:
            raise EaseError(f"select_exit is {exit} and the model has {last} layers: choose one of 1..{last}")
        if c.tokens != "all":
            batches = ProgressBatches(data.train, data.progress("selecting"), c.select_epochs)
            train, spent = select(model, [batches] * c.select_epochs, exit, c.hard_ratio, c.tokens)
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
    """Batches with targets for the selected tokens only, and the FLOPs of the selection.

    Args:
        epochs: batches of each epoch.
        exit: the exit whose confidence selects.
        ratio: share of all scored tokens that is hard: those with the lowest confidence.
        tokens: "hard" selects the hard tokens, "kept" the other ones.
    """
    found, quantile, flops = [], Quantile(), 0.0
    for batches in epochs:
        for batch, step, confidence in read_states(model, batches, None, exit):
            quantile.add(confidence[batch.scored])
            found.append((batch, confidence))
            flops += step.flops
    quantile.merge()
    confidences, scored = [confidence for _, confidence in found], [batch.scored for batch, _ in found]
    hard = lowest(confidences, scored, quantile(ratio), ratio, by_row=model.config.num_labels is not None)
    return [
        batch._replace(y=batch.y.masked_fill(low != (tokens == "hard"), IGNORE))
        for (batch, _), low in zip(found, hard, strict=True)
    ], total(flops)[0]
