"""Classifiers and completions under routing: one decision per row, and the metrics of both tasks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ease import (
    Batch,
    EaseError,
    MinedBatches,
    Policy,
    StandardTransformer,
    Trainer,
    create_deep_supervision_config,
    score,
)
from ease.data.batches import Example, ExampleBatches
from ease.data.tasks import Task
from ease.data.tokenizers import EOS, train_tokenizer
from ease.evaluation.tasks import complete, macro_f1, predict, rouge_l
from ease.flops import run_flops
from ease.generation.decode import generate
from ease.routing.forward import routed_forward

Make = Callable[..., StandardTransformer]


@pytest.fixture
def examples() -> list[Example]:
    """Examples of all lengths from 1 to 40, with a label at the last token."""
    lengths = (torch.randperm(40) + 1).tolist()
    rows = [torch.randint(1, 256, (n,), dtype=torch.int32) for n in lengths]
    return [
        Example(ids, torch.full_like(ids, -100).index_fill(0, torch.tensor([len(ids) - 1]), len(ids) % 3))
        for ids in rows
    ]


# ---------------------------------------------------------------------------------------------------------
# One decision per row


@torch.no_grad()
def test_the_last_real_token_decides_for_its_row(tiny: Make, examples: list[Example]) -> None:
    model = tiny(3, sharp=True, num_labels=3)
    assert model.output_head.weight.shape == (3, 32)
    batch = next(iter(ExampleBatches(examples, 40)))
    assert batch.layout is not None
    last = batch.layout.real.sum(1) - 1
    state, confidences = model.embed(batch.x), []
    for layer in (1, 2, 3):
        state = model.run(state, layer, layer, layout=batch.layout)
        confidences.append(model.logits(state, layer)[torch.arange(40), last].softmax(-1).amax(-1))
    threshold = float(confidences[0].median())
    first, *_, end = routed_forward(model, batch.x, Policy((1,), (threshold,)), layout=batch.layout)
    assert torch.equal(first.queried.nonzero()[:, 1], last)
    torch.testing.assert_close(first.confidence, confidences[0])
    leaves = confidences[0] >= threshold
    assert 5 < int(leaves.sum()) < 35
    assert torch.equal(end.arrived, batch.layout.real & ~leaves[:, None])
    # A row continues as a whole, so its result is that of full depth.
    torch.testing.assert_close(end.confidence, confidences[2][~leaves])

    scores = score(model, [batch], Policy((1,), (threshold,)))
    assert len(scores.exits) == 40
    assert scores.exits.tolist() == [1 if left else 3 for left in leaves]
    heads = 2 * 32 * 3 * (40 + int((~leaves).sum()))  # a head of 3 labels at width 32
    layers = run_flops(model.config, 1, batch.layout.real, batch.layout)
    assert scores.flops == heads + layers + run_flops(model.config, 2, end.arrived, batch.layout)


def test_hard_rows_are_mined_whole(tiny: Make, examples: list[Example]) -> None:
    model = tiny(2, sharp=True, num_labels=3)
    mined = MinedBatches(model, ExampleBatches(examples, 8), Policy(), 0.5)
    assert mined.total == 40
    assert mined.hard == pytest.approx(20, abs=1)
    rows = torch.cat([batch.running.any(1) for batch in mined])
    assert int(rows.sum()) == mined.hard
    for batch in mined:
        assert batch.layout is not None
        assert torch.equal(batch.running, batch.layout.real & batch.running.any(1, keepdim=True))


@torch.no_grad()
def test_patience_leaves_where_exits_agree(tiny: Make, examples: list[Example]) -> None:
    model = tiny(5, sharp=True, num_labels=3)
    batch = next(iter(ExampleBatches(examples, 40)))
    assert batch.layout is not None
    last, state, named = batch.layout.real.sum(1) - 1, model.embed(batch.x), []
    for layer in range(1, 6):
        state = model.run(state, layer, layer, layout=batch.layout)
        named.append(model.logits(state, layer)[torch.arange(40), last].argmax(-1).tolist())
    expected = []
    for votes in zip(*named):
        agree = [e for e in range(3, 5) if len(set(votes[e - 3 : e])) == 1]
        expected.append(min(agree, default=5))
    assert 0 < expected.count(3) < 40
    assert {3, 4, 5} == set(expected)
    predictions, exits = predict(model, batch.x, batch.layout, Policy.patient((1, 2, 3, 4), 3))
    assert exits[torch.arange(40), last].tolist() == expected
    assert predictions[torch.arange(40), last].tolist() == [named[e - 1][i] for i, e in enumerate(expected)]
    assert (predictions[~batch.scored] == -1).all()
    with pytest.raises(EaseError, match="patience is 0"):
        Policy.patient((1,), 0)


def test_the_loss_is_that_of_the_last_token(tiny: Make, examples: list[Example]) -> None:
    model = tiny(2, num_labels=3)
    trainer = Trainer(create_deep_supervision_config(2), 3)
    batch = next(iter(ExampleBatches(examples, 40)))
    loss = trainer.compute_loss(model, batch.x, batch.y, layout=batch.layout)
    alone = []
    for example in examples:
        logits = [at[0, -1] for at in model.forward_all_layers(example.ids[None].long())]
        target = example.targets[-1].long()
        alone.append(sum(torch.nn.functional.cross_entropy(at, target) for at in logits) / 2)
    torch.testing.assert_close(loss, torch.stack(alone).mean())  # type: ignore[arg-type]
    with pytest.raises(EaseError, match=r"must lie in 0..2, got 5..5"):
        score(model, [Batch(batch.x[:1, :1], torch.tensor([[5]]))])
    with pytest.raises(EaseError, match="a head of its own"):
        tiny(2, num_labels=3, tie_embeddings=True)


# ---------------------------------------------------------------------------------------------------------
# Metrics


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for labels in (2, 5):
        targets, predicted = torch.randint(labels, (30,)), torch.randint(1, labels + 1, (30,))
        expected = metrics.f1_score(targets, predicted, average="macro")
        assert macro_f1(predicted, targets) == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    # 3 words of 4 and 6: precision 3/4, recall 3/6, so F is 0.6.
    assert rouge_l(["the cat sat down"], ["the big cat has sat there"]) == pytest.approx(0.6)
    assert rouge_l(["a b", "c"], ["a b", "d"]) == pytest.approx(0.5)


def test_a_batch_of_completions_equals_single_ones(tiny: Make) -> None:
    tokenizer = train_tokenizer("byte", [])
    task = Task(tokenizer, tokenizer.token_to_id(EOS), [], [], [])
    model = tiny(3, sharp=True, vocab_size=258).double()
    model.policy = Policy.of((1, 2), (0.5, 0.5))
    prompts = [torch.randint(2, 258, (n,)) for n in (3, 9, 1)]
    for mode in ("full", "routed"):
        together = complete(model, task, prompts, mode=mode, max_new_tokens=6)
        alone = [complete(model, task, [prompt], mode=mode, max_new_tokens=6)[0] for prompt in prompts]
        assert together == alone
    # Without an exit, "routed" is full depth.
    silent = tiny(3, sharp=True, vocab_size=258)
    assert complete(silent, task, prompts, mode="routed", max_new_tokens=6) == complete(
        silent, task, prompts, max_new_tokens=6
    )
    # The end-of-text token is not part of the completion.
    first = generate(model, prompts[0][None], 6).tokens[0].tolist()
    ended = complete(model, replace(task, eos=first[2]), prompts[:1], max_new_tokens=6)
    assert ended == [task.tokenizer.decode(first[: first.index(first[2])])]
