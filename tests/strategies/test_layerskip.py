"""LayerSkip's curriculum, its layer dropout, and that a phase follows them step by step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, LayerSkipConfig, StandardTransformer, Trainer, create_standard_config, train
from ease.flops import run_flops
from ease.interface import Batch
from ease.training.phases import Step

Make = Callable[..., StandardTransformer]


def test_weights_grow_with_depth_as_in_the_paper() -> None:
    """e(l) = e_scale * (0 + ... + l) for early layers counted from 0, and L - 1 + e_scale * (0 + ... + L - 2)."""
    weights = LayerSkipConfig(exit_scale=0.5).weights(4)
    assert weights == {1: 0, 2: 0.5, 3: 1.5, 4: 3 + 1.5}


@pytest.mark.parametrize("done", range(6))
def test_the_rotational_curriculum_comes_round(done: int) -> None:
    step = LayerSkipConfig(rotation=3).step(7, done, 0.5)
    assert set(step.weights) == {k for k in range(2, 7) if k % 3 == done % 3} | {7}
    assert sum(step.weights.values()) == pytest.approx(1)


def test_the_gradual_curriculum_goes_down_from_the_last_exit() -> None:
    plan = LayerSkipConfig(curriculum="gradual")
    lowest = [min(plan.step(8, 0, progress).weights) for progress in (0.0, 0.1, 0.25, 0.4, 0.5, 1.0)]
    assert lowest == [8, 7, 4, 2, 2, 2]


def test_layer_dropout_rises_with_depth_and_by_choice_with_time() -> None:
    constant = LayerSkipConfig(layer_dropout=0.2).step(5, 0, 0.0).skip
    assert constant == pytest.approx({k: 0.2 * (2 ** ((k - 1) / 4) - 1) for k in range(2, 6)})
    rising = LayerSkipConfig(layer_dropout=0.2, dropout_schedule="exponential")
    assert rising.step(5, 0, 0.0).skip == {}
    assert rising.step(5, 0, 0.5).skip[5] == pytest.approx(0.2 * (math.sqrt(2) - 1))
    assert rising.step(5, 0, 1.0).skip[5] == pytest.approx(0.2)


def test_a_skipped_layer_is_skipped_by_whole_sequences(tiny: Make) -> None:
    """Always skipping layer 2 gives the loss of the model without it, and its work is not done."""
    model, x = tiny(3, sharp=True), torch.randint(256, (8, 12))
    trainer, asked = Trainer(create_standard_config(3), 256), []
    model.layers[1].ffn.register_forward_hook(lambda m, i, out: asked.append(i[0].numel() // 32))
    always = trainer.compute_loss(model, x, x, step=Step({3: 1.0}, {2: 1.0}))
    assert sum(asked) == 0
    without = tiny(3, sharp=True)
    del without.layers[1], without.exit_norms[1]
    expected = Trainer(create_standard_config(2), 256).compute_loss(without, x, x)
    torch.testing.assert_close(always, expected)
    asked.clear()
    trainer.compute_loss(model, x, x, step=Step({3: 1.0}, {2: 0.5}))
    assert 0 < asked[0] < x.numel()
    assert asked[0] % 12 == 0


def test_what_is_skipped_is_not_counted(tiny: Make) -> None:
    model, x = tiny(3), torch.randint(256, (2, 12))
    trainer = Trainer(create_standard_config(3), 256)
    step = lambda skip: trainer.step_flops(model, Batch(x, x), 24, step=Step({3: 1.0}, skip))["training"]  # noqa: E731
    layer = run_flops(model.config, 1, torch.ones_like(x, dtype=torch.bool))
    assert step({}) - step({2: 0.5}) == 3 * 0.5 * layer


def test_a_phase_follows_the_curriculum(tiny: Make, text_data: Callable[..., Data], monkeypatch: Any) -> None:
    model, data, asked = tiny(4), text_data(8, 1), []
    inner = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *a, **k: asked.append(k["step"]) or inner(*a, **k))
    plan = LayerSkipConfig(num_layers=4, exit_layer=(2, 3), routing_threshold=(0.5, 0.5), lr=5e-3, max_epochs=3)
    ((_, history),) = train(model, plan.strategy(), data)
    assert [set(step.weights) for step in asked[:4]] == [{2, 4}, {3, 4}, {2, 4}, {3, 4}]
    assert all(set(step.skip) == {2, 3, 4} for step in asked)
    assert model.trained_exits == {2, 3, 4}
    assert history.rows[-1]["val_loss"] < history.rows[0]["val_loss"]
    assert set(Trainer(create_standard_config(4), 256).evaluate(model, data.val)["exit_shares"]) == {4}


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"layer_dropout": 1.0}, r"layer_dropout must lie in \[0, 1\)"),
        ({"exit_scale": 0.0}, r"exit_scale must lie in \(0, 1\]"),
        ({"rotation": 0}, "rotation must be at least 1"),
        ({"curriculum": "steep"}, "curriculum must be none or rotational or gradual"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(options: Any, fix: str) -> None:
    with pytest.raises(EaseError, match=fix):
        LayerSkipConfig(**options)
