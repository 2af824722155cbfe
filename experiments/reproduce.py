"""Every table and figure of the paper, by tier: `ease reproduce TIER`.

- smoke: everything, end to end, at a size that says nothing.
- 1: the front. Every strategy and plain models of every depth at equal training FLOPs, at several scales.
- 2: ASHEM taken apart, its thresholds, what it costs, in-sample beside held-out, the path of the last layer.
- 3: tier 1's tables on what is given: a checkpoint, texts with labels, prompts with completions, a stream.

A tier is a list of experiments, each a plan of lines in a folder of its own, `OUT/TIER/NAME`. What is trained is kept,
so the same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ease
from ease.data.tokenizers import token_strings
from experiments.analysis import scaling
from experiments.analysis.tables import notes
from experiments.harness.measuring import Report
from experiments.harness.running import Experiment, Settings, run, write_tables
from experiments.harness.scheduler import BASE, PART, Lab, Line, Trial, grow, make, plain, plain_names
from experiments.strategies.classifier_exits import headless
from experiments.tiers import tier3_user_data as given
from experiments.tiers import wikitext_words as wikitext
from experiments.tiers.tier2_ablation import LEAKY, ablations, last_layer

HEADLESS = ("ASHEM", "early exit", "stacking, with exit", "open growth", "tuned exit")
"""Lines whose exits are also measured without asking the head whether they are sure."""


@dataclass(frozen=True)
class Scale:
    """A size of model and data that fits a laptop, and the depths that are tried there."""

    settings: Mapping[str, Any]
    """Of the lab."""
    tokenizer: str | None = "byte"
    """None: whole words, as the original recipe reads WikiText."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Of plain models; the first is phase 1's, after which tokens leave."""
    deep: int = 2
    """Layers of the models that tokens may leave early."""
    more: Mapping[str, Line] = field(default_factory=dict)
    """Lines beside every strategy."""


def sizes(dim: int, budget: float, lrs: tuple[float, ...], **settings: Any) -> dict[str, Any]:
    own = {"dim": dim, "budget": budget, "lrs": lrs, "seq": 128, "batch": 32}
    return own | {"epoch_batches": 200, "eval_batches": (20, 80)} | settings


SCALES = {
    "tiny": Scale(sizes(16, 2.5e8, (1e-2, 2e-2), seq=32, batch=8, epoch_batches=5, eval_batches=(2, 3))),
    "xs": Scale(sizes(32, 5e11, (1e-2, 2e-2, 4e-2, 8e-2), mine_epochs=2)),
    "s": Scale(sizes(48, 2e12, (5e-3, 1e-2, 2e-2), mine_epochs=4)),
    "m": Scale(sizes(64, 8e12, (5e-3, 1e-2, 2e-2), mine_epochs=7), depths=(1, 2, 3, 4), deep=3),
    "l": Scale(sizes(128, 2e14, (3e-3, 6e-3), seq=256, batch=16, mine_epochs=20), "bpe:512", depths=(2, 4, 6), deep=6),
    "words": Scale({"lrs": (1e-2,)}, None, depths=(2, 3, 4), deep=4, more=wikitext.VARIANTS),
    "bpe": Scale(sizes(64, 2e12, (1e-2, 2e-2), dropout=0.1, mine_epochs=2, epoch_batches=150), "bpe:512"),
}


def make_lab(name: str, data: str) -> Lab:
    """The text of `data` at a scale."""
    scale = SCALES[name]
    shape = {"brick": scale.depths[0], "depth": scale.depths[-1], **scale.settings}
    if scale.tokenizer is None:
        return wikitext.lab(None if data == "wikitext-2" else data, **shape)
    corpus = ease.load_corpus(data, scale.tokenizer)
    text = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    pieces = token_strings(corpus.tokenizer, range(corpus.vocab_size))
    about = f"{corpus.name}, {corpus.tokenizer_spec}"
    return Lab(text, about, corpus.vocab_size, pieces=tuple(pieces), **shape)


# ---------------------------------------------------------------------------------------------------------
# Tier 1: the front


def rivals(scale: Scale) -> dict[str, Line]:
    """Every strategy, those that tell most first; what others stand on comes before them."""
    brick, deep, most = scale.depths[0], scale.deep, scale.depths[-1]
    joint = {"num_layers": deep, "exit_layer": brick, "routing_threshold": 0.0}
    opened = {"shallow_layers": brick, "deep_layers": deep}
    # Its first layer has no loss, so that its first exit is the second layer's. Layer dropout stays as it is from the
    # start: at scale s that did better on validation than dropout that rises (perplexity 5.359 against 5.577).
    skip = {"num_layers": max(3, deep), "exit_layer": 2, "routing_threshold": 0.0}
    finished = f"{deep} layers, nine tenths"
    tuned = partial(make, ease.TuneConfig, exits=(brick,))
    *below, under, _ = scale.depths  # the exit lies under the last of them
    grown_first = {"deep_layers": most, "exit_layer": under, "growth": tuple(below), "going_on": 0.3}
    grown_first["first_share"] = 1 - most / sum(scale.depths)
    return {
        **plain(scale.depths),
        "ASHEM": Line(grow(deep), on=BASE),
        **{
            f"progressive growth {'-'.join(map(str, depths))}": Line(make(ease.GrowthConfig, layers=depths))
            for depths in (scale.depths[:n] for n in range(2, len(scale.depths) + 1))
        },
        "gated": Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=brick)),
        "gated, grown": Line(make(ease.GatedConfig, **grown_first)),
        "early exit": Line(make(ease.EarlyExitConfig, **joint)),
        "open growth": Line(make(ease.OpenGrowthConfig, **opened)),
        "N-stage": Line(partial(stages, tuple(range(brick, most + 1))), on=BASE),
        finished: Line(make(ease.StandardConfig, num_layers=deep), share=0.9),
        "tuned exit": Line(tuned(), on=finished),
        "tuned exit, distilled": Line(tuned(objective="distillation"), on=finished),
        "stacking": Line(make(ease.GrowthConfig, layers=(brick, deep), grow_init="copy")),
        "stacking, with exit": Line(make(ease.GrowthConfig, layers=(brick, deep), grow_init="copy", exit_weight=0.5)),
        "gated, an exit per layer": Line(
            make(ease.GatedConfig, deep_layers=most, exit_layer=tuple(range(brick, most)))
        ),
        "gated from the start": Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=brick, first_share=0.0)),
        "open growth from the start": Line(make(ease.OpenGrowthConfig, **opened, first_share=0.0)),
        "early exit, distilled": Line(make(ease.EarlyExitConfig, **joint, objective="both")),
        "LayerSkip": Line(make(ease.LayerSkipConfig, **skip)),
        "deep supervision": Line(make(ease.DeepSupervisionConfig, num_layers=most)),
        "deep supervision, by depth": Line(make(ease.DeepSupervisionConfig, num_layers=most, weighting="depth")),
        "discriminative": Line(make(ease.DiscriminativeConfig, num_layers=deep)),
        **{f"{name}, no head asked": Line(headless, on=name, rates=False) for name in HEADLESS},
        **scale.more,
    }


def stages(depths: tuple[int, ...], trial: Trial) -> ease.StagedConfig:
    """N-stage training on a finished phase 1: equal parts of what is left, each on half of the tokens before."""
    later = len(depths) - 1
    options = trial.options | {"max_flops": trial.flops / later}
    mined = max(1, trial.lab.mine_epochs // later)
    phases = [
        ease.PhaseConfig(layers=layers, ratio=0.5**number, mine_epochs=mined, **options)
        for number, layers in enumerate(depths[1:], 1)
    ]
    return ease.StagedConfig((ease.PhaseConfig(layers=depths[0]), *phases), seed=trial.seed, pretrained=True)


def front(name: str, data: str, command: str) -> Experiment:
    scale = SCALES[name]
    title = f"Fronts at scale {name}"
    report = Report(
        title, BASE, plain_names(scale.depths), ("continued",), explained=("ASHEM", "continued"), command=command
    )
    return Experiment(name, partial(make_lab, name, data), rivals(scale), report)


# ---------------------------------------------------------------------------------------------------------
# Tier 2: ASHEM taken apart


def apart(name: str, data: str, command: str) -> Experiment:
    scale = SCALES[name]
    lines = plain(scale.depths) | ablations(scale.depths[0], scale.deep, BASE, PART)
    report = Report(
        f"ASHEM taken apart at scale {name}",
        BASE,
        plain_names(scale.depths),
        ("continued", "ASHEM"),
        explained=("ASHEM", "continued"),
        original="ASHEM",
        both=(f"{BASE}, own head", "ASHEM, own head", LEAKY),
        leaky=LEAKY,
        command=command,
    )
    return Experiment(name, partial(make_lab, name, data), lines, report)


# ---------------------------------------------------------------------------------------------------------
# Running

TIERS = {"smoke": ("tiny",), "1": ("xs", "s", "m"), "2": ("s",)}
"""Tier -> its scales on the standard library."""
ELSEWHERE = ("words", "bpe")
"""Scales on other data."""


def reproduce(
    tier: str, data: str | None, scales: Sequence[str], settings: Settings, model: str | None = None
) -> list[str]:
    """Trains what is missing of a tier, and writes its tables and figures; returns what is still missing.

    Args:
        data: whatever `ease.load_corpus` reads (stdlib by default); for tier 3 see `experiments.given`.
        scales: those of the tier by default.
        model: a checkpoint, for tier 3.

    Raises:
        EaseError: an unknown tier or scale, or settings that make no sense.
    """
    if tier == "3":
        return given.reproduce(data, model, scales, settings)
    if tier not in TIERS:
        raise ease.EaseError(f"unknown tier {tier!r}: use {', '.join(TIERS)}, 3")
    if model is not None:
        raise ease.EaseError(f"--model is for tier 3, and tier {tier} trains its own: leave it out")
    data = data or "stdlib"
    names = scales or (TIERS[tier] if data == "stdlib" or tier == "smoke" else ELSEWHERE)
    if unknown := [name for name in names if name not in SCALES]:
        raise ease.EaseError(f"unknown scale {unknown[0]!r}: use {', '.join(SCALES)}")
    source = data if data == "stdlib" else Path(data).name
    command = f"ease reproduce {tier} --data {source} --seeds {','.join(map(str, settings.seeds))} --scales {{}}"
    makers = {"smoke": (front, apart), "1": (front,), "2": (apart,)}[tier]
    made = [maker(name, data, command.format(name)) for maker in makers for name in names]
    if tier == "smoke":  # both of its experiments are of one scale
        made = [one._replace(name=kind) for one, kind in zip(made, ("front", "apart"), strict=True)]
    if data != "stdlib":
        made = [one._replace(name=f"{source}-{one.name}") for one in made]
    folder = settings.out / tier
    done = run(made, settings._replace(out=folder))
    for one in made:
        here = folder / one.name
        if one.report.leaky and (here / "test.json").exists() and not (here / "last-layer.tex").exists():
            write_tables([last_layer(one.make_lab())], here, "last-layer")
    over = done.data[:1] if tier == "smoke" else done.data
    if tier != "2" and over:
        told = [note for one in over for note in notes(one)[:1]]
        stem = "scales" if data == "stdlib" else f"{source}-scales"
        write_tables([scaling.table(over, told)], folder, stem)
        scaling.picture(over, folder / stem)
    return done.missing
