"""ASHEM taken apart, one part at a time: which tokens train its second phase, what is frozen, how new layers start.

Each variant is ASHEM's phase 2 on the same finished phase 1 with one thing changed. What the library has no option for
is a strategy here, `ChosenConfig`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ease
from benchmarks import training
from ease.devices import machine
from ease.evaluation.scoring import score
from ease.interface import IGNORE
from ease.strategies.staged import Staged
from ease.training.mining import Quantile
from experiments.analysis.tables import Table
from experiments.harness.scheduler import Lab, Line, Make, Trial, grow, make

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
RATIOS = (0.1, 0.3, 0.7, 1.0)
ALONE = 2048  # tokens without context in a batch
OWN_HEAD = {"tie_embeddings": False}
LEAKY = "original recipe, in-sample"


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


def chosen(layers: int, ashem: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> Make:
    """The variant, and settings of the ASHEM that it is one of."""
    return partial(_chosen, layers, dict(ashem), settings)


def _chosen(layers: int, ashem: dict[str, Any], settings: dict[str, Any], trial: Trial) -> ChosenConfig:
    return ChosenConfig(grow(layers, **ashem)(trial), **settings, reference=trial.reference)


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
        mined, spent = phase.train, dict(phase.spent)
        assert isinstance(mined, ease.MinedBatches)
        if c.by != "confidence":
            mined.batches, more = choose(c, model, mined.batches, brick)
            spent["mining"] += more
        if c.random_start:
            fresh = ease.StandardTransformer(**vars(model.config)).state_dict()
            grown = tuple(f"layers.{layer}." for layer in range(brick, model.num_layers))
            model.load_state_dict({name: w for name, w in fresh.items() if name.startswith(grown)}, strict=False)
        if c.alone:
            mined.batches = apart(model, mined.batches, brick)
        if c.freeze == "nothing":  # then the trunk's states do not stay what they are, and everyone runs to the end
            hard = [b._replace(y=b.y.masked_fill(~b.scored, IGNORE), active=None, state=None) for b in mined.batches]
            return replace(phase, train=Shuffled(hard, self.config.seed), first=1, spent=spent)
        return replace(phase, freeze_head=c.freeze == "all", spent=spent)


class Shuffled:
    """Batches in a new order every time."""

    def __init__(self, batches: Sequence[ease.Batch], seed: int) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ease.Batch]:
        return (self.batches[i] for i in torch.randperm(len(self), generator=self.generator).tolist())


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
            value = losses(model, states(model, batch, brick), batch.y, brick)
        if c.by == "gain":
            assert c.reference is not None
            found = score(c.reference, [batch._replace(active=None, state=None)])
            value, flops = value - found.losses.view_as(value).to(value), flops + found.flops
        # The larger, the harder; the quantile is of values in [0, 1], and order is all that counts.
        value = value if c.by == "chance" else torch.sigmoid(value.cpu().double())
        values.append(value)
        quantile.add(value)
    least = quantile(1 - c.ashem.hard_example_ratio)
    return [b._replace(active=(v >= least).to(b.x.device)) for b, v in zip(batches, values, strict=True)], flops


@torch.no_grad()
def states(model: ease.ExitModel, batch: ease.Batch, brick: int) -> Tensor:
    """(B, T, D) what the brick makes of a batch, where mining had no room to keep it."""
    return model.run(model.embed(batch.x), 1, brick) if batch.state is None else batch.state


@torch.no_grad()
def losses(model: ease.ExitModel, state: Tensor, y: Tensor, exit: int) -> Tensor:
    """(B, T) cross entropy of states (B, T, D) at an exit, a row at a time."""
    rows = zip(state, y, strict=True)
    return torch.stack([F.cross_entropy(model.logits(h, exit), t, reduction="none") for h, t in rows])


def apart(model: ease.ExitModel, batches: Iterable[ease.Batch], brick: int) -> list[ease.Batch]:
    """Every active token as a sequence of length one."""
    found = []
    for batch in batches:
        state = states(model, batch, brick)
        columns = (batch.x[batch.scored], batch.y[batch.scored], state[batch.scored])
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
        "mined from one epoch": on(grow(deep, mine_epochs=1)),
        "chosen by loss": on(chosen(deep, by="loss")),
        # The reference runs on all that is mined: on as much as ASHEM mines, it would take what training has.
        "chosen by gain from depth, one epoch": on(chosen(deep, {"mine_epochs": 1}, by="gain"), reference=reference),
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


def last_layer(lab: Lab, repeats: int = 5) -> Table:
    """A training step whose stages weigh only the last layer, against one that asks every head all the same."""
    sizes = {"vocab": lab.vocab_size, "dim": lab.dim, "heads": lab.heads, "seq": lab.seq, "batch": lab.batch}
    rows = []
    gc.freeze()  # what is there already need not be looked through between the steps
    for layers in sorted({lab.depth, 2 * lab.depth}):
        shape = training.Shape("", layers=layers, **sizes)
        stages = [ease.StageConfig((1, layers - 1), 0.0), ease.StageConfig((layers, layers))]
        config = ease.TrainingConfig(stages=stages)
        ours, every = training.trainer_step(shape, config), training.all_logits_step(shape, config)
        row = training.timed("", shape, 1.0, ours, every, repeats)
        rows.append([str(layers), row.ease, row.other, f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"])
    gc.unfreeze()
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
