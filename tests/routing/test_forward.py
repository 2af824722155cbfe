"""Policies: what they accept, what they refuse, and what a routed forward does with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ease import EaseError, Policy, StandardTransformer, route
from ease.routing.confidence import max_probability
from ease.routing.forward import HEAD_CHUNK, routed_forward

Make = Callable[..., StandardTransformer]


@pytest.mark.parametrize(
    ("exit_layer", "threshold", "exits", "thresholds"),
    [
        (1, 0.5, (1,), (0.5,)),
        (2, 1, (2,), (1.0,)),
        ([1, 3], [0.5, 0.25], (1, 3), (0.5, 0.25)),
        ((1, 2, 3), (0.5, 0.0, 0.1), (1, 3), (0.5, 0.1)),
        ((2, 3), (0.0, 0.0), (), ()),
        ((), (), (), ()),
        # Without routing whatever the exit says is ignored.
        (99, 0.0, (), ()),
        (0, 0, (), ()),
        ((3, 1), 0.0, (), ()),
    ],
)
def test_core_options_become_a_policy(exit_layer: Any, threshold: Any, exits: Any, thresholds: Any) -> None:
    policy = Policy.of(exit_layer, threshold)
    assert (policy.exits, policy.thresholds) == (exits, thresholds)


@pytest.mark.parametrize(
    ("exit_layer", "threshold", "fix"),
    [
        (1, -0.1, r"routing_threshold must lie in \[0, 1\], got -0\.1"),
        (1, 1.01, r"routing_threshold must lie in \[0, 1\]"),
        (1, float("nan"), r"routing_threshold must lie in \[0, 1\]"),
        ((1, 2), (0.5, 7.0), r"routing_threshold must lie in \[0, 1\]"),
        ((1, 2), 0.5, "exit_layer names 2 exits and routing_threshold 1 thresholds: give one threshold per exit"),
        (1, (0.5, 0.5), "give one threshold per exit"),
        ((1, 2, 3), (0.5, 0.5), "give one threshold per exit"),
        ((2, 1), (0.5, 0.5), "from shallow to deep"),
        ((1, 1), (0.5, 0.5), "from shallow to deep"),
        (-1, 0.5, "counted from 1"),
        ((-1, 2), (0.5, 0.5), "counted from 1"),
    ],
)
def test_bad_policies_are_refused_in_one_sentence(exit_layer: Any, threshold: Any, fix: str) -> None:
    stated = [value if isinstance(value, tuple) else (value,) for value in (exit_layer, threshold)]
    for make in (lambda: Policy.of(exit_layer, threshold), lambda: Policy(*stated)):
        with pytest.raises(EaseError, match=fix) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("exit_layer", [3, 4, (1, 3)])
def test_exits_at_or_beyond_the_last_layer_are_refused_while_routing_is_on(exit_layer: Any, tiny: Make) -> None:
    thresholds = 0.5 if isinstance(exit_layer, int) else (0.5,) * len(exit_layer)
    with pytest.raises(
        EaseError, match=r"must lie below the last .*: choose a lower exit, a deeper model, or"
    ) as error:
        route(tiny(3), torch.zeros(1, 2, dtype=torch.long), exit_layer, thresholds)
    assert "\n" not in str(error.value)
    assert (route(tiny(3), torch.zeros(1, 2, dtype=torch.long), exit_layer, 0.0).exits == 3).all()


def test_a_mask_of_another_shape_is_refused(tiny: Make) -> None:
    for shape in ((2,), (1, 3), (2, 2)):
        with pytest.raises(EaseError, match=r"attention_mask must have the shape of the ids, \(1, 2\)"):
            route(tiny(2), torch.zeros(1, 2, dtype=torch.long), 1, 0.5, torch.ones(shape))


def test_confidence_is_the_largest_probability() -> None:
    logits = torch.randn(4, 5, 9)
    torch.testing.assert_close(max_probability(logits), torch.softmax(logits, -1).max(-1).values)
    assert max_probability(torch.full((1, 4), 3.0)).item() == 0.25
    assert max_probability(torch.tensor([1e4, 0.0, 0.0])).item() == 1.0


def test_without_routing_route_is_the_forward(tiny: Make) -> None:
    model, ids = tiny(3, sharp=True), torch.randint(256, (2, 9))
    result = route(model, ids)
    assert (result.exits == 3).all()
    torch.testing.assert_close(result.logits, model(ids))


@given(low=st.floats(0.01, 0.5), high=st.floats(0.5, 1.0), exits=st.sampled_from([(1,), (2,), (1, 3), (1, 2, 3)]))
def test_a_higher_threshold_lets_fewer_leave(low: float, high: float, exits: tuple[int, ...], tiny: Make) -> None:
    """Monotone: who leaves the first exit under a high threshold leaves it under a low one, with the same logits."""
    model, ids = tiny(4, sharp=True), torch.randint(256, (3, 20))
    rest = (0.3,) * (len(exits) - 1)
    easy, strict = (route(model, ids, exits, (threshold, *rest)) for threshold in (low, high))
    first = strict.exits == exits[0]
    assert (easy.exits[first] == exits[0]).all()
    assert torch.equal(easy.logits[first], strict.logits[first])
    assert (easy.confidences[easy.exits == exits[0]] >= low).all()
    assert set(easy.exits.unique().tolist()) <= {*exits, 4}


def test_a_threshold_of_one_takes_only_certainty(tiny: Make) -> None:
    ids = torch.randint(256, (2, 9))
    assert (route(tiny(2, sharp=True), ids, 1, 1.0).exits == 2).all()


def test_a_confidence_equal_to_the_threshold_leaves(tiny: Make) -> None:
    model, ids = tiny(2, sharp=True), torch.randint(256, (2, 9))
    with torch.no_grad():
        (stop,) = routed_forward(model, ids, Policy(), last=1)
    threshold = float(stop.confidence.median())
    result = route(model, ids, 1, threshold)
    assert torch.equal(result.exits.flatten() == 1, stop.confidence >= threshold)
    assert (result.exits.flatten()[stop.confidence == threshold] == 1).all()


def test_tokens_that_are_not_a_number_run_to_the_end(tiny: Make) -> None:
    """A broken model must show as NaN and not as tokens that never left."""
    model, ids = tiny(2), torch.randint(256, (2, 5))
    with torch.no_grad():
        for norm in model.exit_norms:
            norm.weight.fill_(torch.nan)
    result = route(model, ids, 1, 0.5)
    assert (result.exits == 2).all()
    assert result.logits.isnan().all()


def test_heads_are_computed_in_chunks_and_once_per_stop(tiny: Make) -> None:
    model, ids = tiny(3, sharp=True, dim=8), torch.randint(256, (3, 400))
    sizes: list[int] = []
    hook = model.output_head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    result = route(model, ids, 1, 0.05)
    hook.remove()
    staying = int((result.exits == 3).sum())
    assert 0 < staying < 1200
    assert sum(sizes) == 1200 + staying
    assert max(sizes) <= HEAD_CHUNK


def test_when_all_have_left_nothing_runs(tiny: Make) -> None:
    model, ids = tiny(3), torch.randint(256, (2, 5))
    model.layers[1].register_forward_pre_hook(lambda *_: pytest.fail("layer 2 ran for nobody"))
    stops = list(routed_forward(model, ids, Policy((1, 2), (1e-6, 0.5))))
    assert [stop.layer for stop in stops] == [1]
    assert stops[0].left.all()
    assert stops[0].first == 1


@torch.no_grad()
def test_stops_tell_who_arrived_and_who_left(tiny: Make, even_policy: Callable[..., Policy]) -> None:
    model, ids = tiny(4, sharp=True), torch.randint(256, (2, 9))
    places = []
    policy = even_policy(model, ids, (1, 3))
    stops = list(routed_forward(model, ids, policy, read=lambda logits, at: places.append(at) or logits))
    assert [(stop.first, stop.layer) for stop in stops] == [(1, 1), (2, 3), (4, 4)]
    assert stops[0].arrived.all()
    for here, after in zip(stops, stops[1:]):
        assert torch.equal(after.arrived, here.arrived & ~here.left)
    assert torch.equal(stops[-1].left, stops[-1].arrived)
    assert sum(int(stop.left.sum()) for stop in stops) == ids.numel()
    for stop, at in zip(stops, places):
        assert stop.read is not None
        assert torch.equal(at, stop.left.flatten().nonzero().squeeze(1))
        assert torch.equal(max_probability(stop.read), stop.confidence[stop.leaves])
