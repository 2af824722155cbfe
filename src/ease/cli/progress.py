"""Progress of long commands: bars in a terminal, text lines elsewhere."""

import math
from collections.abc import Mapping
from typing import Any, Self


class ProgressBars:
    """A bar per line at a terminal; elsewhere a text line per epoch."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console
        self.bars = Bars(
            TextColumn("{task.description:28}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def line(self, name: str) -> Any:
        from ease.progress import Progress

        task = self.bars.add_task(name, total=1.0, figures="")
        if not self.console.is_terminal:
            self.console.print(name)
        bars, console = self.bars, self.console

        class Line(Progress):
            def step(self, fraction: float, loss: float = math.nan) -> None:
                bars.update(task, completed=fraction)

            def epoch(self, row: Mapping[str, float]) -> None:
                figures = f"val PPL {row['val_ppl']:.2f}, acc {row['val_acc']:.1%}"
                bars.update(task, figures=figures)
                if not console.is_terminal:
                    console.print(f"  epoch {row['epoch']:3.0f}  {row['seconds']:6.1f} s  {figures}")

        return Line()
