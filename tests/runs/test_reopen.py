"""Finished runs: evaluated on data that chose nothing, calibrated, with a policy bound to its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ease
from ease import EaseError, Target, TokenBatches
from ease.cli.main import main
from ease.evaluation import decoding_speed
from ease.policy import Policy
from ease.runs import reopen
from ease.runs.store import load_model


@pytest.fixture
def cached(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, with its text in the cache, on a machine where routing takes half of the time."""
    monkeypatch.setenv("EASE_CACHE", str(made.parent / "cache"))
    monkeypatch.setattr(decoding_speed, "time_shares", lambda models, _: [0.5] * len(models))
    return Path(shutil.copytree(made, tmp_path / "run"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json on purpose, so that its checksum goes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "SHA256SUMS").unlink()


def test_a_run_keeps_its_policy(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_model(cached)[0].policy.thresholds
    assert main(["calibrate", str(cached), "--target-ratio", "0.3"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((cached / "policy.json").read_text())
    model, config = load_model(cached)
    assert model.policy.thresholds == tuple(record["policy"]["thresholds"]) != before
    assert config["calibration"]["target"] == {"kind": "target_ratio", "value": 0.3, "confidence": None}
    assert f"agreement {record['held_out']['agreement']:.2%}" in shown
    assert record["model"]["dim"] == 16
    assert record["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    # What eval then measures are the figures of the policy, on the same held-out half.
    evaluated = reopen.evaluate(cached, [])[0]
    assert {k: evaluated[k] for k in ("ppl", "acc", "tokens")} == {
        k: record["held_out"][k] for k in ("ppl", "acc", "tokens")
    }
    assert main(["eval", str(cached)]) == 0
    assert "half of the test split that was not used for calibration" in " ".join(capsys.readouterr().out.split())
    # Calibrating again takes the place of the old policy.
    measure = ["--measure", record["best"]["measure"]]
    assert main(["calibrate", str(cached), "--target-ratio", "0.5", *measure]) == 0
    assert load_model(cached)[0].policy.thresholds[0] > model.policy.thresholds[0]
    assert [p for p in cached.iterdir() if p.name.startswith(".")] == []


def test_no_token_both_chooses_and_is_reported(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, corpus, data = reopen.open_run(cached)
    # A text repeats itself, and random ids do not: here the content of a window tells where it comes from.
    ids = torch.randint(256, (3, 4000), dtype=torch.int32)
    corpus = replace(corpus, train=ids[0], val=ids[1], test=ids[2])
    monkeypatch.setattr(reopen, "open_run", lambda *_, **__: (model, config, corpus, data))
    used: list[list[Any]] = []
    monkeypatch.setattr(
        "ease.evaluation.policy_search.search", lambda m, t, e, n, *sets: used.extend(map(list, sets[:4])) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        reopen.calibrate(cached, Target("target_ratio", 0.5))
    windows = [{tuple(row) for x, _ in batches for row in x.tolist()} for batches in used]
    learns, proposes, decides, reports = windows

    def cut(ids: Tensor) -> set[tuple[int, ...]]:
        return {tuple(row) for x, _ in TokenBatches(ids, data.seq_len, 1) for row in x.tolist()}

    assert learns | proposes <= cut(corpus.val)
    assert learns
    assert not learns & proposes
    assert decides | reports <= cut(corpus.test)
    assert len(decides) == len(reports) == 64
    assert not decides & reports
    assert sum(map(len, used[2:])) == 16
    # The draw is the same every time, else a later evaluation would score what chose.
    again = reopen.calibration_halves(corpus.test, data)
    assert all(torch.equal(a[0], b[0]) for half, old in zip(again, used[2:]) for a, b in zip(half, old, strict=True))
    with pytest.raises(EaseError, match="calibration needs two"):
        reopen.calibration_halves(corpus.test[:150], data)


def test_a_policy_belongs_to_its_weights(cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert main(["calibrate", str(cached), "--target-ratio", "0.4"]) == 0
    assert main(["export", str(cached), str(tmp_path / "out")]) == 0
    record = json.loads((cached / "policy.json").read_text())
    own = json.loads((tmp_path / "out" / "ease" / "policy.json").read_text())
    assert own["calibration"] == record
    came = ease.from_pretrained(tmp_path / "out")
    assert list(came.policy.thresholds) == record["policy"]["thresholds"]
    with pytest.raises(EaseError, match="were calibrated on other weights"):
        ease.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)

    (cached / "SHA256SUMS").unlink()  # the library writes another header than `save_model`
    for folder, read in ((cached, load_model), (tmp_path / "out", ease.from_pretrained)):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "ffn_norm" in name or "post_attention" in name)
        kept, changed = weights[name][0].item(), weights[name].clone()
        changed[0] += 1e-6
        save_file(weights | {name: changed}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(EaseError, match=rf"policy.json were .* \(fingerprint {record['fingerprint'][:12]}"):
            read(folder)  # type: ignore[operator]
        changed[0] = kept
        save_file(weights | {name: changed}, folder / "model.safetensors", {"format": "pt"})
        read(folder)  # type: ignore[operator]


def test_a_policy_that_saves_no_time_is_not_stored_and_full_depth_stays(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_speed, "time_shares", lambda models, _: [1.25] * len(models))
    assert main(["calibrate", str(cached), "--target-ratio", "0.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Full depth stays: no policy with target ratio 0.5 saves both FLOPs and time, and the best, " in said
    assert "and 125% of the time of full depth." in said
    model, config = load_model(cached)
    assert model.policy == Policy()
    assert not config["calibration"]["installed"]
    assert reopen.evaluate(cached, [])[0]["flops_share"] == 1


def test_the_classifier_of_a_stored_policy_comes_with_it_and_goes_with_it(cached: Path, tmp_path: Path) -> None:
    target = Target("target_ratio", 0.5)
    record = reopen.calibrate(cached, target, measure="gain")
    model, _ = load_model(cached)
    assert model.policy.confidence == "classifier"
    assert model.config.classifier_exits == model.policy.exits == record["policy"]["exits"]
    assert reopen.evaluate(cached, [])[0]["ppl"] == record["held_out"]["ppl"]
    reopen.export(cached, tmp_path / "out")
    assert ease.from_pretrained(tmp_path / "out").policy == model.policy
    reopen.calibrate(cached, target, measure="margin")
    assert not load_model(cached)[0].config.classifier_exits
    record = reopen.calibrate(cached, target, measure="gain")
    record["classifiers"] = {"1": [0.0]}
    (cached / "policy.json").write_text(json.dumps(record))
    with pytest.raises(EaseError, match=r"policy.json is damaged"):
        load_model(cached)


def test_a_failed_calibration_keeps_the_old_policy(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["calibrate", str(cached), "--min-agreement", "0.8"]) == 0
    before = (cached / "policy.json").read_bytes()
    capsys.readouterr()
    for args, says in (
        (["--compute-budget", "0.01"], "the best on these 64 sequences is 0."),
        ([], "give exactly one target: --min-agreement"),
        (["--target-ratio", "0.5", "--min-agreement", "0.9"], "give exactly one target"),
        (["--target-ratio", "2"], "target_ratio must lie in [0, 1], got 2"),
        (["--target-ratio", "0.5", "--exits", "1,9"], "has no trained exit 9: choose among 1"),
        (["--target-ratio", "0.5", "--exits", "a"], "--exits must name layers, such as 4,8, got a"),
        (["--target-ratio", "0.5", "--measure", "luck"], "no measure of confidence 'luck': use max-probability"),
        (["--target-ratio", "0.5", "--measure", "patience"], "has no policy with the measure patience"),
    ):
        assert main(["calibrate", str(cached), *args]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("ease: ") == 1
        assert "Traceback" not in error

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ease.runs.store.write_json", full)
    assert main(["calibrate", str(cached), "--target-ratio", "0.5"]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert (cached / "policy.json").read_bytes() == before
    for damaged in ("{", "[]", '{"format": 1}', '{"format": 1, "policy": {"exits": [1], "measure": 2}}'):
        (cached / "policy.json").write_text(damaged)
        assert main(["eval", str(cached)]) == 2
        assert "policy.json is damaged" in capsys.readouterr().err
    (cached / "policy.json").write_bytes(before.replace(b'"format": 1', b'"format": 9'))
    assert main(["eval", str(cached)]) == 2
    assert "has format 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ({}, ["eval"]),
        ({"data": {}}, ["export", "--overwrite"]),
        ({"data": 3}, ["export", "--overwrite"]),
        ({"data": {"seq_len": "a"}}, ["eval"]),
    ],
)
def test_a_run_without_data_configuration_is_reported(
    cached: Path, run: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(cached, run=run)
    target = [str(tmp_path / "out")] if command[0] == "export" else []
    assert main([command[0], str(cached), *target, *command[1:]]) == 2
    assert "does not record its data configuration" in capsys.readouterr().err


def test_a_run_without_exits_is_reported(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, *rest = reopen.open_run(cached)
    model.policy, model.trained_exits = Policy(), {model.num_layers}
    monkeypatch.setattr(reopen, "open_run", lambda folder, **_: (model, config, *rest))
    with pytest.raises(EaseError, match="has no exits to calibrate: tune it first"):
        reopen.calibrate(cached, Target("target_ratio", 0.5))


def test_without_a_policy_the_trained_exits_below_the_last_layer_route(cached: Path) -> None:
    edit_config(cached, trained_exits=[1, 2], policy={"exits": [], "thresholds": []})
    assert load_model(cached)[0].early_exits == (1, 2)
    assert reopen.evaluate(cached, [0.5])[0]["thresholds"] == (0.5, 0.5)
    record = reopen.calibrate(cached, Target("target_ratio", 0.5))
    assert {tuple(row["exits"]) for row in record["table"]} == {(1,), (2,), (1, 2)}
    record = reopen.calibrate(cached, Target("target_ratio", 0.5), exits=[2], measure="margin")
    assert [(row["exits"], row["measure"]) for row in record["table"]] == [([2], "margin")]


def test_eval_scores_the_test_split_at_thresholds(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = reopen.evaluate(cached, [])[0]
    summary = json.loads((cached / "summary.json").read_text())
    phase2 = next(line for line in summary["lines"] if line["name"] == "phase 2")
    assert own["ppl"] == phase2["test"]["ppl"], "what eval says is what the report says"
    assert main(["eval", str(cached), "--threshold", "0.2", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "0.2" in printed
    assert "test split" in printed
