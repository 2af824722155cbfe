"""Progressive growth: phases of growing depth on all tokens under one schedule, and everything learning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, GrowthConfig, Policy, StandardTransformer, train
from ease.training.config import PhaseOptions

Make = Callable[..., StandardTransformer]


def plan(**options: Any) -> GrowthConfig:
    return GrowthConfig(**{"layers": (1, 2, 4), "lr": 5e-3, "patience": None, "max_epochs": 6} | options)


def test_every_phase_is_deeper_and_learns_with_all_layers(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model, strategy = text_data(8, 2), tiny(1), plan().strategy()
    runs, weights = [], []
    for phase, history in train(model, strategy, data):
        runs.append((phase, history))
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert [phase.name for phase, _ in runs] == ["phase 1", "phase 2", "phase 3"]
    assert [phase.config.weights for phase, _ in runs] == [{1: 1.0}, {2: 1.0}, {4: 1.0}]
    assert all((phase.train, phase.val, phase.first) == (data.train, data.val, 0) for phase, _ in runs)
    assert [phase.options.max_epochs for phase, _ in runs] == [1, 2, 3], "in proportion to depth"
    losses = [history.rows[-1]["val_loss"] for _, history in runs]
    assert losses == sorted(losses, reverse=True)
    for before, after in zip(weights, weights[1:]):
        moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
        assert {"embedding", "layers", "output_head"} <= moved
        assert not torch.equal(before["layers.0.ffn.up_proj.weight"], after["layers.0.ffn.up_proj.weight"])
    assert all(p.requires_grad for p in model.parameters())
    assert strategy.policy() == Policy()
    assert strategy.next_phase(model, data) is None


@pytest.mark.parametrize("grow_init", ["copy", "identity"])
def test_new_layers_start_as_copies_of_the_trained_ones(
    grow_init: Any, tiny: Make, text_data: Callable[..., Data]
) -> None:
    data, model = text_data(2, 1), tiny(2)
    strategy = plan(layers=(2, 4), grow_init=grow_init).strategy()
    strategy.next_phase(model, data)
    strategy.next_phase(model, data)
    copies = [
        torch.equal(model.layers[i].ffn.down_proj.weight, model.layers[i + 2].ffn.down_proj.weight) for i in (0, 1)
    ]
    assert copies == [grow_init == "copy"] * 2


def test_exits_keep_a_loss_where_they_have_a_weight(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model, strategy = text_data(6, 1), tiny(1), plan(exit_weight=0.4, routing_threshold=0.15).strategy()
    runs = list(train(model, strategy, data))
    weights = [phase.config.weights for phase, _ in runs]
    assert weights[0] == {1: 1.0}
    assert weights[1] == pytest.approx({1: 0.4, 2: 0.6})
    assert weights[2] == pytest.approx({1: 0.2, 2: 0.2, 4: 0.6})
    assert [phase.config.policy for phase, _ in runs] == [Policy(), Policy((1,), (0.15,)), strategy.policy()]
    assert strategy.policy() == Policy((1, 2), (0.15, 0.15))
    assert model.trained_exits == {1, 2, 4}
    assert runs[-1][1].rows[-1]["val_loss"] < runs[0][1].rows[0]["val_loss"]


def test_phases_share_the_limits_as_told() -> None:
    config = plan(shares=(0.5, 0.3, 0.2), max_flops=100.0)
    assert [config.options(phase).max_flops for phase in range(3)] == pytest.approx([50.0, 30.0, 20.0])
    assert [plan(max_flops=70.0).options(phase).max_flops for phase in range(3)] == pytest.approx([10.0, 20.0, 40.0])


def test_one_schedule_goes_through_all_phases() -> None:
    config = plan(shares=(0.5, 0.3, 0.2), schedule="cosine", warmup=0.1)
    phases, whole = [config.options(phase) for phase in range(3)], PhaseOptions(schedule="cosine", warmup=0.1)
    at = [(phase.lr_factor(0.0), phase.lr_factor(1.0)) for phase in phases]
    for (_, end), (begin, _) in zip(at, at[1:]):
        assert end == pytest.approx(begin)
    assert at[0][0] == whole.lr_factor(0.0)
    assert at[0][1] == pytest.approx(whole.lr_factor(0.5))
    assert at[-1][1] == pytest.approx(whole.lr_factor(1.0))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"layers": (2,)}, "two or more depths"),
        ({"layers": (2, 2)}, "from shallow to deep"),
        ({"layers": (-1, 2)}, "from shallow to deep"),
        ({"shares": (0.5, 0.5)}, "one above 0 per phase and sum to 1"),
        ({"shares": (0.5, 0.4, 0.2)}, "sum to 1"),
        ({"shares": (0.5, 0.5, 0.0)}, "one above 0"),
        ({"exit_weight": 1.0}, r"exit_weight must lie in \[0, 1\)"),
        ({"grow_init": "zero"}, "grow_init must be identity or copy"),
        ({"exit_weight": 0.5, "routing_threshold": 1.5}, r"must lie in \[0, 1\]"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        plan(**options)
    assert "\n" not in str(error.value)


def test_a_model_of_another_depth_is_refused(tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="phase 1 starts from 1 layers but the model has 3"):
        plan().strategy().next_phase(tiny(3), text_data(1, 1))
