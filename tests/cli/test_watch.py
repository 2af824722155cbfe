"""`ease watch`: the state of a run from its files, in 80 columns."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ease.cli import watch
from ease.cli.main import main
from ease.runs.live import LiveRun
from ease.storage import output_folder

STEP: dict[str, Any] = {
    "event": "step",
    "line": "standard, 4 layers",
    "epoch": 2,
    "step": 20,
    "loss": 2.0,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "exit_losses": {"1": 2.5, "2": 1.5},
    "tokens": 64,
    "flops": 2e6,
    "fraction": 0.25,
    "seconds_left": 83.2,
    "tokens_per_second": 12345.0,
    "flops_per_second": 4.5e9,
    "flops_utilization": 0.41,
    "memory_bytes": 2**28,
}
EPOCH: dict[str, Any] = {
    "event": "epoch",
    "line": "phase 1",
    "epoch": 1,
    "step": 10,
    "val_ppl": 12.5,
    "val_acc": 0.25,
    "flops": 1e6,
    "exit_shares": {"1": 0.25, "2": 0.75},
}


def write(folder: Path, *rows: dict[str, Any], old: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / "metrics.jsonl"
    with file.open("ab") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    if old:
        os.utime(file, (time.time() - 100, time.time() - 100))


def shown(run: Path, encoding: str = "utf-8") -> str:
    live, raw = LiveRun(run), io.BytesIO()
    live.refresh()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=80)
    console.print(watch.view(live, console))
    file.flush()
    text = raw.getvalue().decode(encoding)
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_run_says_whether_it_has_started_works_has_stopped_or_has_finished(tmp_path: Path) -> None:
    run, partial = tmp_path / "demo", tmp_path / ".demo.partial"
    assert shown(run).startswith("demo: not started")
    write(partial, EPOCH, STEP, old=False)
    assert shown(run).startswith("demo: running; last row 0:00:0")
    write(partial)
    if sys.platform != "win32":
        assert shown(run).startswith("demo: stopped before its end; the command that started it resumes it")
        (partial / "checkpoints").mkdir()
        (partial / "checkpoints" / "a.safetensors").touch()
        with suppress(KeyboardInterrupt), output_folder(run, resumable=True):
            assert shown(run).startswith("demo: running; last row 0:01:40 ago"), "such as while it scores"
            raise KeyboardInterrupt
    partial.rename(run)
    (run / "config.json").write_text("{}")
    assert shown(run).startswith("demo: finished")
    assert "standard" not in shown(run), "a line without an epoch has no result"


def test_a_live_run_shows_its_last_step_and_the_lines_so_far(tmp_path: Path) -> None:
    losses = [STEP | {"step": step, "loss": float(loss)} for step, loss in ((1, 9), (10, 5), (20, 2))]
    write(tmp_path / ".demo.partial", EPOCH, *losses, EPOCH | {"line": STEP["line"], "epoch": 2, "step": 20}, old=False)
    text = shown(tmp_path / "demo")
    for part in (
        "standard, 4 layers, epoch 2, step 20",
        "25%  0:01:23 left",
        "2  █▄▁",
        "1: 2.5  2: 1.5",
        "PPL 12.5, accuracy 25.0% (epoch 2)",
        "1: 25.0%  2: 75.0%",
        "12.3 K tokens/s, 4.5 G FLOP/s (41% of the peak)",
        "256 MiB, learning rate 0.001, gradient norm 0.5",
    ):
        assert part in text
    assert [line.split("  ")[0] for line in text.splitlines()[-2:]] == ["phase 1", "standard, 4 layers"]
    plain = shown(tmp_path / "demo", "cp1252")
    assert "2  #-_" in plain
    assert plain.isascii()


def test_values_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    unknown = ("tokens_per_second", "flops_per_second", "flops_utilization", "seconds_left", "memory_bytes", "loss")
    write(tmp_path / ".demo.partial", STEP | dict.fromkeys(unknown), old=False)
    text = shown(tmp_path / "demo")
    assert "tokens/s" not in text
    assert "left" not in text
    assert "MiB" not in text


def test_a_sparkline_has_means_of_many_values() -> None:
    assert watch.sparkline([1.0, 1.0, 2.0, 2.0, 8.0, 8.0], 3) == "▁▂█"
    assert watch.sparkline([3.0], 50) == "▁"
    assert watch.sparkline([], 50) == ""
    assert len(watch.sparkline(list(range(1234)), 50)) == 50


def test_a_resumed_run_is_read_from_where_it_was_cut(tmp_path: Path) -> None:
    partial = tmp_path / ".demo.partial"
    live = LiveRun(tmp_path / "demo")
    rows = [STEP | {"step": step} for step in range(8)]
    write(partial, *rows[:2])
    live.refresh()
    assert live.rows == rows[:2]
    write(partial, *rows[2:5])
    live.refresh()
    live.refresh()
    assert live.rows == rows[:5]
    (partial / "metrics.jsonl").unlink()
    again = [row | {"memory_bytes": 1} for row in rows]
    write(partial, *rows[:3], *again[3:])
    live.refresh()
    assert live.rows == [*rows[:3], *again[3:]]
    with (partial / "metrics.jsonl").open("a") as file:
        file.write('{"line": "half')
    live.refresh()
    assert len(live.rows) == 8


def test_rows_of_older_versions_are_epochs(tmp_path: Path) -> None:
    write(tmp_path / "demo", {name: value for name, value in EPOCH.items() if name != "event"})
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert "phase 1" in shown(tmp_path / "demo").splitlines()[-1]


def test_watch_ends_with_the_run_and_quietly_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, partial = tmp_path / "demo", tmp_path / ".demo.partial"
    write(partial, EPOCH, STEP, old=False)
    file = io.StringIO()
    monkeypatch.setattr("ease.cli.console.output_console", lambda: Console(file=file, width=80, force_terminal=True))

    def slept(seconds: float) -> None:
        if partial.exists():
            partial.rename(run)
            (run / "config.json").write_text("{}")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", slept)
    assert main(["watch", str(run)]) == 0
    assert "demo: finished" in file.getvalue()
    assert main(["watch", str(tmp_path / "other")]) == 0
    assert "other: not started" in file.getvalue()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "is not a run folder (it has no config.json)" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "new"), "--once"]) == 0
    assert capsys.readouterr().out == "new: not started\n"
