"""Scores against brute force: every metric recomputed from the logits of a routed forward."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ease import Data, EaseError, Policy, Scores, StandardTransformer, compute_confidence, route, score
from ease.evaluation.scoring import perplexity

Make = Callable[..., StandardTransformer]


@pytest.fixture
def batches(text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, in which some tokens are not scored."""
    batches = []
    for start, (B, T) in enumerate([(3, 17), (1, 40), (5, 8)], 3):
        ids = text[300 * start :][: B * T + 1].long()
        batches.append((ids[:-1].view(B, T), ids[1:].view(B, T).masked_fill(torch.rand(B, T) < 0.2, -100)))
    return batches


@pytest.mark.parametrize("exits", [(), (1,), (1, 2), (1, 2, 3)])
def test_metrics_equal_brute_force(
    exits: tuple[int, ...],
    batches: list[tuple[Tensor, Tensor]],
    tiny: Make,
    even_policy: Callable[..., Policy],
) -> None:
    L, model = 4, tiny(4, sharp=True)
    policy = even_policy(model, batches[0][0], exits) if exits else Policy()
    losses, correct, exits_taken, confidences = [], [], [], []
    for x, y in batches:
        result = route(model, x, policy=policy)
        for b, t in (y != -100).nonzero().tolist():
            logits = result.logits[b, t]
            losses.append(-logits.double().log_softmax(0)[y[b, t]].item())
            correct.append(int(logits.argmax() == y[b, t]))
            exits_taken.append(int(result.exits[b, t]))
            confidences.append(logits.softmax(0).max().item())
    n = len(losses)

    scores = score(model, batches, policy)
    hard = torch.rand(n) < 0.5
    metrics = scores.metrics(hard)
    assert scores.losses.tolist() == pytest.approx(losses, abs=1e-5)
    assert scores.correct.tolist() == correct
    assert scores.exits.tolist() == exits_taken
    assert scores.confidences.tolist() == pytest.approx(confidences, abs=1e-6)
    assert metrics["tokens"] == n < scores.processed == sum(x.numel() for x, _ in batches)
    assert metrics["loss"] == pytest.approx(sum(losses) / n, rel=1e-5)
    assert metrics["ppl"] == pytest.approx(math.exp(sum(losses) / n), rel=1e-5)
    assert metrics["acc"] == pytest.approx(sum(correct) / n)
    assert metrics["shallow_ratio"] == pytest.approx(sum(e < L for e in exits_taken) / n, abs=1e-6)
    shares = {layer: exits_taken.count(layer) / n for layer in (*exits, L)}
    assert metrics["exit_shares"] == pytest.approx({k: v for k, v in shares.items() if v or k == L})
    # The original recipe's formula, for N exits: layers run over layers in the model.
    assert metrics["compute_cost"] == pytest.approx(sum(exits_taken) / (n * L))
    if len(exits) == 1:
        shallow = exits_taken.count(exits[0])
        assert metrics["compute_cost"] == pytest.approx((shallow * exits[0] + (n - shallow) * L) / (n * L))
    for name, inside in (("hard", hard.tolist()), ("easy", (~hard).tolist())):
        selected = [loss for loss, i in zip(losses, inside) if i]
        assert metrics[f"{name}_ppl"] == pytest.approx(math.exp(sum(selected) / len(selected)), rel=1e-5)
    assert metrics["hard_acc"] == pytest.approx(sum(h for h, i in zip(correct, hard) if i) / int(hard.sum()))
    assert "hard_ppl" not in scores.metrics()
    # In a table with a deeper model, costs are shares of its depth.
    assert scores.metrics(depth=8)["compute_cost"] == pytest.approx(sum(exits_taken) / (n * 8))
    assert metrics["seconds"] > 0


def test_scores_of_one_exit(batches: list[tuple[Tensor, Tensor]], tiny: Make) -> None:
    model = tiny(3, sharp=True)
    scores = score(model, batches, last=2)
    assert (scores.exits == 2).all()
    x, y = batches[0]
    logits = model.logits(model.forward_to_layer(x, 2), 2).flatten(0, 1)
    expected = F.cross_entropy(logits, y.flatten(), reduction="none")[y.flatten() != -100]
    torch.testing.assert_close(scores.losses[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    # An exit at or above `last` is ignored.
    assert (score(model, batches, Policy((1, 2), (1.0, 0.5)), last=2).exits == 2).all()


def test_scoring_restores_the_modes_of_all_modules(batches: list[tuple[Tensor, Tensor]], tiny: Make) -> None:
    model = tiny(2, dropout=0.5)
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = score(model, batches), score(model, batches)
    assert torch.equal(first.losses, second.losses)  # no dropout while scoring
    assert [module.training for module in model.modules()] == modes


def test_no_token_to_score(tiny: Make) -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    for batches in ([], [(ids, torch.full_like(ids, -100))]):
        with pytest.raises(EaseError, match="there is no token to score: give at least one batch"):
            score(tiny(1), batches)


def test_a_policy_with_an_exit_that_does_not_exist(tiny: Make) -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(EaseError, match="choose a lower exit"):
        score(tiny(2), [(ids, ids)], Policy((2,), (0.5,)))


def test_a_broken_model_scores_nan(tiny: Make) -> None:
    model, ids = tiny(2), torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        model.exit_norms[1].weight.fill_(torch.nan)
    assert math.isnan(score(model, [(ids, ids)]).metrics()["loss"])


def test_confidences_equal_compute_confidence_at_the_exit(tiny: Make, batches: list[tuple[Tensor, Tensor]]) -> None:
    model = tiny(2, sharp=True)
    x, y = batches[1]
    expected = compute_confidence(model, model.forward_to_layer(x, 1), 1)[y != -100]
    torch.testing.assert_close(score(model, [(x, y)], last=1).confidences, expected)


def scores(**columns: Any) -> Scores:
    n = len(columns["confidences"])
    rest = {"losses": torch.zeros(n), "exits": torch.ones(n).long(), "correct": torch.ones(n) > 0}
    return Scores(**rest | columns, num_layers=1, flops=1.0, seconds=1.0, processed=n)


def test_reliability_by_hand() -> None:
    confidences = torch.tensor([0.05, 0.55, 0.55, 0.95, 1.0])
    correct = torch.tensor([False, True, False, True, True])
    result = scores(confidences=confidences, correct=correct).reliability()
    assert [round(row["low"], 1) for row in result["bins"]] == [0.0, 0.5, 0.9]
    assert [row["share"] for row in result["bins"]] == pytest.approx([0.2, 0.4, 0.4])
    assert [row["accuracy"] for row in result["bins"]] == pytest.approx([0, 0.5, 1])
    assert [row["confidence"] for row in result["bins"]] == pytest.approx([0.05, 0.55, 0.975])
    assert result["ece"] == pytest.approx(0.2 * 0.05 + 0.4 * 0.05 + 0.4 * 0.025)


def test_perplexity_without_tokens_and_on_overflow() -> None:
    assert math.isnan(perplexity(torch.zeros(0)))
    assert perplexity(torch.full((3,), 1e4)) == math.inf
    assert perplexity(torch.full((3,), 2.0)) == pytest.approx(math.exp(2))
    hard = torch.tensor([True, True])
    metrics = scores(confidences=torch.ones(2)).metrics(hard)
    assert math.isnan(metrics["easy_ppl"])
    assert metrics["hard_ppl"] == 1


def test_figures_is_a_deprecated_name_of_metrics() -> None:
    made, hard = scores(confidences=torch.ones(2)), torch.tensor([True, False])
    with pytest.warns(DeprecationWarning, match=r"use Scores\.metrics"):
        assert made.figures(hard, 3) == made.metrics(hard, 3)


def test_scores_on_real_text_beat_chance(trained: StandardTransformer, text_data: Callable[..., Data]) -> None:
    metrics = score(trained, text_data(1, 2).train).metrics()
    assert metrics["ppl"] < 60
    assert metrics["acc"] > 0.1


def test_compute_confidence_is_per_token(trained: StandardTransformer, batches: list[tuple[Tensor, Tensor]]) -> None:
    x, _ = batches[0]
    with torch.no_grad():
        state = trained.forward_to_layer(x, 2)
        expected = trained.logits(state, 2).softmax(-1).amax(-1)
    state.requires_grad_()
    confidence = compute_confidence(trained, state)
    assert confidence.shape == x.shape
    assert not confidence.requires_grad
    torch.testing.assert_close(confidence, expected)
    torch.testing.assert_close(compute_confidence(trained, state[1:2, 3:4]), confidence[1:2, 3:4])
    assert not torch.allclose(compute_confidence(trained, state, 1), confidence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_prediction(dtype: torch.dtype, tiny: Make) -> None:
    model = tiny(1).to(dtype)
    torch.nn.init.zeros_(model.output_head.weight)
    y = torch.tensor([[0, 1, 2, 0]])
    assert score(model, [(y, y)]).correct.tolist() == [True, False, False, True]
