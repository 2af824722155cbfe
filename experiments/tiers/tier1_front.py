"""Tier 1: the fronts. Every strategy and standard models of every depth at equal training FLOPs, at several scales."""

from __future__ import annotations

from functools import partial

import ease
from experiments.harness.line import (
    BASE,
    CONTINUED,
    Line,
    Trial,
    baselines,
    curve,
    curve_names,
    grow,
    make,
    standard_names,
)
from experiments.harness.measuring import Report
from experiments.harness.running import Experiment
from experiments.strategies.classifier_exits import classifier_exits
from experiments.tiers import memory
from experiments.tiers.scales import SCALES, Scale, make_lab

CLASSIFIER_EXITS = ("ASHEM", "early exit", "stacking, with exit", "open growth", "tuned exit")
"""Lines that are also measured with exit classifiers, whose confidence needs no output head."""


def experiment(name: str, data: str, command: str, allow_overlap: bool = False) -> Experiment:
    """The fronts at a scale of `SCALES`."""
    scale = SCALES[name]
    report = Report(
        f"Fronts at scale {name}",
        scale.base,
        standard_names(scale.depths),
        (CONTINUED,),
        curve=curve_names({1: scale.depths, **scale.curve}),
        memory_baselines=tuple(map(memory.named, standard_names((0, *scale.depths)))) if scale.memory else (),
        by_token_group=() if scale.only else ("ASHEM", CONTINUED),
        task_metrics=scale.task_metrics,
        command=command,
    )
    lines = scale.only or strategies(scale)
    return Experiment(name, partial(make_lab, name, data, allow_overlap), lines, report)


def strategies(scale: Scale) -> dict[str, Line]:
    """The baselines and every strategy, the most informative first and each line after the one that it starts from."""
    plain = every_strategy(scale)
    return memory.lines(plain, scale.depths[0], scale.deep) if scale.memory else plain


def every_strategy(scale: Scale) -> dict[str, Line]:
    """The lines without a memory."""
    brick, deep, most = scale.depths[0], scale.deep, scale.depths[-1]
    joint = {"num_layers": deep, "exit_layer": brick, "routing_threshold": 0.0}
    opened = {"shallow_layers": brick, "deep_layers": deep}
    # LayerSkip's first layer has no loss, so its first exit is after the second layer. Layer dropout is constant: at
    # scale s that did better on validation than dropout that rises (perplexity 5.359 against 5.577).
    skip = {"num_layers": max(3, deep), "exit_layer": 2, "routing_threshold": 0.0}
    finished = f"standard, {deep} layers, before tuning"
    tuned = partial(make, ease.TuneConfig, exits=(brick,))
    *below, under, _ = scale.depths  # the exit is after layer `under`
    grown_first = {"deep_layers": most, "exit_layer": under, "growth": tuple(below), "keep": 0.3}
    grown_first["first_share"] = 1 - most / sum(scale.depths)
    return {
        **baselines(scale.depths),
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
        "deep supervision, weighted by depth": Line(
            make(ease.DeepSupervisionConfig, num_layers=most, weighting="depth")
        ),
        "discriminative": Line(make(ease.DiscriminativeConfig, num_layers=deep)),
        **{f"{name}, classifier exit": Line(classifier_exits, on=name, rates=False) for name in CLASSIFIER_EXITS},
        **curve(scale.curve),
        **scale.more,
    }


def stages(depths: tuple[int, ...], trial: Trial) -> ease.StagedConfig:
    """N-stage training after phase 1: equal parts of the remaining FLOPs, each stage on half of the tokens before."""
    later = len(depths) - 1
    options = trial.options | {"max_flops": trial.flops / later}
    mined = max(1, trial.lab.mine_epochs // later)
    phases = [
        ease.PhaseConfig(layers=layers, ratio=0.5**number, mine_epochs=mined, **options)
        for number, layers in enumerate(depths[1:], 1)
    ]
    return ease.StagedConfig((ease.PhaseConfig(layers=depths[0]), *phases), seed=trial.seed, pretrained=True)
