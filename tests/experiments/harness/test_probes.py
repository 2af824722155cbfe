"""Probes of running text: which spans are found, and when one counts as right."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.harness.probes import PROBES, Spans

TEXT = "def name(self):\n    return wide[0]\n# The end of it. More"


def found(probe: str, pieces: list[str]) -> list[str]:
    first, last = Spans.of(PROBES[probe], pieces)
    return ["".join(pieces[a : b + 1]) for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def test_spans_of_bytes() -> None:
    pieces = list(TEXT)
    assert found("identifiers", pieces) == ["name", "self", "return", "wide", "More"]
    assert found("closing brackets", pieces) == [")", "]"]
    assert found("indentations", pieces) == ["    "]
    assert found("last words", pieces) == []
    assert found("last words", list("It was the end. All of it")) == ["end"]


def test_a_span_is_every_token_that_it_touches() -> None:
    assert found("identifiers", ["def", " na", "me", "(", "self)", ":"]) == [" name", "self)"]
    assert found("last words", ["at ", "the ", "end ", ". ", "all "]) == ["end "], "whole words"
    assert found("identifiers", ["", "na", "", "me", ""]) == ["name"], "a special token has no text"


@pytest.mark.parametrize(("wrong", "share"), [([], 1.0), ([0, 1, 4], 1.0), ([2], 0.5), ([3, 6], 0.0)])
def test_a_span_is_right_if_all_of_its_tokens_are(wrong: list[int], share: float) -> None:
    correct = torch.ones(8, dtype=torch.bool)
    correct[wrong] = False
    assert Spans(torch.tensor([2, 5]), torch.tensor([3, 7])).right(correct) == share


def test_without_a_span_there_is_no_share() -> None:
    assert math.isnan(Spans.of(PROBES["indentations"], ["a", "b"]).right(torch.ones(2, dtype=torch.bool)))
