"""Scaling: two processes against one on this machine, and what 1B and 8B models need on 8 and 64 GPUs.

    python benchmarks/scaling.py [--steps 20] [--rounds 3] [--measure]

- The table of GPUs is computed, not measured: FLOPs from `ease.flops`, bytes from the sizes of gradients and weights.
- `--measure` trains with one and with two processes through gloo, in turn, and counts the bytes that every collective
  is given. The batch is the same, so that each of two processes has half of the work (strong scaling). CPU time of all
  processes, which other work on the machine disturbs less than wall-clock, shows what the division itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import ease
from ease.flops import full_depth_flops
from ease.model_config import ModelConfig
from ease.training.distributed import process, process_group

GPU = {"name": "H100 SXM", "flops": 989e12, "memory": 80e9, "inside": 450e9, "between": 50e9}
UTILISATION = 0.4  # of the peak in bf16, assumed
GPUS_PER_MACHINE = 8

MODELS = {
    "1B": ModelConfig(128_256, 2048, 16, 32, num_kv_heads=8, hidden_dim=8192, head_dim=64, tie_embeddings=True),
    "8B": ModelConfig(128_256, 4096, 32, 32, num_kv_heads=8, hidden_dim=14336),
}
SEQ_LEN, TOKENS = 4096, 2**20  # of a sequence, and of a batch in all


def parameters(c: ModelConfig) -> tuple[int, int]:
    """The parameters of a model, and those of one of its layers."""
    query, key = c.num_heads * c.head_size, c.kv_heads * c.head_size
    layer = c.dim * (2 * query + 2 * key + 3 * c.ffn_size)
    return c.num_layers * layer + (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim, layer


def needs(c: ModelConfig, gpus: int, sharded: bool) -> dict[str, float]:
    """Memory of a GPU, and seconds of a step's computation and communication, without overlap.

    Weights, gradients and the two moments of AdamW are float32: 16 bytes a parameter. Replicated, the gradients are
    summed once (a ring sends 2 (n - 1) / n of them). Sharded, the layers' weights are gathered in the forward and in
    the backward pass and their gradients scattered, each (n - 1) / n; two layers at a time are whole; embedding and
    head stay replicated.
    """
    whole, layer = parameters(c)
    layers = c.num_layers * layer
    share = (gpus - 1) / gpus
    speed = GPU["inside"] if gpus <= GPUS_PER_MACHINE else GPU["between"]
    if sharded:
        memory = 16 * layers / gpus + 8 * 2 * layer + 16 * (whole - layers)
        sent = 3 * share * 4 * layers + 2 * share * 4 * (whole - layers)
    else:
        memory, sent = 16 * whole, 2 * share * 4 * whole
    flops = 3 * TOKENS * full_depth_flops(c, SEQ_LEN)
    return {
        "memory": memory,
        "flops": flops,
        "compute": flops / gpus / (UTILISATION * GPU["flops"]),
        "sent": sent,
        "communication": sent / speed,
    }


def table() -> str:
    """The table of models and numbers of GPUs, in Markdown."""
    columns = ("model", "parameters", "GPUs", "layers", "memory a GPU", "FLOPs a step", "sent a GPU", "computing")
    rows = [f"| {' | '.join((*columns, 'sending', 'efficiency'))} |", "|---" * (len(columns) + 2) + "|"]
    for name, c in MODELS.items():
        for gpus in (8, 64):
            for sharded in (False, True):
                n = needs(c, gpus, sharded)
                fits = "" if n["memory"] < 0.8 * GPU["memory"] else " (does not fit)"
                efficiency = n["compute"] / (n["compute"] + n["communication"])
                rows.append(
                    f"| {name} | {parameters(c)[0] / 1e9:.2f} B | {gpus} | {'sharded' if sharded else 'replicated'} "
                    f"| {n['memory'] / 1e9:.0f} GB{fits} | {n['flops']:.2e} | {n['sent'] / 1e9:.1f} GB "
                    f"| {n['compute']:.2f} s | {n['communication']:.2f} s | {efficiency:.0%} |"
                )
    return "\n".join(rows)


class Counted:
    """Counts the bytes that collectives are given."""

    def __init__(self) -> None:
        self.bytes, self.calls = 0, 0
        for name in ("all_reduce", "broadcast", "all_gather"):
            setattr(dist, name, self._counting(getattr(dist, name), tensor=1 if name == "all_gather" else 0))

    def _counting(self, collective: Any, tensor: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes, self.calls = self.bytes + args[tensor].nbytes, self.calls + 1
            return collective(*args, **kwargs)

        return call


def worker(steps: int) -> None:
    """Trains in this process of a group, and prints what a step took."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        torch.manual_seed(0)
        model = ease.StandardTransformer(2048, dim=256, num_layers=4, num_heads=8)
        ids = torch.randint(2048, ((steps + 2) * 8 * 128 + 1,))
        data = ease.Data(ease.TokenBatches(ids, 128, 8), ease.TokenBatches(ids, 128, 8, max_batches=1))
        counted, marks = Counted(), []

        class Clock(ease.Progress):
            def step(self, fraction: float, *_: Any) -> None:
                marks.append((time.perf_counter(), time.process_time(), counted.bytes, counted.calls))

        config = ease.StandardConfig(num_layers=4, max_epochs=1)
        list(ease.train(model, config.strategy(), data, progress=lambda phase: Clock()))
        marks = marks[1 : steps + 2]  # the first step allocates
        spans = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(marks, marks[1:], strict=False)]
        wall, cpu, sent, calls = (statistics.median(column) for column in zip(*spans, strict=True))
        print(json.dumps({"process": process(), "wall": wall, "cpu": cpu, "bytes": sent, "calls": calls}))


def run(number: int, steps: int) -> list[dict[str, float]]:
    """What the steps of each of so many processes took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", "--steps", str(steps)]
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(number)
    ]
    return [json.loads(process.communicate()[0]) for process in started]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        worker(given.steps)
        return
    print(table())
    for _ in range(given.rounds if given.measure else 0):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        (one,), two = run(1, given.steps), run(2, given.steps)
        cpu, wall = sum(p["cpu"] for p in two), max(p["wall"] for p in two)
        print(
            f"load {load:.1f}: a step takes one process {one['cpu']:.3f} s of CPU and {one['wall']:.3f} s, two "
            f"{cpu:.3f} s and {wall:.3f} s; efficiency {one['cpu'] / cpu:.0%} by CPU time, "
            f"{one['wall'] / 2 / wall:.0%} by wall-clock; {two[0]['bytes'] / 1e6:.2f} MB in "
            f"{two[0]['calls']:.0f} collectives"
        )


if __name__ == "__main__":
    main()
