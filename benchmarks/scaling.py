"""Scaling: two processes against one on this machine, and what 1B and 8B models need on 8 and 64 GPUs.

    python benchmarks/scaling.py [--steps 20] [--rounds 3] [--measure] [--saving] [--stream]

- The table of GPUs is computed, not measured: FLOPs from `ease.flops`, bytes from the sizes of gradients and weights.
- `--measure` trains with one and with two processes through gloo, in turn, and counts the bytes that every collective
  is given. The batch is the same, so that each of two processes has half of the work (strong scaling). CPU time of all
  processes, which other work on the machine disturbs less than wall-clock, shows what the division itself costs.
- `--saving` saves the state of sharded training in two processes: whole tensors, gathered and written by the first one;
  its part by every process, as checkpoints are written; and the same by `async_save` while steps are taken.
- `--stream` reads batches of a stream in two processes that tokenize all documents, or a share each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ease
from ease.data.streaming import open_stream
from ease.flops import full_depth_flops
from ease.model_config import ModelConfig
from ease.training.checkpoint import write_state
from ease.training.distributed import barrier, is_sharded, process, process_group, shared_map
from ease.training.sharding import sharded, unsharded

GPU = {"name": "H100 SXM", "flops": 989e12, "memory": 80e9, "inside": 450e9, "between": 50e9}
UTILISATION = 0.4  # of the peak in bf16, assumed
GPUS_PER_MACHINE = 8

MODELS = {
    "1B": ModelConfig(128_256, 2048, 16, 32, num_kv_heads=8, hidden_dim=8192, head_dim=64, tie_embeddings=True),
    "8B": ModelConfig(128_256, 4096, 32, 32, num_kv_heads=8, hidden_dim=14336),
}
SAVING = ("nothing", "whole", "parts", "async")

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
            for is_parted in (False, True):
                n = needs(c, gpus, is_parted)
                fits = "" if n["memory"] < 0.8 * GPU["memory"] else " (does not fit)"
                efficiency = n["compute"] / (n["compute"] + n["communication"])
                rows.append(
                    f"| {name} | {parameters(c)[0] / 1e9:.2f} B | {gpus} | {'sharded' if is_parted else 'replicated'} "
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


def saving(steps: int) -> None:
    """Saves in this process of a group in three ways, and prints what each took, with and without steps after it."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

    torch.set_num_threads(1)
    with process_group("cpu"), tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast(own))
        background = dist.new_group(backend="gloo")
        torch.manual_seed(0)
        model = ease.StandardTransformer(2048, dim=384, num_layers=6, num_heads=8)
        batches = ease.TokenBatches(torch.randint(2048, (steps * 4 * 64 + 1,)), 64, 4)
        trainer = ease.Trainer(ease.create_standard_config(6), 2048, execution=ease.Execution(parallel="fsdp"))
        with sharded(model, True):
            optimizer = trainer.create_optimizer(model, 1e-3)
            trainer.train_epoch(model, batches, optimizer)
            parts = {
                f"{name}.{key}": value
                for name, p in model.named_parameters()
                for key, value in {"weights": p.detach(), **optimizer.state[p]}.items()
                if is_sharded(value)
            }
            took: dict[str, list[list[float]]] = {way: [] for way in SAVING}
            for number, way in enumerate(SAVING * 3):
                barrier()
                begun, pending = time.perf_counter(), None
                if way == "whole":
                    write_state(folder / "whole.safetensors", unsharded(parts))
                    barrier()
                elif way == "parts":
                    write_state(folder / "parts.safetensors", parts)
                    barrier()
                elif way == "async":
                    writer = HuggingFaceStorageWriter(str(folder / f"async-{number}"), save_distributed=True)
                    pending = async_save(parts, storage_writer=writer, process_group=background)
                pause = time.perf_counter() - begun
                trainer.train_epoch(model, batches, optimizer)
                if pending:
                    pending.result()
                    barrier()
                took[way].append([pause, time.perf_counter() - begun])
            size = sum(p.numel() * p.itemsize for p in parts.values())
            medians = {way: [statistics.median(column) for column in zip(*rows)] for way, rows in took.items()}
            print(json.dumps({"process": process(), "bytes": size, **medians}), flush=True)
            barrier()


def broadcast(text: str) -> str:
    """The text that the first process has."""
    texts = [text]
    dist.broadcast_object_list(texts)
    return texts[0]


def stream(steps: int) -> None:
    """Reads batches of a stream in this process, tokenizing all documents and then a share, and prints the CPU time."""
    with process_group("cpu"), tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(sorted(Path(os.__file__).parent.glob("[a-m]*.py"))):
            text = file.read_text(encoding="utf-8", errors="replace")
            pieces = [json.dumps({"text": piece}) for piece in text.split("\n\n") if piece.strip()]
            (Path(folder) / f"{number:03}.jsonl").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        opened = open_stream(f"{folder}/*.jsonl", "bpe:2048")
        took = {}
        # The first pass fills the tokenizer's cache of words.
        for name, encode_all in (("all", None), ("all", None), ("share", shared_map)):
            batches = opened.train(seq_len=128, batch_size=8, epoch_batches=steps * 20, encode_all=encode_all)
            barrier()
            begun = time.process_time()
            tokens = sum(batch.x.numel() for batch in batches) + batches.buffer * 128
            took[name] = tokens / (time.process_time() - begun)
        print(json.dumps({"process": process(), **took}))


def run(number: int, steps: int, what: str = "steps") -> list[dict[str, Any]]:
    """What the steps of each of so many processes took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", what, "--steps", str(steps)]
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(number)
    ]
    return [json.loads(process.communicate()[0]) for process in started]


WORKERS = {"steps": worker, "saving": saving, "stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--saving", action="store_true")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--worker", choices=WORKERS)
    given = parser.parse_args()
    if given.worker:
        WORKERS[given.worker](given.steps)
        return
    print(table())
    for _ in range(given.rounds if given.saving else 0):
        found = run(2, given.steps, "saving")
        print(f"{found[0]['bytes'] / 1e6:.0f} MB in two processes, median seconds of 3:")
        for way in SAVING:
            pause, steps = (max(p[way][i] for p in found) for i in (0, 1))
            print(f"  {way}: pause {pause:.2f}, with {given.steps} steps after or beside it {steps:.2f}")
    for _ in range(given.rounds if given.stream else 0):
        found = run(2, given.steps, "stream")
        for name in ("all", "share"):
            rates = ", ".join(f"{p[name] / 1e3:.0f}" for p in found)
            print(f"each of two processes tokenizes {name}: {rates} thousand tokens a second of its CPU time")
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
