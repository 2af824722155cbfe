"""The state of a run while it trains, from its files alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from ease.errors import EaseError
from ease.files import read_json
from ease.runs.log import METRICS, read_rows
from ease.runs.record import RECORD
from ease.storage import CONFIG, is_locked, partial_folder

State = Literal["not started", "running", "stopped", "finished"]

FRESH = 5.0  # seconds after a write in which a run counts as running, whatever its lock


class LiveRun:
    """A run of which another process may be training a line.

    Args:
        run: the run folder, which need not exist yet.

    Attributes:
        state: "stopped" is an unfinished run that no process works on.
        rows: the rows of metrics.jsonl so far.
        record: the content of run.json, or empty.
        age: seconds since the last row was written, or None.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.state: State = "not started"
        self.rows: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {}
        self.age: float | None = None
        self._file: Path | None = None
        self._last = 0  # where the last row begins, in bytes

    def refresh(self) -> None:
        """Reads what was written since the last call.

        Raises:
            EaseError: the folder is something else than a run.
        """
        partial = partial_folder(self.run)
        self.age = _age(partial / METRICS)
        if partial.is_dir() and self._running(partial):
            self.state = "running"
        elif (self.run / CONFIG).is_file():
            self.state = "finished"
        elif self.run.exists():
            raise EaseError(f"{self.run} is not a run folder (it has no {CONFIG}): pass the --out of an `ease run`")
        else:
            self.state = "stopped" if partial.is_dir() else "not started"
        folder = self.run if self.state == "finished" else partial
        self._read(folder / METRICS)
        try:
            self.record = read_json(folder / RECORD)
        except EaseError:  # an older version wrote none
            self.record = {}

    def _running(self, partial: Path) -> bool:
        if self.age is not None and self.age < FRESH:
            return True
        return is_locked(partial) is not False

    def _read(self, file: Path) -> None:
        """Reads from the last known row on, or everything if that row is no longer there: a resumed run cuts rows."""
        found = list(read_rows(file, self._last)) if file == self._file and self.rows else []
        if not found or found[0][0] != self.rows[-1]:
            self.rows, self._last, found = [], 0, list(read_rows(file))
        else:
            self.rows.pop()
        self._file = file
        ends = [self._last, *(end for _, end in found)]
        if found:
            self._last = ends[-2]
        self.rows += [row for row, _ in found]


def _age(file: Path) -> float | None:
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None
