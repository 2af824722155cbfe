"""metrics.jsonl: what its rows say, and that a resumed run leaves no row twice, missing or half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ease.progress import Progress, StepMetrics
from ease.runs.log import MetricsFile, MetricsLog, read_rows


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Tracker:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def start(self, line: str, step: int) -> None:
        self.events.append((line, step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.events.append((step, dict(values)))

    def finish(self) -> None:
        self.events.append("finished")


def metrics(step: int) -> StepMetrics:
    return StepMetrics(1 + (step - 1) // 5, step, 2.0, {1: 2.5, 3: 1.5}, 1e-3, 0.7, 64, 1e6 * step)


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "step": 5 * number, "val_loss": 1.0, "flops": 5e6 * number + 1e5, "seconds": 1.0}


def train(
    path: Path, lines: list[str], *, killed: tuple[str, int] | None = None, places: Mapping[str, int] = {}
) -> None:
    """Writes what a run of three epochs of 5 steps per line writes, from its `places` on, until it is killed."""
    file = MetricsFile(path)
    for line in lines:
        log, place = MetricsLog(file, line, Progress(), every=2), places.get(line, 0)
        for number in range(1, place // 5 + 1):
            log.epoch(epoch(number))
        if 0 < place < 15:
            log.resumed(place // 5 + 1, place)
        for step in range(place + 1, 16):
            log.step(step / 15, metrics(step))
            if (line, step) == killed:
                return
            if step % 5 == 0:
                log.epoch(epoch(step // 5))


def told(path: Path) -> list[Any]:
    return [(row["line"], row["event"], row["step"]) for row, _ in read_rows(path)]


LINES = ["phase 1", "phase 2"]


@pytest.fixture
def whole(tmp_path: Path) -> list[Any]:
    train(tmp_path / "whole.jsonl", LINES)
    return told(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("half", [b"", b'{"event": "step", "li', b"\0\0\0\n"])
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(("killed", "saved"), [(1, 0), (8, 7), (9, 5), (12, 6), (14, 0)])
def test_a_resumed_run_has_every_row_once(
    line: str, killed: int, saved: int, half: bytes, whole: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path, LINES, killed=(line, killed))
    path.write_bytes(path.read_bytes() + half)
    train(path, LINES, places={"phase 1": 15 if line == "phase 2" else saved, "phase 2": saved * (line == "phase 2")})
    assert told(path) == whole
    assert [json.loads(row)["line"] for row in path.read_text().splitlines()] == [row[0] for row in whole]


def test_rows_that_are_gone_are_written_again_from_the_epochs(whole: list[Any], tmp_path: Path) -> None:
    train(tmp_path / "metrics.jsonl", LINES, places={"phase 1": 15, "phase 2": 7})
    after = whole.index(("phase 2", "step", 8))
    assert told(tmp_path / "metrics.jsonl") == [
        *(row for row in whole[:after] if row[1] == "epoch"),
        *whole[after:],
    ]


def test_a_row_has_rates_since_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ease.runs.log.peak_flops", lambda device: 5e6)
    clock, tracker = Clock(), Tracker()
    options: dict[str, Any] = {"every": 2, "clock": clock, "trackers": [tracker], "label": "phase 1, in-sample"}
    log = MetricsLog(MetricsFile(tmp_path / "m"), "phase 1", Progress(), **options)
    for step in range(1, 6):
        clock.now += 0.5
        log.step(step / 10, metrics(step))
    clock.now += 60  # validation
    log.epoch(epoch(1) | {"exit_shares": {"1": 0.25, "3": 0.75}})
    clock.now += 0.25
    log.step(0.6, metrics(6)._replace(loss=float("nan")))
    rows = [row for row, _ in read_rows(tmp_path / "m")]
    assert [(row["event"], row["step"]) for row in rows] == [
        *(("step", 1), ("step", 2), ("step", 4), ("epoch", 5), ("step", 6)),
    ]
    assert rows[0]["tokens_per_second"] is rows[0]["seconds_left"] is None
    assert rows[2]["tokens_per_second"] == 128
    assert (rows[2]["flops_per_second"], rows[2]["flops_utilization"]) == (2e6, 0.4)
    assert rows[2]["seconds_left"] == pytest.approx(1.5 / 0.3 * 0.6)
    assert rows[2]["exit_losses"] == {"1": 2.5, "3": 1.5}
    assert rows[4]["tokens_per_second"] == 256, "without validation"
    assert rows[4]["loss"] is None
    assert tracker.events[0] == ("phase 1, in-sample", 0)
    assert [step for step, _ in tracker.events[1:]] == [1, 2, 4, 5, 6]
    assert tracker.events[3][1]["exit_losses/3"] == 1.5
    assert tracker.events[4][1]["exit_shares/1"] == 0.25
    assert all(isinstance(value, float | int) for _, values in tracker.events[1:] for value in values.values())


def test_a_tracker_gets_no_row_twice(tmp_path: Path) -> None:
    tracker, path = Tracker(), tmp_path / "m"
    train(path, ["phase 1"], killed=("phase 1", 8))
    log = MetricsLog(MetricsFile(path), "phase 1", Progress(), every=2, trackers=[tracker])
    log.epoch(epoch(1))
    assert tracker.events == []
    log.resumed(2, 7)
    log.step(8 / 15, metrics(8))
    assert tracker.events[0] == ("phase 1", 7)
    assert [event[0] for event in tracker.events[1:]] == [8]
