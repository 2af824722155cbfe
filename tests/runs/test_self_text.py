"""Training text that the model makes itself: from prompts of the split, the same after a kill, and made once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_runs import SHORT

from ease import EaseError
from ease.cli.main import main
from ease.progress import Progress
from ease.runs import self_text as module
from ease.runs.config import DataConfig, RunConfig
from ease.runs.reopen import evaluate, load_start
from ease.runs.self_text import self_text
from ease.runs.store import load_model
from ease.storage import output_folder
from ease.strategies import BrickConfig

SIZES = {"seq_len": 16, "batch_size": 2, "max_tokens": 500}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{i}: the licence grants\n" for i in range(40)))
    return file


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "ROWS", 4)


def texts(folder: Path) -> dict[str, list[Any]]:
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(folder.glob("*.jsonl"))
    }


def test_each_split_continues_its_own_prompts(made: Path, prompts: Path, tmp_path: Path) -> None:
    start = load_start(str(made))
    data = DataConfig(source=f"self:{prompts}", **SIZES)
    out = self_text(data, start, tmp_path, seed=0, progress=Progress())
    found = texts(out)
    assert {
        name: sum(record["tokens"] for record in records) >= size
        for (name, records), size in zip(found.items(), (50, 500, 50))
    } == {"test": True, "train": True, "valid": True}
    begins = {name: {record["text"][:2] for record in records} for name, records in found.items()}
    assert begins["train"] <= {f"{i}:"[:2] for i in range(33)}
    assert not begins["valid"] & begins["test"]
    assert all(record["tokens"] <= 16 for records in found.values() for record in records)
    first = found["train"][0]
    assert len({record["text"] for record in found["train"]}) > 20, "sampled, so that a prompt gives several texts"
    again = self_text(data, start, tmp_path, seed=0, progress=Progress())
    assert texts(again)["train"][0] == first
    other = self_text(data, start, tmp_path, seed=1, progress=Progress())
    assert texts(other)["train"][0] != first, "made anew, since the plan is another"


def test_text_that_was_interrupted_ends_the_same_and_no_batch_is_made_twice(
    made: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, data = load_start(str(made)), DataConfig(source=f"self:{prompts}", **SIZES)
    whole = self_text(data, start, tmp_path, seed=0, progress=Progress())
    calls, make = [], module.continue_all

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(module, "continue_all", killed)
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "run", resumable=True) as folder:
        self_text(data, start, folder, seed=0, progress=Progress())
    file = tmp_path / ".run.partial/self/train.jsonl"
    file.write_text(file.read_text() + '{"text": "cut off by a ki')
    with output_folder(tmp_path / "run", resumable=True) as folder:
        self_text(data, start, folder, seed=0, progress=Progress())
    assert texts(tmp_path / "run/self") == texts(whole)
    batches = sum(len(records) for records in texts(whole).values()) // 4
    assert len(calls) == batches + 1


@pytest.mark.parametrize("adapter", ["none", "brick"])
def test_tuning_on_the_model_s_own_text(adapter: str, made: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    options = [*SHORT, "--data.max-tokens", "1500", "--data.temperature", "0.8", "--max-epochs", "1"]
    options += ["--adapter", adapter, *(["--exits", "1"] if adapter == "none" else [])]
    assert main(["tune", str(made), "--data", f"self:{prompts}", *options, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["name"] == "self:prompts.txt"
    assert set(texts(out / "self")) == {"train", "valid", "test"}
    moved = out.rename(tmp_path / "moved")
    assert evaluate(moved, [])[0]["ppl"] == pytest.approx(summary["lines"][-1]["test"]["ppl"])
    assert load_model(moved)[0].config.draft_brick == (adapter == "brick")


def test_other_sources_are_cut_into_prompts(made: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} " + "abcdefgh" * 20)
    start = load_start(str(made))
    found = module.read_prompts(str(tmp_path / "texts"), start.tokenizer, 8, False)
    ids = start.tokenizer.encode("valid " + "abcdefgh" * 20).ids
    assert found["val"] == [ids[at : at + 8] for at in range(0, len(ids), 16)]


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda p: RunConfig(BrickConfig(), data=DataConfig(source=f"self:{p}")), "name one with --start"),
        (lambda p: DataConfig(temperature=1.0), "temperature applies to text that the model makes"),
        (lambda p: DataConfig(source=f"self:{p}", temperature=-1.0), "temperature must"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(make: Any, fix: str, prompts: Path) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        make(prompts)
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_suffice_are_named(made: Path, prompts: Path, tmp_path: Path) -> None:
    start = load_start(str(made))
    data = DataConfig(source=f"self:{prompts}", **SIZES | {"max_tokens": 4000}, temperature=0.0)
    with pytest.raises(EaseError, match="33 prompts for train, which at temperature 0 give one text each"):
        self_text(data, start, tmp_path, seed=0, progress=Progress())
    with pytest.raises(EaseError, match="no data at 'nowhere'"):
        self_text(DataConfig(source="self:nowhere"), start, tmp_path, seed=0, progress=Progress())
    torch.manual_seed(0)
