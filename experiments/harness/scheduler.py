"""Scheduling of an experiment's lines: which trainings are due, what each one stores, and which results are chosen.

Every line of a lab gets the same training FLOPs in total, the same text in the same order and the same learning rates,
tried with the first seed and chosen on validation; the other seeds run at the chosen one. FLOPs count training steps,
mining, and the passes of frozen layers and of validation.

Results are stored as they are produced, weights and a row of metrics, under a key made from everything that determines
them. A stopped experiment therefore resumes where it was, and a changed line is trained again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ease
from experiments.harness.candidates import compared, sweep
from experiments.harness.identity import non_defaults
from experiments.harness.lab import Lab
from experiments.harness.line import Line, Trial
from experiments.harness.memory import peak, reset_peak
from experiments.utils import set_seed

Row = dict[str, Any]
"""The stored result of one training."""


class Task(NamedTuple):
    """One training: a line with one seed at one learning rate."""

    line: str
    seed: int
    lr: float
    on: str | None
    """Key of the row whose model it starts from."""
    reference: str | None
    key: str


class Status(NamedTuple):
    """Which results an experiment has and which are due."""

    done: dict[tuple[str, int], Row]
    """(line, seed) -> the row at the learning rate chosen on validation."""
    todo: list[Task]
    """Trainings that can start now, line by line, so that a stopped experiment has finished lines."""
    stored: int
    """Rows that exist."""
    failed: set[str]
    """Lines whose training failed with some seed at every learning rate."""


@dataclass(frozen=True)
class Scheduler:
    """An experiment's lines and the folder with their results."""

    make_lab: Callable[[], Lab]
    lines: Mapping[str, Line]
    folder: Path
    device: str = "cpu"

    @cached_property
    def lab(self) -> Lab:
        return self.make_lab()

    @property
    def without_lab(self) -> Scheduler:
        """A copy without the loaded lab, small enough to send to a worker."""
        return replace(self)

    def rows(self) -> dict[str, Row]:
        """Key -> row. A last line that a kill cut short is ignored."""
        path, rows = self.folder / "rows.jsonl", {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["key"]] = row
        return rows

    def store(self, row: Row) -> None:
        """Append a row in one write."""
        path = self.folder / "rows.jsonl"
        with path.open("ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, 2)
            cut_short = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut_short + json.dumps(row).encode() + b"\n")

    def weights(self, key: str) -> Path:
        """The file with a trained model's weights."""
        return self.folder / "weights" / f"{key}.safetensors"

    def model(self, row: Row) -> ease.StandardTransformer:
        """The trained model of a row."""
        model = self.lab.build(row["model"])
        self.lab.load(model, self.weights(row["key"]))
        model.trained_exits = {*row["exits"], model.num_layers}
        return model.to(self.device)

    def trial(self, line: Line, seed: int, lr: float, on: Row | None) -> Trial:
        """The setting that a line's strategy is configured for; `on` is the row that the line starts from."""
        return Trial(self.lab, seed, lr, line.share * self.lab.budget - (on["flops"] if on else 0.0))

    def task(self, name: str, seed: int, lr: float, done: Mapping[tuple[str, int], Row]) -> Task:
        """A training and its key; `done` holds the rows that the line starts from or refers to."""
        line = self.lines[name]
        on, reference = (done[other, seed] if other else None for other in (line.on, line.reference))
        keys = [row["key"] if row else None for row in (on, reference)]
        identity = {
            "lab": self.lab.identity(),
            "strategy": non_defaults(line.strategy(self.trial(line, seed, lr, on))),
            "line": {"share": line.share, "part": line.part, "shape": dict(line.shape), "on": keys},
            "seed": seed,
        }
        if line.thresholds:
            identity["thresholds"] = line.thresholds
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return Task(name, seed, lr, *keys, key)

    def rates(self, line: Line) -> tuple[float, ...]:
        """The learning rates to try with the first seed; a single placeholder for a line that does not choose one."""
        return self.lab.lrs if line.rates and not line.rate_of else self.lab.lrs[:1]

    def status(self, seeds: Sequence[int]) -> Status:
        """Which results exist and which are due."""
        rows, done, todo, stored, failed = self.rows(), {}, [], 0, set()
        for name, line in self.lines.items():
            lrs = self.rates(line)
            if line.rate_of:
                if (line.rate_of, seeds[0]) not in done:
                    continue
                lrs = (done[line.rate_of, seeds[0]]["lr"],)
            for seed in seeds:
                if any((other, seed) not in done for other in (line.on, line.reference) if other):
                    continue
                tasks = [self.task(name, seed, lr, done) for lr in lrs]
                open_ = [task for task in tasks if task.key not in rows]
                todo, stored = todo + open_, stored + len(tasks) - len(open_)
                succeeded = [rows[task.key] for task in tasks if task not in open_ and "failed" not in rows[task.key]]
                if succeeded and not open_:  # under the name that the line has now
                    done[name, seed] = min(succeeded, key=lambda row: row["val"]["loss"]) | {"line": name}
                if not succeeded and not open_:
                    failed.add(name)
                if seed == seeds[0]:
                    if open_ or not succeeded:
                        break  # the other seeds wait for the choice of the learning rate
                    lrs = (done[name, seed]["lr"],)
        return Status(done, todo, stored, failed)

    def finished(self, seeds: Sequence[int]) -> list[str]:
        """The lines that are finished with every seed."""
        done = self.status(seeds).done
        return [name for name in self.lines if all((name, seed) in done for seed in seeds)]

    def missing(self, seeds: Sequence[int]) -> list[str]:
        """The lines that are not finished with every seed; those that failed at every learning rate say so."""
        finished, failed = self.finished(seeds), self.status(seeds).failed
        return [f"{name} (failed)" if name in failed else name for name in self.lines if name not in finished]

    def train(self, task: Task) -> Row:
        """Train a line and save its weights; the row has the key "failed" if training diverged."""
        lab, line, rows, start = self.lab, self.lines[task.line], self.rows(), time.perf_counter()
        on = rows[task.on] if task.on else None
        row: Row = {"key": task.key, "line": task.line, "seed": task.seed, "lr": task.lr, "on": task.on}
        reset_peak(self.device)
        set_seed(task.seed)
        batches = lab.train(task.seed, line.part)
        trial = self.trial(line, task.seed, task.lr, on)
        if task.reference:
            trial = trial._replace(reference=self.model(rows[task.reference]))
        config = line.strategy(trial)
        strategy = config.strategy()
        if on:
            before = self.model(on)
            model = lab.build({**asdict(before.config), **line.shape})
            model.load_state_dict(before.state_dict())
            model.trained_exits = before.trained_exits
            batches.epoch = on["epochs"]  # continue the order of the text
        else:
            model = lab.model(config.num_layers, **line.shape)
        model.to(self.device)
        phase, flops = None, dict[str, float]()
        curve, seconds = [], 0.0
        try:
            data = ease.Data(batches, lab.val)
            if hasattr(strategy, "apply"):
                strategy.apply(model, data)
                training = ()
            else:
                training = ease.train(model, strategy, data, device=self.device)
            for phase, history in training:  # noqa: B007
                flops = {
                    kind: flops.get(kind, 0.0) + history.flops.get(kind, 0.0) for kind in {**flops, **history.flops}
                }
                curve += [[r["flops"], r["train_loss"], r["val_loss"]] for r in history.rows]
                seconds += history.seconds
        except ease.EaseError as error:
            return row | {"failed": str(error), "seconds": time.perf_counter() - start}
        memory = peak(self.device)
        flops |= getattr(strategy, "spent", {})  # FLOPs outside of phases
        # An exit is usable if the last phase trained it or left it unchanged.
        usable = [e for e in model.trained_exits if not phase or e in phase.config.weights or e < phase.first]
        exits = sorted(e for e in usable if e < model.num_layers)
        measure = strategy.policy().confidence
        points = sweep(model, lab.val, exits, lab.depth, line.thresholds, measure, lab.shares)
        path = self.weights(task.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial")
        lab.save(model, partial_file)
        partial_file.replace(path)
        return row | {
            "strategy": non_defaults(config),
            "model": asdict(model.config),
            "exits": exits,
            "epochs": batches.epoch,
            "flops": sum(flops.values()) + (on["flops"] if on else 0.0),
            "flops_by": flops,
            "seconds": seconds + (on["seconds"] if on else 0.0),
            "memory": memory,
            "val": compared(points, exits)["val"],
            "sweep": points,
            "curve": curve,
        }

    def train_all(
        self,
        seeds: Sequence[int],
        pool: ProcessPoolExecutor,
        jobs: int,
        deadline: float | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        """Train all missing results; after `deadline` (of `time.monotonic`) no training is started."""
        self.folder.mkdir(parents=True, exist_ok=True)
        total = sum(len(self.rates(line)) + len(seeds) - 1 for line in self.lines.values())
        running: dict[Future[Row], Task] = {}
        while True:
            status, busy = self.status(seeds), {task.key for task in running.values()}
            todo = [task for task in status.todo if task.key not in busy]
            if deadline is None or time.monotonic() < deadline:
                for task in todo[: jobs - len(running)]:
                    running[pool.submit(train_task, self.without_lab, task)] = task
            if not running:
                return
            for number, future in enumerate(wait(running, return_when=FIRST_COMPLETED).done, status.stored + 1):
                task = running.pop(future)
                row = future.result()
                self.store(row)
                result = f"failed: {row['failed']}" if "failed" in row else f"val PPL {row['val']['ppl']:.3f}"
                what = f"{task.line:40} seed {task.seed}  lr {task.lr:<6g}"
                log(f"{number:3}/{total} {what} {result}  {row['seconds']:.0f} s")


LOADED: dict[Path, Scheduler] = {}
"""Of a worker: the scheduler whose lab it holds."""


def with_lab(scheduler: Scheduler) -> Scheduler:
    """The worker's own copy of a scheduler, which keeps its lab from task to task."""
    if scheduler.folder not in LOADED:
        LOADED.clear()
        LOADED[scheduler.folder] = scheduler
    return LOADED[scheduler.folder]


def train_task(scheduler: Scheduler, task: Task) -> Row:
    """A worker's part of `Scheduler.train_all`."""
    return with_lab(scheduler).train(task)
