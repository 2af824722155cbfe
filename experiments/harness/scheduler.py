"""Lines at equal training FLOPs, side by side: what the experiments share.

An experiment names a `Lab` (text, sizes, budget) and its lines. A line is a strategy of the library, made by a function
from what a `Trial` gives it, and trained through `ease.train`; it starts from a new model or from another line's. Every
line of a lab gets the same budget in all, the same text in the same order and the same trials of learning rate, made
with the first seed and chosen on validation; the other seeds run at what was chosen. FLOPs count everything that
trains: steps, mining, trunk and validation passes.

What has been trained is kept as it comes, weights and a row of figures, under a key that is made of everything that
decides it. A plan that was stopped goes on where it was, and a line that was changed is trained again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model

import ease
from experiments.harness.candidates import SHARES, compared, sweep
from experiments.utils import set_seed

Row = dict[str, Any]
"""What is kept of one trained line."""
ENDLESS = 1_000_000  # epochs: budgets are in FLOPs


@dataclass(frozen=True)
class Lab:
    """Everything that the lines of one experiment have in common."""

    text: Mapping[str, Any] = field(repr=False)
    """train, val and test, each 1-D ids; other labs hold other things (`experiments.labs`)."""
    corpus: str
    """What the text is, in words."""
    vocab_size: int
    brick: int
    """Layers of phase 1, after which tokens may leave."""
    depth: int
    """Layers that "share of layers run" is a share of."""
    budget: float
    """Training FLOPs of every line."""
    lrs: tuple[float, ...]
    """Learning rates that every line tries."""
    dim: int
    seq: int
    batch: int
    heads: int = 4
    dropout: float = 0.0
    tie_embeddings: bool = True
    epoch_batches: int | None = None
    """Batches between validations (all of the text by default)."""
    eval_batches: tuple[int | None, int | None] = (None, None)
    """Batches of validation and of test that are scored (all by default)."""
    mine_epochs: int = 1
    """Epochs of batches that a phase on hard tokens mines."""
    shares: tuple[float, ...] = SHARES
    """Of the validation tokens that go on from an exit, a routing for each."""
    pieces: tuple[str, ...] = field(default=(), repr=False)
    """The text of every token, where it is known; nothing but what is said of tokens depends on it."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the text."""
        sha = hashlib.sha256()
        for split, ids in sorted(self.text.items()):
            sha.update(f"{split} {len(ids)} ".encode() + ids.int().numpy().tobytes())
        return sha.hexdigest()

    @property
    def tokens(self) -> dict[str, int]:
        """How many each split has."""
        return {split: len(ids) for split, ids in self.text.items()}

    def describe(self) -> dict[str, Any]:
        """The settings and which text it was, fit for JSON."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return settings | {"tokens": self.tokens, "hash": self.hash}

    def identity(self) -> dict[str, Any]:
        """What of the lab decides a trial: the settings beyond their defaults, and the text."""
        hidden = {f.name: default(f) for f in fields(self) if not f.repr}
        return told(replace(self, **{**hidden, "text": {}, "lrs": ()})) | {"hash": self.hash}

    def train(self, seed: int, part: tuple[float, float] = (0.0, 1.0)) -> ease.TokenBatches:
        """The part of the training text between two shares of its length."""
        ids = self.text["train"]
        ids = ids[int(part[0] * len(ids)) : int(part[1] * len(ids))]
        return ease.TokenBatches(ids, self.seq, self.batch, shuffle=True, seed=seed, max_batches=self.epoch_batches)

    @property
    def val(self) -> ease.TokenBatches:
        return ease.TokenBatches(self.text["val"], self.seq, self.batch, max_batches=self.eval_batches[0])

    @property
    def test(self) -> ease.TokenBatches:
        return ease.TokenBatches(self.text["test"], self.seq, self.batch, max_batches=self.eval_batches[1])

    def model(self, layers: int, **shape: Any) -> ease.StandardTransformer:
        """What a line starts from that goes on from no other."""
        own = {"dropout": self.dropout, "tie_embeddings": self.tie_embeddings}
        return ease.StandardTransformer(self.vocab_size, self.dim, layers, self.heads, **own | shape)

    def build(self, shape: Mapping[str, Any]) -> ease.StandardTransformer:
        """A model that is yet to be filled with what a line left."""
        return ease.StandardTransformer(**shape)

    def save(self, model: ease.StandardTransformer, file: Path) -> None:
        """Keeps what a line left."""
        save_model(model, str(file))

    def load(self, model: ease.StandardTransformer, file: Path) -> None:
        load_model(model, str(file))

    def further(self, model: ease.StandardTransformer, policy: ease.Policy) -> dict[str, float]:
        """Figures on the test split beyond those that every lab has."""
        return {}


class Trial(NamedTuple):
    """What a strategy is made for."""

    lab: Lab
    seed: int
    lr: float
    flops: float
    """What is left of the line's budget."""
    reference: ease.StandardTransformer | None = None
    """The model of the line that is looked at for reference."""

    @property
    def options(self) -> dict[str, Any]:
        """How a phase learns, the same for every line."""
        ends = {"patience": None, "max_epochs": ENDLESS, "max_flops": self.flops}
        return {"lr": self.lr, "schedule": "cosine", "warmup": 0.05, **ends}


Make = Callable[[Trial], Any]
"""Makes a line's strategy, one of the configurations that `ease.STRATEGIES` lists or one like them."""


def make(kind: Callable[..., Any], **settings: Any) -> Make:
    """A strategy whose configuration takes the options of a phase beside its own settings."""
    return partial(_make, kind, settings)


def _make(kind: Callable[..., Any], settings: dict[str, Any], trial: Trial) -> Any:
    return kind(**settings, **trial.options)


def grow(layers: int, **settings: Any) -> Make:
    """ASHEM's second phase on a finished first one: new layers on the frozen brick, trained on its hard tokens."""
    return partial(_grow, layers, settings)


def _grow(layers: int, settings: dict[str, Any], trial: Trial) -> ease.ASHEMConfig:
    options = trial.options
    own = {f"phase2_{name}": options.pop(name) for name in ("lr", "patience", "max_epochs", "max_flops")}
    lab = trial.lab
    plan = {"phase1_layers": lab.brick, "phase2_layers": layers, "mine_epochs": lab.mine_epochs, "seed": trial.seed}
    return ease.ASHEMConfig(**{**plan, **own, **options, "pretrained": True, **settings})


@dataclass(frozen=True)
class Line:
    """One way to spend the budget."""

    strategy: Make
    on: str | None = None
    """The line whose model it goes on from, and whose FLOPs are part of its own."""
    share: float = 1.0
    """Of the budget that is spent when it is done; less where other lines go on from it."""
    part: tuple[float, float] = (0.0, 1.0)
    """Of the training text."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Of the model, where it differs from the lab's."""
    reference: str | None = None
    """A line that is looked at but not gone on from; its FLOPs are nobody's."""
    thresholds: tuple[float, ...] = ()
    """Fixed thresholds that are measured beside quantiles."""
    rates: bool = True
    """Whether it tries the lab's learning rates; False: it has none."""


BASE = "phase 1"
PART = 0.6  # of the budget that phase 1 takes where lines share it


def plain_names(depths: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"plain, layers: {k}" for k in depths)


def plain(depths: Sequence[int]) -> dict[str, Line]:
    """Phase 1, on which others stand, the models of every depth to beat, and phase 1 trained on."""
    shallow = make(ease.StandardConfig, num_layers=depths[0])
    models = [Line(make(ease.StandardConfig, num_layers=k)) for k in depths]
    return {
        BASE: Line(shallow, share=PART),
        **dict(zip(plain_names(depths), models, strict=True)),
        "continued": Line(shallow, on=BASE),
    }


class Task(NamedTuple):
    """One line to be trained with one seed at one learning rate."""

    line: str
    seed: int
    lr: float
    on: str | None
    """Key of the run that it goes on from."""
    reference: str | None
    key: str


class Progress(NamedTuple):
    """Where a plan stands."""

    done: dict[tuple[str, int], Row]
    """(line, seed) -> the row at the learning rate that validation chose."""
    todo: list[Task]
    """What can be trained now, line by line, so that a plan that is stopped has finished lines to show."""
    kept: int
    """Rows of the plan that there are."""
    failed: set[str]
    """Lines whose training broke down with some seed, at every learning rate there was to try."""


@dataclass(frozen=True)
class Plan:
    """An experiment's lines, and where what they left is kept."""

    make_lab: Callable[[], Lab]
    lines: Mapping[str, Line]
    folder: Path
    device: str = "cpu"

    @cached_property
    def lab(self) -> Lab:
        return self.make_lab()

    @property
    def closed(self) -> Plan:
        """Without its lab, to be sent to a worker."""
        return replace(self)

    def rows(self) -> dict[str, Row]:
        """Key -> what was kept; a row that a kill cut short does not count."""
        path, rows = self.folder / "rows.jsonl", {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["key"]] = row
        return rows

    def keep(self, row: Row) -> None:
        """Appends a row in one write."""
        path = self.folder / "rows.jsonl"
        with path.open("ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, 2)
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")

    def weights(self, key: str) -> Path:
        return self.folder / "weights" / f"{key}.safetensors"

    def model(self, row: Row) -> ease.StandardTransformer:
        """What a line left."""
        model = self.lab.build(row["model"])
        self.lab.load(model, self.weights(row["key"]))
        model.trained_exits = {*row["exits"], model.num_layers}
        return model.to(self.device)

    def trial(self, line: Line, seed: int, lr: float, on: Row | None) -> Trial:
        return Trial(self.lab, seed, lr, line.share * self.lab.budget - (on["flops"] if on else 0.0))

    def task(self, name: str, seed: int, lr: float, done: Mapping[tuple[str, int], Row]) -> Task:
        """`done` has the runs that it stands on."""
        line = self.lines[name]
        on, reference = (done[other, seed] if other else None for other in (line.on, line.reference))
        keys = [row["key"] if row else None for row in (on, reference)]
        identity = {
            "lab": self.lab.identity(),
            "strategy": told(line.strategy(self.trial(line, seed, lr, on))),
            "line": {"share": line.share, "part": line.part, "shape": dict(line.shape), "on": keys},
            "seed": seed,
        }
        if line.thresholds:
            identity["thresholds"] = line.thresholds
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return Task(name, seed, lr, *keys, key)

    def rates(self, line: Line) -> tuple[float, ...]:
        """The learning rates that are tried with the first seed; any one where a line has none."""
        return self.lab.lrs if line.rates else self.lab.lrs[:1]

    def progress(self, seeds: Sequence[int]) -> Progress:
        """Where the plan stands."""
        rows, done, todo, kept, failed = self.rows(), {}, [], 0, set()
        for name, line in self.lines.items():
            lrs = self.rates(line)
            for seed in seeds:
                if any((other, seed) not in done for other in (line.on, line.reference) if other):
                    continue
                tasks = [self.task(name, seed, lr, done) for lr in lrs]
                open_ = [task for task in tasks if task.key not in rows]
                todo, kept = todo + open_, kept + len(tasks) - len(open_)
                good = [rows[task.key] for task in tasks if task not in open_ and "failed" not in rows[task.key]]
                if good and not open_:  # under the name that the line has now
                    done[name, seed] = min(good, key=lambda row: row["val"]["loss"]) | {"line": name}
                if not good and not open_:
                    failed.add(name)
                if seed == seeds[0]:
                    if open_ or not good:
                        break  # the other seeds wait for the choice
                    lrs = (done[name, seed]["lr"],)
        return Progress(done, todo, kept, failed)

    def finished(self, seeds: Sequence[int]) -> list[str]:
        """The lines that are finished with every seed."""
        done = self.progress(seeds).done
        return [name for name in self.lines if all((name, seed) in done for seed in seeds)]

    def missing(self, seeds: Sequence[int]) -> list[str]:
        """The lines that are not finished with every seed; those that broke down at every rate are called failed."""
        finished, failed = self.finished(seeds), self.progress(seeds).failed
        return [f"{name} (failed)" if name in failed else name for name in self.lines if name not in finished]

    def run(self, task: Task) -> Row:
        """Trains a line and keeps its weights; a row with "failed" where training broke down."""
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
            batches.epoch = on["epochs"]  # the order goes on
        else:
            model = lab.model(config.num_layers, **line.shape)
        model.to(self.device)
        phase, flops = None, dict[str, float]()
        curve, seconds = [], 0.0
        try:
            data = ease.Data(batches, lab.val)
            for phase, history in ease.train(model, strategy, data, device=self.device):  # noqa: B007
                flops = {
                    kind: flops.get(kind, 0.0) + history.flops.get(kind, 0.0) for kind in {**flops, **history.flops}
                }
                curve += [[r["flops"], r["train_loss"], r["val_loss"]] for r in history.rows]
                seconds += history.seconds
        except ease.EaseError as error:
            return row | {"failed": str(error), "seconds": time.perf_counter() - start}
        memory = peak(self.device)
        flops |= getattr(strategy, "spent", {})  # outside of phases
        # An exit is good if the last phase trained it or left it as it was.
        good = [e for e in model.trained_exits if not phase or e in phase.config.weights or e < phase.first]
        exits = sorted(e for e in good if e < model.num_layers)
        measure = strategy.policy().confidence
        points = sweep(model, lab.val, exits, lab.depth, line.thresholds, measure, lab.shares)
        path = self.weights(task.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial")
        lab.save(model, partial_file)
        partial_file.replace(path)
        return row | {
            "strategy": told(config),
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

    def work(
        self,
        seeds: Sequence[int],
        pool: ProcessPoolExecutor,
        jobs: int,
        until: float | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Trains what is missing; after `until` (of `time.monotonic`) nothing new is begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        total = sum(len(self.rates(line)) + len(seeds) - 1 for line in self.lines.values())
        running: dict[Future[Row], Task] = {}
        while True:
            state, busy = self.progress(seeds), {task.key for task in running.values()}
            todo = [task for task in state.todo if task.key not in busy]
            if until is None or time.monotonic() < until:
                for task in todo[: jobs - len(running)]:
                    running[pool.submit(run_task, self.closed, task)] = task
            if not running:
                return
            for number, future in enumerate(wait(running, return_when=FIRST_COMPLETED).done, state.kept + 1):
                task = running.pop(future)
                row = future.result()
                self.keep(row)
                result = f"failed: {row['failed']}" if "failed" in row else f"val PPL {row['val']['ppl']:.3f}"
                what = f"{task.line:40} seed {task.seed}  lr {task.lr:<6g}"
                say(f"{number:3}/{total} {what} {result}  {row['seconds']:.0f} s")


OPEN: dict[Path, Plan] = {}  # of a worker


def opened(plan: Plan) -> Plan:
    """The plan with its lab, which a worker keeps from task to task."""
    if plan.folder not in OPEN:
        OPEN.clear()
        OPEN[plan.folder] = plan
    return OPEN[plan.folder]


def run_task(plan: Plan, task: Task) -> Row:
    return opened(plan).run(task)


def told(value: Any) -> Any:
    """What a configuration says beyond its defaults, fit for JSON: a new option does not make old runs other ones."""
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return {"kind": type(value).__name__} | {
            f.name: told(given[f.name]) for f in fields(value) if f.init and given[f.name] != default(f)
        }
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    return [told(part) for part in value] if isinstance(value, list | tuple) else value


def default(spec: Any) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def reset_peak(device: str) -> None:
    """Peak memory is counted from here, where the system can do that."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes: of the accelerator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # which not every system has

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
