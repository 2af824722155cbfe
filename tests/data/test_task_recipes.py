"""The recipes of both tasks, from JSONL files to a scored run."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ease import EaseError
from ease.cli.main import main
from ease.data.batches import ExampleBatches
from ease.data.tasks import load_classification
from ease.data.tokenizers import EOS, load_tokenizer
from ease.evaluation.tasks import classification_metrics
from ease.runs.store import load_model

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


def recipe(name: str) -> Any:
    """The module of a recipe."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "tasks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(write: Write, records: list[dict[str, Any]]) -> Path:
    """Writes the records as three splits; validation and test get a tenth each."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    records, tenth = [records[i] for i in order], len(records) // 10
    return write(train=records[2 * tenth :], valid=records[:tenth], test=records[tenth : 2 * tenth])


def test_the_classification_recipe(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last adjective of a name decides the label.
    names = [f"n{i}" for i in range(8)]
    adjectives = {"good": ("kind", "wise", "brave"), "bad": ("mean", "rude", "lazy")}
    records: list[dict[str, Any]] = []
    for label, words in adjectives.items():
        other = [w for ws in adjectives.values() for w in ws if w not in words]
        records += [{"text": f"{n} is {w} {m}", "label": label} for n in names for m in names for w in words]
        records += [
            {"text": f"{n} was {o} but now {n} is {w}", "label": label} for n in names for w in words for o in other
        ]
    folder, out = split(write, records), tmp_path / "run"
    options = {"num_layers": 3, "dim": 32, "tokenizer": "word", "lr": 3e-3, "max_epochs": 4, "device": "cpu"}
    summary = recipe("classify").main(folder, out, **options)
    test = summary["test"]
    assert test["no routing"]["acc"] > 0.95
    assert test["no routing"]["f1"] > 0.95
    assert test["confidence"]["acc"] > 0.95
    assert test["confidence"]["shallow_ratio"] > 0.5
    assert test["confidence"]["flops_per_token"] < 0.8 * test["no routing"]["flops_per_token"]
    assert set(test["patience"]["exit_shares"]) == {2, 3}
    assert json.loads((out / "summary.json").read_text())["test"]["confidence"]["acc"] == test["confidence"]["acc"]

    model, config = load_model(out)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    task = load_classification(folder, tokenizer, eos=tokenizer.token_to_id(EOS), labels=config["labels"])
    again = classification_metrics(model, ExampleBatches(task.test, 32), model.policy)
    assert again["f1"] == test["confidence"]["f1"]
    assert again["exit_shares"] == test["confidence"]["exit_shares"]
    with pytest.raises(EaseError, match="exists already"):
        recipe("classify").main(folder, out)
    with pytest.raises(EaseError, match="seed must lie in"):
        recipe("classify").main(folder, tmp_path / "other", seed=-1, tokenizer="word")
    for command in (["generate", str(out), "--prompt", "n1"], ["export", str(out), str(tmp_path / "out")]):
        assert main(command) == 2
        assert "classif" in capsys.readouterr().err


def test_the_completion_recipe(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    asks = [
        "what is the capital of",
        "name the capital of",
        "which city rules",
        "i forgot the capital of",
        "capital of",
    ]
    asks += [f"{ask} my friend" for ask in asks]
    records = [
        {"prompt": f"{ask} land{i}", "completion": f"city{i} in the north" if i % 2 else f"old town of city{i}"}
        for ask in asks
        for i in range(20)
    ]
    options = {"num_layers": 3, "dim": 32, "tokenizer": "word", "lr": 5e-3, "max_epochs": 12, "device": "cpu"}
    test = recipe("complete").main(split(write, records), tmp_path / "run", max_new_tokens=8, **options)["test"]
    assert test["full"]["rouge_l"] > 0.95
    assert test["full"]["shallow_ratio"] == 0
    assert test["routed"]["rouge_l"] > 0.95
    assert test["routed"]["shallow_ratio"] > 0.3
    assert load_model(tmp_path / "run")[0].num_layers == 3
    assert main(["generate", str(tmp_path / "run"), "--prompt", "capital of land3", "--max-new-tokens", "8"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["classify", "complete"])
def test_a_recipe_reports_bad_input_in_one_sentence(name: str, tmp_path: Path) -> None:
    script = ROOT / "recipes" / "tasks" / f"{name}.py"
    command = [sys.executable, str(script), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"ease: .* has no train.jsonl: put .* there\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
