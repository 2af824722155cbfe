"""ease.progress."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ease.interface import Batches, re_iterable


class Progress:
    """Told of every step and epoch, of resumed training from the first epoch again; this one says nothing."""

    def step(self, fraction: float, loss: float = math.nan) -> None: ...
    def epoch(self, row: Mapping[str, float]) -> None: ...


class PrintProgress(Progress):
    """A line per epoch."""

    def epoch(self, row: Mapping[str, float]) -> None:
        print(
            f"epoch {row['epoch']:3.0f}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
            f"val PPL {row['val_ppl']:.2f}  acc {row['val_acc']:.2%}",
            flush=True,
        )


class ProgressBatches:
    """Batches that tell a watch how far `epochs` iterations over them have come."""

    def __init__(self, batches: Batches, progress: Progress, epochs: int = 1) -> None:
        self.batches, self.progress, self.epochs, self.seen = re_iterable(batches), progress, epochs, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for item in self.batches:
            yield item
            self.seen += 1
            self.progress.step(min(1.0, self.seen / max(1, self.epochs * len(self))))
