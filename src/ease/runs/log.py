"""metrics.jsonl: a row every few optimizer steps and one per epoch, written while a run trains.

Rows are only appended, so the file can be read at any time. When a run resumes, rows that are later than its checkpoint
are cut off before the first new one, and so is a half-written last line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ease.devices import memory_in_use, peak_flops
from ease.files import json_safe
from ease.progress import Progress, StepMetrics
from ease.runs.tracking import Tracker
from ease.training.distributed import processes

METRICS = "metrics.jsonl"

LOG_EVERY = 10  # optimizer steps between two rows


def read_rows(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of metrics.jsonl, each with the byte at which it ends, up to the first damaged or incomplete line.

    Args:
        path: the file; one that does not exist has no rows.
        start: the byte at which the first row begins.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(row, dict) or "line" not in row:
                return
            yield row, start


class MetricsFile:
    """metrics.jsonl of a run, which a resumed run continues.

    A resumed run reports its past epochs (`keep_epoch`) and its place (`keep_steps`) in the order of the file. Rows
    after what was reported are cut off before the next row is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._old, self._kept, self._cut = list(read_rows(path)), 0, False

    def keep_epoch(self, line: str, epoch: float) -> bool:
        """Keeps the rows up to the end of an epoch. Returns whether the file has them."""
        at = self._after_steps(line)
        row = self._old[at][0] if at < len(self._old) else {}
        found = (row.get("event"), row.get("line"), row.get("epoch")) == ("epoch", line, epoch)
        if found:
            self._kept = at + 1
        return found

    def keep_steps(self, line: str, step: int) -> None:
        """Keeps the rows of the epoch in progress up to an optimizer step."""
        self._kept = self._after_steps(line, step)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""
        with self.path.open("ab") as file:
            if not self._cut:
                file.truncate(self._old[self._kept - 1][1] if self._kept else 0)
                self._old, self._kept, self._cut = [], 0, True
            file.write((json.dumps(json_safe(row)) + "\n").encode())

    def _after_steps(self, line: str, last: float = float("inf")) -> int:
        """The place after the kept rows and the rows of a line's steps up to step `last` that follow them."""
        at = self._kept
        while at < len(self._old) and (row := self._old[at][0]).get("event") == "step":
            if row["line"] != line or row["step"] > last:
                break
            at += 1
        return at


class MetricsLog(Progress):
    """Progress that writes metrics.jsonl, reports to trackers, and passes all events on.

    Rates are those since the row before, without validation.

    Args:
        file: receives the rows.
        line: name of the line, written into every row.
        inner: the progress that receives the same events.
        device: device of training, whose memory and peak are reported.
        trackers: receive the rows that are new.
        label: name of the line's phase for trackers, `line` by default.
        every: optimizer steps between two rows; step 1 has one too.
        clock: seconds from any fixed point.
    """

    def __init__(
        self,
        file: MetricsFile,
        line: str,
        inner: Progress,
        *,
        device: str = "cpu",
        trackers: Sequence[Tracker] = (),
        label: str | None = None,
        every: int = LOG_EVERY,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.file, self.line, self.inner, self.device = file, line, inner, torch.device(device)
        self.trackers, self.label, self.every, self.clock = trackers, label or line, every, clock
        peak = peak_flops(self.device)
        self.peak = peak and peak * processes()
        self.resumed_at = 0
        self.training = False  # whether past epochs are over
        self.begun: tuple[float, float] | None = None  # when steps were first taken here, and the share done by then
        self.last: tuple[float, float] | None = None  # when rates are measured from, and the FLOPs spent by then
        self.tokens = 0  # since then

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.inner.step(fraction, metrics)
        if metrics is None:
            return
        now = self.clock()
        self._train()
        self.tokens += metrics.tokens
        if self.begun is None:
            self.begun = now, fraction
        if metrics.step > 1 and metrics.step % self.every:
            return
        row: dict[str, Any] = {"event": "step", "line": self.line, **metrics._asdict()}
        row["exit_losses"] = {str(exit): loss for exit, loss in metrics.exit_losses.items()}
        row |= {"fraction": fraction, **self._rates(now, metrics.flops), "seconds_left": self._left(now, fraction)}
        row["memory_bytes"] = memory_in_use(self.device)
        self.last, self.tokens = (now, metrics.flops), 0
        self._write(row, metrics.step)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.inner.epoch(row)
        self.last, self.tokens = (self.clock(), row["flops"]), 0
        written = {"event": "epoch", "line": self.line, **row}
        if self.training:
            self._write(written, row["step"])
        elif not self.file.keep_epoch(self.line, row["epoch"]):
            self.file.append(written)

    def resumed(self, epoch: int, step: int) -> None:
        self.inner.resumed(epoch, step)
        self.file.keep_steps(self.line, step)
        self.resumed_at = step
        self._train()

    def _train(self) -> None:
        if not self.training:
            self.training = True
            for tracker in self.trackers:
                tracker.start(self.label, self.resumed_at)

    def _write(self, row: Mapping[str, Any], step: int) -> None:
        self.file.append(row)
        for tracker in self.trackers:
            tracker.log(step, scalars(row))

    def _rates(self, now: float, flops: float) -> dict[str, float | None]:
        if self.last is None or now <= self.last[0]:
            return dict.fromkeys(("tokens_per_second", "flops_per_second", "flops_utilization"))
        seconds, spent = now - self.last[0], flops - self.last[1]
        return {
            "tokens_per_second": self.tokens / seconds,
            "flops_per_second": spent / seconds,
            "flops_utilization": spent / seconds / self.peak if self.peak else None,
        }

    def _left(self, now: float, fraction: float) -> float | None:
        begun, share = self.begun or (now, fraction)
        return (now - begun) / (fraction - share) * (1 - fraction) if fraction > share else None


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, those of exits under names like exit_losses/2."""
    flat = {k: v for k, v in row.items() if not isinstance(v, Mapping)}
    flat |= {f"{k}/{exit}": v for k, part in row.items() if isinstance(part, Mapping) for exit, v in part.items()}
    return {k: v for k, v in flat.items() if isinstance(v, int | float) and k != "step"}
