"""A run folder is written completely or not at all, and damaged folders are reported by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from ease.errors import EaseError
from ease.interface import RopeScaling
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import route
from ease.runs.store import load_model, save_model
from ease.storage import run_folder, write_json


@pytest.fixture
def model() -> StandardTransformer:
    torch.manual_seed(0)
    model = StandardTransformer(40, 16, 3, 2)
    model.trained_exits = {1, 3}
    return model.eval()


@pytest.mark.parametrize(
    "options", [{"tie_embeddings": True}, {"qkv_bias": True, "qk_norm": True, "rope_scaling": RopeScaling(8, 1, 4, 16)}]
)
def test_a_model_comes_back_bit_identical_with_its_policy(tmp_path: Path, options: dict[str, Any]) -> None:
    model = StandardTransformer(40, 16, 3, 2, num_kv_heads=1, hidden_dim=24, **options).eval()
    model.trained_exits = {1, 3}
    save_model(tmp_path, model, Policy((1,), (0.03,)), run={"seed": 3})
    back, config = load_model(tmp_path)
    ids = torch.randint(0, 40, (2, 9))
    assert torch.equal(model(ids), back(ids))
    assert back.config == model.config
    assert back.policy == Policy((1,), (0.03,))
    assert torch.equal(route(model, ids, 1, 0.03).exits, route(back, ids).exits)
    assert back.trained_exits == {1, 3}
    assert config["run"] == {"seed": 3}


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), run_folder(out) as folder:  # noqa: PT012
        (folder / "metrics.jsonl").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with run_folder(out) as folder:
        (folder / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_existing_folder_is_refused_unless_it_is_a_run_to_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with run_folder(out) as folder:
        (folder / "config.json").write_text('{"format": 1, "model": {}}')
    with pytest.raises(EaseError, match="--overwrite"), run_folder(out):
        pass
    with pytest.raises(RuntimeError), run_folder(out, overwrite=True):
        raise RuntimeError
    kept = json.loads((out / "config.json").read_text())
    assert kept["format"] == 1, "a run that failed must not cost the one before"
    with run_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text('{"format": 2, "model": {}}')
    assert json.loads((out / "config.json").read_text())["format"] == 2
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").touch()
    with pytest.raises(EaseError, match="not a run folder"), run_folder(photos, overwrite=True):
        pass
    assert (photos / "a.jpg").exists()
    (photos / "config.json").write_text('{"theme": "dark"}')  # many things have a config.json
    with pytest.raises(EaseError, match="not a run folder"), run_folder(photos, overwrite=True):
        pass
    assert (photos / "a.jpg").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "not a run folder"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "damaged"),
        (lambda f: _edit(f, format=99), "format 99"),
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


def test_nan_is_written_as_null_and_infinity_stays(tmp_path: Path) -> None:
    """JSON has no NaN, and a threshold may be infinite."""
    write_json(tmp_path / "figures.json", {"auroc": {1: math.nan, 2: (0.5, math.nan)}, "threshold": math.inf})
    text = (tmp_path / "figures.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"auroc": {"1": None, "2": [0.5, None]}, "threshold": math.inf}
