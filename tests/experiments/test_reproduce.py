"""`ease reproduce`: the smallest tier end to end and after a kill, and its errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ease
from ease.cli import reproduce as cli_reproduce
from ease.cli.main import main
from experiments import reproduce
from experiments.analysis import tables
from experiments.analysis.fronts import Fronts
from experiments.harness.candidates import COMPARED
from experiments.harness.running import Settings
from experiments.tiers.scales import SCALES
from experiments.tiers.tier1_front import strategies


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The output of the smoke tier, which was killed once and resumed."""
    out = tmp_path_factory.mktemp("smoke")
    rows = out / "smoke" / "text.txt-front" / "rows.jsonl"
    args = ["reproduce", "smoke", "--data", str(text_file), "--seeds", "0", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(out / "cache"))
        process = subprocess.Popen([sys.executable, "-m", "ease", *args], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < until, "nothing was trained"
            time.sleep(0.05)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(map(running, workers)):
            assert time.monotonic() < until, "a worker outlived the command"
            time.sleep(0.05)
        before = rows.read_bytes()
        assert main(args) == 0
        assert rows.read_bytes().startswith(before)
    return out / "smoke"


def children(pid: int) -> list[int]:
    """The processes that it started, where the system lists them."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, tasks.read_text().split())) if tasks.exists() else []


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(smoke: Path) -> dict[str, Any]:
    return read(smoke / "text.txt-front")


def test_the_smallest_tier_resumes_after_a_kill_and_writes_every_table(smoke: Path) -> None:
    for name in ("text.txt-front", "text.txt-apart"):
        folder = smoke / name
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        keys = [row["key"] for row in rows]
        assert len(set(keys)) == len(keys), "every line once"
        assert not [row for row in rows if "failed" in row]
        assert {path.stem for path in (folder / "weights").iterdir()} == set(keys)
        made = read(folder)
        assert made["missing"] == []
        assert {entry["line"] for entry in made["entries"]} == {row["line"] for row in rows}
        for suffix in ("md", "tex", "svg", "pdf"):
            assert (folder / f"front.{suffix}").stat().st_size > 500
        budget = made["lab"]["budget"]
        for entry in made["entries"]:
            if entry["line"] not in made["partial"]:
                assert entry["flops"] == pytest.approx(budget, rel=0.2), entry["line"]
    assert (smoke / "text.txt-scales.md").read_text().count("needs 3 scales")
    assert {path.stem for path in (smoke / "text.txt-apart").glob("*.tex")} >= {"parts", "leak", "last-layer", "tokens"}


def test_a_second_run_trains_nothing_and_scores_no_test_token_again(
    smoke: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(smoke.parent / "cache"))
    before = {path: path.read_bytes() for path in smoke.rglob("*.*") if path.suffix in (".json", ".jsonl", ".md")}
    args = ["reproduce", "smoke", "--data", str(text_file), "--seeds", "0", "--out", str(smoke.parent)]
    assert main(args) == 0
    assert "test split" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_every_strategy_of_the_library_is_a_line(data: dict[str, Any]) -> None:
    kinds_ = {entry["strategy"]["kind"] for entry in data["entries"]}
    # A draft brick changes no quality, only the speed of decoding.
    trained = {config.__name__ for config in ease.STRATEGIES.values()} - {"BrickConfig"}
    assert kinds_ == trained | {"ClassifierExitsConfig"}


def test_with_a_classifier_exit_a_continuing_token_pays_no_head(data: dict[str, Any]) -> None:
    points = Fronts(data).points
    half = {name: next(p for p in points[name] if p.candidate.share == COMPARED) for name in points if "early" in name}
    head, classifier = half["early exit"], half["early exit, classifier exit"]
    full = Fronts(data).full_depth("early exit")
    assert full.metric("loss") == Fronts(data).full_depth("early exit, classifier exit").metric("loss"), "one model"
    lab = data["lab"]
    # A token that continues costs the layers above and, without a classifier, one head more. Half continue, up to ties.
    layers = full.mean("flops_per_token", "val") - Fronts(data).points["early exit"][0].mean("flops_per_token", "val")
    one_head = 2 * lab["dim"] * lab["vocab_size"]
    continuing, others = (1 - point.mean("shallow_ratio", "val") for point in (head, classifier))
    saved = head.mean("flops_per_token", "val") - classifier.mean("flops_per_token", "val")
    assert saved == pytest.approx(continuing * (layers + one_head) - others * layers, rel=0.25)


def test_the_in_sample_line_is_in_tables_of_its_own(smoke: Path) -> None:
    made = read(smoke / "text.txt-apart")
    (in_sample,) = [entry for entry in made["entries"] if entry["line"] == made["in_sample"]]
    assert in_sample["strategy"]["protocol"] == "original"
    assert all("hard_ppl" in point["val"] for point in in_sample["points"])
    by_name = {table.name: table for table in tables.all_tables(made)}
    assert {name for name, table in by_name.items() if made["in_sample"] in str(table.rows)} == {"leak", "costs"}


def test_a_spent_time_budget_starts_nothing_and_lists_what_is_missing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    messages: list[str] = []
    settings = Settings(tmp_path, (0,), minutes=1e-9, log=messages.append)
    missing = reproduce.reproduce("1", str(text_file), ("tiny",), settings)
    assert [name.split(": ", 1)[1] for name in missing] == list(strategies(SCALES["tiny"]))
    assert not list(tmp_path.rglob("rows.jsonl"))


@pytest.mark.parametrize("scale", ["tiny", "words"])
def test_splits_that_overlap_are_accepted_on_request(
    scale: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    settings = Settings(tmp_path / "out", (0,), minutes=1e-9, log=lambda _: None)
    with pytest.raises(ease.EaseError, match="--allow-overlap"):
        reproduce.reproduce("1", str(tmp_path), (scale,), settings)
    assert reproduce.reproduce("1", str(tmp_path), (scale,), settings, allow_overlap=True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["4"], "unknown tier '4': use smoke, 1, 2, 3"),
        (["1", "--seeds", "a,b"], "seeds must be integers"),
        (["1", "--seeds", "1,1"], "each once"),
        (["1", "--budget", "0"], "more than 0"),
        (["1", "--jobs", "0"], "at least one"),
        (["1", "--allow-overlap"], "--allow-overlap is for --data"),
        (["1", "--scales", "huge"], "unknown scale 'huge'"),
        (["1", "--scales", "tiny", "--data", "no/such/folder"], "no data"),
        (["smoke", "--device", "abacus"], "no device"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], says: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *args]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkout_there_is_one_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    installed = tmp_path / "lib" / "site-packages" / "ease" / "cli" / "reproduce.py"
    monkeypatch.setattr(cli_reproduce, "__file__", str(installed))
    assert main(["reproduce", "smoke"]) == 2
    assert "clone the repository" in capsys.readouterr().err
