"""The decoding benchmark: order and number of the calls, and the metrics of each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ease import Generation, Policy, StandardTransformer, generate
from ease.evaluation.decoding_speed import Call, side_by_side, ways

Make = Callable[..., StandardTransformer]


def test_calls_alternate_and_the_first_of_each_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, done, now = [], [], [0.0]
    monkeypatch.setattr("ease.evaluation.decoding_speed.time.perf_counter", lambda: now[0])

    def call(name: str, seconds: list[float], tokens: list[int]) -> Call:
        def answer() -> Tensor:
            now[0] += seconds[calls.count(name)]
            calls.append(name)
            return torch.tensor([tokens])

        return answer

    given = {
        "a": call("a", [99.0, 2.0, 3.0, 8.0], [1, 2, 3, 4]),
        "b": call("b", [99.0, 1.0, 2.0, 2.0], [1, 2, 4, 3]),
        "c": call("c", [99.0, 4.0, 4.0, 8.0], [1, 2, 3, 4]),
    }
    rows = side_by_side(given, 3, done.append)
    assert "".join(calls) == "abccbaabccba"
    assert done == pytest.approx([k / 12 for k in range(1, 13)])
    assert [row["way"] for row in rows] == ["a", "b", "c"]
    assert [row["same_tokens"] for row in rows] == [1.0, 0.5, 1.0]
    # The speed of the first call by its median time, and of each other by its ratio to the first.
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([4 / 3, 4 / 3 * 2, 4 / 3 * 0.75])
    # The time of the first call over that of each, by round; then the median and range.
    assert [(row["low"], row["ratio"], row["high"]) for row in rows] == [(1, 1, 1), (1.5, 2, 4), (0.5, 0.75, 1)]
    assert all(row["batch"] == 1 and row["layers_per_token"] is None for row in rows)

    calls.clear()
    rows = side_by_side(given, 3, done.append, limit=100.0)  # the first round, which is not timed, takes 297 s
    assert "".join(calls) == "abccba"
    assert [(row["rounds"], row["ratio"]) for row in rows] == [(1, 1), (1, 2), (1, 0.5)]
    assert done[-1] == 1


def test_metrics_equal_those_of_separate_calls(tiny: Make, even_policy: Callable[..., Policy]) -> None:
    model, ids = tiny(2, sharp=True).double(), torch.randint(256, (3, 12))
    policy = even_policy(model, ids, (1,))
    model.policy = policy
    before = torch.get_rng_state()
    rows = {row["way"]: row for row in side_by_side(ways(model, ids, 20), 1)}
    assert torch.equal(torch.get_rng_state(), before), "greedy decoding draws nothing"
    assert list(rows) == ["full", "routed, own policy", "exact, auto", "exact, lookup", "exact, exit 1"]
    full, routed = generate(model, ids, 20), generate(model, ids, 20, "routed")
    assert rows["routed, own policy"]["layers_per_token"] == routed.stats["layers_per_token"] < 2
    assert rows["routed, own policy"]["same_tokens"] == pytest.approx((routed.tokens == full.tokens).double().mean())
    assert 0 < rows["routed, own policy"]["same_tokens"] < 1, "the policy must change some tokens"
    assert rows["exact, lookup"]["draft_source"] == "lookup"
    assert rows["exact, lookup"]["tokens_per_round"] >= 1
    assert all(row["same_tokens"] == 1 for way, row in rows.items() if way.startswith("exact"))
    assert rows["full"]["layers_per_token"] == 2
    assert {row["batch"] for row in rows.values()} == {3}


def test_without_a_policy_only_trained_exits_draft(tiny: Make) -> None:
    model = tiny(3)
    model.trained_exits = {1, 2, 3}
    calls = ways(model, torch.ones(2, 4, dtype=torch.long), 3)
    assert list(calls) == ["full", "exact, auto", "exact, lookup", "exact, exit 1", "exact, exit 2"]
    answer = calls["exact, exit 2"]()
    assert isinstance(answer, Generation)
    assert answer.stats["draft_source"] == "exit 2"
