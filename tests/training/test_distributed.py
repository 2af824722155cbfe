"""Training in several processes: the curves of one process, for every strategy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data_processes
import pytest
from data_processes import STRATEGIES, TRAININGS, curve, interrupted, new_model, windows

from ease.strategies import STRATEGIES as LISTED

# Sums are taken in another order, by which single tokens may change sides at a threshold.
TOLERANCE = 2e-4

# FLOPs that depend on how a batch is divided: a process keeps trunk states up to a budget of its own, one without a row
# runs one that is not scored, and the sample that a classifier learns from is rounded up in each.
INEXACT_FLOPS = ("staged", "examples")


def run_in(number: int, folder: Path, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each process of a group gives."""
    started = data_processes.start(number, "data_processes", str(folder / "found"), *names)
    for status, _, errors in data_processes.ended(started):
        assert status == 0, errors[-2000:]
    return [json.loads((folder / f"found.{rank}-of-{number}.json").read_text()) for rank in range(number)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All trainings in two processes, and the middle of one that one process has begun."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "found").mkdir()
    interrupted("ashem", folder / "found", "phase 1", 2)
    return [{**found, "folder": folder / "found"} for found in run_in(2, folder)]


def assert_same(name: str, found: Sequence[dict[str, Any]]) -> None:
    one = TRAININGS[name]()
    for process in found:
        assert process[name]["weights"] == found[0][name]["weights"], "the processes have the same weights"
        for key, expected in one.items():
            if key == "flops" and name in INEXACT_FLOPS:
                continue
            assert process[name][key] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), key


def test_every_strategy_is_tried() -> None:
    assert {type(config).name for config, _ in STRATEGIES.values()} == set(LISTED)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_give_the_curve_of_one(name: str, two: list[dict[str, Any]]) -> None:
    assert_same(name, two)


def test_a_training_goes_on_with_another_number_of_processes(two: list[dict[str, Any]]) -> None:
    # One process began phase 1; two ended it, mined, and began phase 2; one ends it.
    config, layers = STRATEGIES["ashem"]
    resumed = curve(config, new_model(layers), windows(), two[0]["folder"])
    for key, expected in TRAININGS["ashem"]().items():
        assert resumed[key] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), key


def test_four_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    names = ("early-exit", "gated", "ashem", "examples")
    found = run_in(4, tmp_path, names)
    for name in names:
        assert_same(name, found)
