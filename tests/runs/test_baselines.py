"""Baselines of a run: their depths, their training FLOPs, and the learning rate of the continued line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_runs import TINY, budget

from ease import EaseError, PhaseOptions, Policy, StandardTransformer, create_standard_config
from ease.cli.main import main
from ease.runs.baselines import continued_options
from ease.runs.config import RunConfig
from ease.runs.lines import StrategyLines, TrainedLine
from ease.strategies.single_phase import StandardConfig
from ease.training.phases import Data, Phase

Make = Callable[..., StandardTransformer]


class Done:
    """A strategy that has ended."""

    def next_phase(self, model: Any, data: Data) -> None:
        return None

    def policy(self) -> Policy:
        return Policy()


def trained(model: StandardTransformer, options: PhaseOptions, curve: list[dict[str, Any]]) -> StrategyLines:
    """Phase 1 with these options and this curve, followed by a phase 2 on a frozen trunk."""
    config = create_standard_config(2)
    phases = [Phase("phase 1", config, [], [], options), Phase("phase 2", config, [], [], PhaseOptions(), first=2)]
    lines = [TrainedLine(phase.name, model, curve=curve) for phase in phases]
    return StrategyLines(lines, phases, Done())


def test_the_continued_line_keeps_the_learning_rate_that_phase_1_ended_with(tiny: Make) -> None:
    options = PhaseOptions(lr=0.02, schedule="cosine", warmup=0.05, weight_decay=0.3)
    continued = continued_options(trained(tiny(2), options, [{"lr": 0.01}, {"lr": 0.001}]))
    assert {continued.lr * continued.lr_factor(share / 4) for share in range(5)} == {0.001}
    assert continued.weight_decay == 0.3


def test_a_shared_schedule_continues_where_phase_1_ended(tiny: Make) -> None:
    options = PhaseOptions(lr=0.02, schedule="cosine", span=(0.0, 0.4))
    continued = continued_options(trained(tiny(2), options, [{"lr": 0.01}]))
    assert continued.lr * continued.lr_factor(0.0) == pytest.approx(options.lr * options.lr_factor(1.0))
    assert continued.lr_factor(1.0) == pytest.approx(0.05)


def test_an_initial_model_has_no_rate_to_continue(tiny: Make) -> None:
    options = PhaseOptions(lr=0.02, schedule="cosine", span=(0.5, 1.0))
    config = create_standard_config(2)
    lines = [TrainedLine("initial model", tiny(1)), TrainedLine("phase 2", tiny(2))]
    continued = continued_options(StrategyLines(lines, [Phase("phase 2", config, [], [], options, first=2)], Done()))
    assert (continued.lr, continued.schedule, continued.span) == (0.02, "cosine", (0.0, 1.0))


def test_standard_models_of_several_depths_and_growth_have_equal_training_flops(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    args = ["run", "demo", "--data", str(text_file), "--out", str(tmp_path / "run"), *TINY, *budget("2e8")]
    assert main([*args, "--compare-layers", "1", "3"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = {line["name"]: line for line in summary["lines"]}
    assert list(lines) == [
        *("phase 1", "phase 2", "phase 1 continued"),
        *("standard, 1 layer", "standard, 3 layers", "growth, 1 to 3 layers"),
    ]
    assert [line["num_layers"] for line in lines.values()] == [1, 3, 1, 1, 3, 3]
    for name in list(lines)[2:]:
        assert lines[name]["train_flops"] == pytest.approx(lines["phase 2"]["train_flops"], rel=0.1), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {name: [row["lr"] for row in rows if (row["line"], row["event"]) == (name, "epoch")] for name in lines}
    assert rates["phase 1"][0] > rates["phase 1"][-1]
    assert set(rates["phase 1 continued"]) == {rates["phase 1"][-1]}
    assert rates["growth, 1 to 3 layers"][-1] == pytest.approx(rates["standard, 3 layers"][-1], rel=0.3)
    assert summary["config"]["compare_layers"] == [1, 3]


def test_a_depth_below_1_is_refused() -> None:
    with pytest.raises(EaseError, match="compare_layers must be at least 1, got 0"):
        RunConfig(StandardConfig(), compare_layers=(2, 0))
