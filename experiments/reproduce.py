"""Every table and figure of the paper, by tier: `ease reproduce TIER`.

- smoke: tiers 1 and 2 end to end, at a size too small for conclusions.
- 1: the fronts. Every strategy and standard models of every depth at equal training FLOPs, at several scales.
- 2: the ablation of ASHEM, its thresholds, its cost, in-sample and held-out results, and the last-layer path.
- 3: tier 1's tables on user data: a checkpoint, texts with labels, prompts with completions, or a stream.

A tier is a list of experiments, each a set of lines with a folder of its own, `OUT/TIER/NAME`. Results are saved, so
that the same command resumes a stopped one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ease
from experiments.analysis import scaling
from experiments.analysis.pages import write
from experiments.analysis.table import write_tables
from experiments.analysis.tables import notes
from experiments.harness.running import Settings, run
from experiments.studies.last_layer_path import last_layer
from experiments.tiers import tier1_front, tier2_ablation, tier3_user_data
from experiments.tiers.scales import DEFAULT_SCALES, OTHER_DATA_SCALES, SCALES


def reproduce(
    tier: str,
    data: str | None,
    scales: Sequence[str],
    settings: Settings,
    model: str | None = None,
    *,
    allow_overlap: bool = False,
) -> list[str]:
    """Train what is missing of a tier, and write its tables and figures.

    Args:
        tier: smoke, 1, 2 or 3.
        data: whatever `ease.load_corpus` reads (stdlib by default); for tier 3 see `tiers.tier3_user_data`.
        scales: names of `SCALES`; those of the tier by default.
        settings: output folder, seeds, parallel jobs and time budget.
        model: a checkpoint, for tier 3.
        allow_overlap: accept data whose splits share most of their text.

    Returns:
        The lines that are not trained yet.

    Raises:
        EaseError: an unknown tier or scale, or invalid settings.
    """
    if tier == "3":
        return tier3_user_data.reproduce(data, model, scales, settings, allow_overlap)
    if tier not in DEFAULT_SCALES:
        raise ease.EaseError(f"unknown tier {tier!r}: use {', '.join(DEFAULT_SCALES)}, 3")
    if model is not None:
        raise ease.EaseError(f"--model is for tier 3, and tier {tier} trains its own models: leave it out")
    if allow_overlap and data is None:
        raise ease.EaseError("--allow-overlap is for --data: leave it out, or name your data")
    data = data or "stdlib"
    names = scales or (DEFAULT_SCALES[tier] if data == "stdlib" or tier == "smoke" else OTHER_DATA_SCALES)
    if unknown := [name for name in names if name not in SCALES]:
        raise ease.EaseError(f"unknown scale {unknown[0]!r}: use {', '.join(SCALES)}")
    source = data if data == "stdlib" else Path(data).name
    shown = f"--data {source}{' --allow-overlap' * allow_overlap}"
    command = f"ease reproduce {tier} {shown} --seeds {','.join(map(str, settings.seeds))} --scales {{}}"
    front, ablation = tier1_front.experiment, tier2_ablation.experiment
    makers = {"smoke": (front, ablation), "1": (front,), "2": (ablation,)}[tier]
    experiments = [maker(name, data, command.format(name), allow_overlap) for maker in makers for name in names]
    if tier == "smoke":  # both of its experiments have the same scale
        experiments = [one._replace(name=kind) for one, kind in zip(experiments, ("front", "apart"), strict=True)]
    if data != "stdlib":
        experiments = [one._replace(name=f"{source}-{one.name}") for one in experiments]
    folder = settings.out / tier
    outcome = run(experiments, settings._replace(out=folder), write)
    for one in experiments:
        here = folder / one.name
        if one.report.in_sample and (here / "test.json").exists() and not (here / "last-layer.tex").exists():
            write_tables([last_layer(one.make_lab())], here, "last-layer")
    fronts = outcome.data[:1] if tier == "smoke" else outcome.data
    if tier != "2" and fronts:
        configurations = [note for one in fronts for note in notes(one)[:1]]
        stem = "scales" if data == "stdlib" else f"{source}-scales"
        write_tables([scaling.table(fronts, configurations)], folder, stem)
        scaling.picture(fronts, folder / stem)
    return outcome.missing
