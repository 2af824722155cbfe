"""Growth with everything open: the two phases, what trains which layer, and the threshold that is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import (
    Data,
    EaseError,
    OpenGrowthConfig,
    Phase,
    Policy,
    StandardTransformer,
    Trainer,
    compute_confidence_threshold,
    score,
    train,
)
from ease.flops import head_flops, run_flops
from ease.training.phases import History

Make = Callable[..., StandardTransformer]


def plan(**options: Any) -> OpenGrowthConfig:
    shape: dict[str, Any] = {"shallow_layers": 1, "deep_layers": 3, "hard_ratio": 0.4, "lr": 5e-3, "patience": None}
    return OpenGrowthConfig(**shape | {"max_epochs": 8} | options)


@pytest.fixture(scope="module")
def done(
    tiny: Make, text_data: Callable[..., Data]
) -> tuple[StandardTransformer, Any, list[tuple[Phase, History]], Data, list[dict[str, torch.Tensor]]]:
    """Both phases, 1 -> 3 layers; the weights after each."""
    data, model, strategy = text_data(8, 2), tiny(1), plan().strategy()
    runs, weights = [], []
    for run in train(model, strategy, data):
        runs.append(run)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    return model, strategy, runs, data, weights


def test_two_phases_share_the_limits(done: Any) -> None:
    model, strategy, runs, data, _ = done
    (first, _), (second, _) = runs
    assert [phase.name for phase, _ in runs] == ["phase 1", "phase 2"]
    assert (first.config.weights, second.config.weights) == ({1: 1.0}, {1: 0.5, 3: 0.5})
    assert (first.config.selection.keep, second.config.selection.keep) == ({}, {1: 0.4})
    assert all((phase.train, phase.val, phase.first) == (data.train, data.val, 0) for phase, _ in runs)
    assert [phase.options.max_epochs for phase, _ in runs] == [4, 4]
    assert strategy.config.num_layers == 1
    assert model.num_layers == 3
    assert model.trained_exits == {1, 3}
    assert strategy.next_phase(model, data) is None
    split = plan(max_flops=100.0, first_share=0.3, deep_lr=1e-4)
    assert (split.part(0.3).max_flops, split.second().max_flops) == pytest.approx((30.0, 70.0))
    assert (split.second().lr, plan().second().lr) == (1e-4, 5e-3)


def test_the_loss_falls_in_both_phases_and_nothing_is_frozen(done: Any) -> None:
    model, _, runs, _, (first, second) = done
    losses = [history.column("val_loss") for _, history in runs]
    assert losses[0][-1] < losses[0][0] - 0.3
    assert min(losses[1]) < min(losses[0]) - 0.05
    assert all(not torch.equal(value, second[name]) for name, value in first.items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_threshold_found_sends_the_hard_share_on(done: Any) -> None:
    model, strategy, _, data, _ = done
    policy = strategy.policy()
    assert policy.exits == (1,)
    assert policy.thresholds == (compute_confidence_threshold(model, data.val, 0.4, exit=1),)
    shares = score(model, data.val, policy).metrics()["exit_shares"]
    assert shares[3] == pytest.approx(0.4, abs=0.01)


def test_validation_is_routed_at_the_hard_share_in_every_epoch(
    tiny: Make, text_data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    inner = Trainer.scores

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(inner(*args, **options))
        return seen[-1]

    monkeypatch.setattr(Trainer, "scores", noted)
    data, model = text_data(3, 1), tiny(1)
    *_, (_, history) = train(model, plan(max_epochs=4, hard_ratio=0.25).strategy(), data)
    deep = [float((scores.exits == 3).float().mean()) for scores in seen[2:]]
    assert deep == pytest.approx([0.25] * 2, abs=0.01)
    everyone = torch.ones(8, 32, dtype=torch.bool)
    finding = run_flops(model.config, 1, everyone) + head_flops(model.config, 256)
    assert history.flops["validation"] == sum(scores.flops for scores in seen[2:]) + 2 * finding


def test_deep_layers_learn_from_hard_tokens_and_the_brick_from_all(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(2, 1), tiny(1)
    asked: list[tuple[int, int]] = []
    strategy = plan(max_epochs=2).strategy()
    phases = train(model, strategy, data)
    next(phases)
    second = strategy.next_phase(model, data)
    assert second is not None
    for number, layer in enumerate(model.layers, 1):
        layer.ffn.register_forward_hook(lambda m, i, out, n=number: asked.append((n, i[0].numel() // 32)))
    trainer = Trainer(second.config, 256)
    trainer.train_epoch(model, data.train[:1], trainer.create_optimizer(model, 1e-3))
    assert asked == [(1, 256), (2, 102), (3, 102)]


@pytest.mark.parametrize("layers", [1, 3])
def test_without_a_first_phase_all_is_joint_from_the_start(
    layers: int, tiny: Make, text_data: Callable[..., Data]
) -> None:
    """A new model has all layers; a finished brick that comes in is grown at once."""
    data, model, config = text_data(8, 1), tiny(layers), plan(first_share=0.0, shallow_weight=0.25, max_epochs=3)
    assert config.num_layers == 3
    strategy = config.strategy()
    ((phase, history),) = train(model, strategy, data)
    assert (phase.name, model.num_layers) == ("phase 2", 3)
    assert phase.config.weights == {1: 0.25, 3: 0.75}
    assert phase.options.max_epochs == 3
    assert history.rows[-1]["val_loss"] < history.rows[0]["val_loss"] - 0.3
    assert strategy.policy().exits == (1,)


def test_with_every_token_hard_nobody_is_chosen(tiny: Make, text_data: Callable[..., Data]) -> None:
    strategy = plan(hard_ratio=1.0, max_epochs=2, grow_init="copy").strategy()
    list(train(tiny(1), strategy, text_data(2, 1)))
    assert strategy.policy() == Policy((1,), (1.0,))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"deep_layers": 1}, r"deep_layers \(1\) must be more than shallow_layers \(1\)"),
        ({"shallow_layers": -1}, "at least 0"),
        ({"hard_ratio": 0.0}, r"must lie in \(0, 1\]"),
        ({"shallow_weight": 0.0}, r"must lie in \(0, 1\)"),
        ({"shallow_weight": 1.0}, r"must lie in \(0, 1\)"),
        ({"first_share": 1.0}, r"first_share must lie in \[0, 1\)"),
        ({"first_share": -0.1}, r"first_share must lie in \[0, 1\)"),
        ({"grow_init": "zero"}, "grow_init must be identity or copy"),
        ({"deep_lr": 0.0}, "lr must be above 0"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        plan(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "layers", "fix"),
    [({}, 3, "starts from 1 layers but the model has 3"), ({"first_share": 0.0}, 2, "from 1 or 3 layers")],
)
def test_a_model_of_another_depth_is_refused(
    options: dict[str, Any], layers: int, fix: str, tiny: Make, text_data: Callable[..., Data]
) -> None:
    with pytest.raises(EaseError, match=fix):
        plan(**options).strategy().next_phase(tiny(layers), text_data(1, 1))
