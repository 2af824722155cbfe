"""Effect of each setting of `ease.Execution` on the time, memory and loss of a training step.

    python -m benchmarks.execution [--out results/execution.json] [--device cuda] [--repeats 9] [--markdown]

Every setting is compared with the default on the same model and tokens. Times: steps of both in turn in one process,
the median over rounds and the range of the ratio; CPU time with one thread, wall-clock otherwise, after a first step
that compiles. Memory: the peak of a step above what stays between two steps, in a process of its own. Loss: the mean
over the last 10 of 40 steps of a small model on the text of Python's standard library, the same batches for every
setting.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import LR, Shape, clock, machine, resident
from ease.data.batches import TokenBatches
from ease.data.corpus import load_corpus
from ease.models import StandardTransformer
from ease.trainer import Trainer
from ease.training.config import create_standard_config
from ease.training.execution import Execution

TIMED = Shape("d", vocab=4_096, dim=256, layers=4, heads=4, seq=128, batch=4)
TRAINED = Shape("e", vocab=256, dim=64, layers=3, heads=4, seq=64, batch=8)
STEPS, LAST = 40, 10

SETTINGS = {
    "default": Execution(),
    "batch_tokens: batches of one row": Execution(batch_tokens=TIMED.seq * TIMED.batch),
    "precision bf16": Execution(precision="bf16"),
    "precision fp16": Execution(precision="fp16"),
    "activation_checkpointing": Execution(activation_checkpointing=True),
    "compile": Execution(compile=True),
    "compile, activation_checkpointing": Execution(compile=True, activation_checkpointing=True),
    "optimizer muon": Execution(optimizer="muon"),
}


@dataclass(frozen=True)
class Row:
    """A setting against the default."""

    name: str
    ms: float
    ratio: float
    low: float
    high: float
    mib: float
    loss: float

    def cells(self) -> list[str]:
        ratio = f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"
        return [self.name, f"{self.ms:.0f} ms", ratio, f"{self.mib:.0f} MiB", f"{self.loss:.4f}"]


HEADER = ["setting", "step", "time, relative to the default (range)", "memory of a step", "loss after 40 steps"]


def step_of(name: str, device: str) -> Callable[[], float]:
    """One step of the timed shape under a setting; all settings see the same tokens."""
    execution, shape = SETTINGS[name], TIMED
    ((x, y),) = shape.batches(1)
    rows = 1 if execution.batch_tokens else shape.batch
    batches = list(zip(x.split(rows), y.split(rows), strict=True))
    trainer = Trainer(create_standard_config(shape.layers), shape.vocab, device, execution)
    model = shape.model().to(device)
    optimizer = trainer.create_optimizer(model, LR)
    return lambda: trainer.train_epoch(model, batches, optimizer)  # which reads the loss, and so waits for the device


def compared(name: str, device: str, repeats: int) -> tuple[float, list[float]]:
    """Median seconds of a step, and the ratios of its time to the default's, one per round."""
    calls = [step_of("default", device), step_of(name, device)]
    times: list[list[float]] = [[], []]
    for call in calls * 2:
        call()
    for round in range(repeats):
        for which in (0, 1) if round % 2 else (1, 0):
            gc.collect()
            start = clock() if device == "cpu" else time.perf_counter()
            calls[which]()
            times[which].append((clock() if device == "cpu" else time.perf_counter()) - start)
    return statistics.median(times[1]), [own / other for other, own in zip(*times, strict=True)]


def memory_of(name: str, device: str) -> float:
    """The peak of a step above what stays between two steps, in MiB; to be called in a process of its own."""
    call = step_of(name, device)
    call()
    call()
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return resident("VmHWM") - before


def loss_of(name: str, device: str) -> float:
    shape, text = TRAINED, load_corpus("stdlib", "byte").train[:200_000]
    execution = SETTINGS[name]
    rows = shape.batch
    if execution.batch_tokens:
        rows, execution = 1, replace(execution, batch_tokens=shape.seq * shape.batch)
    large = TokenBatches(text, shape.seq, shape.batch, shuffle=True, max_batches=STEPS)
    batches = [part for x, y in large for part in zip(x.split(rows), y.split(rows), strict=True)]
    torch.manual_seed(0)
    model = StandardTransformer(shape.vocab, shape.dim, shape.layers, shape.heads).to(device)
    trainer = Trainer(create_standard_config(shape.layers), shape.vocab, device, execution)
    optimizer, last = trainer.create_optimizer(model, 1e-3), LAST * shape.batch // rows
    trainer.train_epoch(model, batches[:-last], optimizer)
    return trainer.train_epoch(model, batches[-last:], optimizer)


def measure(device: str, repeats: int) -> list[Row]:
    rows = []
    for name in SETTINGS:
        seconds, ratios = compared(name, device, repeats)
        command = [sys.executable, "-m", "benchmarks.execution", "--device", device, "--memory", name]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = Row(
            name, 1000 * seconds, statistics.median(ratios), min(ratios), max(ratios), peak, loss_of(name, device)
        )
        print(" | ".join(row.cells()), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def markdown(rows: list[Row], about: dict[str, Any], device: str) -> str:
    where = torch.cuda.get_device_name() if device != "cpu" else f"{about['cpu']}, one thread"
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *(r.cells() for r in rows))]
    kernels = f"{TIMED.name}: vocabulary {TIMED.vocab:,}, dim {TIMED.dim}, {TIMED.layers} layers, sequence {TIMED.seq}"
    return "\n".join(
        [
            "**Settings of execution, each against the default**",
            "",
            *lines,
            "",
            f"{where}, torch {about['torch']}. Time and memory at {kernels}, batch {TIMED.batch}; the loss at "
            f"dim {TRAINED.dim}, {TRAINED.layers} layers, batches of {TRAINED.batch} rows of {TRAINED.seq} bytes. "
            "Memory is the peak of a step above what stays between two steps. Made by "
            "`python -m benchmarks.execution --markdown`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per setting")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--memory", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(memory_of(options.memory, options.device))
        return
    rows, about = measure(options.device, options.repeats), machine()
    if options.markdown:
        print(markdown(rows, about, options.device))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": about, "rows": [vars(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
