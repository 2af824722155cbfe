"""Progress of commands: lines of text at intervals, and bars that fit the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from ease.cli.progress import ProgressDisplay, TextProgress
from ease.progress import StepMetrics

ROW = {"epoch": 1.0, "seconds": 12.0, "val_ppl": 7.0, "val_acc": 0.5}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_text_is_written_every_ten_seconds_of_work_and_at_every_epoch() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = TextProgress(lines.append, "phase 1", clock)
    metrics = StepMetrics(1, 1, 2.0, {1: 2.0}, 1e-3, 0.5, 64, 1e6)
    for second in range(26):
        clock.now = float(second)
        progress.step(second / 100, metrics)
    assert lines == ["phase 1", "  phase 1: 10%, train loss 2.000", "  phase 1: 20%, train loss 2.000"]
    progress.epoch(ROW)
    assert lines[3:] == ["  epoch   1    12.0 s  val PPL 7.00, acc 50.0%"]
    for second in range(26, 36):
        clock.now = float(second)
        progress.step(second / 100)
    assert lines[4:] == ["  phase 1: 35%, val PPL 7.00, acc 50.0%"], "ten seconds after the last line"


def test_a_resumed_line_is_named() -> None:
    lines: list[str] = []
    TextProgress(lines.append, "phase 1", Clock()).resumed(3, 210)
    assert lines == ["phase 1", "  phase 1 resumed at epoch 3, step 210"]


def test_bars_fit_80_columns() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, force_terminal=True, width=80, color_system=None)) as display:
        for name in ("growth, 1 to 3 layers, phase 2", "deep-supervision, 12 layers"):
            line = display.line(name)
            line.epoch(ROW)
            line.step(0.5)
            line.resumed(3, 210)
        display.bars.refresh()
    text = file.getvalue()
    assert "…" not in text
    for part in ("growth, 1 to 3 layers, phase 2", "deep-supervision, 12 layers", "val PPL 7.00, acc 50.0%", "50%"):
        assert part in text
    assert "growth, 1 to 3 layers, phase 2 resumed at epoch 3, step 210" in text


def test_text_goes_to_a_pipe() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file)) as display:
        display.line("scoring").step(0.5)
        display.line("phase [1]").epoch(ROW)
    assert file.getvalue() == "scoring\nphase [1]\n  epoch   1    12.0 s  val PPL 7.00, acc 50.0%\n"
