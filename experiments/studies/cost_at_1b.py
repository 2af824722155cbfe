"""What a run at 1B parameters would take, line by line: tokens, FLOPs and hours, by the trainer's own count.

Nothing is trained. Every line's phases are laid out on a model without weights, and `Trainer.step_flops`, which counts
real runs, says what a training token costs in each. Not counted are validation and trials of learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ease
from ease.flops import classifier_flops, full_depth_flops, head_flops, layer_flops
from experiments.analysis.tables import Table
from experiments.harness.scheduler import PART
from experiments.reproduce import SCALES, TIERS, rivals

TOKENS = 20
"""For each parameter (Hoffmann et al. 2022, arXiv:2203.15556)."""
SUSTAINED = 380e12
"""FLOP/s of one H100: the least that Grattafiori et al. 2024 (arXiv:2407.21783) report in Table 4."""
SEEDS = 3
HALF = 0.5
"""Of the tokens go on, in training and at inference."""
WITHOUT_WEIGHTS = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """A model, and the layers after which tokens may leave it."""

    vocab_size: int
    dim: int
    layers: int
    brick: int
    heads: int
    seq: int

    def config(self, layers: int) -> ease.ModelConfig:
        return ease.ModelConfig(self.vocab_size, self.dim, layers, self.heads, tie_embeddings=True)

    def model(self, layers: int) -> ease.StandardTransformer:
        """Without weights."""
        with WITHOUT_WEIGHTS:
            return ease.StandardTransformer(**vars(self.config(layers)))


BILLION = Shape(vocab_size=32_768, dim=2048, layers=18, brick=9, heads=16, seq=2048)


@dataclass(frozen=True)
class Part:
    """One phase of a line."""

    share: float
    """Of the line's FLOPs."""
    per_token: float
    """FLOPs of training on one token."""


def lines(shape: Shape) -> dict[str, list[Part]]:
    """Line -> its phases, set up as the front's lines are."""
    L, E = shape.layers, shape.brick
    exits, by_depth = {"num_layers": L, "exit_layer": E}, (E / (E + L), L / (E + L))
    planned: dict[str, tuple[Any, Sequence[float]]] = {
        "deep supervision": (ease.DeepSupervisionConfig(num_layers=L), (1.0,)),
        "early exit": (ease.EarlyExitConfig(**exits), (1.0,)),
        "early exit, distilled": (ease.EarlyExitConfig(**exits, objective="both"), (1.0,)),
        "LayerSkip": (ease.LayerSkipConfig(**exits), (1.0,)),
        "progressive growth": (ease.GrowthConfig(layers=(E, L)), by_depth),
        "stacking, with exit": (ease.GrowthConfig(layers=(E, L), grow_init="copy", exit_weight=0.5), by_depth),
        "open growth": (ease.OpenGrowthConfig(shallow_layers=E, deep_layers=L), (0.5, 0.5)),
        "gated": (ease.GatedConfig(deep_layers=L, exit_layer=E), (0.3, 0.7)),
        "discriminative": (ease.DiscriminativeConfig(num_layers=L), (1.0,)),
    }
    (whole,) = parts(ease.StandardConfig(num_layers=L), shape, (1.0,))
    (tuned,) = parts(ease.TuneConfig(exits=(E,)), shape, (0.1,))
    return {
        f"plain, layers: {L}": [whole],
        f"plain, layers: {E}": list(parts(ease.StandardConfig(num_layers=E), shape, (1.0,))),
        "ASHEM": list(ashem(shape)),
        **{name: list(parts(config, shape, shares)) for name, (config, shares) in planned.items()},
        "tuned exit": [Part(0.9, whole.per_token), tuned],
    }


def parts(config: Any, shape: Shape, shares: Sequence[float]) -> Iterator[Part]:
    """The phases that a strategy plans without looking at data."""
    strategy, nothing = config.strategy(), ease.Data([], [])
    model = shape.model(config.num_layers or shape.layers)
    for share in shares:
        with WITHOUT_WEIGHTS:
            phase = strategy.next_phase(model, nothing)
        assert phase is not None
        yield Part(share, per_token(phase, model, shape))


def ashem(shape: Shape) -> Iterator[Part]:
    """Phase 2 reads every token twice: to mine, and in a frozen trunk, whose states no memory holds at this size."""
    strategy = ease.ASHEMConfig(phase1_layers=shape.brick, phase2_layers=shape.layers).strategy()
    model, nothing = shape.model(shape.brick), ease.Data([], [])
    phase = strategy.next_phase(model, nothing)
    assert phase is not None
    yield Part(PART, per_token(phase, model, shape))
    mining = full_depth_flops(model.config, shape.seq)
    with WITHOUT_WEIGHTS:
        model.grow(shape.layers)
    training = ease.create_standard_config(shape.layers)
    phase = ease.Phase("phase 2", training, [], [], phase.options, first=shape.brick + 1)
    yield Part(1 - PART, mining + per_token(phase, model, shape, some(shape, HALF)))


def per_token(
    phase: ease.Phase, model: ease.StandardTransformer, shape: Shape, active: torch.Tensor | None = None
) -> float:
    """FLOPs of a training step on one sequence, by token; with a curriculum, the mean over a phase's steps."""
    x = torch.zeros(1, shape.seq, dtype=torch.long)
    batch = ease.Batch(x, x, active)
    model.freeze_below(phase.first, head=phase.freeze_head, exits=phase.exits)
    trainer, going_on = ease.Trainer(phase.config, shape.vocab_size), phase.config.going_on
    went = {exit: some(shape, share) for exit, share in going_on.items()}
    steps = [phase.step(number, number / 100) for number in range(100)] if phase.step else [None]
    counts = [
        trainer.step_flops(model, batch, int(batch.running.sum()), phase.first, step, went).values() for step in steps
    ]
    model.freeze_below(1)
    return sum(map(sum, counts)) / len(counts) / shape.seq


def some(shape: Shape, share: float) -> torch.Tensor:
    """(1, T) a share of the tokens, spread evenly."""
    at = torch.arange(shape.seq, dtype=torch.double)
    return (((at + 1) * share).floor() > (at * share).floor())[None]


def mean(line: Sequence[Part]) -> float:
    """FLOPs of training on one token, over all phases."""
    return sum(part.share for part in line) / sum(part.share / part.per_token for part in line)


def inference(shape: Shape, *, headless: bool = False) -> float:
    """FLOPs per token where half of the tokens leave at the exit; headless: a classifier says which."""
    config, T = shape.config(shape.layers), shape.seq
    pairs, stay = T * (T + 1) / 2, int(HALF * T)
    asked = classifier_flops(config, T) + head_flops(config, T - stay) if headless else head_flops(config, T)
    layers = shape.brick * layer_flops(config, T, T, int(pairs))
    layers += (shape.layers - shape.brick) * layer_flops(config, T, stay, int(HALF * pairs))
    return (layers + asked + head_flops(config, stay)) / T


WHOLE = ("progressive growth", "discriminative")
"""Lines without an exit."""


def table(shape: Shape = BILLION) -> Table:
    """A row per line."""
    made, config = lines(shape), shape.config(shape.layers)
    size = sum(weight.numel() for weight in shape.model(shape.layers).parameters())
    tokens = TOKENS * size
    plain, whole = (f"plain, layers: {layers}" for layers in (shape.layers, shape.brick))
    budget = tokens * mean(made[plain])
    full = full_depth_flops(config, shape.seq)
    costs: Mapping[str, float] = {
        **dict.fromkeys((plain, *WHOLE), full),
        whole: full_depth_flops(shape.config(shape.brick), shape.seq),
        "gated": inference(shape, headless=True),
    }
    rows = []
    for name, line in made.items():
        cost = costs.get(name) or inference(shape)
        rows.append(
            [
                name,
                f"{mean(line) / 1e9:.2f}",
                f"{mean(line) / mean(made[plain]):.0%}",
                f"{tokens * mean(line):.2e}",
                f"{hours(tokens * mean(line)):,.0f}",
                f"{budget / mean(line) / 1e9:.1f}",
                f"{cost / 1e9:.2f}",
                f"{cost / full:.0%}",
            ]
        )
    head = head_flops(config, 1) / (full - head_flops(config, 1)) * shape.layers
    many = len(rivals(SCALES["m"])) * (len(SCALES["m"].settings["lrs"]) + SEEDS - 1)
    largest = max(SCALES[name].settings["budget"] for name in TIERS["1"])
    return Table(
        "cluster",
        f"What the lines would take at {size / 1e9:.2f}B parameters, counted and not run",
        ["line", "training", "share", "run", "H100 hours", "tokens at equal FLOPs", "inference", "share"],
        rows,
        [
            "Training and inference: GFLOPs per token, every head in them, each beside its share of the first line's. "
            f"Run: the FLOPs of training on {TOKENS} tokens a parameter, {tokens / 1e9:.1f}B, each counted in every "
            "phase that reads it. Tokens at equal FLOPs: billions that the line reads for the FLOPs of the first one's "
            "run.",
            f"{shape.layers} layers, dim {shape.dim:,}, vocabulary {shape.vocab_size:,}, tied head, sequences of "
            f"{shape.seq:,}; the exit after layer {shape.brick}, where {HALF:.0%} of the tokens go on, in training and "
            f"at inference. A head costs {head:.2f} layers. Phases share FLOPs as they do on the front. Every token of "
            "ASHEM's phase 2 passes the frozen layers twice, once to mine and once to train.",
            f"Hours at {SUSTAINED / 1e12:.0f} TFLOP/s sustained on one H100, the least that Llama 3's training reports "
            "(arXiv:2407.21783, Table 4), for lines and sizes that have not been run there. At equal FLOPs every line "
            f"takes plain's {hours(budget):,.0f} hours. A front of scale m has {many} trainings; at this size they "
            f"would take up to {many * budget:.1e} FLOPs, {many * hours(budget):,.0f} hours. The largest scale of tier "
            f"1 has {largest:.0e} FLOPs a line, {math.log10(budget / largest):.1f} decades less than one line here.",
        ],
    )


def hours(flops: float) -> float:
    """Of one accelerator."""
    return flops / SUSTAINED / 3600
