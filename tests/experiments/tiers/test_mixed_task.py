"""The task with a known share of deep tokens: right answers, half of it text, groups in scored order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ease
from ease.inputs import IGNORE
from experiments.tiers import mixed_task
from experiments.tiers.mixed_task import GROUPS, SYMBOLS, Mixed, lookups

SHAPE = {"brick": 1, "depth": 2, "budget": 1.0, "lrs": (1e-2,), "dim": 16, "seq": 128, "batch": 4}


@pytest.fixture
def lab(text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mixed:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path))
    monkeypatch.setattr(mixed_task, "ROWS", {"train": 12, "val": 6, "test": 9})
    return mixed_task.lab(str(text_file), True, SHAPE)


@pytest.mark.parametrize("hops", [2, 3])
def test_answers_follow_the_permutation_that_the_row_shows(hops: int) -> None:
    lab = Mixed({}, "", 400, **SHAPE, first=258, hops=hops)
    seen = set()
    for ids, targets in lookups(20, lab, torch.Generator().manual_seed(0)):
        assert len(ids) == len(targets) == lab.seq
        pairs = (ids[:SYMBOLS] - 258).tolist()
        follows = {pair // SYMBOLS: pair % SYMBOLS for pair in pairs}
        assert set(follows) == set(follows.values()) == set(range(SYMBOLS))
        symbols = 258 + SYMBOLS**2
        assert (targets[:SYMBOLS] == IGNORE).all()
        assert (targets[SYMBOLS::2] == IGNORE).all()
        for marker, asked, answer in zip(ids[SYMBOLS::2], ids[SYMBOLS + 1 :: 2], targets[SYMBOLS + 1 :: 2]):
            deep, found = int(marker) - symbols - SYMBOLS, int(asked) - symbols
            for _ in range(hops if deep else 1):
                found = follows[found]
            assert int(answer) - symbols == found
            seen.add(deep)
    assert seen == {0, 1}


def test_half_of_the_scored_tokens_are_text_and_groups_follow_their_order(lab: Mixed) -> None:
    group = lab.groups(lab.test.examples)
    shares = [(group == number).double().mean().item() for number in range(len(GROUPS))]
    assert shares[0] == pytest.approx(0.5, abs=0.06), "in whole rows"
    assert shares[2] / (shares[1] + shares[2]) == pytest.approx(lab.deep_share, abs=0.08)
    scored = torch.cat([batch.x[batch.y != IGNORE] for batch in lab.test])
    assert torch.equal(group == 0, scored < lab.first)
    model = lab.model(2)
    policy = ease.Policy((1,), (1.0,))
    scores = ease.score(model, lab.test, policy)
    found = lab.extra_metrics(model, policy, scores)
    assert set(found) == set(mixed_task.TASK_METRICS)
    assert found["loss deep"] == pytest.approx(scores.losses[group == 2].mean().item(), rel=1e-5)
    assert found["continue deep"] == 1.0
