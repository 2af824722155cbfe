"""Confidence bounds by hand and by simulation (how often a bound fails), sequential tests, and AUROC."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease.evaluation.bounds import auroc, passing, upper_bound


def test_auroc_by_hand() -> None:
    confidences = torch.tensor([0.9, 0.8, 0.8, 0.1])
    # Of the 4 pairs, 0.9 ranks higher in both, and 0.8 ranks higher in one and ties in one.
    assert auroc(confidences, torch.tensor([True, True, False, False])) == pytest.approx(3.5 / 4)
    assert auroc(confidences, torch.tensor([False, False, True, True])) == pytest.approx(0.5 / 4)
    assert auroc(torch.ones(4), torch.tensor([True, False, True, True])) == 0.5
    assert math.isnan(auroc(confidences, torch.ones(4, dtype=torch.bool)))


def test_auroc_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for levels in (3, 50, 10**6):
        confidences, agrees = torch.randint(levels, (500,)) / levels, torch.rand(500) < 0.7
        expected = metrics.roc_auc_score(agrees.numpy(), confidences.double().numpy())
        assert auroc(confidences, agrees) == pytest.approx(expected, abs=1e-9)


def test_bound_by_hand() -> None:
    losses = torch.rand(50)
    assert upper_bound(losses, None) == pytest.approx(losses.mean().item())
    # One sequence with loss 0: each bet b multiplies its stake by 1 + b a / (1 - a).
    bets = [0.5**k for k in range(10)]
    limit = upper_bound(torch.zeros(1), 0.8)
    wealth = sum(b * (1 + b * limit / (1 - limit)) for b in bets) / sum(bets)
    assert wealth == pytest.approx(1 / (1 - 0.8), rel=1e-6)
    # The smaller bets survive one sequence with the largest loss.
    assert upper_bound(torch.tensor([1.0] + [0.0] * 300), 0.95) < 0.05
    assert upper_bound(torch.ones(20), 0.95) == pytest.approx(1)
    # The bound scales with the span, and values outside the span are clipped.
    assert upper_bound(losses * 4 - 2, 0.9, (-2, 2)) == pytest.approx(upper_bound(losses, 0.9) * 4 - 2)
    assert upper_bound(torch.tensor([-9.0, 9.0]), 0.9, (-1, 1)) == upper_bound(torch.tensor([-1.0, 1.0]), 0.9, (-1, 1))


@given(st.integers(0, 10**6), st.integers(2, 200), st.floats(0.01, 0.9))
def test_bound_is_above_the_mean_and_increases_with_confidence_and_losses(seed: int, n: int, scale: float) -> None:
    losses = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * scale
    bounds = [upper_bound(losses, confidence) for confidence in (0.5, 0.9, 0.99)]
    assert losses.mean() <= bounds[0] <= bounds[1] <= bounds[2] <= 1
    assert upper_bound(losses + 0.05, 0.9) >= bounds[1]
    assert upper_bound(losses.flip(0), 0.9) == pytest.approx(bounds[1], abs=1e-9)  # independent of their order


def test_bound_converges_to_the_mean() -> None:
    losses = torch.rand(40_000) * 0.2
    assert upper_bound(losses, 0.95) == pytest.approx(losses.mean().item(), abs=0.002)


# Distributions of a sequence's loss with a given mean: 0 or 1, a few large losses, and losses close to the mean.
DISTRIBUTIONS: dict[str, Callable[[float, int], Tensor]] = {
    "0 or 1": lambda mean, n: (torch.rand(n) < mean).double(),
    "overdispersed": lambda mean, n: torch.distributions.Beta(0.5 * mean, 0.5 * (1 - mean)).sample((n,)).double(),
    "concentrated": lambda mean, n: torch.distributions.Binomial(64, torch.full((n,), mean)).sample().double() / 64,
}
MEANS = [0.005, 0.02, 0.05, 0.0501, 0.052, 0.055, 0.07]  # mean loss of each candidate; the limit is 0.05


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_wrong_candidates_pass_at_most_as_often_as_stated(name: str) -> None:
    torch.manual_seed(1)
    limit, confidence, draws, n = 0.05, 0.9, 300, 250
    wrong, nonempty, naive = 0, 0, 0
    for _ in range(draws):
        losses = [DISTRIBUTIONS[name](mean, n) for mean in MEANS]
        passed = len(passing((upper_bound(each, confidence) for each in losses), limit))
        wrong += passed > 3  # the first three are within the limit
        nonempty += passed > 0
        naive += len(passing((upper_bound(each, None) for each in losses), limit)) > 3
    slack = 3 * math.sqrt(draws * confidence * (1 - confidence))
    assert wrong <= draws * (1 - confidence) + slack
    assert nonempty >= 0.9 * draws, "the bound rejects nearly every candidate"
    assert naive > draws * (1 - confidence) + slack, "the plain mean should fail this test"


def test_bound_from_a_random_half_holds_for_the_whole_text() -> None:
    # Two very different halves: the random choice of the calibration sequences is the only assumption.
    torch.manual_seed(2)
    text = torch.cat([torch.rand(200) * 0.02, 0.1 + torch.rand(200) * 0.3]).double()
    draws, confidence = 400, 0.9
    bounds = [upper_bound(text[torch.randperm(400)[:200]], confidence) for _ in range(draws)]
    failed = sum(bound < text.mean() for bound in bounds)
    assert failed <= draws * (1 - confidence) + 3 * math.sqrt(draws * confidence * (1 - confidence))
    assert sum(bounds) / draws < 1.25 * text.mean()


def test_losses_are_clipped_only_with_a_confidence() -> None:
    losses, span = torch.tensor([5.0, -0.5]), (-1.0, 1.0)
    assert upper_bound(losses, None, span) == 2.25
    assert upper_bound(losses, 0.9, span) == upper_bound(torch.tensor([1.0, -0.5]), 0.9, span)
