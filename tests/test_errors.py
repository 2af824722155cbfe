"""The checks that configurations and public functions share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ease
from ease import EaseError
from ease.errors import checked
from ease.hf.model import EaseForCausalLM
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


IDS = torch.arange(8).view(1, 8)
BATCHES = [(IDS, IDS)]
POLICY, TARGET = ease.Policy((1,), (0.5,)), ease.Target("min_agreement", 0.5)
WRONG_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "continue with a name": (lambda model: ease.generate("x", IDS, 2), "model must be a StandardTransformer"),
    "continue with a wrapped model": (
        lambda model: ease.generate(EaseForCausalLM.wrap(model), IDS, 2),
        "pass its model",
    ),
    "stream to 3": (lambda model: ease.generate(model, IDS, 2, stream=3), "stream must be callable"),
    "a seed without a draw": (
        lambda model: ease.generate(model, IDS, 2, seed=3),
        "seed have no effect at temperature 0",
    ),
    "route a name": (lambda model: ease.route("x", IDS), "model must be an ExitModel, got str"),
    "route a wrapped model": (lambda model: ease.route(EaseForCausalLM.wrap(model), IDS), "pass its model"),
    "route by a name": (lambda model: ease.route(model, IDS, policy="x"), "policy must be a Policy, got str"),
    "confidence of a name": (lambda model: ease.compute_confidence(model, "x"), "hidden_state must be a floating"),
    "score a name": (lambda model: ease.score("x", BATCHES), "model must be an ExitModel"),
    "score by a name": (lambda model: ease.score(model, BATCHES, "x"), "policy must be a Policy"),
    "score on a device": (lambda model: ease.score(model, BATCHES, device="bad"), "no device 'bad' on this machine"),
    "metrics of a name": (lambda model: ease.score(model, BATCHES).metrics("x"), "hard must hold 1 for tokens"),
    "calibrate a name": (lambda model: ease.calibrate("x", POLICY, TARGET, *[BATCHES] * 3), "model must be an ExitM"),
    "calibrate to a name": (
        lambda model: ease.calibrate(model, POLICY, "x", *[BATCHES] * 3),
        "target must be a Target",
    ),
    "calibrate on 3": (
        lambda model: ease.calibrate(model, POLICY, TARGET, 3, BATCHES, BATCHES),
        "propose must be an I",
    ),
    "save a name": (lambda model: ease.save_pretrained("x", "folder"), "model must be a StandardTransformer"),
    "save in 3": (lambda model: ease.save_pretrained(model, 3), "folder must be a string"),
    "save with 3": (lambda model: ease.save_pretrained(model, "folder", tokenizer=3), "tokenizer must be a Tokenizer"),
    "load 3": (lambda model: ease.load_corpus(3), "source must be a string"),
    "load with 3": (lambda model: ease.load_corpus("stdlib", 3), "tokenizer must be a string"),
    "an unknown keyword": (lambda model: ease.DeepSupervisionTransformer(8, width=3), "Transformer has no width: it"),
    "an unknown field": (lambda model: ease.Policy.of(1, 0.5, measure="margin"), "a policy has no measure: it has"),
    "learn from a name": (lambda model: ease.learn_agreement("x", BATCHES, (1,)), "model must be a StandardTr"),
    "mine a name": (lambda model: ease.MinedBatches("x", BATCHES, POLICY, 0.5), "model must be an ExitModel"),
    "mine on a device": (
        lambda model: ease.collect_hard_examples(model, BATCHES, 0.5, device="bad"),
        "no device 'bad'",
    ),
    "train on a device": (lambda model: ease.Trainer(ease.create_standard_config(2), 8, "bad"), "no device"),
    "train a name": (lambda model: ease.train("x", ease.ASHEMConfig().strategy(), ease.Data([], [])), "model must be"),
    "train by a configuration": (
        lambda model: ease.train(model, ease.ASHEMConfig(), ease.Data([], [])),
        r"strategy must have next_phase, got ASHEMConfig: of a configuration, pass its strategy\(\)",
    ),
    "train on a tuple": (
        lambda model: ease.train(model, ease.ASHEMConfig().strategy(), ([], [])),
        "data must be a Data",
    ),
    "wrap a name": (lambda model: EaseForCausalLM.wrap("x"), "model must be a StandardTransformer"),
    "keep a name": (
        lambda model: EaseForCausalLM.wrap(model)(IDS, logits_to_keep="x"),
        "logits_to_keep must be an int",
    ),
    "keep a column that is not there": (
        lambda model: EaseForCausalLM.wrap(model)(IDS, logits_to_keep=torch.tensor([8])),
        "logits_to_keep must lie below 8",
    ),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_of_public_functions_are_one_sentence(name: str) -> None:
    call, message = WRONG_ARGUMENTS[name]
    with pytest.raises(EaseError, match=message):
        call(ease.DeepSupervisionTransformer(8, 8, 2, 2))


def test_arguments_of_any_allowed_type_pass() -> None:
    @checked
    def function(
        path: str | os.PathLike[str], exits: int | Sequence[int], call: Callable[[], None] | None, ids: torch.Tensor
    ) -> int:
        return 3

    assert function(Path("a"), np.int64(2), None, [1]) == function("a", (2, 3), print, ids=torch.zeros(1)) == 3  # type: ignore[arg-type]


def test_a_policy_of_arrays_holds_plain_numbers() -> None:
    policy = ease.Policy(np.array([1, 2]), np.array([0.5, 0.75]))  # type: ignore[arg-type]
    assert policy == ease.Policy((1, 2), (0.5, 0.75))
    assert all(type(exit) is int for exit in policy.exits)
