"""Every table and figure of the paper, by tier: `ease reproduce TIER`, or `python -m experiments.reproduce TIER`.

- smoke: everything, end to end, at a size that says nothing.
- 1: the front. Every strategy and plain models of every depth at equal training FLOPs, at several scales.
- 2: ASHEM taken apart, its thresholds, what it costs, in-sample beside held-out.
- 3: the same on a checkpoint, on classification and on a large stream: by the commands that the library has for these.

A tier is a list of experiments, each a plan of lines in a folder of its own, `OUT/TIER/NAME`. What is trained is kept,
so the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ease
from ease.data import token_strings
from ease.machine import choose_device
from experiments import draw, tables
from experiments.fronts import Report, measure
from experiments.lines import Lab, Line, Plan, Trial, grow, make
from experiments.utils import load_wikitext_words

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
BASE = "phase 1"
PART = 0.6  # of the budget that phase 1 takes where lines share it


@dataclass(frozen=True)
class Scale:
    """A size of model and data that fits a laptop, and the depths that are tried there."""

    settings: Mapping[str, Any]
    """Of the lab."""
    tokenizer: str | None = "byte"
    """None: whole words, as the original recipe reads WikiText."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Plain models; tokens leave after the first."""
    deep: int = 2
    """Layers of the models that tokens may leave early."""


def sizes(dim: int, budget: float, **settings: Any) -> dict[str, Any]:
    own = {"dim": dim, "budget": budget, "seq": 128, "batch": 32, "lrs": (1e-2, 2e-2, 4e-2)}
    return own | {"epoch_batches": 200, "eval_batches": (20, 80)} | settings


SCALES = {
    "tiny": Scale(sizes(16, 2e8, seq=32, batch=8, lrs=(1e-2, 2e-2), epoch_batches=5, eval_batches=(2, 3))),
    "xs": Scale(sizes(32, 5e11, mine_epochs=2)),
    "s": Scale(sizes(48, 2e12, mine_epochs=4)),
    "m": Scale(sizes(64, 8e12, lrs=(1e-2, 2e-2), mine_epochs=7), depths=(1, 2, 3, 4), deep=3),
    "l": Scale(
        sizes(128, 2e14, lrs=(3e-3, 6e-3), seq=256, batch=16, mine_epochs=20), "bpe:512", depths=(2, 4, 6), deep=6
    ),
    # The original recipe's sizes, six epochs of two layers.
    "words": Scale(
        sizes(64, 1.4e13, seq=32, lrs=(5e-3, 1e-2), dropout=0.15, epoch_batches=None, eval_batches=(None, None)),
        tokenizer=None,
        depths=(2, 3, 4),
        deep=4,
    ),
    "bpe": Scale(sizes(64, 8e12, lrs=(1e-2, 2e-2), dropout=0.1, mine_epochs=2, epoch_batches=150), "bpe:512", deep=2),
}


def lab(scale: Scale, data: str) -> Lab:
    """The text of `data` at that scale."""
    shape = {"brick": scale.depths[0], "depth": scale.depths[-1], **scale.settings}
    if scale.tokenizer is None:
        words, vocab = load_wikitext_words(None if data == "wikitext-2" else data)
        text = {"train": words["train"][:330_000], "val": words["val"][:66_000], "test": words["test"]}
        return Lab(text, f"{Path(data).name}, whole words", len(vocab), pieces=tuple(vocab), **shape)
    corpus = ease.load_corpus(data, scale.tokenizer)
    text = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    pieces = token_strings(corpus.tokenizer, range(corpus.vocab_size))
    name = f"{corpus.name}, {corpus.tokenizer_spec}"
    return Lab(text, name, corpus.vocab_size, pieces=tuple(pieces), **shape)


class Experiment(NamedTuple):
    """A plan and what it is reported for."""

    name: str
    scale: Scale
    lines: Mapping[str, Line]
    title: str
    plain: tuple[str, ...]
    explained: str | None = None
    settings: Mapping[str, Any] = {}
    """Of the lab, beside the scale's."""


# ---------------------------------------------------------------------------------------------------------
# Tier 1: the front


def plain(scale: Scale) -> dict[str, Line]:
    """What others stand on, and the models to beat."""
    return {
        BASE: Line(make(ease.StandardConfig, num_layers=scale.depths[0]), share=PART),
        **{f"plain, layers: {k}": Line(make(ease.StandardConfig, num_layers=k)) for k in scale.depths},
        "continued": Line(make(ease.StandardConfig, num_layers=scale.depths[0]), on=BASE),
    }


def rivals(scale: Scale) -> dict[str, Line]:
    """Every strategy, from `brick` to `deep` layers; what others stand on comes first."""
    brick, deep, most = scale.depths[0], scale.deep, scale.depths[-1]
    joint = {"num_layers": deep, "exit_layer": brick, "routing_threshold": 0.0}
    opened = {"shallow_layers": brick, "deep_layers": deep}
    finished = f"{deep} layers, unfinished"
    tuned = partial(make, ease.TuneConfig, exits=(brick,))
    return {
        **plain(scale),
        finished: Line(make(ease.StandardConfig, num_layers=deep), share=0.9),
        "ASHEM": Line(grow(deep), on=BASE),
        "N-stage": Line(partial(stages, tuple(range(brick, most + 1))), on=BASE),
        "deep supervision": Line(make(ease.DeepSupervisionConfig, num_layers=most)),
        "deep supervision, by depth": Line(make(ease.DeepSupervisionConfig, num_layers=most, weighting="depth")),
        "early exit": Line(make(ease.EarlyExitConfig, **joint)),
        "early exit, distilled": Line(make(ease.EarlyExitConfig, **joint, objective="both")),
        "LayerSkip": Line(
            # Its first layer has no loss, so that the first exit is the second layer's.
            make(ease.LayerSkipConfig, num_layers=max(3, deep), exit_layer=2, routing_threshold=0.0)
        ),
        "stacking": Line(make(ease.StackingConfig, layers=(brick, deep))),
        "stacking, with exit": Line(make(ease.StackingConfig, layers=(brick, deep), exit_weight=0.5)),
        "open growth": Line(make(ease.OpenGrowthConfig, **opened)),
        "open growth from the start": Line(make(ease.OpenGrowthConfig, **opened, first_share=0.0)),
        "discriminative": Line(make(ease.DiscriminativeConfig, num_layers=deep)),
        "tuned exit": Line(tuned(), on=finished),
        "tuned exit, distilled": Line(tuned(objective="distillation"), on=finished),
    }


def stages(depths: tuple[int, ...], trial: Trial) -> ease.StagedConfig:
    """N-stage training on a finished phase 1: equal parts of what is left, each on half of the tokens before."""
    part = trial.options | {"max_flops": trial.flops / (len(depths) - 1)}
    phases = [ease.PhaseConfig(layers=depths[0])]
    for number, layers in enumerate(depths[1:], 1):
        mined = max(1, trial.lab.mine_epochs // (len(depths) - 1))
        phases.append(ease.PhaseConfig(layers=layers, ratio=0.5**number, mine_epochs=mined, **part))
    return ease.StagedConfig(tuple(phases), seed=trial.seed, pretrained=True)


def fronts(names: Sequence[str]) -> list[Experiment]:
    return [
        Experiment(
            name,
            scale := SCALES[name],
            rivals(scale),
            f"Scale {name}",
            tuple(f"plain, layers: {k}" for k in scale.depths),
            explained="ASHEM",
        )
        for name in names
    ]


# ---------------------------------------------------------------------------------------------------------
# Running


TIERS: dict[str, tuple[Callable[[Sequence[str]], list[Experiment]], tuple[str, ...], tuple[str, ...]]] = {
    "smoke": (fronts, ("tiny",), ("tiny",)),
    "1": (fronts, ("xs", "s", "m"), ("words", "bpe")),
}
"""Tier -> its experiments by scale, its scales on the standard library, and on other data."""


def reproduce(
    tier: str,
    *,
    data: str = "stdlib",
    seeds: Sequence[int] = (0, 1, 2),
    scales: Sequence[str] = (),
    minutes: float | None = None,
    device: str = "auto",
    jobs: int = 1,
    out: Path = Path("results/reproduce"),
    say: Callable[[str], None] = print,
) -> list[str]:
    """Trains what is missing of a tier, and writes its tables and figures.

    Args:
        data: stdlib, or whatever `ease.load_corpus` reads.
        seeds: the first one tries learning rates.
        scales: those of the tier by default.
        minutes: after which no line is begun any more.
        jobs: lines trained at a time, each on one thread.
        say: told of every line that is done.

    Returns:
        The lines that are missing, by experiment.

    Raises:
        EaseError: an unknown tier or scale, or settings that make no sense.
    """
    if tier not in TIERS:
        raise ease.EaseError(f"unknown tier {tier!r}: use {', '.join(TIERS)}")
    if minutes is not None and not minutes > 0:
        raise ease.EaseError(f"the budget is {minutes:g} minutes: give more than 0, or leave it out")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ease.EaseError(f"seeds are {list(seeds)}: give one or more, each once, none below 0")
    if jobs < 1:
        raise ease.EaseError(f"jobs is {jobs}: train at least one line at a time")
    make_experiments, own, others = TIERS[tier]
    names = scales or (own if data == "stdlib" else others)
    if unknown := [name for name in names if name not in SCALES]:
        raise ease.EaseError(f"unknown scale {unknown[0]!r}: use {', '.join(SCALES)}")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    where = "" if data == "stdlib" else f"{Path(data).name}-"
    command = f"ease reproduce {tier} --data {Path(data).name} --seeds {','.join(map(str, seeds))}"
    missing, reports = [], []
    for made in make_experiments(names):
        folder = out / tier / f"{where}{made.name}"
        make_lab = partial(lab, replace(made.scale, settings={**made.scale.settings, **made.settings}), data)
        plan = Plan(make_lab, made.lines, folder, choose_device(device))
        report = Report(made.title, BASE, made.plain, ("continued",), made.explained, f"{command} --scales {made.name}")
        say(f"{folder}: {plan.lab.corpus}")
        with plan.workers(jobs) as pool:
            plan.work(seeds, pool, jobs, until, say)
            left = plan.missing(seeds)
            missing += [f"{made.name}: {name}" for name in left]
            if BASE in left or set(made.plain) <= set(left):
                continue  # there is nothing to compare with yet
            reports.append(measure(plan, report, seeds, pool, say))
        write(reports[-1], folder)
        say(f"tables: {folder / 'front.md'}")
    return missing


def write(data: dict[str, Any], folder: Path) -> None:
    """Tables and figure of one experiment, from its `test.json` alone."""
    made = tables.all_tables(data)
    (folder / "front.md").write_text("\n".join(table.markdown() for table in made), encoding="utf-8")
    (folder / "front.tex").write_text("\n".join(table.latex() for table in made), encoding="utf-8")
    draw.front(data, folder / "front")
