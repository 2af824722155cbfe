"""Discriminative fine-tuning: one phase in which lower layers learn more slowly, from scratch or from a checkpoint."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, DiscriminativeConfig, EaseError, Policy, StandardTransformer, Trainer, train

Make = Callable[..., StandardTransformer]


def test_rates_fall_by_the_decay_from_the_last_layer_down(tiny: Make, text_data: Callable[..., Data]) -> None:
    model, data, config = tiny(3), text_data(1, 1), DiscriminativeConfig(num_layers=3, lr=1e-2)
    strategy = config.strategy()
    phase = strategy.next_phase(model, data)
    assert phase is not None
    assert phase.config.weights == {3: 1.0}
    assert phase.config.layer_lr_scales == pytest.approx({1: 1 / 2.6**2, 2: 1 / 2.6, 3: 1.0})
    assert (phase.train, phase.val, phase.first, phase.options) == (data.train, data.val, 0, config)
    optimizer = Trainer(phase.config, 256).create_optimizer(model, config.lr)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for k in (1, 2, 3):
        assert rate[model.layers[k - 1].ffn.up_proj.weight] == pytest.approx(1e-2 / 2.6 ** (3 - k))
    assert rate[model.output_head.weight] == 1e-2
    assert strategy.next_phase(model, data) is None
    assert strategy.policy() == Policy()


def test_it_learns_and_lower_layers_move_less(tiny: Make, text_data: Callable[..., Data]) -> None:
    model = tiny(3)
    before = copy.deepcopy(model)
    config = DiscriminativeConfig(num_layers=3, lr=1e-2, weight_decay=0.0, decay=0.1, max_epochs=2)
    ((_, history),) = train(model, config.strategy(), text_data(4, 1))
    assert history.rows[1]["val_loss"] < history.rows[0]["val_loss"]
    pairs = zip(model.layers, before.layers)
    moved = [float((a.ffn.up_proj.weight - b.ffn.up_proj.weight).detach().norm()) for a, b in pairs]
    assert 0 < 5 * moved[0] < moved[1]
    assert 5 * moved[1] < moved[2]


def test_a_checkpoint_brings_its_depth(trained: StandardTransformer, text_data: Callable[..., Data]) -> None:
    plan = DiscriminativeConfig(num_layers=7, lr=1e-3, max_epochs=1)
    data = text_data(4, 1)
    start = Trainer(plan.strategy().next_phase(trained, data).config, 256).evaluate(trained, data.val)["loss"]  # type: ignore[union-attr]
    ((phase, history),) = train(trained, plan.strategy(), data)
    assert phase.config.layer_lr_scales == pytest.approx({1: 1 / 2.6, 2: 1.0})
    assert history.rows[-1]["val_loss"] < start


def test_a_decay_of_one_is_plain_training(tiny: Make, text_data: Callable[..., Data]) -> None:
    from ease import StandardConfig

    ends = []
    for plan in (DiscriminativeConfig, StandardConfig):
        options: Any = {"decay": 1.0} if plan is DiscriminativeConfig else {}
        model = tiny(2)
        list(train(model, plan(num_layers=2, lr=3e-3, max_epochs=1, **options).strategy(), text_data(3, 1)))
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_bad_plans_are_refused_in_one_sentence(decay: float) -> None:
    with pytest.raises(EaseError, match=r"decay must lie in \(0, 1\]"):
        DiscriminativeConfig(decay=decay)
