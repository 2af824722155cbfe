"""Damaged checkpoints of unfinished training: it ends with the same bits, or is refused in one sentence."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data_damage import DAMAGES, damage

from ease import ASHEMConfig, Data, StandardTransformer, TokenBatches, train
from ease.errors import EaseError
from ease.progress import Progress, StepMetrics
from ease.runs.config import DataConfig, RunConfig, ShapeConfig
from ease.runs.runner import run


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


class Killer(Progress):
    """Kills after a number of training steps."""

    def __init__(self, steps: float = math.inf) -> None:
        self.steps = steps

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.steps -= metrics is not None  # mining has none
        if self.steps < 0:
            raise Killed


def train_phases(folder: Path, text: torch.Tensor, steps: float = math.inf) -> object:
    """Two phases of ASHEM with checkpoints in `folder`; returns all that training decides."""
    torch.manual_seed(0)
    model = StandardTransformer(256, 16, 2, 2, dropout=0.1)
    strategy = ASHEMConfig(phase1_max_epochs=2, phase2_max_epochs=2, schedule="cosine").strategy()
    train_batches = TokenBatches(text[:4000], 16, 4, shuffle=True, max_batches=5)
    data = Data(train_batches, TokenBatches(text[4000:], 16, 4, max_batches=2))
    killer = Killer(steps)
    rows = [h.rows for _, h in train(model, strategy, data, progress=lambda _: killer, checkpoints=folder)]
    for row in (row for phase in rows for row in phase):
        del row["seconds"]
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return rows, weights, strategy.policy(), torch.get_rng_state().tolist()


def train_run(folder: Path, text_file: Path, steps: float = math.inf) -> object:
    """A run whose unfinished folder is in `folder`; returns the figures and the weights of the finished one."""
    config = RunConfig(
        ASHEMConfig(phase1_max_epochs=2, phase2_max_epochs=2, schedule="cosine"),
        "tiny",
        ShapeConfig(16, 2, dropout=0.1),
        DataConfig(str(text_file), "byte", seq_len=16, batch_size=4, epoch_batches=5, eval_batches=3),
        compare=(),
    )
    killer, out = Killer(steps), folder / "run"
    run(config, out, progress=lambda _: killer)
    lines = json.loads((out / "summary.json").read_text())["lines"]
    figures = [{name: value for name, value in line["test"].items() if name != "seconds"} for line in lines]
    content = figures, (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    return content


def damaged_resumes(train_in: Callable[..., object], steps: int, count: int, folder: Path) -> Counter[str]:
    """Resumes from `count` damaged copies of the files that a kill after `steps` steps left; counts the outcomes."""
    whole = train_in(folder / "whole")
    with suppress(Killed):
        train_in(folder / "killed", steps=steps)
    names = sorted(f.relative_to(folder / "killed") for f in (folder / "killed").rglob("*") if f.is_file())
    assert sum(name.suffix == ".safetensors" for name in names) == 4
    rng, outcomes = random.Random(0), Counter[str]()
    for i in range(count):
        copy = Path(shutil.copytree(folder / "killed", folder / "copy"))
        done, message = [], ""
        for name in rng.sample(names, rng.choice((1, 1, 2))):
            if rng.random() < 0.1:
                (copy / name).unlink()
                done.append(f"{name} deleted")
            else:
                done.append(f"{name} {damage(copy / name, rng)}")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                again, outcome = train_in(copy), "resumed with a warning" if told else "resumed"
            except EaseError as error:
                again, outcome, message = whole, "refused", str(error)
            except BaseException as error:
                raise AssertionError(f"damage {i}: {done}") from error
        assert again == whole, (i, done)
        assert len(message.splitlines()) <= 1, (i, done)
        outcomes[outcome] += 1
        assert all("training resumes from the checkpoint before it" in str(each.message) for each in told), (i, done)
        shutil.rmtree(copy)
    return outcomes


@pytest.fixture
def unfinished(text: torch.Tensor, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("ease.training.checkpoint.EVERY", 0.0)
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    return {"phases": partial(train_phases, text=text), "unfinished run": partial(train_run, text_file=text_file)}


@pytest.mark.parametrize(("kind", "count"), [("phases", 20), ("unfinished run", 14)])
def test_damaged_checkpoints_give_the_same_training_or_are_refused(
    kind: str, count: int, unfinished: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = damaged_resumes(unfinished[kind], 15, count, tmp_path)
    assert outcomes["resumed with a warning"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phases", "unfinished run"])
def test_many_damaged_checkpoints_give_the_same_training_or_are_refused(
    kind: str, unfinished: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = damaged_resumes(unfinished[kind], 15, DAMAGES, tmp_path)
    print(f"{kind}: of {DAMAGES}, {', '.join(f'{n} {what}' for what, n in sorted(outcomes.items()))}")
    assert min(outcomes.values()) > DAMAGES // 20
