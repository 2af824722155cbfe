"""Variants of ASHEM's second phase for the ablation: hard-token selection, context, freezing and initialization.

Each variant is ASHEM's phase 2 on the same finished phase 1 with one component changed. This module holds the variants
that the library has no option for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ease
from ease.evaluation.scoring import score
from ease.interface import IGNORE
from ease.strategies.staged import Staged
from ease.training.mining import Quantile
from experiments.harness.line import Make, Trial, grow

SINGLE_TOKENS = 2048
"""Tokens without context in a batch."""


@dataclass(frozen=True)
class ASHEMVariantConfig:
    """ASHEM's second phase with one component changed."""

    ashem: ease.ASHEMConfig
    select_by: Literal["confidence", "loss", "gain", "random"] = "confidence"
    """The criterion for hard tokens in training: low confidence, high loss, the largest decrease of loss by a reference
    model, or random choice."""
    without_context: bool = False
    """Train every hard token as a sequence of its own, as the original recipe does."""
    freeze: Literal["all", "all but head", "nothing"] = "all"
    """The part of phase 1 that is frozen."""
    random_init: bool = False
    """Initialise new layers as in a new model instead of as the identity."""
    reference: ease.StandardTransformer | None = None

    @property
    def num_layers(self) -> int:
        return self.ashem.num_layers

    def strategy(self) -> ASHEMVariant:
        return ASHEMVariant(self)


def variant(layers: int, ashem: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> Make:
    """A line's strategy: settings of the variant, and `ashem` settings of the ASHEM that it changes."""
    return partial(_variant, layers, dict(ashem), settings)


def _variant(layers: int, ashem: dict[str, Any], settings: dict[str, Any], trial: Trial) -> ASHEMVariantConfig:
    return ASHEMVariantConfig(grow(layers, **ashem)(trial), **settings, reference=trial.reference)


class ASHEMVariant(Staged):
    """The strategy: `Staged` with its mined batches or its phase changed."""

    def __init__(self, config: ASHEMVariantConfig) -> None:
        super().__init__(config.ashem.staged(), done=1)
        self.variant = config

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> ease.Phase | None:
        c, brick = self.variant, model.num_layers
        phase = super().next_phase(model, data)
        if phase is None:
            return None
        mined, spent = phase.train, dict(phase.spent)
        assert isinstance(mined, ease.MinedBatches)
        if c.select_by != "confidence":
            mined.batches, selection_flops = select(c, model, mined.batches, brick)
            spent["mining"] += selection_flops
        if c.random_init:
            fresh = ease.StandardTransformer(**vars(model.config)).state_dict()
            grown = tuple(f"layers.{layer}." for layer in range(brick, model.num_layers))
            model.load_state_dict({name: w for name, w in fresh.items() if name.startswith(grown)}, strict=False)
        if c.without_context:
            mined.batches = single_tokens(model, mined.batches, brick)
        if c.freeze == "nothing":  # the trunk's states change during training, so every token runs all layers
            hard = [b._replace(y=b.y.masked_fill(~b.scored, IGNORE), active=None, state=None) for b in mined.batches]
            return replace(phase, train=Shuffled(hard, self.config.seed), first=0, spent=spent)
        return replace(phase, freeze_head=c.freeze == "all", spent=spent)


class Shuffled:
    """Batches in a new random order every epoch."""

    def __init__(self, batches: Sequence[ease.Batch], seed: int) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ease.Batch]:
        return (self.batches[i] for i in torch.randperm(len(self), generator=self.generator).tolist())


def select(
    c: ASHEMVariantConfig, model: ease.ExitModel, batches: Iterable[ease.Batch], brick: int
) -> tuple[list[ease.Batch], float]:
    """Replace the active tokens of mined batches by the same number of others.

    Args:
        c: the criterion.
        model: phase 1's model, whose head mining has evaluated and counted.
        batches: mined batches.
        brick: layers of phase 1.

    Returns:
        The batches, and the FLOPs of the criterion in addition to those of mining.
    """
    batches, generator, flops = list(batches), torch.Generator().manual_seed(c.ashem.seed), 0.0
    values, quantile = [], Quantile()
    for batch in batches:
        if c.select_by == "random":
            value = torch.rand(batch.x.shape, generator=generator)
        else:
            value = losses(model, states(model, batch, brick), batch.y, brick)
        if c.select_by == "gain":
            assert c.reference is not None
            scores = score(c.reference, [batch._replace(active=None, state=None)])
            value, flops = value - scores.losses.view_as(value).to(value), flops + scores.flops
        # Larger is harder. The quantile takes values in [0, 1], and only their order matters.
        value = value if c.select_by == "random" else torch.sigmoid(value.cpu().double())
        values.append(value)
        quantile.add(value)
    least = quantile(1 - c.ashem.hard_example_ratio)
    return [b._replace(active=(v >= least).to(b.x.device)) for b, v in zip(batches, values, strict=True)], flops


@torch.no_grad()
def states(model: ease.ExitModel, batch: ease.Batch, brick: int) -> Tensor:
    """(B, T, D) the brick's output, computed again where mining could not store it."""
    return model.run(model.embed(batch.x, layout=batch.layout), 1, brick) if batch.state is None else batch.state


@torch.no_grad()
def losses(model: ease.ExitModel, state: Tensor, y: Tensor, exit: int) -> Tensor:
    """(B, T) cross entropy of states (B, T, D) at an exit, computed one row at a time to save memory."""
    rows = zip(state, y, strict=True)
    return torch.stack([F.cross_entropy(model.logits(h, exit), t, reduction="none") for h, t in rows])


def single_tokens(model: ease.ExitModel, batches: Iterable[ease.Batch], brick: int) -> list[ease.Batch]:
    """Every active token as a sequence of length one."""
    found = []
    for batch in batches:
        state = states(model, batch, brick)
        columns = (batch.x[batch.scored], batch.y[batch.scored], state[batch.scored])
        for x, y, state in zip(*(column.split(SINGLE_TOKENS) for column in columns), strict=True):
            found.append(ease.Batch(x[:, None], y[:, None], state=state[:, None]))
    return found
