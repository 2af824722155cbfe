"""Trackers of experiments: TensorBoard, Weights & Biases and trackio behind one interface.

Every line of a run is a run of its own in a tracker, so that their curves lie over each other; the run folder is their
group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ease.errors import EaseError, check_choice, first_line, require

TENSORBOARD = "tensorboard"  # subfolder of a run with its event files


class TrackedRun(NamedTuple):
    """What a tracker is told about a run."""

    name: str
    id: str
    """The same when the run resumes, and unlike that of any other run."""
    folder: Path
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Receives the metrics of a run while it trains."""

    def start(self, line: str, step: int) -> None:
        """Begins a line, which ends the one before.

        Args:
            line: name of the line or phase.
            step: optimizer steps that were taken before; above 0 when training resumes.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the metrics of the line at an optimizer step."""

    def finish(self) -> None:
        """Ends the last line."""


class TensorBoard:
    """Event files in the subfolder "tensorboard" of the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.writer: Any = None

    def start(self, line: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.finish()
        # TensorBoard then hides what was logged after the checkpoint.
        purge = step + 1 if step else None
        folder = self.run.folder / TENSORBOARD / re.sub(r'[\\/:*?"<>|]', "-", line)
        self.writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


class RunPerLine:
    """A tracker whose library returns an object for each line, with `log` and `finish`."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.line: Any = None

    def open(self, line: str) -> Any:
        """Begins a line, or resumes it."""
        raise NotImplementedError

    def start(self, line: str, step: int) -> None:
        self.finish()
        self.line = self.open(line)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.line.log(dict(values), step=step)

    def finish(self) -> None:
        if self.line is not None:
            self.line.finish()
        self.line = None


class WandB(RunPerLine):
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables apply."""

    def open(self, line: str) -> Any:
        import wandb

        try:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ease"),
                group=self.run.name,
                name=f"{self.run.name}, {line}",
                id=f"{self.run.id}-{re.sub(r'[^a-z0-9]+', '-', line.lower())}",
                config=dict(self.run.config),
                resume="allow",
                reinit="create_new",
            )
        except wandb.errors.Error as error:
            raise EaseError(
                f"wandb does not start ({first_line(error)}): run `wandb login`, or set WANDB_MODE=offline"
            ) from error


class Trackio(RunPerLine):
    """trackio; TRACKIO_SPACE_ID and its other variables apply."""

    def open(self, line: str) -> Any:
        import trackio

        name = f"{self.run.name}, {line} ({self.run.id})"
        return trackio.init(
            project="ease", group=self.run.name, name=name, config=dict(self.run.config), resume="allow"
        )


TRACKERS: Mapping[str, type[TensorBoard | WandB | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `EaseError` for an unknown tracker, and for one whose library is not installed."""
    for name in names:
        check_choice("track", name, tuple(TRACKERS))
        require(name, "track")
