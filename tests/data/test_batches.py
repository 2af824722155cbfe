"""Batches: a pass takes every token or example once, in an order that the seed and the epoch determine."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ease.data.batches import Example, ExampleBatches, TokenBatches
from ease.errors import EaseError

# ---------------------------------------------------------------------------------------------------------
# Windows of a text


@given(st.integers(2, 200), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_pass_predicts_each_token_once(tokens: int, T: int, B: int, shuffle: bool, drop_last: bool) -> None:
    ids = torch.arange(tokens, dtype=torch.int32)
    windows = (tokens - 1) // T
    if windows < (B if drop_last else 1):
        with pytest.raises(EaseError, match="smaller"):
            TokenBatches(ids, T, B, shuffle=shuffle, drop_last=drop_last)
        return
    batches = TokenBatches(ids, T, B, shuffle=shuffle, drop_last=drop_last)
    got = list(batches)
    assert len(got) == len(batches) == (windows // B if drop_last else -(-windows // B))
    for x, y in got:
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert x.shape == y.shape
        assert x.shape[1] == T
        assert x.shape[0] == B or not drop_last
        assert torch.equal(x + 1, y)
        assert bool((x[:, 0] % T == 0).all())
    seen = torch.cat([y.flatten() for _, y in got]).tolist()
    assert len(seen) == len(set(seen)) == (windows // B * B if drop_last else windows) * T
    if not shuffle:
        assert seen == list(range(1, len(seen) + 1))


def starts(batches: TokenBatches) -> list[int]:
    return [int(i) for x, _ in batches for i in x[:, 0]]


def test_shuffle_is_set_by_the_seed_and_new_in_every_epoch() -> None:
    ids = torch.arange(401)
    one, two = (TokenBatches(ids, 4, 5, shuffle=True, seed=7) for _ in range(2))
    first, second = starts(one), starts(one)
    assert sorted(first) == sorted(second) == list(range(0, 400, 4))
    assert first != second
    assert [starts(two), starts(two)] == [first, second]
    assert starts(TokenBatches(ids, 4, 5, shuffle=True, seed=8)) != first
    two.epoch = 1
    assert one.epoch == 2
    assert starts(two) == second
    plain = TokenBatches(ids, 4, 5)
    assert starts(plain) == starts(plain) == list(range(0, 400, 4))


def test_max_batches_slices_a_pass() -> None:
    ids = torch.arange(41)  # 10 windows of 4, 5 batches of 2
    batches = TokenBatches(ids, 4, 2, shuffle=True, max_batches=2)
    assert len(batches) == 2
    stream = [start for _ in range(5) for start in starts(batches)]  # two passes
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(0, 40, 4))
    whole = TokenBatches(ids, 4, 2, shuffle=True)
    assert stream == starts(whole) + starts(whole)

    plain = TokenBatches(ids, 4, 2, max_batches=2)
    assert starts(plain) == starts(plain) == [0, 4, 8, 12]
    assert len(TokenBatches(ids, 4, 2, max_batches=99)) == 5


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"batch_size": 0}, {"max_batches": 0}, {"seed": -1}])
def test_sizes_below_1_are_refused(bad: dict[str, int]) -> None:
    sizes: dict[str, Any] = {"seq_len": 4, "batch_size": 2, **bad}
    with pytest.raises(EaseError, match=next(iter(bad))):
        TokenBatches(torch.arange(100), **sizes)


def test_only_1d_integer_ids_are_accepted() -> None:
    for ids in (torch.zeros(100), torch.zeros(10, 10, dtype=torch.int64)):
        with pytest.raises(EaseError, match=r"shape \(T,\)"):
            TokenBatches(ids, 4, 2)


# ---------------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_takes_every_example_once_without_its_padding(
    shuffle: bool, bucket: bool, examples: list[Example]
) -> None:
    batches = ExampleBatches(examples, 6, shuffle=shuffle, bucket=bucket, seed=3)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 7
    rows = []
    for batch in first:
        assert batch.layout is not None
        real = batch.layout.real
        assert torch.equal(real, real.sum(1, keepdim=True) > torch.arange(real.shape[1]))
        assert real.any(0).all()  # no column is padding only
        assert (batch.y[~real] == -100).all()
        rows += [(x[r].tolist(), y[r].tolist()) for x, y, r in zip(batch.x, batch.y, real)]
    made = [(e.ids.tolist(), e.targets.tolist()) for e in examples]
    assert sorted(rows) == sorted(made)
    assert (rows == made) is (not shuffle and not bucket)
    assert [b.x.tolist() for b in first] != [b.x.tolist() for b in second] or not shuffle
    again = ExampleBatches(examples, 6, shuffle=shuffle, bucket=bucket, seed=3)
    again.epoch = 1
    assert all(torch.equal(a.x, b.x) for a, b in zip(second, again))
    padding = sum(int((~batch.layout.real).sum()) for batch in first if batch.layout)
    assert padding < 100 if bucket else padding > 200  # 1 + 2 + 3 + 4 + 5 per batch of sorted lengths
