"""Prompt lookup proposes what followed the latest earlier occurrence of the last tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ease.generation.lookup import ACCEPTANCE, LENGTHS, PromptLookup

rows = st.lists(st.integers(0, 2), max_size=40)


def search(row: list[int], length: int) -> list[int]:
    """The same by comparing everywhere."""
    for n in LENGTHS:
        for place in range(len(row) - 1, n - 1, -1):
            if n <= len(row) and row[place - n : place] == row[-n:]:
                found = list(row)
                for i in range(length):
                    found.append(found[place + i])
                return found[len(row) :]
    return []


@given(rows, rows, st.integers(0, 9))
def test_the_proposal_is_that_of_a_search_of_the_whole_row(prompt: list[int], answer: list[int], length: int) -> None:
    lookup = PromptLookup(prompt)
    for token in answer:
        tokens, confidences = lookup.propose(length)
        assert tokens == search(lookup.tokens, length)
        assert len(confidences) == len(tokens)
        assert all(0 < confidence < 1 for confidence in confidences)
        lookup.append([token])
    assert lookup.tokens == prompt + answer
    assert PromptLookup(prompt + answer).propose(length)[0] == lookup.propose(length)[0]


def test_a_longer_match_is_surer() -> None:
    short = PromptLookup([9, 1, 2, 3, 8, 1, 2]).propose(2)
    long = PromptLookup([5, 6, 7, 1, 2, 3, 5, 6, 7, 1, 2]).propose(2)
    assert (short[0], long[0]) == ([3, 8], [3, 5])
    assert short[1] == [ACCEPTANCE[0], ACCEPTANCE[1]]
    assert long[1] == [ACCEPTANCE[3], ACCEPTANCE[4]]
