"""Trackers: real event files of TensorBoard, and what Weights & Biases and trackio are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ease import EaseError
from ease.cli.main import main
from ease.runs.tracking import TRACKERS, TrackedRun, check_trackers


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun("demo", "0123abcd", tmp_path, {"seed": 0})


# The package imports what Python deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_a_run_per_line_that_goes_on_after_a_kill(run: TrackedRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (1, 10, 20)), (15, (20, 30))):
        tracker = TRACKERS["tensorboard"](run)
        tracker.start("phase 1: a/b", resumed)
        for step in steps:
            tracker.log(step, {"loss": step + resumed, "exit_losses/2": 0.5})
        tracker.start("phase 2", 0)
        tracker.log(1, {"loss": 7.0})
        tracker.finish()
    folders = sorted(path.name for path in (run.folder / "tensorboard").iterdir())
    assert folders == ["phase 1- a-b", "phase 2"]
    read = EventAccumulator(str(run.folder / "tensorboard" / folders[0]))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "exit_losses/2"}
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1), (10, 10), (20, 35), (30, 45)]


class Service:
    """A fake of the libraries: `init` gives a run with `log` and `finish`."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.errors = SimpleNamespace(Error=ConnectionError)

    def init(self, **options: Any) -> Any:
        told: dict[str, Any] = {"options": options, "rows": [], "finished": 0}
        self.runs.append(told)

        def finish() -> None:
            told["finished"] += 1

        return SimpleNamespace(log=lambda values, step: told["rows"].append((step, values)), finish=finish)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_a_run_per_line_in_the_group_of_the_run(
    name: str, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    tracker = TRACKERS[name](run)
    tracker.finish()
    for line in ("phase 1", "standard, 4 layers"):
        tracker.start(line, 0)
        tracker.log(10, {"loss": 2.0})
    tracker.finish()
    tracker.finish()
    assert [(told["rows"], told["finished"]) for told in service.runs] == [([(10, {"loss": 2.0})], 1)] * 2
    for told in service.runs:
        options = told["options"]
        assert (options["project"], options["group"], options["resume"]) == ("ease", "demo", "allow")
        assert options["config"] == {"seed": 0}
    names = [told["options"]["name"] for told in service.runs]
    assert [part in name for part, name in zip(("phase 1", "standard, 4 layers"), names)] == [True, True]
    if name == "wandb":
        assert service.runs[1]["options"]["id"] == "0123abcd-standard-4-layers"
    else:
        assert all("0123abcd" in name for name in names), "trackio resumes by name"


def test_a_service_that_does_not_start_is_one_sentence(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(service, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("no API key\nmore")))
    with pytest.raises(EaseError, match=r"wandb does not start \(no API key\): run `wandb login`, or set WANDB_MODE"):
        TRACKERS["wandb"](run).start("phase 1", 0)


def test_unknown_and_missing_trackers_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EaseError, match="track must be tensorboard or wandb or trackio, got 'mlflow'"):
        check_trackers(["mlflow"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["run", "demo", "--out", str(tmp_path / "run"), "--track", "trackio"]) == 2
    assert "this needs the package trackio: pip install -e '.[track]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
