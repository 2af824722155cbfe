"""Trainings that one process and several processes should run alike, and a function that starts the processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ease import (
    ASHEMConfig,
    BrickConfig,
    Data,
    DeepSupervisionConfig,
    DiscriminativeConfig,
    EarlyExitConfig,
    Execution,
    GatedConfig,
    GrowthConfig,
    LayerSkipConfig,
    OpenGrowthConfig,
    StagedConfig,
    StandardConfig,
    StandardTransformer,
    TokenBatches,
    TuneConfig,
    train,
)
from ease.data.batches import Example, ExampleBatches
from ease.data.streaming import StreamBatches
from ease.data.tokenizers import train_tokenizer
from ease.progress import Progress
from ease.strategies.staged import PhaseConfig
from ease.training import checkpoint
from ease.training.distributed import process, process_group, processes, shared_map
from ease.training.mining import Quantile

ROOT = Path(__file__).parents[1]

TEXT = torch.tensor(list((ROOT / "LICENSE").read_bytes()), dtype=torch.int32)

SPEED: dict[str, Any] = {"lr": 3e-3, "max_epochs": 2}

THREE = tuple(PhaseConfig(layers=n, ratio=share, lr=3e-3, max_epochs=2) for n, share in ((1, 1.0), (2, 0.5), (3, 0.3)))

STRATEGIES: dict[str, tuple[Any, int]] = {
    "standard": (StandardConfig(num_layers=2, **SPEED), 2),
    "budget": (StandardConfig(num_layers=2, lr=3e-3, max_flops=4e7), 2),
    "deep-supervision": (DeepSupervisionConfig(num_layers=3, **SPEED), 3),
    "discriminative": (DiscriminativeConfig(num_layers=2, **SPEED), 2),
    "early-exit": (EarlyExitConfig(num_layers=3, exit_layer=(1, 2), routing_threshold=(0.2, 0.2), **SPEED), 3),
    "distillation": (EarlyExitConfig(num_layers=3, exit_layer=1, objective="both", routing_threshold=0.2, **SPEED), 3),
    "layerskip": (LayerSkipConfig(num_layers=3, layer_dropout=0.4, **SPEED), 3),
    "growth": (GrowthConfig(layers=(1, 3), exit_weight=0.3, lr=3e-3, max_epochs=2), 1),
    "open-growth": (OpenGrowthConfig(shallow_layers=1, deep_layers=3, hard_ratio=0.4, lr=3e-3, max_epochs=2), 1),
    "gated": (GatedConfig(exit_layer=(1, 2), keep=(0.6, 0.5), deep_layers=3, lr=3e-3, max_epochs=2), 1),
    "staged": (StagedConfig(THREE, trunk_budget=20_000), 1),
    "ashem": (ASHEMConfig(phase1_layers=1, phase2_layers=2, phase1_max_epochs=2, phase2_max_epochs=2), 1),
    "original": (
        ASHEMConfig(phase1_layers=1, phase2_layers=2, phase1_max_epochs=1, phase2_max_epochs=1, protocol="original"),
        1,
    ),
    "tune": (TuneConfig(exits=(1,), tokens="hard", adapter="mlp", objective="both", **SPEED), 2),
    "brick": (BrickConfig(vocabulary=64, **SPEED), 2),
}


def windows(train_batches: int = 3, val_batches: int = 1, rows: int = 8) -> Data:
    """Windows of a text."""
    shuffled = TokenBatches(TEXT[:6000], 16, rows, shuffle=True, max_batches=train_batches)
    return Data(shuffled, TokenBatches(TEXT[6000:9000], 16, rows, max_batches=val_batches))


def examples() -> Data:
    """Padded rows of different lengths, of which a batch has 8 and the last one has a single one."""
    rows = [TEXT[40 * i : 40 * i + 5 + i % 20] for i in range(33)]
    given = [Example(row[:-1], row[1:]) for row in rows]
    return Data(ExampleBatches(given[:17], 8, shuffle=True), ExampleBatches(given[17:], 5))


def new_model(num_layers: int, **options: Any) -> StandardTransformer:
    torch.manual_seed(0)
    return StandardTransformer(256, dim=16, num_layers=num_layers, num_heads=2, **options)


def curve(
    config: Any, model: StandardTransformer, data: Data, folder: Path | None = None, **options: Any
) -> dict[str, list[float]]:
    """What a training gives, in numbers that do not depend on the number of processes."""
    found: dict[str, list[float]] = {"train_loss": [], "val_loss": [], "val_acc": [], "steps": [], "flops": []}
    torch.manual_seed(1)
    strategy = config.strategy()
    for _, history in train(model, strategy, data, checkpoints=folder, execution=Execution(**options)):
        for name in ("train_loss", "val_loss", "val_acc", "flops"):
            found[name] += history.column(name)
        found["steps"].append(history.steps)
    found["thresholds"] = list(strategy.policy().thresholds)
    found["mined"] = [part["count"] for part in getattr(strategy, "mined", [])]
    found["weights"] = [float(p.detach().double().square().sum()) for p in model.parameters()]
    return found


class _Stopped(Exception):
    """The end of a training that is resumed later."""


class _Stop(Progress):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, fraction: float, metrics: Any = None) -> None:
        self.steps -= metrics is not None  # the first call after resuming has no metrics
        if not self.steps:
            raise _Stopped


def interrupted(name: str, folder: Path, phase: str, steps: int) -> None:
    """Trains, sharded, with checkpoints after every step, and stops in a phase before the last step is saved."""
    (config, layers), data = STRATEGIES[name], windows()
    model = new_model(layers)
    stop = lambda now: _Stop(steps) if now.name == phase else Progress()  # noqa: E731
    torch.manual_seed(1)
    checkpoint.EVERY = 0.0
    execution = Execution(parallel="fsdp")
    try:
        list(train(model, config.strategy(), data, checkpoints=folder, progress=stop, execution=execution))
    except _Stopped:
        return
    raise AssertionError("the training was not stopped")


def _examples() -> dict[str, list[float]]:
    config, layers = STRATEGIES["gated"]
    return curve(config, new_model(layers), examples())


def _sharded(name: str) -> dict[str, list[float]]:
    config, layers = STRATEGIES[name]
    return curve(config, new_model(layers), windows(), parallel="fsdp")


def _quantiles() -> dict[str, list[float]]:
    """Quantiles of values of which each process adds its own: exact ones, and those from bins."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for exact in (1000, 100, 700):  # in the last case no process alone needs bins
        quantile = Quantile(exact)
        quantile.add(values[process() :: processes()])
        quantile.merge()
        found += [quantile(share) for share in (0.0, 0.37, 0.5, 1.0)]
    return {"quantiles": found, "weights": [1.0]}


class _Rows:
    """Documents of a stream."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        while self.at < 300:
            self.at += 1
            yield {"text": "ab " * (self.at % 7) + str(self.at)}
        self.at = 0

    def set_epoch(self, epoch: int) -> None:
        pass


def _stream() -> dict[str, list[float]]:
    """Batches of a stream whose documents the processes divide, over more than one pass."""
    encoded = []
    tokenizer = train_tokenizer("byte", [])

    def encode_all(encode: Callable[[str], torch.Tensor], texts: Sequence[str]) -> list[torch.Tensor]:
        return shared_map(lambda text: encoded.append(text) or encode(text), texts)  # type: ignore[func-returns-value]

    options = {"seq_len": 16, "batch_size": 4, "epoch_batches": 80, "buffer": 8}
    stream = StreamBatches(_Rows(), tokenizer, eos=None, encode_all=encode_all, **options)
    found = [float((batch.x * torch.arange(1, 17)).sum()) for batch in stream]
    assert stream.passes
    assert len(encoded) <= 600 / processes() + 4, "no process encodes more than its share"
    return {"batches": found, "weights": [1.0]}


TRAININGS: dict[str, Callable[[], dict[str, list[float]]]] = {
    **{
        name: lambda config=config, layers=layers: curve(config, new_model(layers), windows())  # type: ignore[misc]
        for name, (config, layers) in STRATEGIES.items()
    },
    "examples": _examples,
    "quantiles": _quantiles,
    "stream": _stream,
    "memory": lambda: curve(STRATEGIES["standard"][0], new_model(2, memory_orders=(2,), memory_rows=64), windows()),
    "micro-batches": lambda: curve(STRATEGIES["ashem"][0], new_model(1), windows(), batch_tokens=256),
    **{f"{name}, sharded": lambda name=name: _sharded(name) for name in ("growth", "gated", "ashem", "tune")},  # type: ignore[misc]
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start(number: int, module: str, *args: str, folders: Sequence[Path] = ()) -> list[subprocess.Popen[str]]:
    """Starts a module in as many processes as torchrun would, each with one thread, and in a folder of its own."""
    shared = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)])
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            env=os.environ | {name: str(value) for name, value in shared.items()} | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[rank] if folders else None,
        )
        for rank in range(number)
    ]


def ended(running: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[tuple[int, str, str]]:
    """Exit status, output, and errors of each process."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, outputs, strict=True)]


def main(out: str, *names: str) -> None:
    """Runs the named trainings in one group of processes and writes what they give; continues that of `out`."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        if Path(out).is_dir():
            for _ in range(2):  # the second time from parts
                interrupted("ashem", Path(out), "phase 2", 2)
        found = {name: TRAININGS[name]() for name in names or TRAININGS}
        Path(out).with_suffix(f".{process()}-of-{processes()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
