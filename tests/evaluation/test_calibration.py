"""Calibration: candidate thresholds, and the choice among them for a target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease import EaseError, Policy, StandardTransformer, Target, TokenBatches, calibrate, score
from ease.evaluation.bounds import upper_bound
from ease.evaluation.calibration import GOALS, LOOSEST, candidate_thresholds
from ease.evaluation.sequences import Sequences, Views

Make = Callable[..., StandardTransformer]


def random_views(seed: int, exits: int, n: int, levels: int) -> Views:
    """Confidences with ties, and exits whose rate of agreement with the last one is about their confidence."""
    g = torch.Generator().manual_seed(seed)
    confidences = (torch.rand(exits, n, generator=g, dtype=torch.float64) * levels).ceil() / levels
    wrong = torch.rand(exits, n, generator=g) > confidences
    return Views(confidences, torch.cat([wrong.long(), torch.zeros(1, n, dtype=torch.long)]), torch.empty(0))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 200), st.sampled_from([4, 1000]))
def test_candidates_are_ordered_by_one_price_for_all_exits(seed: int, exits: int, n: int, levels: int) -> None:
    views = random_views(seed, exits, n, levels)
    candidates = candidate_thresholds(views)
    assert candidates[0] == (1.0,) * exits
    assert candidates[-1] == (LOOSEST,) * exits
    assert len(set(candidates)) == len(candidates)
    assert all(0 < t <= 1 for candidate in candidates for t in candidate)
    for strict, loose in zip(candidates, candidates[1:]):
        assert all(s >= t for s, t in zip(strict, loose))
    prices_by_exit = []
    for confidences, agrees in zip(views.confidences, views.agrees):
        rates = {c: float((~agrees[confidences >= c]).double().mean()) for c in set(confidences.tolist())}
        prices_by_exit.append({c: min(rate for other, rate in rates.items() if other <= c) for c in rates})
    for candidate in candidates[1:-1]:
        # No token that leaves, at any exit, has a higher price than a token that stays.
        leaving, staying = [0.0], [math.inf]
        for prices, t in zip(prices_by_exit, candidate):
            if t < 1:  # a threshold of 1 also means that no token leaves
                leaving.append(max(price for c, price in prices.items() if c >= t))
            staying += [price for c, price in prices.items() if c < t]
        assert max(leaving) <= min(staying) + 2e-6


def test_candidates_are_spaced_evenly_even_if_all_exits_agree() -> None:
    confidences = torch.rand(2, 2000, dtype=torch.float64)
    for best in (torch.zeros(3, 2000, dtype=torch.long), torch.randint(2, (3, 2000))):
        shares = [
            float((confidences >= torch.tensor(t)[:, None]).any(0).double().mean())
            for t in candidate_thresholds(Views(confidences, best, torch.empty(0)))
        ]
        assert shares[0] == 0
        assert shares[-1] == 1
        assert max(b - a for a, b in zip(shares, shares[1:])) < 0.04


def test_one_confident_mistake_does_not_disable_an_exit() -> None:
    confidences = torch.linspace(1, 0.01, 1000, dtype=torch.float64)[None]
    best = torch.zeros(2, 1000, dtype=torch.long)
    best[0, 0] = 1  # the most confident token is wrong
    shares = torch.tensor(
        [
            float((confidences >= t[0]).double().mean())
            for t in candidate_thresholds(Views(confidences, best, torch.empty(0)))
        ]
    )
    assert (shares < 0.5).sum() > 10


def thirds(text: Tensor) -> list[list[Any]]:
    """Batches to propose, to decide, and to measure on."""
    drawn = list(TokenBatches(text, 32, 8, shuffle=True, max_batches=18))
    return [drawn[:6], drawn[6:12], drawn[12:]]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("min_agreement", [0.99, 0.85]),
        ("max_ppl_increase", [0.01, 0.1]),
        ("target_ratio", [0.2, 0.6]),
        ("compute_budget", [0.8, 1.0]),
    ],
)
@pytest.mark.parametrize("confidence", [None, 0.8])
def test_the_chosen_candidate_satisfies_the_target_and_the_next_does_not(
    kind: Any, values: list[float], confidence: float | None, text: Tensor, trained: StandardTransformer
) -> None:
    propose, decide, held_out = thirds(text)
    policy, goal = Policy((1,), (1.0,)), GOALS[kind]
    with torch.no_grad():
        trained.exit_norms[0].weight *= 1 + 2 * torch.randn(32)  # an exit that loses quality
    candidates = candidate_thresholds(Sequences(trained, propose, policy).views)
    sequences = Sequences(trained, decide, policy)

    def satisfied(thresholds: tuple[float, ...], value: float) -> bool:
        losses = sequences.means(goal.loss(sequences, replace(policy, thresholds=thresholds)))
        return upper_bound(losses, confidence, goal.span(sequences)) <= goal.to_limit(value)

    chosen = []
    for value in values:
        try:
            result = calibrate(trained, policy, Target(kind, value, confidence), propose, decide, held_out)
        except EaseError:
            assert confidence is not None, "without a confidence all of these can be reached"
            continue
        at = candidates.index(result.policy.thresholds)
        assert satisfied(result.policy.thresholds, value)
        beyond = at - 1 if goal.budget else at + 1
        assert beyond in (-1, len(candidates)) or not satisfied(candidates[beyond], value)
        chosen.append(result.policy.thresholds[0])
        record = result.record
        assert record["calibration"]["sequences"] == record["held_out"]["sequences"] == 48
        measured = score(trained, held_out, result.policy).metrics()
        assert record["held_out"]["ppl"] == measured["ppl"], "not measured on the held-out sequences"
        expected = {
            "min_agreement": record["held_out"]["agreement"],
            "max_ppl_increase": record["held_out"]["ppl_increase"],
            "target_ratio": measured["exit_shares"][2],
            "compute_budget": record["held_out"]["flops_share"],
        }
        assert record["held_out"]["value"] == pytest.approx(expected[kind], rel=0.03, abs=1e-5)
    # A target of lower quality or of lower cost never gives higher thresholds.
    assert chosen == sorted(chosen, reverse=not goal.budget)
    assert len(set(chosen)) == 2 or (chosen and confidence)


def test_all_exits_are_calibrated_jointly(text: Tensor, tiny: Make) -> None:
    model = tiny(4, sharp=True)
    with torch.no_grad():  # later layers change little, so that both exits often agree with the last layer
        for layer in model.layers[1:]:
            layer.attention.o_proj.weight *= 0.1
            layer.ffn.down_proj.weight *= 0.1
    result = calibrate(model, Policy((1, 3), (1.0, 1.0)), Target("target_ratio", 0.4), *thirds(text))
    shares = result.record["held_out"]["exit_shares"]
    assert all(0.02 < shares[e] < 0.9 for e in (1, 3))
    assert shares[4] == pytest.approx(0.4, abs=0.05)
    json.dumps(result.record)  # values fit for JSON


def test_other_measures_are_calibrated_as_well(text: Tensor, tiny: Make) -> None:
    policy = Policy((1, 2), (1.0, 1.0), "margin", always_deep=3)
    result = calibrate(tiny(3, sharp=True), policy, Target("target_ratio", 0.5), *thirds(text))
    assert (result.policy.confidence, result.policy.always_deep) == ("margin", 3)
    assert result.record["held_out"]["exit_shares"][3] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "target",
    [
        Target("compute_budget", 0.1),
        Target("min_agreement", 0.9999, 0.95),
        Target("max_ppl_increase", 0.0, 0.95),
        Target("target_ratio", 0.0, 0.9),
    ],
    ids=str,
)
def test_an_unreachable_target_names_the_best_value(target: Target, text: Tensor, trained: StandardTransformer) -> None:
    policy, sets = Policy((1,), (1.0,)), thirds(text)
    with pytest.raises(EaseError, match=f"{target} cannot be reached: the best on these 48 sequences is") as caught:
        calibrate(trained, policy, target, *sets)
    best = float(str(caught.value).split(" is ")[1].split(",")[0])
    calibrate(trained, policy, replace(target, value=best), *sets)
    better = best + 0.001 if target.kind == "min_agreement" else best - 0.001
    with pytest.raises(EaseError, match="cannot be reached"):
        calibrate(trained, policy, replace(target, value=better), *sets)


def test_invalid_input(text: Tensor, tiny: Make) -> None:
    for kind, value, message in (
        ("min_agreement", 1.1, r"min_agreement must lie in \[0, 1\], got 1.1"),
        ("max_ppl_increase", -0.1, "max_ppl_increase must be a number of at least 0, got -0.1"),
        ("target_ratio", math.nan, r"target_ratio must lie in \[0, 1\], got nan"),
    ):
        with pytest.raises(EaseError, match=message):
            Target(kind, value)  # type: ignore[arg-type]
    with pytest.raises(EaseError, match="use one of min_agreement"):
        Target("speed", 0.5)  # type: ignore[arg-type]
    with pytest.raises(EaseError, match=r"confidence must lie in \(0, 1\), such as 0.95, got 95"):
        Target("min_agreement", 0.9, 95)
    model, target, sets = tiny(2), Target("min_agreement", 0.9), thirds(text)
    with pytest.raises(EaseError, match="no exits to calibrate"):
        calibrate(model, Policy(), target, *sets)
    with pytest.raises(EaseError, match="choose a lower exit"):
        calibrate(model, Policy((2,), (1.0,)), target, *sets)
    with pytest.raises(EaseError, match="no token to calibrate on"):
        calibrate(model, Policy((1,), (1.0,)), target, sets[0], [], sets[2])
    with torch.no_grad():
        model.layers[0].ffn_norm.weight.fill_(torch.nan)
    with pytest.raises(EaseError, match="weights are probably corrupt"):
        calibrate(model, Policy((1,), (1.0,)), target, *sets)
