"""Progress of long work: callbacks for training steps and epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ease.interface import Batches, re_iterable


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step. Counts named "of the phase" include the step."""

    epoch: int
    """Epoch of the phase, counted from 1."""
    step: int
    """Optimizer steps of the phase."""
    loss: float
    """Training loss in nats, weighted over exits."""
    exit_losses: Mapping[int, float]
    """Layer -> mean loss in nats over the tokens scored there, before its weight."""
    lr: float
    """Learning rate of the first parameter group."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens: int
    """Scored tokens of the step."""
    flops: float
    """FLOPs of the phase, of all kinds."""
    skipped: int = 0
    """Steps of the phase that were skipped, since their loss or gradient was not finite."""


class Progress:
    """Progress callback of one piece of work; the base class does nothing.

    When training is resumed, past epochs are replayed to `epoch` first, followed by one call of `resumed`.
    """

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        """Called after every step.

        Args:
            fraction: share of the work that is done, in [0, 1].
            metrics: metrics of an optimizer step; None for work other than training, and for past steps of a resumed
                phase.
        """

    def epoch(self, row: Mapping[str, float]) -> None:
        """Called after every epoch of training.

        Args:
            row: metrics of the epoch, a row of `History.rows`.
        """

    def resumed(self, epoch: int, step: int) -> None:
        """Called when training continues from a checkpoint.

        Args:
            epoch: the epoch that training continues in, counted from 1.
            step: optimizer steps taken before.
        """


class PrintProgress(Progress):
    """Progress that prints one line per epoch."""

    def epoch(self, row: Mapping[str, float]) -> None:
        print(
            f"epoch {row['epoch']:3.0f}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
            f"val PPL {row['val_ppl']:.2f}  acc {row['val_acc']:.2%}",
            flush=True,
        )

    def resumed(self, epoch: int, step: int) -> None:
        print(f"resumed at epoch {epoch}, step {step}", flush=True)


class ProgressBatches:
    """Batches that report to a progress how far `epochs` iterations over them have come.

    Args:
        batches: the batches; may be iterated over again.
        progress: receives the share that is done.
        epochs: number of iterations that are the whole work.
    """

    def __init__(self, batches: Batches, progress: Progress, epochs: int = 1) -> None:
        self.batches, self.progress, self.epochs, self.seen = re_iterable(batches), progress, epochs, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for item in self.batches:
            yield item
            self.seen += 1
            self.progress.step(min(1.0, self.seen / max(1, self.epochs * len(self))))
