"""Optimizer steps: accumulation over micro-batches, steps that are skipped, and resuming both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ease import (
    EaseError,
    Execution,
    Layout,
    Phase,
    PhaseOptions,
    StageConfig,
    StandardTransformer,
    Trainer,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
)
from ease.interface import Batch
from ease.progress import Progress
from ease.training import checkpoint
from ease.training.engine import MAX_SKIPPED
from ease.training.losses import Distillation

Make = Callable[..., StandardTransformer]
Pair = tuple[Tensor, Tensor]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: torch.nn.Module, other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def pairs(count: int, B: int = 4, T: int = 8, ignored: float = 0.0) -> list[Pair]:
    torch.manual_seed(5)
    ids = [torch.randint(256, (B, T)) for _ in range(count)]
    return [(x, x.roll(-1, 1).masked_fill(torch.rand(B, T) < ignored, -100)) for x in ids]


def phase(train: Any, config: TrainingConfig | None = None, **options: Any) -> Phase:
    options = {"max_epochs": 2, "patience": None, "lr": 1e-2, "schedule": "cosine", "warmup": 0.2} | options
    return Phase("one", config or create_standard_config(2), train, pairs(1), PhaseOptions(**options))


class Spoilt(Trainer):
    """A trainer whose loss is NaN in the calls with a number in `bad`, counted from 1."""

    bad: Any = ()
    calls = 0

    def compute_loss(self, *args: Any, **options: Any) -> Tensor:
        loss = super().compute_loss(*args, **options)
        self.calls += 1
        return loss * math.nan if self.calls in self.bad else loss


# Steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny: Make) -> None:
    model, batches = tiny(2), pairs(6)
    trainer = Spoilt(create_standard_config(2), 256)
    trainer.bad = (3, 4, 8)
    history = trainer.run(model, phase(batches))
    assert (history.steps, history.skipped) == (9, 3)
    assert [row["skipped"] for row in history.rows] == [2, 3]
    assert all(math.isfinite(row["train_loss"]) for row in history.rows)
    assert history.rows[-1]["lr"] == pytest.approx(1e-2 * 0.05)  # the schedule is that of the batches
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_weights_and_optimizer_do_not_change_in_a_skipped_step(where: str, tiny: Make) -> None:
    model, trainer = tiny(2), Spoilt(create_standard_config(2), 256)
    optimizer = trainer.create_optimizer(model, 1e-2)
    trainer.train_epoch(model, pairs(1), optimizer)
    before, state = weights(model), repr(optimizer.state_dict())
    if where == "loss":
        trainer.bad = range(100)
    else:
        model.layers[0].ffn.up_proj.weight.register_hook(lambda g: g * math.inf)
    assert math.isnan(trainer.train_epoch(model, pairs(2), optimizer))
    assert same(model, before)
    assert repr(optimizer.state_dict()) == state


def test_skipping_ends_after_so_many_in_a_row(tiny: Make) -> None:
    model, trainer = tiny(2), Spoilt(create_standard_config(2), 256)
    trainer.bad = {*range(2, MAX_SKIPPED + 1), *range(MAX_SKIPPED + 2, 1000)}  # nine in a row are allowed
    with pytest.raises(
        EaseError, match=rf"in {MAX_SKIPPED} steps in a row the loss is nan: .* lower the learning rate"
    ):
        trainer.run(model, phase(pairs(7), max_epochs=9))
    assert trainer.calls == 2 * MAX_SKIPPED + 1


# Accumulation


def masked(B: int, T: int) -> list[Batch]:
    """Batches that differ in how many of their tokens are scored, with padding."""
    lengths = torch.arange(2, 2 + B)
    made = []
    for i, (x, y) in enumerate(pairs(8, B, T, ignored=0.3)):
        layout = Layout.from_attention_mask(torch.arange(T) < (lengths + i % 3)[:, None])
        made.append(Batch(x, y.masked_fill(torch.rand(B, 1) < 0.1 * i, -100), layout=layout))
    return made


def joined(batches: list[Batch], number: int) -> list[Batch]:
    """The same rows in batches that are `number` times larger."""
    groups = [batches[i : i + number] for i in range(0, len(batches), number)]
    made = []
    for group in groups:
        layouts = [batch.layout for batch in group if batch.layout is not None]
        layout = Layout(*(torch.cat([getattr(part, name) for part in layouts]) for name in ("positions", "segments")))
        made.append(Batch(torch.cat([b.x for b in group]), torch.cat([b.y for b in group]), layout=layout))
    return made


@pytest.mark.parametrize(
    "config",
    [
        create_standard_config(3),
        create_deep_supervision_config(3),
        TrainingConfig([StageConfig((1, 3))], objective=Distillation(2.0, 0.5)),
    ],
    ids=["standard", "deep supervision", "distillation"],
)
@pytest.mark.parametrize("number", [2, 3])  # 3 does not divide the 8 batches of the epoch
def test_accumulation_is_one_large_batch(number: int, config: TrainingConfig, tiny: Make) -> None:
    small, ended, models = masked(4, 8), [], []
    for batches, execution in ((joined(small, number), Execution()), (small, Execution(batch_tokens=number * 32))):
        model = tiny(3).double()
        trainer = Trainer(config, 256, execution=execution)
        ended.append(trainer.run(model, phase(batches, config, schedule="constant", warmup=0.0)))
        models.append(weights(model))
    large, accumulated = ended
    assert accumulated.steps == large.steps == 2 * math.ceil(8 / number)
    for column in ("train_loss", "val_loss"):
        assert accumulated.column(column) == pytest.approx(large.column(column), rel=1e-12)
    assert sum(accumulated.flops.values()) == pytest.approx(sum(large.flops.values()), rel=1e-12)
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-8, atol=1e-10)


def test_one_batch_is_never_split_and_the_default_is_a_step_per_batch(tiny: Make) -> None:
    ends = []
    for tokens in (None, 1, 32):
        model = tiny(2)
        history = Trainer(create_standard_config(2), 256, execution=Execution(batch_tokens=tokens)).run(
            model, phase(pairs(3))
        )
        ends.append((history.steps, weights(model)))
    assert [steps for steps, _ in ends] == [6, 6, 6]
    assert all(torch.equal(value, end[name]) for _, end in ends for name, value in ends[0][1].items())


# Resuming


class Killed(BaseException):
    pass


class Killer(Progress):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, fraction: float, loss: float = 0.0) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def test_a_killed_run_resumes_in_the_middle_of_skipped_steps(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    execution = Execution(batch_tokens=64)  # two batches a step

    def live(folder: str, kills: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        for kill in [*kills, 10**6]:
            model = tiny(2, dropout=0.1)
            trainer = Spoilt(create_standard_config(2), 256, execution=execution)
            trainer.bad = (5, 7, 8, 12)  # steps 3 to 5 of the 8, and one of the last
            path = tmp_path / folder / "phase.safetensors"
            trainer.calls = checkpoint.read_state(path)["batches"] if path.exists() else 0
            torch.manual_seed(3)
            try:
                history = trainer.run(model, phase(pairs(7)), Killer(kill), path)
            except Killed:
                continue
        told = asdict(history) | {"seconds": 0}
        for row in told["rows"]:
            del row["seconds"]
        return weights(model), told

    whole, history = live("whole", [])
    again, told = live("killed", [3, 2, 2])
    assert history["skipped"] == 4
    assert told == history
    assert all(torch.equal(whole[name], again[name]) for name in whole)


class Broken:
    """Batches of which one cannot be read until it is mended."""

    def __init__(self, batches: list[Pair], at: int) -> None:
        self.batches, self.at = batches, at

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Pair]:
        for i, batch in enumerate(self.batches):
            if i == self.at:
                raise EaseError("this batch cannot be read")
            yield batch


def test_data_that_cannot_be_read_within_a_step_loses_no_batch(tiny: Make, tmp_path: Path) -> None:
    execution, path, ends = Execution(batch_tokens=96), tmp_path / "phase.safetensors", []
    for file, breaks in ((None, -1), (path, 4), (path, -1)):  # the batch in the middle of the second step
        model = tiny(2)
        trainer = Trainer(create_standard_config(2), 256, execution=execution)
        broken = breaks >= 0
        with pytest.raises(EaseError, match="cannot be read") if broken else nullcontext():
            trainer.run(model, phase(Broken(pairs(7), breaks)), checkpoint=file)
        if not broken:
            ends.append(weights(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_of_another_step_size_or_precision_is_refused(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "phase.safetensors"
    for execution in (Execution(), Execution(batch_tokens=64), Execution(precision="bf16")):
        trainer = Trainer(create_standard_config(2), 256, execution=execution)
        if execution == Execution():
            trainer.run(tiny(2), phase(pairs(2)), checkpoint=path)
            continue
        with pytest.raises(EaseError, match="belongs to a training with another configuration"):
            trainer.run(tiny(2), phase(pairs(2)), checkpoint=path)
