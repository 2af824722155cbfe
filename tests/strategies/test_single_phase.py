"""The plain strategies: one phase on all tokens."""

from collections.abc import Callable

import pytest

from ease import Data, DeepSupervisionConfig, EaseError, Policy, StandardConfig, StandardTransformer, train

Make = Callable[..., StandardTransformer]


def test_standard_is_one_phase_with_the_loss_at_the_end(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(4, 1), tiny(3)
    config = StandardConfig(num_layers=3, lr=3e-3, max_epochs=2)
    strategy = config.strategy()
    ((phase, history),) = train(model, strategy, data)
    assert phase.config.weights == {3: 1.0}
    assert (phase.train, phase.val, phase.first, phase.options) == (data.train, data.val, 0, config)
    assert strategy.policy() == Policy()
    assert history.rows[1]["val_loss"] < history.rows[0]["val_loss"]
    assert strategy.next_phase(model, data) is None


def test_deep_supervision_trains_every_exit_and_may_route(tiny: Make, text_data: Callable[..., Data]) -> None:
    model = tiny(3)
    config = DeepSupervisionConfig(num_layers=3, lr=3e-3, max_epochs=1, exit_layer=(1, 2), routing_threshold=(0.2, 0.2))
    strategy = config.strategy()
    ((phase, _),) = train(model, strategy, text_data(4, 1))
    assert phase.config.weights == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    assert strategy.policy() == Policy((1, 2), (0.2, 0.2))
    assert model.trained_exits == {1, 2, 3}


def test_deep_supervision_may_weigh_by_depth(tiny: Make, text_data: Callable[..., Data]) -> None:
    config = DeepSupervisionConfig(num_layers=3, weighting="depth", lr=3e-3, max_epochs=2)
    ((phase, history),) = train(tiny(3), config.strategy(), text_data(4, 1))
    assert phase.config.weights == pytest.approx({1: 1 / 6, 2: 2 / 6, 3: 3 / 6})
    assert history.rows[1]["val_loss"] < history.rows[0]["val_loss"]
    with pytest.raises(EaseError, match="weighting must be uniform or depth"):
        DeepSupervisionConfig(weighting="steep")  # type: ignore[arg-type]


def test_without_a_threshold_deep_supervision_does_not_route() -> None:
    assert DeepSupervisionConfig(num_layers=2).strategy().policy() == Policy()


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        (DeepSupervisionConfig(num_layers=2, exit_layer=2, routing_threshold=0.5), "choose a lower exit"),
        (StandardConfig(num_layers=5), "num_layers is 5 but the model has 2: set it to the model's"),
    ],
)
def test_a_model_too_shallow_is_refused(
    config: StandardConfig, fix: str, tiny: Make, text_data: Callable[..., Data]
) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        list(train(tiny(2), config.strategy(), text_data(1, 1)))
    assert "\n" not in str(error.value)
