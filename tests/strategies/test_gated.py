"""Exits that choose in training by a classifier that learns along: what trains, what it costs, what is found."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, GatedConfig, Phase, Policy, StandardTransformer, generate, route, score, train
from ease.training.phases import History

Make = Callable[..., StandardTransformer]


def plan(**options: Any) -> GatedConfig:
    shape: dict[str, Any] = {"deep_layers": 3, "exit_layer": 1, "keep": 0.4, "lr": 1e-2, "patience": None}
    return GatedConfig(**shape | {"max_epochs": 12} | options)


@pytest.fixture(scope="module")
def done(
    tiny: Make, text_data: Callable[..., Data]
) -> tuple[StandardTransformer, Any, list[tuple[Phase, History]], Data]:
    data, model, strategy = text_data(8, 2), tiny(1), plan().strategy()
    torch.manual_seed(1)
    return model, strategy, list(train(model, strategy, data)), data


def test_two_phases_of_one_schedule_and_every_token_counts_alike(done: Any) -> None:
    model, _, [(first, before), (second, after)], _ = done
    assert (first.config.weights, first.config.selection.keep) == ({1: 1.0}, {})
    assert second.config.weights == {1: 1.0, 3: 1.0}
    assert second.config.selection.keep == {1: 0.4}
    assert (first.options.max_epochs, second.options.max_epochs) == (4, 8)
    assert (first.options.span, second.options.span) == ((0.0, 0.3), (0.3, 1.0))
    assert before.column("val_loss")[-1] < before.column("val_loss")[0] - 0.1
    assert after.column("val_loss")[-1] < before.column("val_loss")[-1] - 0.1
    assert model.trained_exits == {1, 3}


def test_the_brick_grows_up_to_the_exit_under_the_same_schedule(tiny: Make, text_data: Callable[..., Data]) -> None:
    config = plan(exit_layer=2, growth=(1,), first_share=0.6, max_epochs=10, max_flops=1e12)
    data, model, depths = text_data(2, 1), tiny(1), []
    strategy = config.strategy()
    phases = []
    while phase := strategy.next_phase(model, data):
        phases.append(phase)
        depths.append(model.num_layers)
    assert depths == [1, 2, 3]
    assert [phase.name for phase in phases] == ["phase 1", "phase 2", "phase 3"]
    assert [phase.config.weights for phase in phases[:2]] == [{1: 1.0}, {2: 1.0}]
    assert phases[2].config.selection.keep == {2: 0.4}
    assert [phase.options.max_flops for phase in phases] == pytest.approx([0.2e12, 0.4e12, 0.4e12]), "by depth"
    spans = [end for phase in phases for end in phase.options.span]
    assert spans == pytest.approx([0.0, 0.2, 0.2, 0.6, 0.6, 1.0])
    assert config.num_layers == 1
    assert strategy.policy().exits == (2,)


def test_the_rate_goes_on_where_phase_1_left_it() -> None:
    options = plan(schedule="cosine", warmup=0.1)
    first, second = options.part(0.3, after=0.0), options.part(0.7, after=0.3)
    assert [first.lr_factor(p) for p in (0.1, 1.0)] == pytest.approx([options.lr_factor(p) for p in (0.03, 0.3)])
    assert [second.lr_factor(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(
        [options.lr_factor(p) for p in (0.3, 0.65, 1.0)]
    )
    assert options.part(0.3).lr_factor(1.0) == pytest.approx(0.05)


def test_the_policy_found_sends_the_share_on_and_asks_no_head(done: Any) -> None:
    model, strategy, _, data = done
    policy = strategy.policy()
    assert (policy.exits, policy.confidence) == ((1,), "classifier")
    shares = score(model, data.val, policy).metrics()["exit_shares"]
    assert shares[3] == pytest.approx(0.4, abs=0.02)


def test_the_classifier_has_learned_where_the_exit_is_right(done: Any) -> None:
    """On held-out text, tokens that it is surer of are foretold better by the exit."""
    model, _, _, data = done
    everyone = score(model, data.val, Policy((1,), (1e-9,), "classifier"))
    sure = everyone.confidences >= everyone.confidences.median()
    assert everyone.losses[sure].mean() < everyone.losses[~sure].mean() - 0.3


@pytest.mark.parametrize("autocast", [False, True])
def test_classifiers_choose_in_half_precision(autocast: bool, done: Any) -> None:
    """A confidence is a 32-bit float there, and logits are not."""
    model, strategy, _, data = done
    half, (x, _) = copy.deepcopy(model), next(iter(data.val))
    if not autocast:
        half = half.bfloat16()
    policy = strategy.policy()
    half.policy = policy
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        exits = route(half.eval(), x).exits
        assert set(exits.unique().tolist()) == {1, 3}
        for mode in ("full", "routed", "exact"):
            assert generate(half, x[:, :8], 4, mode).tokens.shape == (len(x), 4)


def test_the_classifier_stays_as_it_is_in_other_phases(done: Any) -> None:
    model = done[0]
    assert not any(p.requires_grad for p in model.exit_classifiers.parameters())


def test_two_exits_share_by_share(tiny: Make, text_data: Callable[..., Data]) -> None:
    """From the start, in a model that has all its layers."""
    data, model = text_data(4, 2), tiny(3)
    strategy = plan(exit_layer=(1, 2), keep=(0.6, 0.5), max_epochs=2, first_share=0.0).strategy()
    [(_, history)] = train(model, strategy, data)
    assert history.flops["validation"] > 0
    assert set(history.flops) >= {"training", "validation"}
    shares = score(model, data.val, strategy.policy()).metrics()["exit_shares"]
    assert shares == {1: pytest.approx(0.4, abs=0.05), 2: pytest.approx(0.3, abs=0.05), 3: pytest.approx(0.3, abs=0.05)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 0.0}, "share of hard tokens must lie in"),
        ({"keep": 1.0}, "a share below 1"),
        ({"keep": (0.5, 0.5)}, "give one share, or one per exit"),
        ({"exit_layer": (), "keep": ()}, "name at least one exit"),
        ({"classifier_weight": 0.0}, "the classifiers choose"),
        ({"exit_layer": (2, 1)}, "from shallow to deep"),
        ({"exit_layer": 3}, "must lie below the last"),
        ({"first_share": 1.0}, "the last phase needs a share"),
        ({"growth": (1,)}, "growth must name depths below exit 1, from shallow to deep"),
        ({"exit_layer": 2, "growth": (-1,)}, "growth must name depths below exit 2"),
        ({"exit_layer": 2, "growth": (1,), "first_share": 0.0}, "growth needs phases before the last"),
        ({"span": (0.5, 0.5)}, "span must be two increasing numbers"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EaseError, match=sentence):
        plan(**options)


def test_models_of_another_depth_are_refused(tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="starts from 1 layers but the model has 2"):
        plan().strategy().next_phase(tiny(2), text_data(1, 1))
    with pytest.raises(EaseError, match="starts from 1 or 3 layers but the model has 2"):
        plan(first_share=0.0).strategy().next_phase(tiny(2), text_data(1, 1))


def test_a_finished_model_keeps_what_its_classifier_knows(done: Any) -> None:
    model, _, _, data = done
    before = model.exit_classifiers["1"].weight.clone()
    plan(first_share=0.0).strategy().next_phase(model, data)
    assert torch.equal(model.exit_classifiers["1"].weight, before)
