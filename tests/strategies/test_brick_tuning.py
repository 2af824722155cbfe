"""Training a draft brick: it learns to predict what the full model predicts, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ease import BrickConfig, Data, EaseError, StandardTransformer, train
from ease.evaluation.drafts import score_drafts
from ease.interface import Batch, Layout
from ease.storage import digest
from ease.strategies.draft_brick import most_frequent
from ease.training.drafts import draft_loss

Make = Callable[..., StandardTransformer]


@pytest.fixture
def finished(learned: Callable[[int, int], tuple[StandardTransformer, Data]]) -> tuple[StandardTransformer, Data]:
    return learned(3, 4)


def tuned(model: StandardTransformer, data: Data, **options: Any) -> Any:
    plan = BrickConfig(**{"lr": 5e-3, "max_epochs": 3, "patience": None} | options)
    ((phase, history),) = train(model, plan.strategy(), data)
    return phase, history


def backbone(model: StandardTransformer) -> str:
    """A hash of everything but the brick."""
    return digest(*(value for name, value in model.state_dict().items() if not name.startswith("draft_brick.")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_brick_learns_and_the_backbone_stays_bit_for_bit(dtype: torch.dtype, finished: Any) -> None:
    model, data = finished
    model.to(dtype)
    before, exits = backbone(model), set(model.trained_exits)
    _, history = tuned(model, data)
    assert backbone(model) == before
    assert model.trained_exits == exits
    first, last = history.rows[0], history.rows[-1]
    assert last["val_loss"] < 0.9 * first["val_loss"]
    scores = score_drafts(model, data.val).metrics()
    best = history.rows[history.best_epoch - 1]
    assert scores["loss"] == pytest.approx(best["val_loss"])
    assert scores["acc"] == scores["agreement"] == best["val_agreement"] > 0.3
    assert 0 < scores["agreement_3"] < scores["agreement_2"] < scores["agreement"]
    assert not any(p.requires_grad for p in model.draft_brick.parameters())
    assert all(p.requires_grad for p in model.layers.parameters()), "the phase is over, so nothing else is frozen"


def test_agreement_is_that_of_rounds_of_drafts(finished: Any) -> None:
    """Counted one round after another, with the brick's cache."""
    model, data = finished
    tuned(model, data, max_epochs=1)
    x = data.val[0][0][:2]
    scores = score_drafts(model, [(x, x)])
    states, full = model.forward_to_layer(x, 3), model(x).argmax(-1)
    agreed: list[list[bool]] = [[], [], []]
    for start in range(x.shape[1] - 1):
        cache = model.new_draft_cache(2, x.shape[1])
        g = model.draft(states[:, : start + 1], x[:, 1 : start + 2], cache=cache)[:, -1:]
        so_far = torch.ones(2, dtype=torch.bool)
        for n in range(min(3, x.shape[1] - 1 - start)):
            if n:
                g = model.draft(g, x[:, [start + 1 + n]], cache=cache)
            so_far &= model.draft_tokens(g)[0][:, 0] == full[:, start + 1 + n]
            agreed[n] += so_far.tolist()
    assert [part.float().mean().item() for part in scores.chains] == pytest.approx([sum(a) / len(a) for a in agreed])


def test_the_loss_is_the_divergence_over_the_trimmed_vocabulary_and_the_distance(finished: Any) -> None:
    model, data = finished
    model.add_draft_brick(torch.arange(0, 256, 3), torch.randn(9, 32))
    x, y = data.train[0]
    y = y.clone()
    y[:, :5] = -100  # not scored: the predictions after the first five tokens
    loss = draft_loss(model, Batch(x, y), 1, 0.5)
    states = model.forward_to_layer(x, 3)
    g = model.draft(states[:, :-1], x[:, 1:])[:, 4:]
    goal = model.logits(states[:, 5:], 3)[..., ::3].log_softmax(-1)
    apart = F.kl_div(model.draft_logits(g).log_softmax(-1), goal, log_target=True, reduction="none").sum(-1).mean()
    distance = F.smooth_l1_loss(model.draft_brick.normed(g), model.exit_norm(states[:, 5:], 3))
    torch.testing.assert_close(loss, apart + 0.5 * distance)


def test_packed_documents_are_learned_as_if_each_were_alone(finished: Any) -> None:
    model, data = finished
    model.add_draft_brick(torch.arange(256), torch.randn(9, 32))
    x, y = (part[:1] for part in data.train[0])
    layout = Layout(torch.cat([torch.arange(12), torch.arange(20)])[None], torch.tensor([[0] * 12 + [1] * 20]))
    packed = score_drafts(model, [Batch(x, y, layout=layout)])
    alone = score_drafts(model, [(x[:, :12], y[:, :12]), (x[:, 12:], y[:, 12:])])
    torch.testing.assert_close(packed.losses, alone.losses, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, packed.chains, alone.chains))


def test_the_vocabulary_holds_the_most_frequent_tokens(finished: Any) -> None:
    model, data = finished
    assert most_frequent([([[5, 2, 5]], [[2, 5, 0]]), ([[7, 2, 9]], [[2, 9, 0]])], 10).tolist() == [
        *(2, 5, 7, 9),
        *(0, 1, 3, 4, 6, 8),
    ]
    tuned(model, data, vocabulary=20, max_epochs=1)
    ids = torch.cat([x.flatten() for x, _ in data.train])
    counts = ids.bincount(minlength=256)
    assert model.config.draft_vocabulary == 20
    assert counts[model.draft_brick.vocabulary].min() >= counts.sort(descending=True).values[20]
    before = model.draft_brick.vocabulary.clone()
    weights = digest(*model.draft_brick.parameters())
    tuned(model, data, max_epochs=1)  # a brick that the model has is trained further
    assert model.draft_brick.vocabulary.equal(before)
    assert digest(*model.draft_brick.parameters()) != weights
    with pytest.raises(EaseError, match="has 20 tokens and is trained further: leave out vocabulary"):
        tuned(model, data, vocabulary=30)


def test_budgets_hold(finished: Any) -> None:
    model, data = finished
    _, whole = tuned(model, data, max_epochs=1)
    limit = 1.5 * sum(whole.flops.values())
    _, longer = tuned(model, data, max_epochs=5, max_flops=limit)
    step = (whole.flops["training"] + whole.flops["trunk"]) / whole.steps
    assert limit - step <= sum(longer.flops.values()) <= limit + step


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda m, d: BrickConfig(drafts=0), "drafts must be at least 1"),
        (lambda m, d: BrickConfig(regression=-1.0), "regression"),
        (lambda m, d: BrickConfig(vocabulary=0), "vocabulary must be at least 1"),
        (lambda m, d: tuned(m, d, vocabulary=257), "the model has 256 tokens: give no more"),
        (lambda m, d: score_drafts(m, d.val), "the model has no draft brick"),
        (lambda m, d: tuned(m, d, lr=1e30), "is (nan|inf).*lower the learning rate"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(make: Any, fix: str, finished: Any) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        make(*finished)
    assert "\n" not in str(error.value)
