"""Scheduling of lines: equal budgets, the same order of text, choices on validation, no result lost or made twice."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from experiments.harness.candidates import Candidate, candidates, compared
from experiments.harness.lab import Lab
from experiments.harness.line import Line, grow, make
from experiments.harness.scheduler import LOADED, Scheduler, with_lab

BUDGET = 6e8


def make_lab(text: torch.Tensor, **settings: Any) -> Lab:
    third = len(text) // 3
    splits = {"train": text[:third], "val": text[third : 2 * third], "test": text[2 * third :]}
    sizes = {"brick": 1, "depth": 2, "budget": BUDGET, "lrs": (1e-2, 2e-2), "dim": 16, "seq": 16, "batch": 8}
    ends = {"epoch_batches": 6, "eval_batches": (2, 2)}
    return Lab(splits, "three modules", 256, **{**sizes, **ends, **settings})


SHALLOW = make(ease.StandardConfig, num_layers=1)
LINES = {
    "phase 1": Line(SHALLOW, share=0.6),
    "standard, 2 layers": Line(make(ease.StandardConfig, num_layers=2)),
    "continued": Line(SHALLOW, on="phase 1"),
    "ASHEM": Line(grow(2), on="phase 1", thresholds=(0.9,)),
    "early exit": Line(make(ease.EarlyExitConfig, num_layers=2, exit_layer=1, routing_threshold=0.0)),
    "growth": Line(make(ease.GrowthConfig, layers=(1, 2))),
}


@pytest.fixture
def schedule(text: torch.Tensor, tmp_path: Path) -> Callable[..., Scheduler]:
    """Makes a scheduler in the test's folder."""

    def make_scheduler(chosen: dict[str, Line] | None = None, **settings: Any) -> Scheduler:
        return Scheduler(partial(make_lab, text, **settings), LINES if chosen is None else chosen, tmp_path)

    return make_scheduler


def train_all(scheduler: Scheduler, seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """Train everything that is due."""
    rows = []
    while todo := scheduler.status(seeds).todo:
        rows.append(scheduler.train(todo[0]))
        scheduler.store(rows[-1])
    return rows


@pytest.fixture
def no_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lab: Lab) -> None:
        raise AssertionError("training reads the test split")

    monkeypatch.setattr(Lab, "test", property(refuse))


@pytest.mark.usefixtures("no_test_split")
def test_every_line_spends_the_same_and_never_sees_the_test_split(schedule: Callable[..., Scheduler]) -> None:
    made = schedule()
    rows = train_all(made)
    done = made.status([0]).done
    assert {name for name, _ in done} == set(LINES)
    for name, line in LINES.items():
        spent = done[name, 0]["flops"]
        # A phase ends on a whole step and a validation pass, a few hundredths of this budget each.
        assert spent == pytest.approx(line.share * BUDGET, rel=0.12), name
    base = done["phase 1", 0]
    for name in ("continued", "ASHEM"):
        assert done[name, 0]["flops"] == pytest.approx(base["flops"] + sum(done[name, 0]["flops_by"].values()))
    assert all(row["memory"] > 0 for row in rows)


def test_a_line_continues_the_text_where_the_line_before_stopped(
    schedule: Callable[..., Scheduler], monkeypatch
) -> None:
    read: list[list[torch.Tensor]] = []
    batches = ease.TokenBatches._batches

    def watched(self: ease.TokenBatches, first: int) -> Any:
        if self.shuffle:
            read.append([])
        for x, y in batches(self, first):
            if self.shuffle:
                read[-1].append(x)
            yield x, y

    monkeypatch.setattr(ease.TokenBatches, "_batches", watched)
    made = schedule({name: LINES[name] for name in ("phase 1", "continued", "ASHEM")}, lrs=(1e-2,))
    orders = []
    for _ in range(3):
        read.clear()
        made.store(made.train(made.status([0]).todo[0]))
        orders.append([list(epoch) for epoch in read])
    base, continued, mined = orders
    lab = made.lab
    stream = lab.train(0)
    epochs = [[x for x, _ in stream] for _ in range(len(base) + 1)]
    assert all(torch.equal(a, b) for epoch, seen in zip(epochs, base) for a, b in zip(epoch, seen))
    assert torch.equal(continued[0][0], epochs[len(base)][0])
    assert torch.equal(mined[0][0], epochs[len(base)][0]), "growth mines what the line continued trains on"


def test_learning_rates_are_chosen_with_the_first_seed_on_validation(schedule: Callable[..., Scheduler]) -> None:
    made = schedule({"phase 1": LINES["phase 1"]})
    first = made.status([0, 1]).todo
    assert [(task.seed, task.lr) for task in first] == [(0, 1e-2), (0, 2e-2)]
    for task, loss in zip(first, (3.0, 2.0), strict=True):
        made.store({"key": task.key, "lr": task.lr, "val": {"loss": loss}})
    state = made.status([0, 1])
    assert state.done["phase 1", 0]["lr"] == 2e-2
    assert [(task.seed, task.lr) for task in state.todo] == [(1, 2e-2)], "the other seeds use the chosen learning rate"
    # Another rate adds a trial and keeps the existing ones.
    more = schedule({"phase 1": LINES["phase 1"]}, lrs=(1e-2, 2e-2, 4e-2))
    assert [(task.seed, task.lr) for task in more.status([0, 1]).todo] == [(0, 4e-2)]
    without = schedule({"phase 1": replace(LINES["phase 1"], rates=False)})
    assert len(without.status([0, 1]).todo) == 1, "a line without a learning rate is trained once per seed"


def test_a_changed_line_is_trained_again_and_no_other(schedule: Callable[..., Scheduler]) -> None:
    some = {"phase 1": LINES["phase 1"], "ASHEM": LINES["ASHEM"]}
    made = schedule(some, lrs=(1e-2,))
    train_all(made)
    assert not made.status([0]).todo
    changed = schedule({**some, "ASHEM": Line(grow(2, hard_example_ratio=0.3), on="phase 1")}, lrs=(1e-2,))
    assert [task.line for task in changed.status([0]).todo] == ["ASHEM"]
    renamed = schedule({"the first": LINES["phase 1"]}, lrs=(1e-2,))
    assert renamed.status([0]).done["the first", 0]["line"] == "the first"
    sizes = schedule(some, lrs=(1e-2,), dim=32)
    assert [task.line for task in sizes.status([0]).todo] == ["phase 1"], "its phase 1 changes, too"


def test_a_key_depends_on_the_line_it_starts_from_and_on_its_text(schedule: Callable[..., Scheduler]) -> None:
    part = replace(LINES["continued"], part=(0.5, 1.0))
    made = schedule({**LINES, "on a part": part, "wide": replace(LINES["phase 1"], shape={"dropout": 0.1})})
    base = {"phase 1": {"key": "a", "flops": 3e8}}
    other = {"phase 1": {"key": "b", "flops": 3e8}}
    named = [("continued", base), ("continued", other), ("on a part", base), ("phase 1", {}), ("wide", {})]
    keys = {made.task(name, 0, 1e-2, {(on, 0): row for on, row in rows.items()}).key for name, rows in named}
    assert len(keys) == len(named)


def test_the_identity_of_a_lab_is_fixed(text: torch.Tensor) -> None:
    lab = make_lab(text, pieces=("a",))
    identity = {"corpus": "three modules", "vocab_size": 256, "brick": 1, "depth": 2, "budget": BUDGET, "dim": 16}
    identity |= {
        "seq": 16,
        "batch": 8,
        "epoch_batches": 6,
        "eval_batches": [2, 2],
        "kind": "Lab",
        "text": {},
        "lrs": [],
    }
    assert lab.identity() == identity | {"hash": lab.hash}, "otherwise every stored row would be trained again"


def test_a_row_cut_short_by_a_kill_is_ignored_and_later_ones_are_kept(schedule: Callable[..., Scheduler]) -> None:
    made = schedule()
    made.folder.mkdir(exist_ok=True)
    made.store({"key": "one"})
    with (made.folder / "rows.jsonl").open("a") as file:
        file.write('{"key": "tw')
    assert set(made.rows()) == {"one"}
    made.store({"key": "three"})
    assert set(made.rows()) == {"one", "three"}


def test_a_failed_training_is_stored_and_never_chosen(schedule: Callable[..., Scheduler]) -> None:
    made = schedule({"phase 1": LINES["phase 1"]}, lrs=(1e-2, 1e18))
    rows = train_all(made)
    assert "lower the learning rate" in rows[1]["failed"]
    assert made.status([0]).done["phase 1", 0]["lr"] == 1e-2
    only = schedule({"phase 1": LINES["phase 1"]}, lrs=(1e18,))
    assert not only.status([0]).todo
    assert only.missing([0]) == ["phase 1 (failed)"]


def test_a_stored_model_is_loaded_unchanged(schedule: Callable[..., Scheduler]) -> None:
    made = schedule({name: LINES[name] for name in ("phase 1", "ASHEM")}, lrs=(1e-2,))
    train_all(made)
    row = made.status([0]).done["ASHEM", 0]
    model = made.model(row)
    assert (model.num_layers, model.trained_exits, row["exits"]) == (2, {1, 2}, [1])
    full = next(point for point in row["sweep"] if not point["exits"])
    assert ease.score(model, made.lab.val).metrics()["loss"] == pytest.approx(full["val"]["loss"])


def test_exits_that_later_training_changed_are_not_used(schedule: Callable[..., Scheduler]) -> None:
    made = schedule({"growth": LINES["growth"], "early exit": LINES["early exit"]}, lrs=(1e-2,))
    rows = {row["line"]: row for row in train_all(made)}
    assert rows["growth"]["exits"] == [], "its first phase trained exit 1, and the second moved on without it"
    assert rows["early exit"]["exits"] == [1]


def test_learning_rates_are_compared_where_half_of_the_tokens_continue() -> None:
    points = [c._asdict() | {"exits": list(c.exits)} for c in candidates([1, 2], [0.9])]
    assert Candidate.of(compared(points, [1, 2])) == Candidate((1,), 0.5)
    assert Candidate.of(compared(points[:1], [])) == Candidate()
    assert [c.threshold for c in candidates([1, 2], [0.9])][-1] == 0.9
    assert not any(c.exits for c in candidates([], [0.9])), "no exit, no threshold"
    assert [c.share for c in candidates([1, 2], (), (0.0, 0.9)) if c.exits] == [0.0, 0.9, 0.0, 0.9, 0.9]


def test_a_scheduler_is_sent_to_workers_without_its_lab(schedule: Callable[..., Scheduler]) -> None:
    made = schedule()
    assert made.lab is made.lab
    assert "lab" not in vars(made.without_lab)
    LOADED.clear()
    assert with_lab(made) is with_lab(made.without_lab)
    other = replace(made, folder=made.folder / "other")
    assert with_lab(other) is other
    assert list(LOADED) == [other.folder], "a worker holds one lab at a time"


def test_a_line_takes_over_the_learning_rate_of_another(schedule: Callable[..., Scheduler]) -> None:
    made = schedule({"half": Line(SHALLOW, share=0.5), "whole": Line(SHALLOW, rate_of="half")})
    first = made.status([0, 1]).todo
    assert {task.line for task in first} == {"half"}, "the rate is not chosen yet"
    for task, loss in zip(first, (3.0, 2.0), strict=True):
        made.store({"key": task.key, "lr": task.lr, "val": {"loss": loss}})
    due = [task for task in made.status([0, 1]).todo if task.line == "whole"]
    assert [(task.seed, task.lr) for task in due] == [(0, 2e-2)]
    made.store({"key": due[0].key, "lr": 2e-2, "val": {"loss": 1.0}})
    due = [task for task in made.status([0, 1]).todo if task.line == "whole"]
    assert [(task.seed, task.lr) for task in due] == [(1, 2e-2)]
