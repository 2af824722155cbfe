"""Experiments from the first line to the last table, whatever their lines are."""

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
from experiments.analysis import plots as draw
from experiments.analysis import tables
from experiments.harness.measuring import Report, measure
from experiments.harness.scheduler import Lab, Line, Plan

Say = Callable[[str], None]


class Experiment(NamedTuple):
    """Lines in one lab, and what they are reported for."""

    name: str
    """Of its folder."""
    make_lab: Callable[[], Lab]
    lines: Mapping[str, Line]
    report: Report


class Settings(NamedTuple):
    """How experiments are run."""

    out: Path
    seeds: Sequence[int] = (0, 1, 2)
    """The first one tries learning rates."""
    jobs: int = 1
    """Lines trained at a time, each on one thread."""
    minutes: float | None = None
    """After which no line is begun any more."""
    device: str = "cpu"
    say: Say = print

    def check(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ease.EaseError(f"the budget is {self.minutes:g} minutes: give more than 0, or leave it out")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ease.EaseError(f"seeds are {list(self.seeds)}: give one or more, each once, none below 0")
        if self.jobs < 1:
            raise ease.EaseError(f"jobs is {self.jobs}: train at least one line at a time")


class Done(NamedTuple):
    """What came of experiments."""

    data: list[dict[str, Any]]
    """What their `test.json` hold."""
    missing: list[str]
    """The lines that are not trained yet."""


def run(experiments: Sequence[Experiment], settings: Settings) -> Done:
    """Trains what is missing of each, in turn, and writes its tables and its figure into a folder of its own."""
    settings.check()
    device, say, seeds = choose_device(settings.device), settings.say, settings.seeds
    until = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    done = Done([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ProcessPoolExecutor(settings.jobs, get_context("spawn"), start_worker) as pool:
            for experiment in experiments:
                plan = Plan(experiment.make_lab, experiment.lines, settings.out / experiment.name, device)
                say(f"{plan.folder}: {plan.lab.corpus}")
                plan.work(seeds, pool, settings.jobs, until, say)
                done.missing.extend(f"{experiment.name}: {name}" for name in plan.missing(seeds))
                report, finished = experiment.report, plan.finished(seeds)
                if report.base not in finished or not set(report.plain) & set(finished):
                    continue  # there is nothing to compare with yet
                done.data.append(measure(plan, report, seeds, pool, say))
                write(done.data[-1], plan.folder)
                say(f"tables: {plan.folder / 'front.md'}")
    except BrokenProcessPool:
        raise ease.EaseError(
            "a worker died: what was trained is kept and the same command goes on; fewer --jobs need less memory"
        ) from None
    finally:
        torch.set_num_threads(threads)
    return done


def start_worker() -> None:
    """One thread, and no life after the command's: a pool's workers would wait for a parent that was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def write(data: dict[str, Any], folder: Path) -> None:
    """Tables and figure of one experiment, from what its `test.json` holds and nothing else."""
    write_tables(tables.all_tables(data), folder, "front")
    draw.front(data, folder / "front")


def write_tables(made: Sequence[tables.Table], folder: Path, name: str) -> None:
    """All in one page of Markdown, and each as LaTeX by its name."""
    (folder / f"{name}.md").write_text("\n".join(table.markdown() for table in made), encoding="utf-8")
    for table in made:
        (folder / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
