"""ASHEM taken apart, one part at a time: which tokens train its second phase, what is frozen, how new layers start.

Each variant is ASHEM's phase 2 on the same finished phase 1 with one thing changed. What the library has no option for
is a strategy here, `ChosenConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ease
from benchmarks import training
from ease.evaluation import score
from ease.machine import machine
from ease.mining import Quantile
from ease.seam import IGNORE
from ease.staged import Staged
from experiments.lines import Lab, Line, Make, Trial, grow, make
from experiments.tables import Table

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
RATIOS = (0.1, 0.3, 0.7, 1.0)
ALONE = 2048  # tokens without context in a batch
OWN_HEAD = {"tie_embeddings": False}
LEAKY = "seed's protocol, in-sample"


@dataclass(frozen=True)
class ChosenConfig:
    """ASHEM's second phase with one of its parts exchanged."""

    ashem: ease.ASHEMConfig
    by: Literal["confidence", "loss", "gain", "chance"] = "confidence"
    """What makes a token hard in training: little confidence, a large loss, how much less a reference loses on it, or
    chance."""
    alone: bool = False
    """Train every hard token as a sequence of its own, as the original recipe does."""
    freeze: Literal["all", "head learns", "nothing"] = "all"
    """What of phase 1 stays as it is."""
    random_start: bool = False
    """New layers start as in a new model instead of handing their input through."""
    reference: ease.StandardTransformer | None = None

    @property
    def num_layers(self) -> int:
        return self.ashem.num_layers

    def strategy(self) -> Chosen:
        return Chosen(self)


def chosen(layers: int, **settings: Any) -> Make:
    return partial(_chosen, layers, settings)


def _chosen(layers: int, settings: dict[str, Any], trial: Trial) -> ChosenConfig:
    return ChosenConfig(grow(layers)(trial), **settings, reference=trial.reference)


class Chosen(Staged):
    """The strategy: what `Staged` mines and how it trains, changed."""

    def __init__(self, config: ChosenConfig) -> None:
        super().__init__(config.ashem.staged(), done=1)
        self.chosen = config

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> ease.Phase | None:
        c, brick = self.chosen, model.num_layers
        phase = super().next_phase(model, data)
        if phase is None:
            return None
        assert isinstance(phase.train, ease.MinedBatches)
        batches, spent = phase.train.batches, dict(phase.spent)
        if c.by != "confidence":
            batches, more = choose(c, model, batches, brick)
            spent["mining"] += more
        if c.random_start:
            fresh = ease.StandardTransformer(**vars(model.config)).state_dict()
            grown = tuple(f"layers.{layer}." for layer in range(brick, model.num_layers))
            model.load_state_dict({name: w for name, w in fresh.items() if name.startswith(grown)}, strict=False)
        first = phase.first
        if c.alone:
            batches = apart(batches)
        elif c.freeze == "nothing":
            first = 1
            batches = [b._replace(y=b.y.masked_fill(~b.scored, IGNORE), active=None, state=None) for b in batches]
        phase.train.batches = batches
        return replace(phase, first=first, freeze_head=c.freeze == "all", spent=spent)


def choose(
    c: ChosenConfig, model: ease.ExitModel, batches: Iterable[ease.Batch], brick: int
) -> tuple[list[ease.Batch], float]:
    """The batches with as many other tokens active, and the FLOPs of finding them; mining has asked the head before."""
    batches, generator, flops = list(batches), torch.Generator().manual_seed(c.ashem.seed), 0.0
    values, quantile = [], Quantile()
    for batch in batches:
        if c.by == "chance":
            value = torch.rand(batch.x.shape, generator=generator)
        else:
            value = losses(lambda h: model.logits(h, brick), batch.state, batch.y)
        if c.by == "gain":
            assert c.reference is not None
            found = score(c.reference, [batch._replace(active=None, state=None)])
            value, flops = value - found.losses.view_as(value), flops + found.flops
        # The larger, the harder; the quantile is of values in [0, 1], and order is all that counts.
        value = value if c.by == "chance" else torch.sigmoid(value.double())
        values.append(value)
        quantile.add(value)
    least = quantile(1 - c.ashem.hard_example_ratio)
    return [b._replace(active=v >= least) for b, v in zip(batches, values, strict=True)], flops


@torch.no_grad()
def losses(logits: Callable[[Tensor], Tensor], state: Tensor | None, y: Tensor) -> Tensor:
    """(B, T) cross entropy of states (B, T, D), a row at a time."""
    assert state is not None
    return torch.stack([F.cross_entropy(logits(h), t, reduction="none") for h, t in zip(state, y, strict=True)])


def apart(batches: Iterable[ease.Batch]) -> list[ease.Batch]:
    """Every active token as a sequence of length one."""
    found = []
    for batch in batches:
        assert batch.state is not None
        columns = (batch.x[batch.scored], batch.y[batch.scored], batch.state[batch.scored])
        for x, y, state in zip(*(column.split(ALONE) for column in columns), strict=True):
            found.append(ease.Batch(x[:, None], y[:, None], state=state[:, None]))
    return found


# ---------------------------------------------------------------------------------------------------------
# The lines


def seed_protocol(layers: int, share: float) -> Make:
    """The original recipe, both phases: it mines and trains on the validation tokens."""
    return partial(_seed_protocol, layers, share)


def _seed_protocol(layers: int, share: float, trial: Trial) -> ease.ASHEMConfig:
    first = grow(layers)(trial._replace(flops=(1 - share) * trial.flops))
    options = trial.options | {"max_flops": share * trial.flops}
    own = {f"phase1_{name}": options[name] for name in ("lr", "patience", "max_epochs", "max_flops")}
    return replace(first, pretrained=False, protocol="seed", **own)


def ablations(brick: int, deep: int, base: str, share: float) -> dict[str, Line]:
    """ASHEM and its variants on phase 1, the line `base`, which takes `share` of the budget."""
    on = partial(Line, on=base)
    own, reference = f"{base}, own head", f"plain, layers: {deep}"
    opened = make(ease.OpenGrowthConfig, shallow_layers=brick, deep_layers=deep, first_share=0.0)
    return {
        "ASHEM": on(grow(deep), thresholds=THRESHOLDS),
        "chosen by loss": on(chosen(deep, by="loss")),
        "chosen by gain from depth": on(chosen(deep, by="gain"), reference=reference),
        "chosen by chance": on(chosen(deep, by="chance")),
        **{f"hard ratio {ratio:g}": on(grow(deep, hard_example_ratio=ratio)) for ratio in RATIOS},
        "copied start": on(grow(deep, grow_init="copy")),
        "random start": on(chosen(deep, random_start=True)),
        "tokens without context": on(chosen(deep, alone=True)),
        "nothing frozen": on(chosen(deep, freeze="nothing")),
        "nothing frozen, brick keeps its loss": on(opened),
        own: Line(make(ease.StandardConfig, num_layers=brick), share=share, shape=OWN_HEAD),
        "ASHEM, own head": Line(grow(deep), on=own, shape=OWN_HEAD),
        "ASHEM, own head learns": Line(chosen(deep, freeze="head learns"), on=own, shape=OWN_HEAD),
        LEAKY: Line(seed_protocol(deep, share), shape=OWN_HEAD),
    }


# ---------------------------------------------------------------------------------------------------------
# The path of the last layer


def last_layer(lab: Lab, repeats: int = 15) -> Table:
    """A training step whose stages weigh only the last layer, against one that asks every head all the same."""
    sizes = {"vocab": lab.vocab_size, "dim": lab.dim, "heads": lab.heads, "seq": lab.seq, "batch": lab.batch}
    rows = []
    for layers in sorted({lab.depth, 2 * lab.depth}):
        shape = training.Shape("", layers=layers, **sizes)
        stages = [ease.StageConfig((1, layers - 1), 0.0), ease.StageConfig((layers, layers))]
        config = ease.TrainingConfig(stages=stages)
        ours, every = training.trainer_step(shape, config), training.all_logits_step(shape, config)
        row = training.timed("", shape, 1.0, ours, every, repeats)
        rows.append([str(layers), row.ease, row.other, f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"])
    about = machine("cpu")
    return Table(
        "last-layer",
        "A training step with stages of weights 0, ..., 0, 1",
        ["layers", "last head only", "every head", "ratio (range)"],
        rows,
        [
            f"{lab.corpus}: vocabulary {lab.vocab_size:,}, dim {lab.dim}, sequences of {lab.seq}, batches of "
            f"{lab.batch}; random tokens, CPU time of one thread, steps in turn, the median of the rounds' ratios. "
            f"{about['cpu']}, torch {about['torch']}.",
        ],
    )
