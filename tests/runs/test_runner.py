"""Execution of a run: its folder, its lines, the model it starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_runs import COMPARE, SHORT, TINY, budget

import ease
from ease.cli.main import main
from ease.runs.store import load_model


def test_a_run_is_a_folder_without_pickles(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {
        *("config.json", "run.json", "metrics.jsonl", "summary.json", "model.safetensors", "tokenizer.json"),
        *("explorer.json", "report.html", "SHA256SUMS"),
    }
    assert [p for p in made.parent.iterdir() if p.name.startswith(".")] == []


def test_the_summary_has_the_lines_of_a_fair_comparison(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    lines = {line["name"]: line for line in summary["lines"]}
    assert list(lines) == [
        "phase 1",
        "phase 2",
        "phase 1 continued",
        "standard, 3 layers",
        "deep-supervision, 3 layers",
    ]
    for name in list(lines)[2:]:
        # A budget ends on a whole step and its validation pass: at this size, a few hundredths of it.
        assert lines[name]["train_flops"] == pytest.approx(lines["phase 2"]["train_flops"], rel=0.1), name
    for line in lines.values():
        assert {"ppl", "acc", "hard_ppl", "compute_cost", "flops_per_token", "seconds"} <= set(line["test"])
        assert line["train_flops"] == pytest.approx(sum(line["flops_by"].values()))
    assert lines["phase 2"]["curve"][0] == lines["phase 1"]["curve"][0]
    assert summary["hard"]["train_ratio"] == pytest.approx(0.5, abs=0.01)
    assert summary["hard"]["fixed_by"] == "phase 1's final model"
    joint = lines["deep-supervision, 3 layers"]
    assert joint["val"]["shallow_ratio"] == pytest.approx(lines["phase 2"]["val"]["shallow_ratio"], abs=0.02)


def test_several_baselines_may_be_given_at_once(text_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    args = ["run", "demo", "--data", str(text_file), "--out", str(tmp_path / "out"), *TINY, *budget("2e8")]
    assert main([*args, "--compare", "full-depth", "continued"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [line["name"] for line in summary["lines"]] == [
        *("phase 1", "phase 2", "phase 2, no routing", "phase 1 continued")
    ]


def test_a_run_without_exits_times_no_decoding(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    limits = ["--strategy.num-layers", "2", "--strategy.max-flops", "6e7", "--strategy.max-epochs", "1"]
    assert main(["run", "standard", "--data", str(text_file), "--out", str(out), *TINY, *limits]) == 0
    shown = capsys.readouterr()
    assert "decoding" not in shown.out + shown.err
    assert json.loads((out / "summary.json").read_text())["generation"] is None
    assert '"generation":null' in (out / "report.html").read_text()


def test_metrics_are_rows_of_steps_and_of_epochs(made: Path) -> None:
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    for event, loss in (("epoch", "val_loss"), ("step", "loss")):
        found = [row for row in rows if row["event"] == event]
        assert {"phase 1", "phase 2", "phase 1 continued"} <= {row["line"] for row in found}
        assert all(row[loss] > 0 for row in found)
    routed = [row for row in rows if (row["line"], row["event"]) == ("phase 2", "epoch")]
    assert all(sum(row["exit_shares"].values()) == pytest.approx(1) for row in routed)


def test_a_run_records_its_start(made: Path) -> None:
    record = json.loads((made / "run.json").read_text())
    assert record["config"] == json.loads((made / "summary.json").read_text())["config"]
    (start,) = record["starts"]
    assert (start["ease_version"], start["machine"]["torch"]) == (ease.__version__, torch.__version__)
    assert set(start) == {"time", "ease_version", "git", "machine"}


def test_ashem_grows_on_a_checkpoint(made: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out, plan = tmp_path / "grown", ["--strategy.pretrained", "--strategy.phase1-layers", "3"]
    limits = [
        "--strategy.phase2-layers",
        "4",
        "--strategy.phase2-max-flops",
        "3e8",
        "--compare",
        "continued",
        "standard",
    ]
    args = ["run", "ashem", "--start", str(made), "--data", str(text_file), "--out", str(out), *SHORT, *plan, *limits]
    assert main(args) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [line["name"] for line in summary["lines"]] == [
        *("initial model", "phase 2", "initial model continued", "standard, 4 layers")
    ]
    assert summary["hard"]["fixed_by"] == "initial model's final model"
    came, grown = load_model(made)[0], load_model(out)[0]
    assert grown.num_layers == 4
    assert all(torch.equal(p, grown.get_parameter(n)) for n, p in came.named_parameters())


def test_phase_1_determines_the_hard_set_after_an_initial_model(made, text_file, tmp_path: Path, monkeypatch) -> None:
    """The hard set and the continued line belong to phase 1, which phase 2 was built on, not to the initial model."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out, plan = tmp_path / "grown", ["--strategy.phase1-layers", "3", "--strategy.phase1-max-flops", "6e7"]
    limits = ["--strategy.phase2-layers", "4", "--strategy.phase2-max-flops", "3e8", "--compare", "continued"]
    args = ["run", "ashem", "--start", str(made), "--data", str(text_file), "--out", str(out), *SHORT, *plan, *limits]
    assert main(args) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [line["name"] for line in summary["lines"]] == ["initial model", "phase 1", "phase 2", "phase 1 continued"]
    assert summary["hard"]["fixed_by"] == "phase 1's final model"
    assert 0.3 < summary["hard"]["test_ratio"] < 0.7


def test_a_run_has_the_policy_that_its_strategy_ends_with(text_file: Path, tmp_path: Path, monkeypatch) -> None:
    """Open growth determines its threshold after training, and the configured share of tokens continues."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    plan = ["--strategy.hard-ratio", "0.3", "--strategy.max-flops", "6e8", "--compare", "full-depth"]
    assert main(["run", "open-growth", "--data", str(text_file), "--out", str(tmp_path / "run"), *TINY, *plan]) == 0
    lines = json.loads((tmp_path / "run" / "summary.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["phase 1", "phase 2", "phase 2, no routing"]
    assert lines[1]["val"]["exit_shares"]["4"] == pytest.approx(0.3, abs=0.01)
    assert load_model(tmp_path / "run")[1]["policy"]["thresholds"] == lines[1]["policy"]["thresholds"]


def test_baselines_of_phases_that_share_a_schedule_complete_it(text_file: Path, tmp_path: Path, monkeypatch) -> None:
    """And the report sweeps the confidence measure of the policy."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    args = ["run", "gated", "--data", str(text_file), "--out", str(tmp_path / "run"), *TINY, *COMPARE]
    assert main([*args, "--strategy.max-flops", "4e8"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = {row["line"]: row["lr"] for row in rows if row["event"] == "epoch"}
    assert set(ends) == {"phase 1", "phase 2", "phase 1 continued", "standard, 4 layers", "deep-supervision, 4 layers"}
    last = ends.pop("phase 2")
    assert ends.pop("phase 1") > 5 * last
    assert list(ends.values()) == pytest.approx([last] * 3, rel=0.2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    sent = {point["shallow_ratio"]: point["flops_per_token"] for point in summary["sweep"]["points"]}
    policy = next(line for line in summary["lines"] if line["name"] == "phase 2")
    assert policy["policy"]["confidence"] == "classifier"
    nearest = min(sent, key=lambda share: abs(share - policy["test"]["shallow_ratio"]))
    assert sent[nearest] == pytest.approx(policy["test"]["flops_per_token"], rel=0.05)


def test_a_standard_baseline_is_trained_unless_it_equals_the_strategy(
    text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    for name, lines in (("discriminative", {"discriminative", "standard, 4 layers"}), ("standard", {"training"})):
        args = ["run", name, "--data", str(text_file), "--out", str(tmp_path / name), *TINY, "--compare", "standard"]
        assert main([*args, "--strategy.max-flops", "3e7"]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert {line["name"] for line in summary["lines"]} == lines


def test_deep_supervision_differs_from_a_strategy_with_another_objective(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal weights at equal exits are another training if the objective differs."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    args = ["run", "early-exit", "--data", str(text_file), "--out", str(tmp_path / "run"), *TINY]
    own = ["--strategy.num-layers", "2", "--strategy.exit-layer", "1", "--strategy.exit-weight", "1"]
    own += ["--strategy.routing-threshold", "0.5", "--strategy.objective", "distillation"]
    assert main([*args, *own, "--strategy.max-flops", "3e7", "--compare", "deep-supervision"]) == 0
    lines = json.loads((tmp_path / "run" / "summary.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["early exit", "deep-supervision, 2 layers"]


def test_a_text_that_is_too_short_is_reported_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one line\n" * 30)
    assert main(["run", "demo", "--data", str(short), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "use more text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
