"""What a run measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ease import Policy, StandardTransformer, TokenBatches, generate
from ease.progress import Progress
from ease.runs import metrics as figures
from ease.runs.lines import Line
from ease.runs.metrics import decoding

Make = Callable[..., StandardTransformer]


def test_the_sweep_goes_from_everyone_leaving_to_no_one(made: Path) -> None:
    points = json.loads((made / "summary.json").read_text())["sweep"]["points"]
    costs = [point["compute_cost"] for point in points]
    assert costs[0] == pytest.approx(1 / 3)
    assert costs[-1] == pytest.approx(1.0, abs=0.02)
    assert costs == sorted(costs)


def test_the_report_says_how_well_confidence_ranks(made: Path) -> None:
    exits = json.loads((made / "summary.json").read_text())["reliability"]["exits"]
    assert [e["layer"] for e in exits] == [1, 3]
    assert 0.5 < exits[0]["auroc"] < 1
    assert exits[1]["auroc"] is None
    assert '"auroc":0.' in (made / "report.html").read_text()


class Seen(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shares: list[float] = []

    def line(self, name: str) -> Progress:
        self.names.append(name)
        return self

    def step(self, progress: float, loss: float = 0.0) -> None:
        self.shares.append(progress)


def lined(model: StandardTransformer, policy: Policy) -> Line:
    return Line("phase 2", model, policy, [], {}, 0.0)


def test_decoding_is_timed_on_held_out_prompts_with_the_policy_of_the_line(
    tiny: Make, text: Tensor, even_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROUNDS", 1)
    model, test, seen = tiny(2, sharp=True).double(), TokenBatches(text, 33, 4), Seen()
    policy = replace(even_policy(model, test.windows[:8, :17].long(), (1,)), always_deep=2)
    own = model.exit_layer, model.routing_threshold, model.policy_options
    random = torch.get_rng_state()
    told = decoding(lined(model, policy), test, seen.line)
    assert told is not None
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.exit_layer, model.routing_threshold, model.policy_options) == own, "the model stays as it was"
    assert (told["prompt_tokens"], told["new_tokens"]) == (17, 17), "the last new token stands at position 34, unread"
    assert [(row["batch"], row["way"]) for row in told["rows"]] == [
        (batch, way) for batch in (1, 8) for way in ("full", "routed, own policy", "exact, auto", "exact, exit 1")
    ]
    rows = {(row["batch"], row["way"]): row for row in told["rows"]}
    assert all(row["same_tokens"] == 1.0 for (_, way), row in rows.items() if way.startswith("exact"))
    model.exit_layer, model.routing_threshold, model.policy_options = (1,), policy.thresholds, {"always_deep": 2}
    prompts = torch.stack([text[33 * row : 33 * row + 17] for row in range(8)]).long()
    for batch in (1, 8):
        routed = generate(model, prompts[:batch], 17, "routed").stats["layers_per_token"]
        assert 1 < rows[batch, "routed, own policy"]["layers_per_token"] == routed < 2
    assert seen.names == ["decoding"]
    assert seen.shares == sorted(seen.shares)
    assert seen.shares[-1] == 1.0


def test_decoding_fits_the_shortest_sequences_and_the_fewest_rows(trained: StandardTransformer, text: Tensor) -> None:
    told = decoding(lined(trained, Policy((1,), (0.5,))), TokenBatches(text[:2], 1, 1), lambda name: Progress())
    assert told is not None
    assert (told["prompt_tokens"], told["new_tokens"]) == (1, 1)
    assert {row["batch"] for row in told["rows"]} == {1}


def test_decoding_is_left_out_where_there_is_nothing_to_compare(tiny: Make, text: Tensor) -> None:
    test, seen = TokenBatches(text, 16, 4), Seen()
    assert decoding(lined(tiny(2), Policy()), test, seen.line) is None
    labels = tiny(2, num_labels=3)
    assert decoding(lined(labels, Policy((1,), (0.5,))), test, seen.line) is None
    assert seen.names == [], "no progress is shown of what is not done"


def test_a_run_says_how_its_model_decodes(made: Path) -> None:
    told = json.loads((made / "summary.json").read_text())["generation"]
    assert {row["batch"] for row in told["rows"]} == {1, 8}
    assert all(row["layers_per_token"] == 3 for row in told["rows"] if row["way"] == "full")
    assert told["line"] == "phase 2"
    assert "Three ways to decode" in (made / "report.html").read_text()
