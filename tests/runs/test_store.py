"""A run folder is written completely or not at all, and damaged folders are reported by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from ease.cli.main import main
from ease.errors import EaseError
from ease.files import write_checksums
from ease.model_config import RopeScaling
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import route
from ease.runs.store import can_resume, load_model, save_calibration, save_model


@pytest.fixture
def model() -> StandardTransformer:
    torch.manual_seed(0)
    model = StandardTransformer(40, 16, 3, 2)
    model.trained_exits = {1, 3}
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": True, "draft_brick": True, "draft_vocabulary": 7},
        {"qkv_bias": True, "qk_norm": True, "rope_scaling": RopeScaling(8, 1, 4, 16)},
    ],
)
def test_a_model_comes_back_bit_identical_with_its_policy(tmp_path: Path, options: dict[str, Any]) -> None:
    model = StandardTransformer(40, 16, 3, 2, num_kv_heads=1, hidden_dim=24, **options).eval()
    model.trained_exits = {1, 3}
    save_model(tmp_path, model, Policy((1,), (0.03,)), run={"seed": 3})
    back, config = load_model(tmp_path)
    ids = torch.randint(0, 40, (2, 9))
    assert torch.equal(model(ids), back(ids))
    if model.draft_brick is not None:
        states = torch.randn(2, 9, 16)
        assert torch.equal(model.draft_logits(model.draft(states, ids)), back.draft_logits(back.draft(states, ids)))
    assert back.config == model.config
    assert back.policy == Policy((1,), (0.03,))
    assert torch.equal(route(model, ids, 1, 0.03).exits, route(back, ids).exits)
    assert back.trained_exits == {1, 3}
    assert config["run"] == {"seed": 3}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "not a run folder"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "damaged"),
        (lambda f: _edit(f, format=99), "format 99 and .* reads 1: use the version that wrote it$"),
        (lambda f: _edit(f, format=99, ease_version="9.1"), "use the version that wrote it, 9.1$"),
        (
            lambda f: _edit(f, ease_version="9.1", model={"dim": 8, "width": 3}),
            "'width'; ease 9.1 wrote it and this is",
        ),
        (lambda f: _edit(f, model_type="llama"), "is a checkpoint, not a run: `ease tune`"),
        (lambda f: _edit(f, policy={"exits": [1], "thresholds": [0.5], "of_tomorrow": 1}), "damaged"),
        (lambda f: _edit(f, run=3), "damaged"),
        (lambda f: _edit(f, data={"eos": "x"}), "damaged"),
        (lambda f: _edit(f, model={"dim": 8}), "damaged"),
    ],
)
def test_a_damaged_run_is_reported_in_one_sentence(tmp_path: Path, model, damage, says: str) -> None:
    save_model(tmp_path, model, Policy())
    damage(tmp_path)
    with pytest.raises(EaseError, match=says) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_older_version_is_loaded_watched_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is as the package wrote it on 2026-11-24: no checksums, no run.json, rows of epochs only."""
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "old_run", run)
    model, config = load_model(run)
    assert (config["ease_version"], model.policy.exits, model.trained_exits) == ("0.1.0", (1,), {1, 3})
    assert route(model, torch.arange(8)[None]).exits.shape == (1, 8)
    assert main(["watch", str(run), "--once"]) == 0
    assert "phase 1 continued" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert "phase 1 continued" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "policy.json"])
def test_a_file_with_another_checksum_is_refused(name: str, tmp_path: Path, model: StandardTransformer) -> None:
    save_model(tmp_path, model, Policy((1,), (0.5,)))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checksums(tmp_path, ("config.json", "model.safetensors", "tokenizer.json"))
    save_calibration(tmp_path, model, {"policy": asdict(Policy((1,), (0.5,)))})
    save_calibration(tmp_path, model, {"policy": asdict(Policy((1,), (0.75,)))})
    assert load_model(tmp_path)[0].policy.thresholds == (0.75,)
    file = tmp_path / name
    data = bytearray(file.read_bytes())
    if name == "model.safetensors":
        data[-1] ^= 1
    file.write_bytes(data.replace(b"0.75", b"0.25").replace(b"0.5", b"0.6").replace(b"{}", b"[]"))
    says = "were calibrated on other weights" if name == "model.safetensors" else rf"{name} is damaged \(its checksum"
    with pytest.raises(EaseError, match=says):
        load_model(tmp_path)


def test_a_damaged_plan_of_an_unfinished_run_is_named_and_discarded_on_request(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert not can_resume(tmp_path, {"seed": 1}, overwrite=False)
    (tmp_path / "checkpoints" / "phase-1.parts-1").mkdir()
    (tmp_path / "checkpoints" / "phase-1.parts-1" / "shard.safetensors").touch()
    assert not can_resume(tmp_path, {"seed": 1}, overwrite=False), "no file names these parts"
    (tmp_path / "checkpoints" / "phase-1.safetensors").touch()
    assert can_resume(tmp_path, {"seed": 1}, overwrite=False)
    (tmp_path / "checkpoints" / "plan.json").write_text("{")
    with pytest.raises(EaseError, match=r"plan.json is damaged .*--overwrite"):
        can_resume(tmp_path, {"seed": 1}, overwrite=False)
    assert not can_resume(tmp_path, {"seed": 1}, overwrite=True)


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("policy", [Policy.patient((1, 2), 2), Policy((1,), (0.5,), "margin", half_life=8.0)])
def test_a_policy_comes_back_with_its_measure(policy: Policy, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(3)
    save_model(tmp_path, model, policy)
    assert load_model(tmp_path)[0].policy == policy
    model.policy = policy
    ease.save_pretrained(model, tmp_path / "export")
    assert ease.from_pretrained(tmp_path / "export").policy == policy
