"""Sequences under a policy against brute force: losses, agreement, and costs of routed runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ease import Layout, Policy, StandardTransformer, TokenBatches, route, score
from ease.evaluation.calibration import GOALS
from ease.evaluation.sequences import Sequences
from ease.interface import Batch

Make = Callable[..., StandardTransformer]


@pytest.fixture
def batches(text: Tensor) -> list[Batch]:
    """Padded batches of different sizes, in which some tokens are not scored."""
    batches = []
    for start, (B, T) in enumerate([(3, 17), (1, 40), (5, 8)], 3):
        ids = text[300 * start :][: B * T + 1].long()
        x, y = ids[:-1].view(B, T), ids[1:].view(B, T).masked_fill(torch.rand(B, T) < 0.2, -100)
        mask = torch.arange(T) >= torch.randint(3, (B, 1))
        batches.append(Batch(x, y, layout=Layout.from_attention_mask(mask)))
    return batches


def test_sequences_equal_brute_force(batches: list[Batch], tiny: Make, even_policy: Callable[..., Policy]) -> None:
    model, exits = tiny(4, sharp=True), (1, 3)
    policy = even_policy(model, batches[0].x, exits, batches[0].layout)
    sequences = Sequences(model, batches, policy)
    agreements, at_last, loss_increases, confidences_at_3, best_at_3 = [], [], [], [], []
    for x, y, *_, layout, _ in batches:
        assert layout is not None
        routed = route(model, x, attention_mask=layout.real, policy=policy)
        full = route(model, x, attention_mask=layout.real, policy=Policy())
        scored = (y != -100) & layout.real
        for b in range(len(x)):
            at = scored[b]
            same = routed.logits[b, at].argmax(-1) == full.logits[b, at].argmax(-1)
            agreements.append(same.double().mean().item())
            at_last.append((routed.exits[b, at] == 4).double().mean().item())
            nll = [-r.logits[b, at].double().log_softmax(-1) for r in (routed, full)]
            routed_loss, full_loss = (part.gather(1, y[b, at][:, None]).mean().item() for part in nll)
            loss_increases.append(routed_loss - full_loss)
        logits = model.logits(model.run(model.embed(x), 1, 3, layout=layout), 3)[scored]
        confidences_at_3.append(logits.softmax(-1).amax(-1))
        best_at_3.append(logits.argmax(-1))
    assert len(sequences) == 9
    measured = {kind: sequences.means(GOALS[kind].loss(sequences, policy)) for kind in GOALS}
    assert measured["min_agreement"].tolist() == pytest.approx([1 - a for a in agreements])
    assert measured["target_ratio"].tolist() == pytest.approx(at_last)
    assert measured["max_ppl_increase"].tolist() == pytest.approx(loss_increases, abs=1e-5)
    assert 0 < sum(at_last) < 9
    confidences, agrees = sequences.view(3)
    torch.testing.assert_close(confidences.float(), torch.cat(confidences_at_3))
    assert torch.equal(sequences.views.best[1], torch.cat(best_at_3))
    assert torch.equal(agrees, sequences.views.best[1] == sequences.views.best[2])

    padding = batches[0]._replace(layout=Layout.from_attention_mask(torch.zeros_like(batches[0].x)))
    padded = Sequences(model, [*batches, padding], policy)
    assert len(padded) == 9
    assert torch.equal(padded.views.best, sequences.views.best), "a batch of padding alone changes nothing"

    metrics = sequences.metrics(policy)
    assert metrics["ppl_full"] == score(model, batches).metrics()["ppl"]
    assert metrics["ppl_increase"] == pytest.approx(metrics["ppl"] / metrics["ppl_full"] - 1)
    assert set(metrics["auroc"]) == {1, 3}


@pytest.mark.parametrize("measure", ["max-probability", "steadiness"])
def test_costs_equal_the_flops_of_a_routed_run(measure: str, text: Tensor, tiny: Make) -> None:
    model, exits = tiny(4, sharp=True), (1, 3)
    batches = list(TokenBatches(text, 32, 8, max_batches=6))
    sequences = Sequences(model, batches, Policy(exits, (1.0, 1.0), measure))
    full = score(model, batches).flops
    thresholds = [float(v.quantile(q)) for v, q in zip(sequences.views.confidences, (0.7, 0.5))]
    policy = Policy(exits, tuple(thresholds), measure)
    routed = score(model, batches, policy)
    assert len(set(routed.exits.tolist())) == 3
    estimate = sequences.costs[routed.exits].mean().item()
    # Costs count attention at its mean length, not at the positions of the tokens that stay.
    assert estimate == pytest.approx(routed.flops / full, rel=0.02)
    assert sequences.metrics(policy)["flops_share"] == routed.flops / full
    # A token at the last layer has paid for every head on the way, so it costs more than without exits.
    heads = 3 if measure == "max-probability" else 1
    head = 2 * 32 * 256 * sum(b.numel() for b, _ in batches)
    assert sequences.costs[4].item() == pytest.approx(1 + (heads - 1) * head / full)
