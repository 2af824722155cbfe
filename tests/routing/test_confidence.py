"""Every measure: what it says of clear cases, that walks follow it, and what is paid for it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, Policy, StandardTransformer, learn_agreement, route, score
from ease.flops import classifier_flops, head_flops
from ease.routing.confidence import MEASURES, Evidence, certainty, margin, max_probability, steadiness
from ease.routing.forward import routed_forward
from ease.training.exit_classifiers import lessons

Make = Callable[..., StandardTransformer]


def evidence(before: torch.Tensor, after: torch.Tensor) -> Evidence:
    return Evidence(1, before, after, None, torch.arange(len(after)))


def test_what_measures_of_logits_say_of_clear_cases() -> None:
    even, sure, split = torch.zeros(4), torch.tensor([99.0, 0, 0, 0]), torch.tensor([5.0, 5.0, -99, -99])
    logits = torch.stack([even, sure, split])
    torch.testing.assert_close(max_probability(logits), torch.tensor([0.25, 1.0, 0.5]))
    torch.testing.assert_close(margin(logits), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(certainty(logits), torch.tensor([0.0, 1.0, 1 - math.log(2) / math.log(4)]))


def test_steadiness_is_the_cosine_of_a_state_with_itself_before() -> None:
    state = torch.tensor([[1.0, 0.0]])
    for after, expected in (([2.0, 0.0], 1.0), ([0.0, 3.0], 0.5), ([-1.0, 0.0], 0.0)):
        assert steadiness(evidence(state, torch.tensor([after]))).item() == pytest.approx(expected)


@pytest.fixture(scope="module")
def taught(_trained: StandardTransformer, text_data: Callable[..., Data]) -> StandardTransformer:
    import copy

    model = copy.deepcopy(_trained)
    learn_agreement(model, text_data(8, 4).val, [1])
    return model


@pytest.mark.parametrize("name", MEASURES)
def test_a_walk_follows_every_measure_and_pays_for_heads_as_it_must(name: str, taught: Any, text: torch.Tensor) -> None:
    ids = text[300:556].long().view(4, 64)
    options = {"confidence": name, "patience": int(name == "patience") * 2}
    (all_deep,) = (s for s in routed_forward(taught, ids, Policy((1,), (math.inf,), **options)) if s.layer == 1)
    confidence = all_deep.confidence.detach()
    assert ((confidence >= 0) & (confidence <= 1)).all()
    threshold = float(confidence.median())
    first, *rest = routed_forward(taught, ids, Policy((1,), (threshold,), **options), read=lambda logits, _: logits)
    assert torch.equal(first.leaves, confidence >= threshold)
    leaving = int(first.leaves.sum())
    assert first.num_heads == (ids.numel() if MEASURES[name].needs_head else leaving)
    state = taught.run(taught.embed(ids), 1, 1)
    assert first.read is not None or not leaving
    if leaving:
        torch.testing.assert_close(first.read, taught.logits(state[first.left], 1))
    assert sum(stop.num_heads for stop in rest) == ids.numel() - leaving


def test_the_classifier_tells_agreement_better_than_chance_and_changes_no_exit(
    taught: StandardTransformer, trained: StandardTransformer, text_data: Callable[..., Data]
) -> None:
    held_out = text_data(12, 4).val
    lesson = lessons(taught, held_out, [1])[1]
    confidence, agrees = taught.exit_confidence(lesson.states, 1), lesson.targets["agreement"].bool()
    assert confidence[agrees].mean() > confidence[~agrees].mean() + 0.05
    assert confidence.mean().item() == pytest.approx(agrees.double().mean().item(), abs=0.1)
    x = held_out[0][0]
    assert all(map(torch.equal, taught.forward_all_layers(x), trained.forward_all_layers(x)))


def test_without_the_head_a_token_that_stays_pays_for_none(taught: StandardTransformer, text: torch.Tensor) -> None:
    batch = (text[300:556].long().view(4, 64), text[301:557].long().view(4, 64))
    deep = {
        name: score(taught, [batch], Policy((1,), (math.inf,), confidence=name)) for name in ("margin", "classifier")
    }
    less = head_flops(taught.config, 256) - classifier_flops(taught.config, 256)
    assert deep["margin"].flops - deep["classifier"].flops == less


def test_the_start_of_a_text_goes_deep(tiny: Make) -> None:
    model, ids = tiny(3, sharp=True), torch.randint(256, (5, 12))
    model.policy = Policy(always_deep=3)
    exits = route(model, ids, 1, 1e-9).exits
    assert exits[:, :3].eq(3).all()
    assert exits[:, 3:].eq(1).all()
    padded = torch.tensor([[0, 0, 0, *[1] * 9]]).expand(5, 12)
    assert route(model, ids, 1, 1e-9, padded).exits[0].tolist() == [0] * 3 + [3] * 3 + [1] * 6


def test_a_threshold_with_a_half_life_falls_from_one() -> None:
    policy = Policy((1,), (0.6,), half_life=4.0)
    limits = policy.limits(0.6, torch.tensor([0, 4, 8, 400]), torch.float64)
    torch.testing.assert_close(limits, torch.tensor([1.0, 0.8, 0.7, 0.6], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (
            lambda m: route(m, torch.zeros(1, 2, dtype=torch.long), policy=Policy((1,), (0.5,), "hunch")),
            "no measure of confidence 'hunch': use max-probability",
        ),
        (lambda m: Policy((1,), (0.5,), patience=2), "for the measure patience alone"),
        (lambda m: Policy((1,), (0.5,), half_life=0.0), "half_life"),
        (lambda m: route(m, torch.zeros(1, 2, dtype=torch.long), 1, 0.5), "exit 1 has no classifier"),
        (lambda m: learn_agreement(m, [], [3]), "must lie below the last"),
        (lambda m: learn_agreement(m, [], []), "no exit to learn"),
        (lambda m: learn_agreement(m, [], (1,)), "no scored token to learn the agreement from"),
    ],
)
def test_bad_policies_are_refused_in_one_sentence(make: Any, fix: str, tiny: Make) -> None:
    model = tiny(3)
    model.policy = Policy(confidence="classifier")
    with pytest.raises(EaseError, match=fix) as error:
        make(model)
    assert "\n" not in str(error.value)
