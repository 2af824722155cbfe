"""Exits that choose in training by a classifier that learns along: what trains, what it costs, what is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, GatedConfig, Phase, Policy, StandardTransformer, score, train
from ease.trainer import History

Make = Callable[..., StandardTransformer]


def plan(**options: Any) -> GatedConfig:
    shape: dict[str, Any] = {"num_layers": 3, "exit_layer": 1, "going_on": 0.4, "lr": 1e-2, "patience": None}
    return GatedConfig(**shape | {"max_epochs": 10} | options)


@pytest.fixture(scope="module")
def done(
    tiny: Make, text_data: Callable[..., Data]
) -> tuple[StandardTransformer, Any, list[tuple[Phase, History]], Data]:
    data, model, strategy = text_data(8, 2), tiny(3), plan().strategy()
    return model, strategy, list(train(model, strategy, data)), data


def test_one_phase_in_which_every_token_counts_alike(done: Any) -> None:
    model, _, [(phase, history)], _ = done
    assert phase.config.weights == {1: pytest.approx(0.6), 3: pytest.approx(0.4)}
    assert phase.config.going_on == {1: 0.4}
    assert history.column("val_loss")[-1] < history.column("val_loss")[0] - 0.3
    assert model.trained_exits == {1, 3}
    two = plan(exit_layer=(1, 2), going_on=(0.5, 0.2)).training(3)
    assert two.weights == {1: pytest.approx(0.5), 2: pytest.approx(0.4), 3: pytest.approx(0.1)}


def test_the_policy_found_sends_the_share_on_and_asks_no_head(done: Any) -> None:
    model, strategy, _, data = done
    policy = strategy.policy()
    assert (policy.exits, policy.confidence) == ((1,), "classifier")
    shares = score(model, data.val, policy).figures()["exit_shares"]
    assert shares[3] == pytest.approx(0.4, abs=0.02)


def test_the_classifier_has_learned_where_the_exit_is_right(done: Any) -> None:
    """On held-out text, tokens that it is surer of are foretold better by the exit."""
    model, _, _, data = done
    everyone = score(model, data.val, Policy((1,), (1e-9,), "classifier"))
    sure = everyone.confidences >= everyone.confidences.median()
    assert everyone.losses[sure].mean() < everyone.losses[~sure].mean() - 0.3


def test_the_classifier_stays_as_it_is_in_other_phases(done: Any) -> None:
    model = done[0]
    assert not any(p.requires_grad for p in model.exit_classifiers.parameters())


def test_two_exits_share_by_share(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(4, 2), tiny(3)
    strategy = plan(exit_layer=(1, 2), going_on=(0.6, 0.5), max_epochs=2).strategy()
    [(phase, history)] = train(model, strategy, data)
    assert history.flops["validation"] > 0
    assert set(history.flops) >= {"training", "validation"}
    shares = score(model, data.val, strategy.policy()).figures()["exit_shares"]
    assert shares == {1: pytest.approx(0.4, abs=0.05), 2: pytest.approx(0.3, abs=0.05), 3: pytest.approx(0.3, abs=0.05)}
    assert phase.config.weights == {1: pytest.approx(0.4), 2: pytest.approx(0.3), 3: pytest.approx(0.3)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"going_on": 0.0}, "share of hard tokens must lie in"),
        ({"going_on": (0.5, 0.5)}, "give one share, or one per exit"),
        ({"exit_layer": (), "going_on": ()}, "name at least one exit"),
        ({"classifier_weight": 0.0}, "it is what chooses"),
        ({"exit_layer": (2, 1)}, "from shallow to deep"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EaseError, match=sentence):
        plan(**options)


def test_an_exit_at_the_last_layer_is_refused(tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="must lie below the last"):
        plan(exit_layer=3).strategy().next_phase(tiny(3), text_data(1, 1))


def test_a_finished_model_keeps_what_its_classifier_knows(done: Any) -> None:
    model, _, _, data = done
    before = model.exit_classifiers["1"].weight.clone()
    plan().strategy().next_phase(model, data)
    assert torch.equal(model.exit_classifiers["1"].weight, before)
