"""Cost of every line at 1B parameters: tokens, FLOPs and hours, by the trainer's own count.

Nothing is trained. Every line's phases are set up on a model without weights, and `Trainer.step_flops`, which also
counts real runs, gives the cost of a training token in each. Validation and trials of learning rates are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ease
from ease.flops import classifier_flops, full_depth_flops, head_flops, layer_flops
from experiments.analysis.table import Table
from experiments.harness.line import PART, standard_name
from experiments.tiers.scales import DEFAULT_SCALES, SCALES
from experiments.tiers.tier1_front import strategies

TOKENS = 20
"""Per parameter (Hoffmann et al. 2022, arXiv:2203.15556)."""
SUSTAINED = 380e12
"""FLOP/s of one H100: the lowest value that Grattafiori et al. 2024 (arXiv:2407.21783) report in Table 4."""
SEEDS = 3
CONTINUING = 0.5
"""Share of the tokens that continues past the exit, in training and at inference."""
WITHOUT_WEIGHTS = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """The size of a model, and its exit after layer `brick`."""

    vocab_size: int
    dim: int
    layers: int
    brick: int
    heads: int
    seq: int

    def config(self, layers: int) -> ease.ModelConfig:
        return ease.ModelConfig(self.vocab_size, self.dim, layers, self.heads, tie_embeddings=True)

    def model(self, layers: int) -> ease.StandardTransformer:
        """A model without weights."""
        with WITHOUT_WEIGHTS:
            return ease.StandardTransformer(**vars(self.config(layers)))


BILLION = Shape(vocab_size=32_768, dim=2048, layers=18, brick=9, heads=16, seq=2048)


@dataclass(frozen=True)
class Part:
    """One phase of a line."""

    share: float
    """Share of the line's FLOPs."""
    per_token: float
    """FLOPs of training per token."""


def lines(shape: Shape) -> dict[str, list[Part]]:
    """Line -> its phases, configured as in tier 1."""
    L, E = shape.layers, shape.brick
    exits, by_depth = {"num_layers": L, "exit_layer": E}, (E / (E + L), L / (E + L))
    configs: dict[str, tuple[Any, Sequence[float]]] = {
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
        standard_name(L): [whole],
        standard_name(E): list(parts(ease.StandardConfig(num_layers=E), shape, (1.0,))),
        "ASHEM": list(ashem(shape)),
        **{name: list(parts(config, shape, shares)) for name, (config, shares) in configs.items()},
        "tuned exit": [Part(0.9, whole.per_token), tuned],
    }


def parts(config: Any, shape: Shape, shares: Sequence[float]) -> Iterator[Part]:
    """The phases of a strategy that does not depend on data."""
    strategy, nothing = config.strategy(), ease.Data([], [])
    model = shape.model(config.num_layers or shape.layers)
    for share in shares:
        with WITHOUT_WEIGHTS:
            phase = strategy.next_phase(model, nothing)
        assert phase is not None
        yield Part(share, per_token(phase, model, shape))


def ashem(shape: Shape) -> Iterator[Part]:
    """ASHEM's phases. Phase 2 runs the frozen layers twice, in mining and in training: their states exceed memory."""
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
    yield Part(1 - PART, mining + per_token(phase, model, shape, some(shape, CONTINUING)))


def per_token(
    phase: ease.Phase, model: ease.StandardTransformer, shape: Shape, active: torch.Tensor | None = None
) -> float:
    """FLOPs per token of a training step on one sequence; with a curriculum, the mean over a phase's steps."""
    x = torch.zeros(1, shape.seq, dtype=torch.long)
    batch = ease.Batch(x, x, active)
    model.freeze_below(phase.first, head=phase.freeze_head, exits=phase.exits)
    trainer = ease.Trainer(phase.config, shape.vocab_size)
    continuing = {exit: some(shape, share) for exit, share in phase.config.selection.keep.items()}
    steps = [phase.curriculum(n, n / 100) for n in range(100)] if phase.curriculum else [None]
    counts = [
        trainer.step_flops(model, batch, int(batch.running.sum()), phase.first, step, continuing).values()
        for step in steps
    ]
    model.freeze_below(0)
    return sum(map(sum, counts)) / len(counts) / shape.seq


def some(shape: Shape, share: float) -> torch.Tensor:
    """(1, T) mask of a share of the tokens, spread evenly."""
    at = torch.arange(shape.seq, dtype=torch.double)
    return (((at + 1) * share).floor() > (at * share).floor())[None]


def mean(line: Sequence[Part]) -> float:
    """FLOPs of training per token, over all phases."""
    return sum(part.share for part in line) / sum(part.share / part.per_token for part in line)


def inference(shape: Shape, *, classifier: bool = False) -> float:
    """FLOPs per token if half of the tokens leave at the exit, by the confidence of the head or of a classifier."""
    config, T = shape.config(shape.layers), shape.seq
    pairs, stay = T * (T + 1) / 2, int(CONTINUING * T)
    exit = classifier_flops(config, T) + head_flops(config, T - stay) if classifier else head_flops(config, T)
    layers = shape.brick * layer_flops(config, T, T, int(pairs))
    layers += (shape.layers - shape.brick) * layer_flops(config, T, stay, int(CONTINUING * pairs))
    return (layers + exit + head_flops(config, stay)) / T


WITHOUT_EXIT = ("progressive growth", "discriminative")
"""Lines without an exit."""


def table(shape: Shape = BILLION) -> Table:
    """A row per line."""
    made, config = lines(shape), shape.config(shape.layers)
    size = sum(weight.numel() for weight in shape.model(shape.layers).parameters())
    tokens = TOKENS * size
    deep, shallow = standard_name(shape.layers), standard_name(shape.brick)
    budget = tokens * mean(made[deep])
    full = full_depth_flops(config, shape.seq)
    costs: Mapping[str, float] = {
        **dict.fromkeys((deep, *WITHOUT_EXIT), full),
        shallow: full_depth_flops(shape.config(shape.brick), shape.seq),
        "gated": inference(shape, classifier=True),
    }
    rows = []
    for name, line in made.items():
        cost = costs.get(name) or inference(shape)
        rows.append(
            [
                name,
                f"{mean(line) / 1e9:.2f}",
                f"{mean(line) / mean(made[deep]):.0%}",
                f"{tokens * mean(line):.2e}",
                f"{hours(tokens * mean(line)):,.0f}",
                f"{budget / mean(line) / 1e9:.1f}",
                f"{cost / 1e9:.2f}",
                f"{cost / full:.0%}",
            ]
        )
    head = head_flops(config, 1) / (full - head_flops(config, 1)) * shape.layers
    many = len(strategies(SCALES["m"])) * (len(SCALES["m"].settings["lrs"]) + SEEDS - 1)
    largest = max(SCALES[name].settings["budget"] for name in DEFAULT_SCALES["1"])
    return Table(
        "cluster",
        f"Cost of every line at {size / 1e9:.2f}B parameters, counted and not run",
        ["line", "training", "share", "run", "H100 hours", "tokens at equal FLOPs", "inference", "share"],
        rows,
        [
            "Training and inference: GFLOPs per token, including every head, each with its share of the first line's. "
            f"Run: the FLOPs of training on {TOKENS} tokens per parameter, {tokens / 1e9:.1f}B, each counted in every "
            "phase that reads it. Tokens at equal FLOPs: billions of tokens that the line reads for the FLOPs of the "
            "first line's run.",
            f"{shape.layers} layers, dim {shape.dim:,}, vocabulary {shape.vocab_size:,}, tied head, sequences of "
            f"{shape.seq:,}; the exit after layer {shape.brick}, past which {CONTINUING:.0%} of the tokens continue "
            f"in training and at inference. A head costs {head:.2f} layers. Phases share FLOPs as in tier 1. Every "
            "token of ASHEM's phase 2 passes the frozen layers twice, once in mining and once in training.",
            f"Hours at {SUSTAINED / 1e12:.0f} TFLOP/s sustained on one H100, the lowest value reported for Llama 3 "
            "(arXiv:2407.21783, Table 4), for lines and sizes that have not been run there. At equal FLOPs every line "
            f"takes {hours(budget):,.0f} hours. Tier 1 at scale m has {many} trainings; at this size they would take "
            f"up to {many * budget:.1e} FLOPs, {many * hours(budget):,.0f} hours. The largest scale of tier "
            f"1 has {largest:.0e} FLOPs a line, {math.log10(budget / largest):.1f} decades less than one line here.",
        ],
    )


def hours(flops: float) -> float:
    """Hours of one accelerator."""
    return flops / SUSTAINED / 3600
