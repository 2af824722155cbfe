"""Thresholds for a target: what is proposed, what is tested, and how often a bound fails."""

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

from ease import EaseError, Layout, Policy, StandardTransformer, Target, TokenBatches, calibrate, route, score
from ease.evaluation.bounds import CLIP, auroc, passing, upper_bound
from ease.evaluation.calibration import GOALS, LOOSEST, Sequences, Views, path
from ease.interface import Batch

Make = Callable[..., StandardTransformer]


# ---------------------------------------------------------------------------------------------------------
# Ranks and bounds


def test_auroc_by_hand() -> None:
    sure = torch.tensor([0.9, 0.8, 0.8, 0.1])
    # Of the 4 pairs 0.9 wins both, 0.8 wins one and draws one.
    assert auroc(sure, torch.tensor([True, True, False, False])) == pytest.approx(3.5 / 4)
    assert auroc(sure, torch.tensor([False, False, True, True])) == pytest.approx(0.5 / 4)
    assert auroc(torch.ones(4), torch.tensor([True, False, True, True])) == 0.5
    assert math.isnan(auroc(sure, torch.ones(4, dtype=torch.bool)))


def test_auroc_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for levels in (3, 50, 10**6):
        sure, agrees = torch.randint(levels, (500,)) / levels, torch.rand(500) < 0.7
        expected = metrics.roc_auc_score(agrees.numpy(), sure.double().numpy())
        assert auroc(sure, agrees) == pytest.approx(expected, abs=1e-9)


def test_the_bound_by_hand() -> None:
    losses = torch.rand(50)
    assert upper_bound(losses, None) == pytest.approx(losses.mean().item())
    # One sequence without loss: each bet b multiplies its stake by 1 + b a / (1 - a).
    bets = [0.5**k for k in range(10)]
    limit = upper_bound(torch.zeros(1), 0.8)
    wealth = sum(b * (1 + b * limit / (1 - limit)) for b in bets) / sum(bets)
    assert wealth == pytest.approx(1 / (1 - 0.8), rel=1e-6)
    # A loss of everything in one sequence is survived by the smaller bets.
    assert upper_bound(torch.tensor([1.0] + [0.0] * 300), 0.95) < 0.05
    assert upper_bound(torch.ones(20), 0.95) == pytest.approx(1)
    # On another scale the same, and what lies outside counts as the end.
    assert upper_bound(losses * 4 - 2, 0.9, (-2, 2)) == pytest.approx(upper_bound(losses, 0.9) * 4 - 2)
    assert upper_bound(torch.tensor([-9.0, 9.0]), 0.9, (-1, 1)) == upper_bound(torch.tensor([-1.0, 1.0]), 0.9, (-1, 1))


@given(st.integers(0, 10**6), st.integers(2, 200), st.floats(0.01, 0.9))
def test_the_bound_is_above_the_mean_and_grows_with_confidence_and_losses(seed: int, n: int, scale: float) -> None:
    losses = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * scale
    bounds = [upper_bound(losses, confidence) for confidence in (0.5, 0.9, 0.99)]
    assert losses.mean() <= bounds[0] <= bounds[1] <= bounds[2] <= 1
    assert upper_bound(losses + 0.05, 0.9) >= bounds[1]
    assert upper_bound(losses.flip(0), 0.9) == pytest.approx(bounds[1], abs=1e-9)  # their order does not matter


def test_the_bound_closes_in_on_the_mean() -> None:
    losses = torch.rand(40_000) * 0.2
    assert upper_bound(losses, 0.95) == pytest.approx(losses.mean().item(), abs=0.002)


# Laws of a sequence's loss with a given mean: all or nothing, a few sequences that lose much, and all much alike.
LAWS: dict[str, Callable[[float, int], Tensor]] = {
    "all or nothing": lambda mean, n: (torch.rand(n) < mean).double(),
    "overdispersed": lambda mean, n: torch.distributions.Beta(0.5 * mean, 0.5 * (1 - mean)).sample((n,)).double(),
    "alike": lambda mean, n: torch.distributions.Binomial(64, torch.full((n,), mean)).sample().double() / 64,
}
MEANS = [0.005, 0.02, 0.05, 0.0501, 0.052, 0.055, 0.07]  # of the candidates; the limit is 0.05


@pytest.mark.parametrize("law", LAWS)
def test_a_wrong_candidate_passes_no_more_often_than_was_said(law: str) -> None:
    torch.manual_seed(1)
    limit, confidence, draws, n = 0.05, 0.9, 300, 250
    wrong, found, naive = 0, 0, 0
    for _ in range(draws):
        losses = [LAWS[law](mean, n) for mean in MEANS]
        passed = len(passing((upper_bound(each, confidence) for each in losses), limit))
        wrong += passed > 3  # the first three are right
        found += passed > 0
        naive += len(passing((upper_bound(each, None) for each in losses), limit)) > 3
    slack = 3 * math.sqrt(draws * confidence * (1 - confidence))
    assert wrong <= draws * (1 - confidence) + slack
    assert found >= 0.9 * draws, "not by refusing everything"
    assert naive > draws * (1 - confidence) + slack, "the plain mean fails this test"


def test_the_bound_holds_for_the_whole_text_by_the_draw_of_its_half() -> None:
    # A text of two halves as unlike as can be; which sequences calibrate is drawn, so nothing is assumed of them.
    torch.manual_seed(2)
    text = torch.cat([torch.rand(200) * 0.02, 0.1 + torch.rand(200) * 0.3]).double()
    draws, confidence = 400, 0.9
    bounds = [upper_bound(text[torch.randperm(400)[:200]], confidence) for _ in range(draws)]
    failed = sum(bound < text.mean() for bound in bounds)
    assert failed <= draws * (1 - confidence) + 3 * math.sqrt(draws * confidence * (1 - confidence))
    assert sum(bounds) / draws < 1.25 * text.mean()


# ---------------------------------------------------------------------------------------------------------
# Candidates


def seen(seed: int, exits: int, n: int, levels: int) -> Views:
    """Confidences with ties, and exits that agree with the last one about as often as they are sure."""
    g = torch.Generator().manual_seed(seed)
    sure = (torch.rand(exits, n, generator=g, dtype=torch.float64) * levels).ceil() / levels
    wrong = torch.rand(exits, n, generator=g) > sure
    return Views(sure, torch.cat([wrong.long(), torch.zeros(1, n, dtype=torch.long)]))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 200), st.sampled_from([4, 1000]))
def test_candidates_go_from_strict_to_loose_at_one_price(seed: int, exits: int, n: int, levels: int) -> None:
    views = seen(seed, exits, n, levels)
    candidates = path(views)
    assert candidates[0] == (1.0,) * exits
    assert candidates[-1] == (LOOSEST,) * exits
    assert len(set(candidates)) == len(candidates)
    assert all(0 < t <= 1 for candidate in candidates for t in candidate)
    for strict, loose in zip(candidates, candidates[1:]):
        assert all(s >= t for s, t in zip(strict, loose))
    listed = []
    for sure, agrees in zip(views.confidences, views.agrees):
        rates = {c: float((~agrees[sure >= c]).double().mean()) for c in set(sure.tolist())}
        listed.append({c: min(rate for other, rate in rates.items() if other <= c) for c in rates})
    for candidate in candidates[1:-1]:
        # Whoever leaves, at whichever exit, is no dearer than anyone who stays.
        paid, saved = [0.0], [math.inf]
        for prices, t in zip(listed, candidate):
            if t < 1:  # which also stands for "none leaves"
                paid.append(max(price for c, price in prices.items() if c >= t))
            saved += [price for c, price in prices.items() if c < t]
        assert max(paid) <= min(saved) + 2e-6


def test_candidates_are_spread_evenly_even_where_all_agree() -> None:
    sure = torch.rand(2, 2000, dtype=torch.float64)
    for best in (torch.zeros(3, 2000, dtype=torch.long), torch.randint(2, (3, 2000))):
        shares = [float((sure >= torch.tensor(t)[:, None]).any(0).double().mean()) for t in path(Views(sure, best))]
        assert shares[0] == 0
        assert shares[-1] == 1
        assert max(b - a for a, b in zip(shares, shares[1:])) < 0.04


def test_an_early_mistake_does_not_close_an_exit() -> None:
    sure = torch.linspace(1, 0.01, 1000, dtype=torch.float64)[None]
    best = torch.zeros(2, 1000, dtype=torch.long)
    best[0, 0] = 1  # the surest token of all is wrong
    prices = torch.tensor([float((sure >= t[0]).double().mean()) for t in path(Views(sure, best))])
    assert (prices < 0.5).sum() > 10


# ---------------------------------------------------------------------------------------------------------
# What a policy does to sequences


@pytest.fixture
def batches(text: Tensor) -> list[Batch]:
    """Padded batches of unlike sizes, some tokens of which are not scored."""
    made = []
    for start, (B, T) in enumerate([(3, 17), (1, 40), (5, 8)], 3):
        ids = text[300 * start :][: B * T + 1].long()
        x, y = ids[:-1].view(B, T), ids[1:].view(B, T).masked_fill(torch.rand(B, T) < 0.2, -100)
        mask = torch.arange(T) >= torch.randint(3, (B, 1))
        made.append(Batch(x, y, layout=Layout.from_attention_mask(mask)))
    return made


def test_sequences_equal_brute_force(batches: list[Batch], tiny: Make, even_policy: Callable[..., Policy]) -> None:
    model, exits = tiny(4, sharp=True), (1, 3)
    policy = even_policy(model, batches[0].x, exits, batches[0].layout)
    sequences = Sequences(model, batches, policy)
    agrees, deep, lost, sure, named = [], [], [], [], []
    for x, y, *_, layout in batches:
        assert layout is not None
        routed = route(model, x, exits, policy.thresholds, attention_mask=layout.real)
        full = route(model, x, (), (), attention_mask=layout.real)
        scored = (y != -100) & layout.real
        for b in range(len(x)):
            at = scored[b]
            same = routed.logits[b, at].argmax(-1) == full.logits[b, at].argmax(-1)
            agrees.append(same.double().mean().item())
            deep.append((routed.exits[b, at] == 4).double().mean().item())
            nll = [-r.logits[b, at].double().log_softmax(-1) for r in (routed, full)]
            one, other = (part.gather(1, y[b, at][:, None]).mean().item() for part in nll)
            lost.append(one - other)
        logits = model.logits(model.run(model.embed(x), 1, 3, layout=layout), 3)[scored]
        sure.append(logits.softmax(-1).amax(-1))
        named.append(logits.argmax(-1))
    assert len(sequences) == 9
    measured = {kind: sequences.means(GOALS[kind].lost(sequences, policy)) for kind in GOALS}
    assert measured["min_agreement"].tolist() == pytest.approx([1 - a for a in agrees])
    assert measured["target_ratio"].tolist() == pytest.approx(deep)
    assert measured["max_ppl_increase"].tolist() == pytest.approx(lost, abs=1e-5)
    assert 0 < sum(deep) < 9
    confidences, right = sequences.view(3)
    torch.testing.assert_close(confidences.float(), torch.cat(sure))
    assert torch.equal(sequences.views.best[1], torch.cat(named))
    assert torch.equal(right, sequences.views.best[1] == sequences.views.best[2])

    nobody = batches[0]._replace(layout=Layout.from_attention_mask(torch.zeros_like(batches[0].x)))
    padded = Sequences(model, [*batches, nobody], policy)
    assert len(padded) == 9
    assert torch.equal(padded.views.best, sequences.views.best), "a batch of padding alone says nothing"

    figures = sequences.figures(policy)
    assert figures["ppl_full"] == score(model, batches).figures()["ppl"]
    assert figures["ppl_increase"] == pytest.approx(figures["ppl"] / figures["ppl_full"] - 1)
    assert set(figures["auroc"]) == {1, 3}


@pytest.mark.parametrize("measure", ["max-probability", "steadiness"])
def test_costs_are_those_that_a_routed_run_counts(measure: str, text: Tensor, tiny: Make) -> None:
    model, exits = tiny(4, sharp=True), (1, 3)
    batches = list(TokenBatches(text, 32, 8, max_batches=6))
    sequences = Sequences(model, batches, Policy(exits, (1.0, 1.0), measure))
    full = score(model, batches).flops
    thresholds = [float(v.quantile(q)) for v, q in zip(sequences.views.confidences, (0.7, 0.5))]
    policy = Policy(exits, tuple(thresholds), measure)
    routed = score(model, batches, policy)
    assert len(set(routed.exits.tolist())) == 3
    estimate = sequences.costs[routed.exits].mean().item()
    # Attention is counted at its mean length, whoever stands where.
    assert estimate == pytest.approx(routed.flops / full, rel=0.02)
    assert sequences.figures(policy)["flops_share"] == routed.flops / full
    # Whoever goes to the end has paid for every head on the way: that is more than without exits.
    heads = 3 if measure == "max-probability" else 1
    head = 2 * 32 * 256 * sum(b.numel() for b, _ in batches)
    assert sequences.costs[4].item() == pytest.approx(1 + (heads - 1) * head / full)


# ---------------------------------------------------------------------------------------------------------
# Calibration


def thirds(text: Tensor) -> list[list[Any]]:
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
def test_a_target_is_kept_and_not_by_more_than_a_step(
    kind: Any, values: list[float], confidence: float | None, text: Tensor, trained: StandardTransformer
) -> None:
    propose, decide, held_out = thirds(text)
    policy, goal = Policy((1,), (1.0,)), GOALS[kind]
    with torch.no_grad():
        trained.exit_norms[0].weight *= 1 + 2 * torch.randn(32)  # an exit that costs something
    candidates = path(Sequences(trained, propose, policy).views)
    sequences = Sequences(trained, decide, policy)

    def kept(thresholds: tuple[float, ...], value: float) -> bool:
        losses = sequences.means(goal.lost(sequences, replace(policy, thresholds=thresholds)))
        return upper_bound(losses, confidence, goal.span(sequences)) <= goal.limit(value)

    chosen = []
    for value in values:
        try:
            found = calibrate(trained, policy, Target(kind, value, confidence), propose, decide, held_out)
        except EaseError:
            assert confidence is not None, "without a confidence these can all be had"
            continue
        at = candidates.index(found.policy.thresholds)
        assert kept(found.policy.thresholds, value)
        beyond = at - 1 if goal.budget else at + 1
        assert beyond in (-1, len(candidates)) or not kept(candidates[beyond], value)
        chosen.append(found.policy.thresholds[0])
        record = found.record
        assert record["calibration"]["sequences"] == record["held_out"]["sequences"] == 48
        measured = score(trained, held_out, found.policy).figures()
        assert record["held_out"]["ppl"] == measured["ppl"], "measured on the sequences that chose nothing"
        ratio = measured["exit_shares"][2]
        told = {
            "min_agreement": record["held_out"]["agreement"],
            "max_ppl_increase": record["held_out"]["ppl_increase"],
            "target_ratio": ratio,
            "compute_budget": record["held_out"]["flops_share"],
        }
        assert record["held_out"]["value"] == pytest.approx(told[kind], rel=0.03, abs=1e-5)
    # Whoever asks for less quality gets thresholds that are no higher, and so does whoever asks for less compute.
    assert chosen == sorted(chosen, reverse=not goal.budget)
    assert len(set(chosen)) == 2 or (chosen and confidence)


def test_all_exits_are_calibrated_jointly(text: Tensor, tiny: Make) -> None:
    model = tiny(4, sharp=True)
    found = calibrate(model, Policy((1, 3), (1.0, 1.0)), Target("target_ratio", 0.4), *thirds(text))
    shares = found.record["held_out"]["exit_shares"]
    assert all(0.02 < shares[e] < 0.9 for e in (1, 3))
    assert shares[4] == pytest.approx(0.4, abs=0.05)
    json.dumps(found.record)  # values fit for JSON


def test_losses_are_clipped_only_where_a_confidence_needs_it() -> None:
    losses, span = torch.tensor([5.0, -0.5]), (-CLIP, CLIP)
    assert upper_bound(losses, None, span) == 2.25
    assert upper_bound(losses, 0.9, span) == upper_bound(torch.tensor([1.0, -0.5]), 0.9, span)


def test_other_measures_are_calibrated_as_well(text: Tensor, tiny: Make) -> None:
    policy = Policy((1, 2), (1.0, 1.0), "margin", always_deep=3)
    found = calibrate(tiny(3, sharp=True), policy, Target("target_ratio", 0.5), *thirds(text))
    assert (found.policy.confidence, found.policy.always_deep) == ("margin", 3)
    assert found.record["held_out"]["exit_shares"][3] == pytest.approx(0.5, abs=0.06)


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
def test_what_cannot_be_had_names_the_best_that_can(target: Target, text: Tensor, trained: StandardTransformer) -> None:
    policy, sets = Policy((1,), (1.0,)), thirds(text)
    with pytest.raises(EaseError, match=f"{target} cannot be had: the best on these 48 sequences is") as caught:
        calibrate(trained, policy, target, *sets)
    best = float(str(caught.value).split(" is ")[1].split(",")[0])
    calibrate(trained, policy, replace(target, value=best), *sets)
    better = best + 0.001 if target.kind == "min_agreement" else best - 0.001
    with pytest.raises(EaseError, match="cannot be had"):
        calibrate(trained, policy, replace(target, value=better), *sets)


def test_bad_input(text: Tensor, tiny: Make) -> None:
    for kind, value in (("min_agreement", 1.1), ("max_ppl_increase", -0.1), ("target_ratio", math.nan)):
        with pytest.raises(EaseError, match="is no target: give a share"):
            Target(kind, value)  # type: ignore[arg-type]
    with pytest.raises(EaseError, match="use one of min_agreement"):
        Target("speed", 0.5)  # type: ignore[arg-type]
    with pytest.raises(EaseError, match="a confidence of 95 is none"):
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
    with pytest.raises(EaseError, match="weights are broken"):
        calibrate(model, Policy((1,), (1.0,)), target, *sets)
