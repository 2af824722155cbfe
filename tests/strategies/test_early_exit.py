"""Early exits trained jointly: where the losses are and what they weigh, self-distillation, and who leaves."""

from collections.abc import Callable
from typing import Any

import pytest

from ease import Data, EarlyExitConfig, EaseError, Policy, StandardTransformer, score, train
from ease.training.losses import CrossEntropy, Distillation

Make = Callable[..., StandardTransformer]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"exit_layer": 1}, {1: 1 / 2, 3: 1 / 2}),
        ({"exit_layer": (1, 2), "routing_threshold": (0.5, 0.5)}, {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}),
        ({"exit_layer": (2,), "routing_threshold": (0.5,), "exit_weight": 0.25}, {2: 0.2, 3: 0.8}),
        (
            {"exit_layer": (1, 2), "routing_threshold": (0.5, 0.5), "exit_weight": (0.2, 0.8)},
            {1: 0.1, 2: 0.4, 3: 0.5},
        ),
        ({"exit_layer": 1, "routing_threshold": 0.0}, {1: 1 / 2, 3: 1 / 2}),
    ],
)
def test_exits_and_the_last_layer_have_a_loss(
    options: dict[str, Any], weights: dict[int, float], tiny: Make, text_data: Callable[..., Data]
) -> None:
    model, data, config = tiny(3), text_data(1, 1), EarlyExitConfig(num_layers=3, **options)
    strategy = config.strategy()
    phase = strategy.next_phase(model, data)
    assert phase is not None
    assert phase.config.weights == pytest.approx(weights)
    assert phase.config.policy == strategy.policy()
    assert (phase.train, phase.val, phase.first, phase.options) == (data.train, data.val, 0, config)
    assert strategy.next_phase(model, data) is None


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("cross-entropy", CrossEntropy()), ("distillation", Distillation(2.0, 1.0)), ("both", Distillation(2.0, 0.5))],
)
def test_exits_learn_from_the_text_or_from_the_last_exit(
    objective: Any, expected: object, tiny: Make, text_data: Callable[..., Data]
) -> None:
    model, data = tiny(3), text_data(6, 1)
    before = [score(model, data.val, last=exit).metrics()["loss"] for exit in (1, 3)]
    options = {} if objective == "cross-entropy" else {"temperature": 2.0}
    plan = EarlyExitConfig(
        num_layers=3, exit_layer=1, routing_threshold=0.5, objective=objective, lr=5e-3, max_epochs=3, **options
    )
    ((phase, history),) = train(model, plan.strategy(), data)
    assert phase.config.objective == expected
    assert history.rows[-1]["val_loss"] < history.rows[0]["val_loss"]
    for exit, loss in zip((1, 3), before):
        assert score(model, data.val, last=exit).metrics()["loss"] < loss - 0.5
    assert model.trained_exits == {1, 3}
    threshold = score(model, data.val, last=1).confidences.median().item()
    policy = EarlyExitConfig(exit_layer=1, routing_threshold=threshold).strategy().policy()
    assert score(model, data.val, policy).metrics()["exit_shares"] == pytest.approx({1: 0.5, 3: 0.5}, abs=0.01)


def test_a_threshold_of_zero_trains_exits_and_routes_nobody() -> None:
    assert EarlyExitConfig(routing_threshold=0.0).strategy().policy() == Policy()


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"exit_layer": (), "routing_threshold": ()}, "name at least one exit"),
        ({"exit_layer": (2, 1), "routing_threshold": (0.5, 0.5)}, "from shallow to deep"),
        ({"exit_layer": (1, 2)}, "give one threshold per exit"),
        ({"exit_weight": 0.0}, "give one weight above 0, or one per exit"),
        ({"exit_weight": (1.0, 2.0)}, "give one weight above 0, or one per exit"),
        ({"objective": "hints"}, "objective must be cross-entropy or distillation or both, got 'hints'"),
        ({"temperature": 2.0}, "belongs to distillation: leave it out"),
        ({"objective": "both", "temperature": 0.0}, "temperature must be above 0"),
        ({"routing_threshold": 1.5}, r"must lie in \[0, 1\]"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        EarlyExitConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_an_exit_at_the_last_layer_is_refused(threshold: float, tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="exit_layer 2 must lie below the last"):
        EarlyExitConfig(exit_layer=2, routing_threshold=threshold).strategy().next_phase(tiny(2), text_data(1, 1))
