"""Progress of long commands: bars in a terminal, lines of text elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from ease.progress import Progress, StepMetrics

INTERVAL = 10.0  # seconds between two lines of text within an epoch


class BarProgress(Progress):
    """Progress of one piece of work as a bar in a terminal."""

    def __init__(self, bars: Bars, name: str) -> None:
        self.bars, self.name = bars, name
        self.task: TaskID = bars.add_task(name, total=1.0, metrics="")

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.bars.update(self.task, completed=fraction)

    def epoch(self, row: Mapping[str, float]) -> None:
        self.bars.update(self.task, metrics=_metrics(row))

    def resumed(self, epoch: int, step: int) -> None:
        self.bars.console.print(_resumed(self.name, epoch, step), markup=False)


class TextProgress(Progress):
    """Progress of one piece of work as text: a line per epoch, and one every `INTERVAL` seconds in between.

    Args:
        write: receives every line.
        name: name of the work.
        clock: seconds from any fixed point.
    """

    def __init__(self, write: Callable[[str], object], name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.name, self.clock = write, name, clock
        self.metrics, self.written = "", clock()
        write(name)

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        if self.clock() - self.written < INTERVAL:
            return
        loss = f"train loss {metrics.loss:.3f}" if metrics else ""
        parts = [f"{fraction:.0%}", loss, self.metrics]
        self._write(f"  {self.name}: {', '.join(filter(None, parts))}")

    def epoch(self, row: Mapping[str, float]) -> None:
        self.metrics = _metrics(row)
        self._write(f"  epoch {row['epoch']:3.0f}  {row['seconds']:6.1f} s  {self.metrics}")

    def resumed(self, epoch: int, step: int) -> None:
        self._write(f"  {_resumed(self.name, epoch, step)}")

    def _write(self, text: str) -> None:
        self.write(text)
        self.written = self.clock()


class ProgressDisplay:
    """Progress of a whole command, to be entered as a context.

    Args:
        console: where to show it; bars in a terminal, lines of text elsewhere.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Bars(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def line(self, name: str) -> Progress:
        """Progress of one named piece of work."""
        if self.console.is_terminal:
            return BarProgress(self.bars, name)
        return TextProgress(self._print, name)

    def _print(self, text: str) -> Any:
        self.console.print(text, markup=False, soft_wrap=True)


def _metrics(row: Mapping[str, float]) -> str:
    if "val_agreement" in row:
        return f"agreement {row['val_agreement']:.1%}, next 2 {row['val_agreement_2']:.1%}"
    return f"val PPL {row['val_ppl']:.2f}, acc {row['val_acc']:.1%}"


def _resumed(name: str, epoch: int, step: int) -> str:
    return f"{name} resumed at epoch {epoch}, step {step}"
