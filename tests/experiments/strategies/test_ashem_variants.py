"""Variants of ASHEM's second phase: selection, freezing, context and initialization."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ease
from experiments.harness.lab import Lab
from experiments.harness.line import Trial
from experiments.strategies.ashem_variants import variant


@pytest.fixture
def trial(text: torch.Tensor) -> Trial:
    half = len(text) // 2
    splits = {"train": text[:half], "val": text[half:], "test": text[half:]}
    sizes = {"brick": 1, "depth": 2, "budget": 1e9, "lrs": (1e-2,), "dim": 16, "seq": 16, "batch": 8}
    lab = Lab(splits, "", 256, **sizes, epoch_batches=4, eval_batches=(2, 2), tie_embeddings=False)  # type: ignore[arg-type]
    return Trial(lab, 0, 1e-2, 3e8)


def phase_of(trial: Trial, **settings: Any) -> tuple[ease.Phase, ease.StandardTransformer, ease.StandardTransformer]:
    torch.manual_seed(0)
    model = trial.lab.model(1)
    model.trained_exits = {1}
    before = copy.deepcopy(model)
    config = variant(2, **settings)(trial)
    phase = config.strategy().next_phase(model, ease.Data(trial.lab.train(0), trial.lab.val))
    assert phase is not None
    return phase, model, before


def hard_of(phase: ease.Phase) -> torch.Tensor:
    return torch.cat([batch.scored.flatten() for batch in phase.train.batches])


def test_half_of_the_tokens_are_hard_by_every_criterion(trial: Trial) -> None:
    reference = trial.lab.model(2)
    found = {}
    for select_by in ("confidence", "loss", "gain", "random"):
        phase, _model, before = phase_of(trial._replace(reference=reference), select_by=select_by)
        found[select_by] = hard_of(phase)
        assert found[select_by].double().mean() == pytest.approx(0.5, abs=0.02)
    batches = phase.train.batches
    scores = ease.score(before, [batch._replace(active=None, state=None) for batch in batches])
    assert scores.losses[found["loss"]].min() >= scores.losses[~found["loss"]].max() - 1e-5
    gain = scores.losses - ease.score(reference, [b._replace(active=None, state=None) for b in batches]).losses
    assert gain[found["gain"]].min() >= gain[~found["gain"]].max() - 1e-5
    assert len({tuple(hard.tolist()) for hard in found.values()}) == 4
    trial = trial._replace(reference=reference)
    by_loss, by_gain = (phase_of(trial, select_by=select_by)[0].spent for select_by in ("loss", "gain"))
    assert by_gain["mining"] > by_loss["mining"], "the reference's passes are counted"


def test_only_what_is_not_frozen_changes(trial: Trial) -> None:
    for freeze, moves in (("all", set()), ("all but head", {"head"}), ("nothing", {"head", "brick"})):
        phase, model, before = phase_of(trial, freeze=freeze)
        ease.Trainer(phase.config, 256).run(model, phase)
        moved = {"head": "output_head.weight", "brick": "layers.0.ffn.down_proj.weight"}
        found = {
            part for part, name in moved.items() if not torch.equal(model.state_dict()[name], before.state_dict()[name])
        }
        assert found == moves


def test_tokens_without_context_and_a_random_init(trial: Trial) -> None:
    phase, _, _ = phase_of(trial, without_context=True)
    whole, _, _ = phase_of(trial)
    assert {batch.x.shape[1] for batch in phase.train} == {1}
    assert sum(len(batch.x) for batch in phase.train) == int(hard_of(whole).sum())
    ids = torch.randint(256, (1, 8))
    for random_init in (False, True):
        _, model, before = phase_of(trial, random_init=random_init)
        assert torch.equal(model(ids), before(ids)) != random_init
        assert torch.equal(model.forward_to_layer(ids, 1), before.forward_to_layer(ids, 1))
