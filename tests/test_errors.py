"""The checks that configurations share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import ease
from ease import EaseError
from ease.runs.config import DataConfig, RunConfig, ShapeConfig
from ease.strategies import STRATEGIES


@pytest.mark.parametrize("kind", [*STRATEGIES.values(), DataConfig, ShapeConfig], ids=lambda kind: kind.__name__)
def test_every_field_of_a_configuration_refuses_another_type(kind: Callable[..., Any]) -> None:
    for field in fields(kind):  # type: ignore[arg-type]
        with pytest.raises(EaseError) as error:
            kind(**{field.name: object()})
        assert "\n" not in str(error.value)
        assert field.name in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ease.StageConfig((1, 2), loss_weight="x"), "loss_weight must be a number"),  # type: ignore[arg-type]
        (lambda: ease.TrainingConfig(layer_weights=[1]), "layer_weights must be a dictionary"),  # type: ignore[arg-type]
        (lambda: ease.TrainingConfig(layer_weights={"1": 1.0}), "a key of layer_weights must be an integer"),  # type: ignore[dict-item]
        (lambda: ease.TrainingConfig([(1, 2)]), "an element of stages must be a StageConfig"),  # type: ignore[list-item]
        (lambda: ease.StagedConfig(phases=(1, 2)), "an element of phases must be a PhaseConfig"),  # type: ignore[arg-type]
        (lambda: RunConfig(ease.ASHEMConfig(), compare_layers=("2",)), "compare_layers must be an integer"),  # type: ignore[arg-type]
        (lambda: ease.Target("min_agreement", "x"), "min_agreement must be a number"),  # type: ignore[arg-type]
        (lambda: ease.Policy("1", (0.5,)), "exit_layer must be a list"),  # type: ignore[arg-type]
        (lambda: ease.Policy.of(1, "0.5"), "routing_threshold must be a list"),  # type: ignore[arg-type]
        (lambda: ease.Trainer("x", 5), "config must be a TrainingConfig"),  # type: ignore[arg-type]
        (lambda: ease.TokenBatches(list(range(9)), 2.5, 1), "seq_len must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_one_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(EaseError, match=message):
        make()


def test_a_policy_of_arrays_holds_plain_numbers() -> None:
    policy = ease.Policy(np.array([1, 2]), np.array([0.5, 0.75]))  # type: ignore[arg-type]
    assert policy == ease.Policy((1, 2), (0.5, 0.75))
    assert all(type(exit) is int for exit in policy.exits)
