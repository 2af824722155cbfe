"""Running of experiments: training of what is missing, measurement, and output."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

import ease
from ease.devices import choose_device
from experiments.harness.lab import Lab
from experiments.harness.line import Line
from experiments.harness.measuring import Report, measure
from experiments.harness.scheduler import Scheduler

Write = Callable[[dict[str, Any], Path], None]
"""Writes tables and figures of an experiment's data into a folder."""


class Experiment(NamedTuple):
    """Lines in one lab, and how they are reported."""

    name: str
    """The name of its folder."""
    make_lab: Callable[[], Lab]
    lines: Mapping[str, Line]
    report: Report


class Settings(NamedTuple):
    """How experiments are run."""

    out: Path
    seeds: Sequence[int] = (0, 1, 2)
    """Random seeds; the first one tries the learning rates."""
    jobs: int = 1
    """Lines trained in parallel, each on one thread."""
    minutes: float | None = None
    """Time budget, after which no training is started."""
    device: str = "cpu"
    log: Callable[[str], None] = print

    def check(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ease.EaseError(f"the budget must be more than 0 minutes, got {self.minutes:g}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ease.EaseError(f"seeds must be integers from 0 on, each once, got {list(self.seeds)}")
        if self.jobs < 1:
            raise ease.EaseError(f"jobs must be at least one, got {self.jobs}")


class Outcome(NamedTuple):
    """The results of experiments."""

    data: list[dict[str, Any]]
    """The content of their `test.json` files."""
    missing: list[str]
    """The lines that are not trained yet."""


def run(experiments: Sequence[Experiment], settings: Settings, write: Write) -> Outcome:
    """Train what is missing of each experiment, measure it, and write its tables and figure into its folder."""
    settings.check()
    device, log, seeds = choose_device(settings.device), settings.log, settings.seeds
    deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    outcome = Outcome([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ProcessPoolExecutor(settings.jobs, get_context("spawn"), start_worker) as pool:
            for experiment in experiments:
                scheduler = Scheduler(experiment.make_lab, experiment.lines, settings.out / experiment.name, device)
                log(f"{scheduler.folder}: {scheduler.lab.corpus}")
                scheduler.train_all(seeds, pool, settings.jobs, deadline, log)
                outcome.missing.extend(f"{experiment.name}: {name}" for name in scheduler.missing(seeds))
                report, finished = experiment.report, scheduler.finished(seeds)
                if report.base not in finished or not set(report.baselines) & set(finished):
                    continue  # no baseline to compare with yet
                outcome.data.append(measure(scheduler, report, seeds, pool, log))
                write(outcome.data[-1], scheduler.folder)
                log(f"tables: {scheduler.folder / 'front.md'}")
    except BrokenProcessPool:
        raise ease.EaseError(
            "a worker process died: run the same command again to continue, with fewer --jobs if memory ran out"
        ) from None
    finally:
        torch.set_num_threads(threads)
    return outcome


def start_worker() -> None:
    """Initialise a worker: one thread, and an end when the parent is killed, for which a pool's workers would wait."""
    torch.set_num_threads(1)

    def exit_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=exit_with_parent, daemon=True).start()
