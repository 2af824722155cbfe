"""Lines at equal training FLOPs, side by side: the plan, the trials and the table that experiments share.

An experiment names a `Lab` (text, sizes, budget) and its lines. Every line of a lab gets the same budget and the same
trials of learning rate, made with the first seed and chosen on validation; the other seeds run at what was chosen.
FLOPs count everything that trains: steps, mining, trunk and validation passes. Rows and weights are kept on disk as
they come, so a plan that was stopped goes on where it was. The test split is scored once, by `--report`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

import ease
from ease.mining import MinedBatches, compute_confidence_threshold
from ease.trainer import History
from experiments.utils import set_seed

HARD_SET = 0.5  # of the tokens: those that phase 1's final model is least sure of, on which all lines are scored
LATER = 10_000  # the epoch at which later phases start: past phase 1's, so that the order goes on


@dataclass(frozen=True)
class Lab:
    """Everything that lines of one experiment have in common."""

    text: dict[str, Tensor]
    """train, val and test, each 1-D ids."""
    vocab_size: int
    brick: int
    """Layers of phase 1, after which tokens may leave."""
    depth: int
    """Layers that "share of layers run" is a share of."""
    budget: float
    """Training FLOPs of every line."""
    shares: tuple[float, ...]
    """Tokens that go on at inference. The first rules training; the report shows all."""
    lrs: tuple[float, ...]
    dim: int
    seq: int
    batch: int
    heads: int = 4
    dropout: float = 0.0
    epoch_batches: int | None = None
    """Batches between validations (all of the text by default)."""
    eval_batches: tuple[int | None, int | None] = (None, None)
    """Batches of validation and of test that are scored (all by default)."""

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

    def model(self, layers: int, seed: int = 0, dropout: float | None = None) -> ease.StandardTransformer:
        set_seed(seed)
        return ease.StandardTransformer(
            self.vocab_size,
            self.dim,
            layers,
            self.heads,
            dropout=self.dropout if dropout is None else dropout,
            tie_embeddings=True,
        )

    def fit(self, model: ease.StandardTransformer, lr: float, flops: float, *phase: Any, **options: Any) -> History:
        """One phase up to `flops`; the epoch that validates best is kept."""
        options["options"] = ease.PhaseOptions(
            lr=lr, schedule="cosine", warmup=0.05, patience=None, max_epochs=1_000_000, max_flops=flops
        )
        made = ease.Phase("phase", *phase, **options)
        return ease.Trainer(made.config, self.vocab_size).run(model, made)

    def policy(self, model: ease.StandardTransformer, share: float) -> ease.Policy:
        """Sends that share of the validation tokens on from the brick; a model without an exit there runs in full."""
        if self.brick == model.num_layers or self.brick not in model.trained_exits:
            return ease.Policy()
        return ease.Policy.of(self.brick, compute_confidence_threshold(model, self.val, share, exit=self.brick))


class Line(Protocol):
    """How one line is trained. Frozen dataclasses, so that they can be sent to a worker."""

    @property
    def on(self) -> str | None:
        """The line whose model it goes on from."""

    def train(
        self, lab: Lab, seed: int, lr: float, start: ease.StandardTransformer | None, budget: float
    ) -> tuple[ease.StandardTransformer, History]:
        """The trained model; `start` and `budget` are what the line that it goes on from left."""


@dataclass(frozen=True)
class Plain:
    """A standard model, trained on a part of the text, for a share of the budget."""

    layers: int
    share: float = 1.0
    part: tuple[float, float] = (0.0, 1.0)
    on: None = None

    def train(self, lab: Lab, seed: int, lr: float, start: Any, budget: float) -> Any:
        model = lab.model(self.layers, seed)
        config = ease.create_standard_config(self.layers)
        return model, lab.fit(model, lr, self.share * budget, config, lab.train(seed, self.part), lab.val)


@dataclass(frozen=True)
class DeepSupervision:
    """The loss at the exit and at the end."""

    layers: int
    on: None = None

    def train(self, lab: Lab, seed: int, lr: float, start: Any, budget: float) -> Any:
        model = lab.model(self.layers, seed)
        config = ease.TrainingConfig(layer_weights={lab.brick: 0.5, self.layers: 0.5})
        return model, lab.fit(model, lr, budget, config, lab.train(seed), lab.val)


@dataclass(frozen=True)
class Continued:
    """The earlier phase trained on, on the text that growth gets."""

    on: str

    def train(self, lab: Lab, seed: int, lr: float, start: Any, budget: float) -> Any:
        data = lab.train(seed)
        data.epoch = LATER
        config = ease.create_standard_config(lab.brick)
        return start, lab.fit(start, lr, budget, config, data, lab.val)


@dataclass(frozen=True)
class Growth:
    """New layers on the frozen brick, trained on its hard tokens alone (ratio 1: on all)."""

    layers: int
    on: str
    ratio: float = 0.5
    init: Literal["identity", "copy"] = "identity"
    part: tuple[float, float] = (0.0, 1.0)
    dropout: float | None = None  # of the new layers
    mine_epochs: int = 1

    def train(self, lab: Lab, seed: int, lr: float, start: Any, budget: float) -> Any:
        model = lab.model(lab.brick, seed, self.dropout)
        model.load_state_dict(start.state_dict())
        model.trained_exits = {lab.brick}
        data = lab.train(seed, self.part)
        data.epoch = LATER
        mined = MinedBatches(model, data, ease.Policy(), self.ratio, epochs=self.mine_epochs, seed=seed)
        threshold = compute_confidence_threshold(model, lab.val, lab.shares[0])
        model.grow(self.layers, self.init)
        config = ease.TrainingConfig(
            layer_weights={self.layers: 1.0}, exit_layer=lab.brick, routing_threshold=threshold
        )
        spent = {"mining": mined.flops}
        return model, lab.fit(model, lr, budget, config, mined, lab.val, first=lab.brick + 1, spent=spent)


@dataclass(frozen=True)
class Plan:
    """An experiment's lines, and where what they left is kept."""

    lab: Callable[[], Lab]
    lines: dict[str, Line]
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "rows.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def weights(self, name: str, seed: int, lr: float) -> str:
        return str(self.folder / f"{name.replace('/', '-')}-{seed}-{lr:g}.safetensors")

    def chosen(self, name: str, first_seed: int, lrs: Sequence[float]) -> float | None:
        """The learning rate that validation chose with the first seed; None while trials are missing."""
        trials = [r for r in self.rows() if r["line"] == name and r["seed"] == first_seed and r["lr"] in lrs]
        return min(trials, key=lambda r: r["val"]["loss"])["lr"] if len(trials) == len(lrs) else None

    def model(self, name: str, seed: int, lr: float) -> tuple[ease.StandardTransformer, dict[str, Any]]:
        """What a line left, and its row."""
        row = next(r for r in self.rows() if (r["line"], r["seed"], r["lr"]) == (name, seed, lr))
        model = load_lab(self.lab).model(row["layers"])
        load_model(model, self.weights(name, seed, lr))
        model.trained_exits = set(row["trained_exits"])
        return model, row

    def ready(self, seeds: Sequence[int]) -> list[tuple[str, int, float]]:
        """What can be run now: (line, seed, learning rate)."""
        lrs, tasks = load_lab(self.lab).lrs, []
        done = {(r["line"], r["seed"], r["lr"]) for r in self.rows()}
        for seed in seeds:
            for name, line in self.lines.items():
                if line.on and (line.on, seed, self.chosen(line.on, seeds[0], lrs)) not in done:
                    continue
                trials = lrs if seed == seeds[0] else [self.chosen(name, seeds[0], lrs)]
                tasks += [(name, seed, lr) for lr in trials if lr and (name, seed, lr) not in done]
        return tasks

    def run(self, name: str, seed: int, lr: float, base_lr: float | None) -> dict[str, Any]:
        """Trains one line and keeps its weights; `base_lr` names the run of the line that it goes on from."""
        torch.set_num_threads(1)
        lab, line = load_lab(self.lab), self.lines[name]
        start, base = self.model(line.on, seed, base_lr) if line.on and base_lr else (None, {"flops": 0.0})
        model, history = line.train(lab, seed, lr, start, lab.budget - base["flops"])
        save_model(model, self.weights(name, seed, lr))
        return {
            "line": name,
            "seed": seed,
            "lr": lr,
            "layers": model.num_layers,
            "trained_exits": sorted(model.trained_exits),
            "flops": base["flops"] + sum(history.flops.values()),
            "flops_by": history.flops,
            "seconds": history.seconds,
            "val": ease.score(model, lab.val, lab.policy(model, lab.shares[0])).figures(),
            "curve": [[r["flops"], r["train_loss"], r["val_loss"]] for r in history.rows],
        }

    def work(self, seeds: Sequence[int], jobs: int) -> None:
        """Runs what is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lrs = load_lab(self.lab).lrs
        running: dict[Future[dict[str, Any]], tuple[str, int, float]] = {}
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            while True:
                waiting = [task for task in self.ready(seeds) if task not in running.values()]
                for name, seed, lr in waiting[: jobs - len(running)]:
                    on = self.lines[name].on
                    future = pool.submit(self.run, name, seed, lr, self.chosen(on, seeds[0], lrs) if on else None)
                    running[future] = (name, seed, lr)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, seed, lr = running.pop(future)
                    row = future.result()
                    with (self.folder / "rows.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{name:45} seed {seed} lr {lr:g} val PPL {row['val']['ppl']:.4f}  {row['seconds']:.0f} s")

    def report(self, seeds: Sequence[int]) -> None:
        """Scores the test split once per line and seed, at what validation chose, and prints the table."""
        lab, out = load_lab(self.lab), []
        first = next(iter(self.lines))
        for seed in seeds:
            brick_lr = self.chosen(first, seeds[0], lab.lrs)
            if brick_lr is None:
                raise SystemExit(f"{first!r} is not trained yet: run without --report first")
            brick, _ = self.model(first, seed, brick_lr)
            threshold = compute_confidence_threshold(brick, lab.val, HARD_SET)
            hard = ease.score(brick, lab.test).confidences < threshold
            for name in self.lines:
                rows = [r for r in self.rows() if r["line"] == name and r["seed"] == seed]
                lr = self.chosen(name, seeds[0], lab.lrs)
                if lr is None or lr not in [r["lr"] for r in rows]:
                    continue
                model, row = self.model(name, seed, lr)
                for share in lab.shares:
                    policy = lab.policy(model, share)
                    label = f"{name}; {share:.0%} go on" if policy.exits else name
                    test = ease.score(model, lab.test, policy).figures(hard, depth=lab.depth)
                    out.append({"line": label, "seed": seed, "lr": lr, "flops": row["flops"], "test": test})
                    if not policy.exits:
                        break
        (self.folder / "test.json").write_text(json.dumps(out, indent=1))
        print("| line | lr | test PPL | hard PPL | share of layers run | FLOPs/token | training FLOPs |")
        print("|---|---|---|---|---|---|---|")
        for label in dict.fromkeys(row["line"] for row in out):
            mine = [row for row in out if row["line"] == label]
            cells = [
                spread([r["test"][key] for r in mine], digits)
                for key, digits in (("ppl", 3), ("hard_ppl", 2), ("compute_cost", 2))
            ]
            per_token = sum(r["test"]["flops_per_token"] for r in mine) / len(mine)
            flops = sum(r["flops"] for r in mine) / len(mine)
            print(f"| {label} | {mine[0]['lr']:g} | {' | '.join(cells)} | {per_token / 1e3:.0f}k | {flops:.2e} |")


@lru_cache(1)  # a worker is sent the same experiment again and again
def load_lab(make: Callable[[], Lab]) -> Lab:
    return make()


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    t = torch.tensor(values, dtype=torch.float64)
    return f"{t.mean():.{digits}f}" + (f" ± {t.std():.{digits}f}" if len(values) > 1 else "")


def main(parser: argparse.ArgumentParser, plan: Callable[[argparse.Namespace], Plan]) -> None:
    """The command line that experiments share."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one tries learning rates")
    parser.add_argument("--jobs", type=int, default=1, help="lines trained at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--report", action="store_true", help="score the test split and print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = plan(args)
    if args.report:
        made.report(args.seeds)
    else:
        made.work(args.seeds, args.jobs)
