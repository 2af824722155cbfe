"""The memory: which tokens an n-gram has, in every layout and with a cache, and how its table learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ease
from ease import EaseError, Layout, Policy, StandardTransformer, Trainer, generate, route
from ease.modules.memory import Memory, with_stored_tokens, with_tokens_before
from ease.routing.forward import routed_forward
from ease.training.optimizer import ROW_DECAY, MasterAdamW, clip_gradients

Make = Callable[..., StandardTransformer]
SHAPE: dict[str, Any] = {"memory_orders": (3, 2), "memory_rows": 64, "num_kv_heads": 2}


@pytest.fixture(scope="module")
def model(tiny: Make) -> StandardTransformer:
    """Four layers on a memory whose rows are as large as the embedding's."""
    made = tiny(4, sharp=True, **SHAPE).double()
    with torch.no_grad():
        made.memory.table.normal_(std=0.5)
    made.trained_exits = {0, 2, 4}
    return made


@pytest.fixture(scope="module")
def policy(model: StandardTransformer) -> Policy:
    """About a third of the tokens each leaves at exit 0 and at exit 2."""
    ids, thresholds = torch.randint(256, (8, 16)), []
    for exit, share in ((0, 0.7), (2, 0.5)):
        state = model.run(model.embed(ids), 1, exit)
        thresholds.append(float(ease.compute_confidence(model, state, exit).quantile(share)))
    return Policy((0, 2), tuple(thresholds))


@given(data=st.data())
def test_the_tokens_before_are_those_of_the_segment(data: st.DataObject) -> None:
    T, count = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
    real = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    cut, ids = data.draw(st.integers(0, T)), torch.randint(9, (1, T))
    segments = [(-1 if not r else int(t >= cut)) for t, r in enumerate(real)]
    layout = Layout(torch.zeros(1, T, dtype=torch.long), torch.tensor([segments]))
    found = with_tokens_before(ids, count, layout)[0].tolist()
    for t, segment in enumerate(segments):
        if segment >= 0:
            before = [int(ids[0, u]) for u in range(t, -1, -1) if segments[u] == segment][: count + 1]
            assert found[t] == before + [-1] * (count + 1 - len(before))
    plain = with_tokens_before(ids, count)
    whole = Layout(torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long))
    assert torch.equal(plain, with_tokens_before(ids, count, whole))
    assert torch.equal(plain, with_stored_tokens(ids, torch.arange(T)[None], count))


def test_rows_depend_on_the_last_n_tokens_alone_and_are_spread_evenly() -> None:
    memory = Memory(ease.ModelConfig(1000, 8, 1, 2, memory_orders=(1, 2, 5), memory_rows=50))
    ids = torch.randint(1000, (1, 20_000))
    rows = memory.indices(with_tokens_before(ids, memory.reach))[0]
    assert rows.shape == (20_000, 3, 2)
    for part, found in enumerate(rows.flatten(1).unbind(1)):
        assert int(found.min()) >= 50 * part
        assert int(found.max()) < 50 * (part + 1)
        counts = (found - 50 * part).bincount(minlength=50)
        # 400 in each row on average, a standard deviation of 20. Of order 1 there are only 1,000 different n-grams.
        assert part < 2 or (counts - 400).abs().max() < 100
    changed = ids.clone()
    changed[0, 100] += 1
    differ = (memory.indices(with_tokens_before(changed, memory.reach))[0] != rows).any(2)
    for order, column in zip((1, 2, 5), differ.unbind(1)):
        assert set(column.nonzero().flatten().tolist()) <= set(range(100, 100 + order))


def cached(model: StandardTransformer, ids: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Logits and exits of ids (B, T), read token by token."""
    cache = model.new_cache(*ids.shape, key=policy)
    logits, exits = model.new_logits(*ids.shape), torch.full_like(ids, -1)
    for t in range(ids.shape[1]):
        for step in routed_forward(model, ids[:, t : t + 1], policy, cache=cache, read=lambda chunk, _: chunk):
            if step.read is not None:
                logits[step.leaving, t], exits[step.leaving, t] = step.read, step.layer
    return logits, exits


@torch.no_grad()
def test_every_way_of_running_gives_the_same_logits_and_exits(model: StandardTransformer, policy: Policy) -> None:
    ids = torch.randint(256, (6, 16))
    whole = route(model, ids, policy=policy)
    shares = [(whole.exits == exit).double().mean() for exit in (0, 2, 4)]
    assert all(0.1 < share < 0.9 for share in shares)
    logits, exits = cached(model, ids, policy)
    assert torch.equal(exits, whole.exits)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-10)
    for places in (torch.arange(4, 20), torch.arange(16), torch.randperm(20)[:16].sort().values):
        padded, mask = torch.randint(256, (6, 20)), torch.zeros(6, 20, dtype=torch.bool)
        padded[:, places], mask[:, places] = ids, True
        found = route(model, padded, attention_mask=mask, policy=policy)
        assert torch.equal(found.exits[mask].view(6, 16), whole.exits)
        assert (found.exits[~mask] == -1).all()
        torch.testing.assert_close(found.logits[mask].view(6, 16, -1), whole.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"draft_exit": 0}, {"draft_exit": 2}, {"draft_source": "lookup"}, {}])
def test_exact_decoding_keeps_the_tokens(options: dict[str, Any], model: StandardTransformer) -> None:
    ids, mask = torch.randint(256, (5, 7)), torch.arange(7) >= torch.tensor([0, 1, 3, 6, 0])[:, None]
    full = generate(model, ids, 30, attention_mask=mask)
    exact = generate(model, ids, 30, "exact", attention_mask=mask, draft_confidence=0.05, **options)
    assert torch.equal(exact.tokens, full.tokens)
    assert exact.stats["drafted"] or not options
    for row, real, answer in zip(ids, mask, full.tokens):  # full decoding without a cache
        text = row[real]
        for token in answer:
            assert int(model(text[None])[0, -1].argmax()) == int(token)
            text = torch.cat((text, token[None]))


def test_routed_decoding_reads_the_memory_of_every_row(model: StandardTransformer, policy: Policy) -> None:
    ids, mask = torch.randint(256, (5, 7)), torch.arange(7) >= torch.tensor([0, 1, 3, 6, 0])[:, None]
    model.policy = policy
    try:
        together = generate(model, ids, 20, "routed", attention_mask=mask)
        assert set(together.exits.unique().tolist()) == {0, 2, 4}
        for row, real, answer in zip(ids, mask, together.tokens):
            assert torch.equal(generate(model, row[real][None], 20, "routed").tokens[0], answer)
    finally:
        model.policy = Policy()


def test_growth_from_the_memory_alone_starts_as_the_identity(tiny: Make) -> None:
    model, ids = tiny(0, **SHAPE), torch.randint(256, (2, 9))
    with torch.no_grad():
        model.memory.table.normal_()
    before = model(ids)
    model.grow(2)
    assert torch.equal(model.logits(model.embed(ids), 0), before)
    assert torch.equal(model(ids), before)


def test_a_phase_above_leaves_the_memory_bit_identical(tiny: Make, text_data: Callable[..., ease.Data]) -> None:
    model = tiny(0, **SHAPE)
    config = ease.ASHEMConfig(phase1_layers=0, phase2_layers=2, phase1_max_epochs=2, phase2_max_epochs=2)
    strategy, before = config.strategy(), dict[str, Tensor]()
    for phase, _ in ease.train(model, strategy, text_data(2, 1)):
        if phase.first == 0:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            assert before["memory.table"].any(), "phase 1 trains the memory"
    assert strategy.policy().exits == (0,)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_step_updates_the_rows_that_it_read_and_no_others(tiny: Make) -> None:
    model, lr = tiny(1, **SHAPE), 0.1
    trainer = Trainer(ease.create_standard_config(1), 256)
    optimizer = trainer.create_optimizer(model, lr)
    x = torch.randint(256, (2, 8))
    read = model.memory.indices(with_tokens_before(x, model.memory.reach)).unique()
    trainer.train_epoch(model, [(x, x)], optimizer)
    table = model.memory.table.detach()
    assert set(table.any(1).nonzero().flatten().tolist()) == set(read.tolist())
    # The first update of a row is its gradient divided by the gradient's root mean square.
    torch.testing.assert_close(table[read].square().mean(1).sqrt(), torch.full((len(read),), lr), rtol=1e-3, atol=0)


def test_row_updates_follow_their_formula() -> None:
    table = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer, square, steps = MasterAdamW([{"params": [table]}], 0.5), torch.zeros(4), torch.zeros(4)
    expected = torch.zeros(4, 2)
    for rows in ([1, 2, 1], [2], [2, 0]):
        values = torch.randn(len(rows), 2)
        table.grad = torch.sparse_coo_tensor([rows], values, (4, 2), check_invariants=True)
        optimizer.step()
        dense = torch.zeros(4, 2).index_add_(0, torch.tensor(rows), values)
        for row in set(rows):
            steps[row] += 1
            square[row] = ROW_DECAY * square[row] + (1 - ROW_DECAY) * dense[row].square().mean()
            expected[row] -= 0.5 * dense[row] / (square[row] / (1 - ROW_DECAY ** steps[row])).sqrt()
    torch.testing.assert_close(table.detach(), expected)


def test_sparse_gradients_are_clipped_as_dense_ones() -> None:
    dense, sparse, other = (torch.nn.Parameter(torch.zeros(5, 3)) for _ in range(3))
    values, rows = torch.randn(4, 3), torch.tensor([1, 3, 1, 0])
    dense.grad = torch.zeros(5, 3).index_add_(0, rows, values)
    sparse.grad = torch.sparse_coo_tensor(rows[None], values, (5, 3), check_invariants=True)
    other.grad = torch.randn(5, 3)
    copy = torch.nn.Parameter(torch.zeros(5, 3))
    copy.grad = other.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([dense, copy], 0.5)
    torch.testing.assert_close(clip_gradients([sparse, other], 0.5), norm)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    torch.testing.assert_close(other.grad, copy.grad)


def test_an_export_keeps_the_memory_beside_the_stock_model(tmp_path: Path, model: StandardTransformer) -> None:
    pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="no stock model has a memory"):
        ease.save_pretrained(model, tmp_path / "out")
    back, ids = ease.from_pretrained(tmp_path / "out"), torch.randint(256, (2, 9))
    assert back.config.memory_orders == (2, 3)
    assert back.trained_exits == {0, 2, 4}
    assert torch.equal(back(ids), model(ids))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"memory_orders": (0, 2)}, "lengths of n-grams from 1 on"),
        ({"memory_orders": (2,), "memory_rows": 0}, "memory_rows must be at least 1"),
        ({"memory_orders": (2,), "num_layers": 0, "draft_brick": True}, "grow it first"),
    ],
)
def test_shapes_without_sense_are_refused(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix):
        ease.ModelConfig(**{"vocab_size": 256, "dim": 16, **options})


def test_exit_0_needs_a_memory(tiny: Make) -> None:
    model, ids = tiny(2), torch.randint(256, (2, 5))
    for use in (
        lambda: route(model, ids, 0, 0.5),
        lambda: Trainer(ease.TrainingConfig(layer_weights={0: 1.0}), 256).compute_loss(model, ids, ids),
        lambda: model.logits(model.embed(ids), 0),
        lambda: generate(model, ids, 2, "exact", draft_exit=0),
    ):
        with pytest.raises(EaseError, match=r"memory|exits 1\.\.2|lie in 1\.\.1"):
            use()


def test_after_training_every_optimizer_takes_the_model(tiny: Make, text_data: Callable[..., ease.Data]) -> None:
    model, data = tiny(1, **SHAPE), text_data(2, 1)
    config = ease.StandardConfig(num_layers=1, max_epochs=1)
    list(ease.train(model, config.strategy(), data))
    model(torch.randint(256, (2, 5))).sum().backward()
    torch.optim.AdamW(model.parameters()).step()


def test_growth_from_a_memory_has_shares_and_may_copy(tiny: Make, text_data: Callable[..., ease.Data]) -> None:
    config = ease.GrowthConfig(layers=(0, 1, 2), grow_init="copy", max_epochs=6)
    assert [config.options(phase).max_epochs for phase in range(3)] == [2, 2, 3]
    model = tiny(0, **SHAPE)
    assert len(list(ease.train(model, config.strategy(), text_data(2, 1)))) == 3
    assert model.num_layers == 2


def test_the_brick_reads_the_same_rows_in_training_and_in_decoding(tiny: Make) -> None:
    from ease.training.drafts import draft_pass

    model, ids = tiny(2, **SHAPE), torch.randint(256, (2, 9))
    with torch.no_grad():
        model.memory.table.normal_()
        model.add_draft_brick(torch.arange(256), torch.randn(8, 32))
        states = model.forward_to_layer(ids, 2)
        trained = draft_pass(model, ease.Batch(ids, ids), 1).drafts[0]
        torch.testing.assert_close(model.draft(states[:, :-1], ids[:, 1:]), trained)
        cache = model.new_draft_cache(2, 9)
        parts = [model.draft(states[:, t : t + 1], ids[:, t + 1 : t + 2], cache=cache) for t in range(8)]
        torch.testing.assert_close(torch.cat(parts, 1), trained)


def test_no_tokens_give_no_logits(tiny: Make) -> None:
    assert tiny(2, **SHAPE)(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 256)


def test_freezing_below_layer_1_freezes_the_memory_and_its_exit(tiny: Make) -> None:
    model = tiny(2, **SHAPE)
    model.freeze_below(1)
    learning = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"layers", "exit_norms"}
    model.freeze_below(1, exits=(0,))
    assert model.memory.norm.weight.requires_grad
    assert not model.memory.table.requires_grad
    model.freeze_below(0)
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_a_cache_keeps_the_ids_of_rows_that_are_chosen_cut_and_given_room(model: StandardTransformer) -> None:
    ids, cache = torch.randint(256, (3, 8)), model.new_cache(3, 6)
    model.run(model.embed(ids[:, :6], cache=cache), 1, 4, cache=cache)
    cache.cut(torch.full((3,), 5))
    cache.select(np.array([2, 0, 2]))
    cache.grow(9)
    ids = ids[[2, 0, 2]]
    after = model.run(model.embed(ids[:, 5:], cache=cache), 1, 4, cache=cache)
    torch.testing.assert_close(after, model.forward_to_layer(ids, 4)[:, 5:], rtol=0, atol=1e-10)
