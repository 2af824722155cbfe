"""Metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ease import Policy, StandardTransformer, TokenBatches, generate
from ease.progress import Progress, StepMetrics
from ease.runs import metrics
from ease.runs.lines import TrainedLine
from ease.runs.metrics import decoding_metrics

Make = Callable[..., StandardTransformer]


def test_the_sweep_goes_from_all_tokens_exiting_to_none(made: Path) -> None:
    points = json.loads((made / "summary.json").read_text())["sweep"]["points"]
    costs = [point["compute_cost"] for point in points]
    assert costs[0] == pytest.approx(1 / 3)
    assert costs[-1] == pytest.approx(1.0, abs=0.02)
    assert costs == sorted(costs)


def test_the_report_shows_how_well_confidence_ranks(made: Path) -> None:
    exits = json.loads((made / "summary.json").read_text())["reliability"]["exits"]
    assert [e["layer"] for e in exits] == [1, 3]
    assert 0.5 < exits[0]["auroc"] < 1
    assert exits[1]["auroc"] is None
    assert '"auroc":0.' in (made / "report.html").read_text()


class Seen(Progress):
    """Records the progress it receives."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shares: list[float] = []

    def line(self, name: str) -> Progress:
        self.names.append(name)
        return self

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.shares.append(fraction)


def lined(model: StandardTransformer, policy: Policy) -> TrainedLine:
    return TrainedLine("phase 2", model, policy)


def test_decoding_is_timed_on_held_out_prompts_with_the_policy_of_the_line(
    tiny: Make, text: Tensor, even_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROUNDS", 1)
    model, test, seen = tiny(2, sharp=True).double(), TokenBatches(text, 33, 4), Seen()
    policy = replace(even_policy(model, test.windows[:8, :17].long(), (1,)), always_deep=2)
    own = model.policy
    random = torch.get_rng_state()
    decoded = decoding_metrics(lined(model, policy), test, seen.line)
    assert decoded is not None
    assert torch.equal(torch.get_rng_state(), random)
    assert model.policy == own, "the model stays as it was"
    assert (decoded["prompt_tokens"], decoded["new_tokens"]) == (17, 17), "position 34 is never read"
    assert [(row["batch"], row["way"]) for row in decoded["rows"]] == [
        (batch, way)
        for batch in (1, 8)
        for way in ("full", "routed, own policy", "exact, auto", "exact, lookup", "exact, exit 1")
    ]
    rows = {(row["batch"], row["way"]): row for row in decoded["rows"]}
    assert all(row["same_tokens"] == 1.0 for (_, way), row in rows.items() if way.startswith("exact"))
    model.policy = policy
    prompts = torch.stack([text[33 * row : 33 * row + 17] for row in range(8)]).long()
    for batch in (1, 8):
        routed = generate(model, prompts[:batch], 17, "routed").stats["layers_per_token"]
        assert 1 < rows[batch, "routed, own policy"]["layers_per_token"] == routed < 2
    assert seen.names == ["decoding"]
    assert seen.shares == sorted(seen.shares)
    assert seen.shares[-1] == 1.0


def test_decoding_fits_the_shortest_sequences_and_the_fewest_rows(trained: StandardTransformer, text: Tensor) -> None:
    decoded = decoding_metrics(
        lined(trained, Policy((1,), (0.5,))), TokenBatches(text[:2], 1, 1), lambda name: Progress()
    )
    assert decoded is not None
    assert (decoded["prompt_tokens"], decoded["new_tokens"]) == (1, 1)
    assert {row["batch"] for row in decoded["rows"]} == {1}


def test_decoding_is_omitted_without_exits_or_text(tiny: Make, text: Tensor) -> None:
    test, seen = TokenBatches(text, 16, 4), Seen()
    assert decoding_metrics(lined(tiny(2), Policy()), test, seen.line) is None
    labels = tiny(2, num_labels=3)
    assert decoding_metrics(lined(labels, Policy((1,), (0.5,))), test, seen.line) is None
    assert seen.names == [], "no progress is shown for omitted work"


def test_a_run_records_decoding_speed(made: Path) -> None:
    decoded = json.loads((made / "summary.json").read_text())["generation"]
    assert {row["batch"] for row in decoded["rows"]} == {1, 8}
    assert all(row["layers_per_token"] == 3 for row in decoded["rows"] if row["way"] == "full")
    assert decoded["line"] == "phase 2"
    assert "Decoding speed" in (made / "report.html").read_text()
