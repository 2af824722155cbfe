"""The table of counts is a Kneser-Ney model of bounded size, and what it drafts is what it finds most probable."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from data_damage import damage
from hypothesis import given
from hypothesis import strategies as st

from ease import CountTable, EaseError

V = 4

pieces = st.lists(st.lists(st.integers(0, V - 1), max_size=30), max_size=4).filter(lambda p: any(len(x) > 1 for x in p))
some_orders = st.sampled_from([(1,), (1, 2), (1, 3), (2, 3, 5)])
ARRAYS = ("keys", "sizes", "tokens", "weights", "best", "confidences")


def kneser_ney(texts: list[list[int]], orders: tuple[int, ...], history: list[int]) -> list[float]:
    """The distribution after a history, from the definition."""
    probabilities = [1 / V] * V
    for n in (0, *orders):
        seen: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for text in texts:
            for i in range(max(n, 1), len(text)):  # nothing predicts the first token of a piece
                seen[tuple(text[i - n : i])].append((text[i - n - 1] if i > n else V, text[i]))
        seen = {context: pairs for context, pairs in seen.items() if len(pairs) > 1}
        counts = {
            context: Counter(token for _, token in (pairs if n == orders[-1] else set(pairs)))
            for context, pairs in seen.items()
        }
        frequencies = Counter(count for counter in counts.values() for count in counter.values())
        once, twice = frequencies[1], frequencies[2]
        discount = once / (once + 2 * twice) if once and twice else 0.5
        context = tuple(history[len(history) - n :])
        if n <= len(history) and context in counts:
            own = counts[context]
            total = sum(own.values())
            rest = discount * len(own) / total
            probabilities = [max(own[w] - discount, 0) / total + rest * probabilities[w] for w in range(V)]
    return probabilities


@given(pieces, some_orders, st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_the_probabilities_are_those_of_interpolated_kneser_ney(
    texts: list[list[int]], orders: tuple[int, ...], history: list[int]
) -> None:
    table = CountTable.of(texts, V, orders=orders)
    expected = kneser_ney(texts, orders, history)
    np.testing.assert_allclose(table.distribution([history])[0], expected, atol=3e-6)
    text = [*history, 2]
    found = table.predict(text)
    for i, probability in enumerate(found.probabilities):
        assert probability == pytest.approx(kneser_ney(texts, orders, text[: i + 1])[text[i + 1]], abs=3e-6)


@given(pieces, some_orders, st.integers(1, 40), st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_a_table_of_any_size_sums_to_one_and_proposes_what_is_most_probable(
    texts: list[list[int]], orders: tuple[int, ...], max_ngrams: int, history: list[int]
) -> None:
    table = CountTable.of(texts, V, orders=orders, max_ngrams=max_ngrams)
    assert len(table.tokens) <= max_ngrams
    distribution = table.distribution([history])[0]
    assert distribution.sum() == pytest.approx(1, abs=1e-9)
    assert distribution.min() > 0
    found = table.predict([*history, 0])
    assert found.probabilities[-1] == pytest.approx(distribution[0])
    assert found.confidences[-1] == pytest.approx(distribution.max(), abs=2e-6)
    assert distribution[found.tokens[-1]] == pytest.approx(distribution.max())

    proposed, confidences = table.propose(history, 3)
    for i, (token, confidence) in enumerate(zip(proposed, confidences, strict=True)):
        after = table.predict([*history, *proposed[:i], 0])
        assert (token, confidence) == (after.tokens[-1], after.confidences[-1])
        assert 0 < confidence < 1


def test_a_proposal_ends_where_no_context_is_known() -> None:
    table = CountTable.of([0, 1, 2, 0, 1, 3], V, orders=(1, 2))  # 2 and 3 are followed at most once
    assert table.propose([0], 4)[0] == [1, 2]
    assert table.propose(np.array([3, 0], np.int32), 1)[0] == [1]
    assert table.propose([3], 4) == table.propose([], 4) == table.propose([0], 0) == ([], [])


@pytest.mark.parametrize("max_ngrams", [100, 1000, 10**6])
def test_on_real_text_the_prediction_is_the_most_probable_token(max_ngrams: int, text: torch.Tensor) -> None:
    table = CountTable.of(text[2000:], 256, max_ngrams=max_ngrams)
    distributions = table.distribution(text[:600].unfold(0, 8, 1))
    found = table.predict(text[:601])
    places = np.arange(len(distributions))
    np.testing.assert_allclose(found.confidences[7:], distributions.max(1), rtol=1e-5)
    np.testing.assert_allclose(distributions[places, found.tokens[7:]], distributions.max(1), rtol=1e-5)
    np.testing.assert_allclose(found.probabilities[7:], distributions[places, text[8:601]], rtol=1e-9)


def test_longer_contexts_foretell_held_out_text_better(text: torch.Tensor) -> None:
    train, held_out = text[:-2000], text[-2000:]
    table = CountTable.of(train, 256)
    scores, short = table.score(held_out), CountTable.of(train, 256, orders=(1,)).score(held_out)
    assert scores.tokens == 1999
    assert 1 < scores.perplexity < 0.7 * short.perplexity < 256
    assert scores.accuracy > 1.2 * short.accuracy
    right = table.predict(held_out).tokens == held_out[1:].numpy()
    assert right.mean() == scores.accuracy


def test_a_smaller_table_keeps_the_ngrams_that_are_worth_most(text: torch.Tensor) -> None:
    whole, half, few = (CountTable.of(text, 256, max_ngrams=most) for most in (10**6, 5000, 500))
    assert [len(table.tokens) for table in (half, few)] == [5000, 500]
    losses = [math.log(table.score(text).perplexity) for table in (whole, half, few)]
    assert losses == sorted(losses)
    assert losses[2] < 0.6 * math.log(256)


def test_large_ids_are_told_apart() -> None:
    largest = 262_143
    table = CountTable.of(torch.tensor([largest, 7, 0, largest, 7, 0, largest], dtype=torch.int32), largest + 1)
    assert table.propose([5, largest], 3)[0] == [7, 0, largest]
    assert table.score([largest, 7, 0]).accuracy == 1


def test_a_table_is_read_as_it_was_written(text: torch.Tensor, tmp_path: Path) -> None:
    table = CountTable.of(text, 256, orders=(1, 2, 4), max_ngrams=1000)
    file = tmp_path / "counts.safetensors"
    table.save(file)
    again = CountTable.load(file)
    assert (again.vocab_size, again.orders) == (256, (1, 2, 4))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert again.propose(text[:50].numpy(), 5) == table.propose(text[:50].tolist(), 5)
    with pytest.raises(EaseError, match="exists already"):
        table.save(file)
    CountTable.of(text, 256, max_ngrams=10).save(file, overwrite=True)
    assert len(CountTable.load(file).tokens) == 10
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(EaseError, match="could not be written"):
        table.save(tmp_path / "nowhere" / "counts.safetensors")


def test_a_damaged_file_is_refused_in_one_sentence(text: torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "counts.safetensors"
    CountTable.of(text, 256, max_ngrams=50).save(file)
    intact = file.read_bytes()
    for seed in range(60):
        file.write_bytes(intact)
        damage(file, random.Random(seed))
        if file.read_bytes() == intact:
            continue
        with pytest.raises(EaseError, match=r"is damaged .*: make the table again"):
            CountTable.load(file)
    file.unlink()
    with pytest.raises(EaseError, match="is missing"):
        CountTable.load(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 256), ("best", -1), ("sizes", 0), ("weights", 1.5), ("confidences", math.nan), ("keys", 0)],
)
def test_a_file_with_a_checksum_and_impossible_values_is_refused(
    name: str, value: float, text: torch.Tensor, tmp_path: Path
) -> None:
    table = CountTable.of(text, 256, max_ngrams=50)
    getattr(table, name)[-1] = value
    table.save(tmp_path / "counts.safetensors")
    with pytest.raises(EaseError, match=f"{name} holds values that no table has"):
        CountTable.load(tmp_path / "counts.safetensors")


def test_bad_input_is_refused() -> None:
    with pytest.raises(EaseError, match=r"must lie in 0\.\.3, got 0\.\.4"):
        CountTable.of([0, 4], V)
    with pytest.raises(EaseError, match="at least 2 tokens"):
        CountTable.of([[0], [1]], V)
    with pytest.raises(EaseError, match="at least 2 tokens"):
        CountTable.of([0, 1], V).score([1])
    with pytest.raises(EaseError, match=r"orders must be lengths of contexts in 1\.\.64"):
        CountTable.of([0, 1], V, orders=(0, 1))
    with pytest.raises(EaseError, match="max_ngrams must be at least 1"):
        CountTable.of([0, 1], V, max_ngrams=0)
    with pytest.raises(EaseError, match="made for 4 ids, and the model has 5"):
        CountTable.of([0, 1], V).check_vocab_size(5)
