"""Hard tokens: one by one and never by the sequence, exactly as many as asked for, from bounded memory."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease import (
    Batch,
    Data,
    EaseError,
    Layout,
    MinedBatches,
    Policy,
    StandardTransformer,
    collect_hard_examples,
    compute_confidence,
    compute_confidence_threshold,
)
from ease.routing.forward import routed_forward
from ease.training import mining
from ease.training.mining import BINS, Quantile, read_states

Make = Callable[..., StandardTransformer]
Pair = tuple[Tensor, Tensor]


@pytest.fixture
def batches(text: Tensor) -> list[Pair]:
    """Three batches of real text with a few tokens that are not scored: 300 scored ones."""
    made = []
    for n in range(3):
        ids = text[3000 + 200 * n :][:129].long()
        x, y = ids[:-1].view(4, 32), ids[1:].clone().view(4, 32)
        y[:, -7:] = -100
        made.append((x, y))
    return made


@torch.no_grad()
def all_confidences(model: StandardTransformer, batches: list[Pair], exit: int) -> Tensor:
    """(batches, B, T)"""
    return torch.stack([model.logits(model.forward_to_layer(x, exit), exit).softmax(-1).amax(-1) for x, _ in batches])


# Thresholds


@pytest.mark.parametrize("exit", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.25, 0.9])
def test_exactly_the_share_asked_for_is_hard(
    ratio: float, exit: int, trained: StandardTransformer, batches: list[Pair]
) -> None:
    threshold = compute_confidence_threshold(trained, batches, ratio, exit=exit)
    scored = torch.stack([y != -100 for _, y in batches])
    confidence = all_confidences(trained, batches, exit)
    assert scored.sum() == 300
    assert (confidence[scored] < threshold).sum() == round(300 * ratio)
    assert len(collect_hard_examples(trained, batches, threshold, exit=exit)["inputs"]) == round(300 * ratio)


def test_hard_is_said_of_tokens_and_not_of_sequences(trained: StandardTransformer, batches: list[Pair]) -> None:
    """The trap: averaged over its sequence a token's confidence is nearly that of every other token.

    Then the threshold lies elsewhere, and whole sequences are hard or easy.
    """
    threshold = compute_confidence_threshold(trained, batches, 0.5)
    confidence, scored = all_confidences(trained, batches, 2), torch.stack([y != -100 for _, y in batches])
    hard = collect_hard_examples(trained, batches, threshold)
    assert torch.equal(hard["confidences"], confidence[scored & (confidence < threshold)])

    averaged = ((confidence * scored).sum(-1) / scored.sum(-1))[..., None].expand_as(confidence)
    assert abs(float(averaged[scored].median()) - threshold) > 0.02
    in_row = (scored & (confidence < threshold)).sum(-1)
    assert (in_row > 2).all(), "every sequence has hard tokens"
    assert (scored.sum(-1) - in_row > 2).all(), "and easy ones"

    mined = MinedBatches(trained, batches, Policy(), 0.5)
    for batch, row in zip(mined.batches, confidence):
        assert torch.equal(batch.active, row < mined.threshold)


def test_hard_examples_are_aligned(trained: StandardTransformer, batches: list[Pair]) -> None:
    """Each field speaks of the same token: the state gives the confidence back, and (input, target) is in the text."""
    hard = collect_hard_examples(trained, batches, 0.3, exit=1)
    n = len(hard["inputs"])
    assert 10 < n < 290
    assert hard["hidden_states"].shape == (n, 32)
    torch.testing.assert_close(compute_confidence(trained, hard["hidden_states"], 1), hard["confidences"])
    assert (hard["confidences"] < 0.3).all()
    assert (hard["targets"] != -100).all()
    at = 0
    for (x, y), confidence in zip(batches, all_confidences(trained, batches, 1)):
        states = trained.forward_to_layer(x, 1)
        for b, t in ((confidence < 0.3) & (y != -100)).nonzero().tolist():
            assert (hard["inputs"][at], hard["targets"][at]) == (x[b, t], y[b, t])
            torch.testing.assert_close(hard["hidden_states"][at], states[b, t])
            at += 1
    assert at == n


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(ratio: float, trained: StandardTransformer, batches: list[Pair]) -> None:
    uses = [
        lambda: compute_confidence_threshold(trained, batches, ratio),
        lambda: MinedBatches(trained, batches, Policy(), ratio),
    ]
    for use in uses:
        with pytest.raises(EaseError, match=r"the share of hard tokens must lie in \(0, 1\], got") as error:
            use()
        assert "\n" not in str(error.value)


def test_no_hard_token_is_told(trained: StandardTransformer, batches: list[Pair]) -> None:
    uses = [
        lambda: collect_hard_examples(trained, batches, 0.0),
        lambda: MinedBatches(trained, [batches[0][:1] * 2], Policy(), 1e-9),
    ]
    for use in uses:
        with pytest.raises(EaseError, match=r"less confident than the threshold .*: raise the share") as error:
            use()
        assert "\n" not in str(error.value)
    nothing = [(x, torch.full_like(y, -100)) for x, y in batches]
    for use in (
        lambda: compute_confidence_threshold(trained, nothing, 0.5),
        lambda: MinedBatches(trained, nothing, Policy(), 0.5),
    ):
        with pytest.raises(EaseError, match="give at least one scored token"):
            use()


def test_one_shot_iterators_are_refused(trained: StandardTransformer, batches: list[Pair]) -> None:
    for use in (
        lambda: compute_confidence_threshold(trained, iter(batches), 0.5),  # type: ignore[arg-type]
        lambda: collect_hard_examples(trained, iter(batches), 0.5),  # type: ignore[arg-type]
        lambda: MinedBatches(trained, iter(batches), Policy(), 0.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(EaseError, match="one-shot iterator"):
            use()


# Quantiles in bounded memory

UNIT = st.floats(0, 1, width=32)


@given(st.lists(st.lists(UNIT, max_size=9), min_size=1, max_size=4).filter(any), UNIT)
def test_a_small_quantile_is_exact(parts: list[list[float]], share: float) -> None:
    quantile = Quantile()
    for part in parts:
        quantile.add(torch.tensor(part))
    values = torch.tensor([value for part in parts for value in part]).double()
    assert quantile.count == len(values)
    assert quantile(share) == torch.quantile(values, share)


@given(st.lists(st.lists(UNIT, max_size=9), min_size=1, max_size=4), UNIT, st.integers(0, 5))
def test_a_large_quantile_is_off_by_a_bin_at_most(parts: list[list[float]], share: float, exact: int) -> None:
    """Off from the values that the exact one lies between."""
    parts = [*parts, [0.5] * (exact + 1)]
    quantile = Quantile(exact)
    for part in parts:
        quantile.add(torch.tensor(part))
        assert sum(map(len, quantile.parts)) <= exact
    assert quantile.bins is not None
    assert len(quantile.bins) == BINS
    assert int(quantile.bins.sum()) == quantile.count
    values = sorted(value for part in parts for value in torch.tensor(part).tolist())
    rank = share * (len(values) - 1)
    low, high = values[math.floor(rank)], values[math.ceil(rank)]
    assert low - 1.01 / BINS <= quantile(share) <= high + 1.01 / BINS


def test_a_large_quantile_of_dense_values_is_that_of_torch() -> None:
    values, quantile = torch.rand(200_000), Quantile(1000)
    for part in values.split(30_000):
        quantile.add(part)
    for share in (0.0, 0.1, 0.5, 0.999, 1.0):
        assert quantile(share) == pytest.approx(float(torch.quantile(values.double(), share)), abs=2e-5)
    assert Quantile(1000).count == 0


MANY_VALUES = """
import math, resource, sys, torch
from ease.training.mining import Quantile
torch.set_num_threads(1)
rows, draw = int(sys.argv[1]), torch.Generator().manual_seed(0)
Quantile(10).add(torch.rand(10**6, generator=draw)[:5])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantile = Quantile()
for _ in range(rows):
    quantile.add(torch.rand(10**6, generator=draw).square_())
shares = (0.001, 0.1, 0.5, 0.9, 0.999)
print(quantile.count, max(abs(quantile(share) - share**2) for share in shares))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("millions", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_quantile_of_very_many_values_needs_little_memory(millions: int) -> None:
    """Squares of uniform numbers, whose quantile at a share is the share's square."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_VALUES, str(millions)], capture_output=True, text=True, check=True
    )
    count, error, memory = map(float, done.stdout.split())
    assert count == millions * 10**6
    assert error < 1e-3
    assert memory < 64


@pytest.mark.parametrize("exact", [10**6, 20])
def test_a_quantile_refuses_nan_and_resolves_values_near_one(exact: int) -> None:
    with pytest.raises(EaseError, match="a confidence is NaN: the model's weights are probably corrupt"):
        Quantile(exact).add(torch.tensor([0.5] * 30 + [math.nan]))
    values, quantile = 1 - 1e-8 * torch.linspace(0, 1, 1001).double(), Quantile(exact)
    for part in values.split(100):
        quantile.add(part)
    assert abs(int((values < quantile(0.3)).sum()) - 300) <= 1


@pytest.mark.parametrize("exact", [10**6, 50])
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.99])
def test_ties_are_broken_so_that_the_share_is_mined_whatever_the_batch_size(
    ratio: float, exact: int, tiny: Make, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(2)
    with torch.no_grad():
        model.output_head.weight.zero_()  # every confidence is the same
    monkeypatch.setattr(mining, "Quantile", lambda: Quantile(exact))
    ids = text[:1025].long()
    x, y = ids[:-1].view(32, 32), ids[1:].view(32, 32)
    masks = []
    for size in (4, 8, 32):
        mined = MinedBatches(model, list(zip(x.split(size), y.split(size), strict=True)), Policy(), ratio)
        assert abs(mined.hard - round(1024 * ratio)) <= 1
        masks.append(torch.cat([batch.scored for batch in mined.batches]).tolist())
    assert masks[0] == masks[1] == masks[2]
    quarters = [sum(map(sum, masks[0][at : at + 8])) for at in range(0, 32, 8)]
    assert max(quarters) - min(quarters) <= 1  # spread over the text


def test_nan_is_not_mined(tiny: Make, batches: list[Pair]) -> None:
    model = tiny(2)
    with torch.no_grad():
        model.output_head.weight.fill_(math.nan)
    with pytest.raises(EaseError, match="a confidence is NaN"):
        compute_confidence_threshold(model, batches, 0.5)
    with pytest.raises(EaseError, match="a confidence is NaN"):
        MinedBatches(model, batches, Policy(), 0.5)


def test_mining_from_bins_takes_nearly_the_share(
    trained: StandardTransformer, batches: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = compute_confidence_threshold(trained, batches, 0.5)
    monkeypatch.setattr(mining, "Quantile", lambda: Quantile(50))
    assert compute_confidence_threshold(trained, batches, 0.5) == pytest.approx(exact, abs=5e-3)
    assert abs(MinedBatches(trained, batches, Policy(), 0.5).hard - 150) <= 1


# Mined batches


def test_a_batch_without_a_token_is_passed_over(trained: StandardTransformer, batches: list[Pair]) -> None:
    x, y = batches[0]
    empty = Batch(x, torch.full_like(y, -100), layout=Layout.from_attention_mask(torch.zeros_like(x)))
    mined, alone = (MinedBatches(trained, b, Policy(), 0.5) for b in ([*batches, empty], batches))
    assert (mined.hard, mined.threshold, len(mined)) == (alone.hard, alone.threshold, len(alone))
    assert len(list(read_states(trained, [*batches, empty], None, 2))) == len(batches)


@pytest.mark.parametrize("ratio", [0.5, 0.2, 1.0])
def test_mined_batches_hold_the_share(ratio: float, trained: StandardTransformer, batches: list[Pair]) -> None:
    mined = MinedBatches(trained, batches, Policy(), ratio)
    scored = [int(batch.scored.sum()) for batch in mined]
    assert sum(scored) == mined.hard == round(300 * ratio)
    assert mined.total == 300
    assert len(mined) == len(batches)
    confidence = all_confidences(trained, batches, 2)
    for batch, (x, y), row in zip(mined.batches, batches, confidence):
        assert torch.equal(batch.x, x)
        assert torch.equal(batch.y, y)
        assert batch.active is not None
        assert batch.active.all() if ratio == 1 else torch.equal(batch.active, row < mined.threshold)
        assert batch.state is not None
        torch.testing.assert_close(batch.state, trained.forward_to_layer(x, 2).detach())


def test_tokens_without_a_target_do_not_count(trained: StandardTransformer, batches: list[Pair]) -> None:
    """Not for the threshold, not as hard ones, not in the loss, whatever stands in them."""
    plain = MinedBatches(trained, batches, Policy(), 0.5)
    changed = [(x.clone(), y) for x, y in batches]
    for x, y in changed:
        x[y == -100] = torch.randint(256, (int((y == -100).sum()),))  # at the ends, where nobody looks back
    other = MinedBatches(trained, changed, Policy(), 0.5)
    assert (plain.threshold, plain.hard) == (other.threshold, other.hard)
    for a, b in zip(plain.batches, other.batches):
        assert torch.equal(a.scored, b.scored)
        assert not a.scored[a.y == -100].any()


@pytest.mark.parametrize("routed", [False, True])
def test_what_does_not_fit_is_computed_again_bit_for_bit(
    routed: bool, tiny: Make, batches: list[Pair], even_policy: Callable[..., Policy]
) -> None:
    model = tiny(3, sharp=True, dropout=0.3)
    policy = even_policy(model, batches[0][0], (1,)) if routed else Policy()
    size = 4 * 32 * 32 * 4  # of one batch's state
    kept = [MinedBatches(model, batches, policy, 0.3, budget=budget) for budget in (1e9, size, 0)]
    assert [sum(b.state is not None for b in mined.batches) for mined in kept] == [3, 1, 0]
    model.freeze_below(4)
    for epoch in zip(*kept):
        stored, _, again = epoch
        assert stored.flops == 0 < again.flops
        for other in epoch[1:]:
            assert torch.equal(other.x, stored.x)
            assert torch.equal(other.active, stored.active)
            assert torch.equal(other.state, stored.state)
    assert len({mined.threshold for mined in kept}) == 1


def test_the_order_is_new_in_every_epoch_and_set_by_the_seed(
    trained: StandardTransformer, text_data: Callable[..., Data]
) -> None:
    train = text_data(8, 1).train

    def orders(seed: int) -> list[list[int]]:
        mined = MinedBatches(trained, train, Policy(), 0.5, seed=seed)
        places = {int(batch.x.sum()): i for i, batch in enumerate(mined.batches)}
        return [[places[int(batch.x.sum())] for batch in mined] for _ in range(3)]

    first = orders(0)
    assert all(sorted(order) == list(range(8)) for order in first)
    assert first[0] != first[1] != first[2]
    assert orders(0) == first
    assert orders(1) != first


def test_tokens_that_left_before_are_not_mined(
    tiny: Make, batches: list[Pair], even_policy: Callable[..., Policy]
) -> None:
    """The share is of all tokens, the least confident of those still running; the rest keep the state of their exit."""
    model = tiny(3, sharp=True)
    policy = even_policy(model, torch.cat([x for x, _ in batches]), (1,))
    confidence = all_confidences(model, batches, 1)
    mined = MinedBatches(model, batches, policy, 0.2)
    assert mined.hard == 60
    for batch, row in zip(mined.batches, confidence):
        left = row >= policy.thresholds[0]
        assert batch.active is not None
        assert batch.state is not None
        assert not (batch.active & left).any()
        torch.testing.assert_close(batch.state[left], model.forward_to_layer(batch.x, 1)[left].detach())
    # Asked for more than still run, all of them are taken.
    everyone = MinedBatches(model, batches, policy, 1.0)
    for batch, row in zip(everyone.batches, confidence):
        assert torch.equal(batch.active, row < policy.thresholds[0])


def test_a_batch_that_left_as_a_whole_is_mined_empty(tiny: Make, batches: list[Pair]) -> None:
    model = tiny(3, sharp=True)
    confidence = all_confidences(model, batches, 1).flatten(1)
    order = confidence.amin(1).argsort()
    threshold = float((confidence[order[-1]].amin() + confidence[order[-2]].amin()) / 2)
    mined = MinedBatches(model, batches, Policy((1,), (threshold,)), 0.001, budget=0)
    gone = mined.batches[int(order[-1])]
    assert gone.active is not None
    assert not gone.active.any()
    assert mined.hard >= 1
    for batch in mined:
        assert batch.state is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_hard_tokens_are_those_that_routing_lets_continue(
    dtype: torch.dtype, trained: StandardTransformer, batches: list[Pair]
) -> None:
    model = trained.to(dtype)
    mined = MinedBatches(model, batches, Policy(), 0.3)
    found = compute_confidence_threshold(model, batches, 0.3, exit=1)
    model.grow(3)
    for batch in mined.batches:
        (at_exit, _) = routed_forward(model, batch.x, Policy((2,), (mined.threshold,)))
        assert batch.active is not None
        # Of tokens that are tied at the threshold, mining takes as many as the share asks for.
        differ = at_exit.confidence.view_as(batch.x)[at_exit.remaining != batch.active]
        assert bool(((differ - mined.threshold).abs() < 1e-6).all())
    hard = collect_hard_examples(model, batches, found, exit=1)
    assert hard["confidences"].dtype == torch.float32
    routed = [next(routed_forward(model, x, Policy((1,), (found,)))) for x, _ in batches]
    continuing = sum(int((step.remaining & (y != -100)).sum()) for step, (_, y) in zip(routed, batches))
    assert len(hard["inputs"]) == continuing


def test_released_batches_hold_no_states_and_give_them_again(trained: StandardTransformer, batches: list[Pair]) -> None:
    mined = MinedBatches(trained, batches, Policy(), 0.5)
    before = [batch.state for batch in mined.batches]
    mined.release()
    assert all(batch.state is None for batch in mined.batches)
    order = mined.state_dict()
    after = list(mined)
    mined.load_state_dict(order)
    assert len(after) == len(before)
    for batch, again in zip(after, mined, strict=True):
        assert torch.equal(batch.state, again.state)
        assert any(torch.equal(batch.state, state) for state in before)
