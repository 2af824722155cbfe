"""What a draft costs and how often it is right, as measured within a request."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ease import generate
from ease.generation.sources.base import Pace, Reliability


def test_reliability_starts_with_what_the_source_says_and_ends_with_what_came_true() -> None:
    reliability = Reliability()
    assert reliability([0.05, 0.55, 1.0]) == pytest.approx([0.05, 0.55, 1.0])
    for _ in range(100):
        reliability.learn(np.full(10, 0.95), np.arange(10) < 4)
    assert reliability([0.95])[0] == pytest.approx(0.4, abs=0.03)
    assert reliability([0.55])[0] == pytest.approx(0.55)


def test_the_price_of_a_draft_is_what_its_time_would_gain_otherwise() -> None:
    """Rounds of 9 seconds and one more per token read, of which each of two rows appends two."""
    pace = Pace(prior=0.05)
    for drafts in range(200):
        pace.record(2 + drafts % 5, 9.0 + 2 + drafts % 5, 4)
    assert pace.seconds_per_token == pytest.approx(13 / 4, rel=0.1)
    alone, spared = pace.prices(np.array([1.0, 0.0]))
    assert alone == pytest.approx(1 / (1 + 9 / 2), rel=0.1)
    assert spared == pytest.approx(1)
    assert pace.prices(np.array([0.5, 0.5])) == pytest.approx([1 / (1 + 9 / 4)] * 2, rel=0.1)


def test_rounds_of_one_length_leave_the_prior() -> None:
    pace = Pace(prior=0.1)
    before = pace.prices(np.ones(1))
    for _ in range(20):
        pace.record(1, 5.0, 1)
    assert pace.prices(np.ones(1)) == pytest.approx(0.1)
    assert before == pytest.approx(0.1, abs=0.01)


def test_a_slow_round_of_few_tokens_makes_no_draft_free() -> None:
    pace = Pace(prior=0.1)
    for places, seconds in ((1, 9.0), (5, 1.0)) * 5:
        pace.record(places, seconds, 1)
    assert 0.01 <= pace.prices(np.ones(1)) <= 1


def test_the_first_round_of_a_request_is_not_measured(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may reorder the weights of the model, which takes as long as many steps."""
    recorded: list[int] = []
    monkeypatch.setattr(Pace, "record", lambda self, places, seconds, tokens: recorded.append(places))
    stats = generate(tiny(2), torch.ones(3, 4, dtype=torch.long), 9, "exact", draft_source="none").stats
    assert (stats["rounds"], len(recorded)) == (8, 7)
