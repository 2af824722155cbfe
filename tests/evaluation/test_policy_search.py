"""The search of exits and measures: what it installs, what it leaves alone, and what decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ease import EaseError, Policy, StandardTransformer, Target, TokenBatches, score
from ease.evaluation import policy_search
from ease.evaluation.calibration import Choice, choose
from ease.evaluation.policy_search import MEASURES, Preview, search
from ease.evaluation.sequences import Sequences
from ease.storage import fingerprint

RATIO = Target("target_ratio", 0.5)
Sets = tuple[list[Any], list[Any], list[Any], list[Any]]
Times = Callable[[Sequence[StandardTransformer], Sequence[Any]], list[float]]


@pytest.fixture
def sets(text: Tensor) -> Sets:
    """Batches to fit classifiers to, to propose, to decide, and to measure on."""
    drawn = list(TokenBatches(text, 32, 8, shuffle=True, max_batches=16))
    return drawn[:4], drawn[4:8], drawn[8:12], drawn[12:]


def clock(share: float) -> Times:
    return lambda models, batches: [share] * len(models)


def test_a_policy_is_installed_only_if_it_saves_flops_and_time(trained: StandardTransformer, sets: Sets) -> None:
    before = fingerprint(trained)
    for target, measures, share, installed in (
        (RATIO, MEASURES, 0.9, True),
        (RATIO, MEASURES, 1.1, False),  # slower than full depth
        (Target("target_ratio", 0.9), ("margin",), 0.9, False),  # more FLOPs than full depth: few tokens leave
    ):
        found = search(trained, target, (1,), measures, *sets, times=clock(share))
        record, best = found.record, found.record["best"]
        assert record["installed"] is installed
        assert [row["measure"] for row in record["table"]].count(best["measure"]) == 1
        assert {row["measure"] for row in record["table"]} == set(measures)
        assert found.model.policy == Policy(**record["policy"])
        assert record["held_out"]["flops_share"] == pytest.approx(
            score(found.model, sets[3], found.model.policy).flops / score(trained, sets[3]).flops
        )
        if installed:
            assert best["flops_share"] < 1
            assert best["time_share"] == share
            assert record["policy"]["exits"] == (1,)
        else:
            assert found.model.policy == Policy()
            assert record["held_out"]["flops_share"] == 1
            assert not record["classifiers"]
        json.dumps(record)
        assert fingerprint(trained) == before, "the model keeps no classifier"
        assert not trained.config.classifier_exits


def test_the_fastest_of_those_that_save_nothing_is_not_installed_for_one_that_does(
    trained: StandardTransformer, sets: Sets
) -> None:
    found = search(trained, RATIO, (1,), MEASURES, *sets, times=lambda models, _: [1.2, 0.9, 1.2, 1.2][: len(models)])
    assert found.record["best"] == found.record["table"][1]
    assert found.record["installed"]


def test_the_classifiers_of_the_installed_policy_alone_are_in_the_view(tiny: Any, sets: Sets) -> None:
    model = tiny(4, sharp=True)
    found = search(model, RATIO, (1, 2, 3), ["gain"], *sets, times=clock(0.5))
    exits = found.model.policy.exits
    assert len(exits) < 3
    assert found.record["searched"] == 6  # three exits alone, and three pairs
    assert found.model.config.classifier_exits == exits == tuple(found.record["classifiers"])
    assert not model.config.classifier_exits
    kept = search(model, RATIO, (1, 2, 3), ["gain"], *sets, times=clock(1.5))
    assert not kept.model.config.classifier_exits


def test_with_one_exit_the_preview_sends_tokens_where_routing_does(trained: StandardTransformer, sets: Sets) -> None:
    policy = Policy((1,), (0.3,))
    sequences = Sequences(trained, sets[1], policy)
    routed, preview = sequences.scores(policy), Preview(sequences, (1,))
    estimated = preview.scores(policy)
    assert torch.equal(estimated.exits, routed.exits)
    assert 0.05 < (routed.exits == 1).double().mean() < 0.95
    left = routed.exits == 1
    torch.testing.assert_close(estimated.losses[left].float(), routed.losses[left])
    assert preview.agreement(policy)[~left].all()
    torch.testing.assert_close(preview.full.losses.float(), sequences.full.losses)


def test_the_confidence_is_shared_by_the_candidates(
    trained: StandardTransformer, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spied(target: Target, *rest: Any) -> Choice:
        asked.append(target.confidence)
        return choose(target, *rest)

    monkeypatch.setattr(policy_search, "choose", spied)
    target = Target("target_ratio", 0.9, 0.8)
    search(trained, target, (1,), ["margin", "max-probability"], *sets, times=clock(0.5))
    assert asked == [None, None, 0.9, 0.9]  # ranked without a confidence; 1 - (1 - 0.8) / 2


def test_an_unreachable_target_is_an_error(trained: StandardTransformer, sets: Sets) -> None:
    with pytest.raises(EaseError, match="cannot be reached: the best on these 32 sequences is 0"):
        search(trained, Target("compute_budget", 0.01), (1,), MEASURES, *sets, times=clock(0.5))
    with pytest.raises(EaseError, match="no exit has a classifier of its own"):
        search(trained, RATIO, (1,), ["classifier"], *sets, times=clock(0.5))
