"""Tier 2: the ablation of ASHEM, with variants that change one component, fixed thresholds and in-sample results."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ease
from experiments.harness.line import (
    BASE,
    CONTINUED,
    PART,
    Line,
    Make,
    Trial,
    baselines,
    grow,
    make,
    standard_name,
    standard_names,
)
from experiments.harness.measuring import Report
from experiments.harness.running import Experiment
from experiments.strategies.ashem_variants import variant
from experiments.tiers.scales import SCALES, make_lab

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
RATIOS = (0.1, 0.3, 0.7, 1.0)
UNTIED = {"tie_embeddings": False}
IN_SAMPLE = "original recipe, in-sample"


def experiment(name: str, data: str, command: str, allow_overlap: bool = False) -> Experiment:
    """The ablation at a scale of `SCALES`."""
    scale = SCALES[name]
    lines = baselines(scale.depths) | variants(scale.depths[0], scale.deep, BASE, PART)
    report = Report(
        f"Ablation of ASHEM at scale {name}",
        BASE,
        standard_names(scale.depths),
        (CONTINUED, "ASHEM"),
        by_token_group=("ASHEM", CONTINUED),
        ablated="ASHEM",
        on_validation=(f"{BASE}, untied head", "ASHEM, untied head", IN_SAMPLE),
        in_sample=IN_SAMPLE,
        command=command,
    )
    return Experiment(name, partial(make_lab, name, data, allow_overlap), lines, report)


def variants(brick: int, deep: int, base: str, share: float) -> dict[str, Line]:
    """ASHEM and its variants, started from phase 1.

    Args:
        brick: layers of phase 1.
        deep: layers of the grown models.
        base: the name of phase 1's line.
        share: of the budget that phase 1 takes.
    """
    on = partial(Line, on=base)
    untied = f"{base}, untied head"
    open_growth = make(ease.OpenGrowthConfig, shallow_layers=brick, deep_layers=deep, first_share=0.0)
    by_gain = variant(deep, {"mine_epochs": 1}, select_by="gain")
    return {
        "ASHEM": on(grow(deep), thresholds=THRESHOLDS),
        "mined from one epoch": on(grow(deep, mine_epochs=1)),
        "selected by loss": on(variant(deep, select_by="loss")),
        # The reference model runs on all mined text; on as much as ASHEM mines, that would leave no FLOPs to train.
        "selected by gain from depth, one epoch": on(by_gain, reference=standard_name(deep)),
        "selected at random": on(variant(deep, select_by="random")),
        **{f"hard ratio {ratio:g}": on(grow(deep, hard_example_ratio=ratio)) for ratio in RATIOS},
        "copied initialization": on(grow(deep, grow_init="copy")),
        "random initialization": on(variant(deep, random_init=True)),
        "tokens without context": on(variant(deep, without_context=True)),
        "nothing frozen": on(variant(deep, freeze="nothing")),
        "nothing frozen, loss at the exit kept": on(open_growth),
        untied: Line(make(ease.StandardConfig, num_layers=brick), share=share, shape=UNTIED),
        "ASHEM, untied head": Line(grow(deep), on=untied, shape=UNTIED),
        "ASHEM, untied head trained": Line(variant(deep, freeze="all but head"), on=untied, shape=UNTIED),
        IN_SAMPLE: Line(original_recipe(deep, share), shape=UNTIED),
    }


def original_recipe(layers: int, share: float) -> Make:
    """Both phases of the original recipe, which mines and trains on the validation tokens."""
    return partial(_original_recipe, layers, share)


def _original_recipe(layers: int, share: float, trial: Trial) -> ease.ASHEMConfig:
    first = grow(layers)(trial._replace(flops=(1 - share) * trial.flops))
    options = trial.options | {"max_flops": share * trial.flops}
    own = {f"phase1_{name}": options[name] for name in ("lr", "patience", "max_epochs", "max_flops")}
    return replace(first, pretrained=False, protocol="original", **own)
