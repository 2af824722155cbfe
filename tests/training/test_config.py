"""The two core options and how a phase learns: what adds up, what is said of it, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ease import (
    EaseError,
    GatedConfig,
    GrowthConfig,
    OpenGrowthConfig,
    PhaseOptions,
    Policy,
    StageConfig,
    StagedConfig,
    StandardConfig,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
)
from ease.training.losses import Distillation
from ease.training.selection import LearnedGate, LeastConfident


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0, 2)), min_size=1, max_size=5))
def test_overlapping_stages_add_up(drawn: list[tuple[int, int, float]]) -> None:
    stages = [StageConfig((min(a, b), max(a, b)), w) for a, b, w in drawn]
    expected = {k: sum(s.loss_weight for s in stages if s.layers[0] <= k <= s.layers[1]) for k in range(1, 7)}
    expected = {k: w for k, w in expected.items() if w > 0}
    if not expected:
        with pytest.raises(EaseError, match="every loss weight is 0"):
            TrainingConfig(stages)
        return
    weights = TrainingConfig(stages).weights
    assert weights == pytest.approx(expected)
    assert list(weights) == sorted(weights)


def test_presets() -> None:
    assert create_standard_config(5).weights == {5: 1.0}
    assert create_deep_supervision_config(4).weights == pytest.approx(dict.fromkeys(range(1, 5), 0.25))
    for config in (create_standard_config(5), create_deep_supervision_config(4)):
        assert config.policy == Policy()


def test_weights_of_deep_supervision_may_grow_with_depth() -> None:
    config = create_deep_supervision_config(4, "depth")
    assert config.weights == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    with pytest.raises(EaseError, match="weighting must be uniform or depth, got 'steep'"):
        create_deep_supervision_config(4, "steep")  # type: ignore[arg-type]


def test_a_part_of_the_options_has_a_share_of_the_limits() -> None:
    whole = PhaseOptions(lr=1e-2, warmup=0.1, max_epochs=10, max_flops=100.0)
    assert whole.part(0.25) == replace(whole, max_epochs=2, max_flops=25.0)
    assert whole.part(0.01, lr=1e-3) == replace(whole, max_epochs=1, max_flops=1.0, lr=1e-3)
    assert replace(whole, max_flops=None).part(0.5).max_flops is None
    # What a strategy adds to the options is not the phase's.
    assert type(StandardConfig(num_layers=2, max_epochs=10).part(0.5)) is PhaseOptions


@pytest.mark.parametrize(
    ("config", "phases"),
    [
        (lambda n: GrowthConfig(layers=(1, 2, 3), max_epochs=n), 3),
        (lambda n: OpenGrowthConfig(max_epochs=n), 2),
        (lambda n: OpenGrowthConfig(max_epochs=n, first_share=0.0), 1),
        (lambda n: GatedConfig(max_epochs=n), 2),
        (lambda n: GatedConfig(exit_layer=2, growth=(1,), max_epochs=n), 3),
    ],
)
def test_every_phase_needs_an_epoch(config: Callable[[int], object], phases: int) -> None:
    config(phases)
    if phases > 1:
        with pytest.raises(EaseError, match=f"each of the {phases} phases needs an epoch"):
            config(phases - 1)


def keeping(keep: dict[int, float], weights: dict[int, float] | None = None) -> TrainingConfig:
    return TrainingConfig(layer_weights=weights or {3: 1.0}, selection=LeastConfident(keep))


def test_a_configuration_describes_itself() -> None:
    text = TrainingConfig([StageConfig((1, 2), 0.5)], (0.9, 0.25), (1, 2)).describe()
    for part in ("layer 1: weight 0.5", "layer 2: weight 0.5", "after layer 1 when", "at least 0.9", "at least 0.25"):
        assert part in text
    assert "no routing" in create_standard_config(2).describe()
    budget = TrainingConfig(layer_weights={1: 1.0, 2: 1.0}, selection=LeastConfident({1: 0.3})).describe()
    assert "in training the least confident 30% continue past exit 1" in budget


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: StageConfig((2, 1)), r"reversed: write \(1, 2\)"),
        (lambda: StageConfig((-1, 2)), "layers are counted from 1"),
        (lambda: StageConfig((-3, -1)), "layers are counted from 1"),
        (lambda: TrainingConfig(), "give either stages or layer_weights, and not both"),
        (lambda: TrainingConfig([StageConfig((1, 1))], layer_weights={1: 1.0}), "and not both"),
        (lambda: TrainingConfig([]), "give one layer a weight above 0"),
        (lambda: TrainingConfig([StageConfig((1, 2), 0.0)]), "give one layer a weight above 0"),
        (lambda: TrainingConfig(layer_weights={}), "give one layer a weight above 0"),
        (lambda: TrainingConfig(layer_weights={1: 0.0, 2: 0.0}), "give one layer a weight above 0"),
        (lambda: TrainingConfig(layer_weights={-1: 1.0}), "layers are counted from 1"),
        (lambda: TrainingConfig([StageConfig((1, 1), -1.0)]), "must be finite and not negative"),
        (lambda: TrainingConfig([StageConfig((1, 2), 2.0), StageConfig((2, 2), -1.0)]), "not negative"),
        (lambda: TrainingConfig(layer_weights={1: math.nan}), "must be finite"),
        (lambda: TrainingConfig(layer_weights={1: math.inf}), "must be finite"),
        (lambda: TrainingConfig([StageConfig((1, 1))], 1.2), r"routing_threshold must lie in \[0, 1\]"),
        (lambda: TrainingConfig([StageConfig((1, 1))], -0.2), r"routing_threshold must lie in \[0, 1\]"),
        (lambda: TrainingConfig([StageConfig((1, 1))], (0.5, 0.5)), "give one threshold per exit"),
        (lambda: TrainingConfig([StageConfig((1, 1))], 0.5, (1, 2)), "give one threshold per exit"),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({3: 0.5})),
            "the selection names exit 3: choose one below",
        ),
        (
            lambda: TrainingConfig(layer_weights={2: 1.0, 3: 0.0}, selection=LeastConfident({2: 0.5})),
            "below layer 2, the last with a",
        ),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({-1: 0.5})),
            "the selection names exit -1",
        ),
        (lambda: TrainingConfig([StageConfig((0, 2))]).check(2, first_exit=1), "layer 0 needs a model with a memory"),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({0: 0.5})).check(3, first_exit=1),
            "layer 0 needs a model with a memory",
        ),
        (lambda: LearnedGate({}, 1.0), "needs at least one exit"),
        (
            lambda: TrainingConfig(
                layer_weights={3: 1.0}, selection=LearnedGate({1: 0.5}, 1.0), objective=Distillation()
            ),
            "a token that leaves has no teacher",
        ),
        (
            lambda: LearnedGate({1: 0.5}, -1.0),
            "must be finite and above 0, got -1",
        ),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({1: 0.0})),
            r"past exit 1 must lie in \(0, 1\], got 0",
        ),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({1: 1.5})),
            r"must lie in \(0, 1\], got 1.5",
        ),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, selection=LeastConfident({1: 0.5})).check(3, 2),
            "mine the tokens",
        ),
        (lambda: TrainingConfig(layer_weights={3: 1.0}, layer_lr_scales={1: 0.0}), "scales lie above 0"),
        (lambda: TrainingConfig(layer_weights={3: 1.0}, layer_lr_scales={1: -1.0}), "scales lie above 0"),
        (lambda: TrainingConfig(layer_weights={3: 1.0}, layer_lr_scales={1: math.inf}), "scales lie above 0"),
        (lambda: TrainingConfig(layer_weights={3: 1.0}, layer_lr_scales={0: 1.0}), "layers are counted from 1"),
        (
            lambda: TrainingConfig(layer_weights={3: 1.0}, layer_lr_scales={4: 1.0}).check(3),
            "layer_lr_scales names layer 4 but the model has 3",
        ),
        (lambda: TrainingConfig([StageConfig((2, 4))]).check(3), "shorten the stage or use a deeper model"),
        (lambda: TrainingConfig(layer_weights={4: 0.0, 1: 1.0}).check(3), "reaches layer 4 but the model has 3"),
        (lambda: TrainingConfig([StageConfig((1, 3))], 0.5, 3).check(3), "choose a lower exit"),
        (lambda: TrainingConfig([StageConfig((1, 3))], 0.5, 9).check(3), "choose a lower exit"),
        (lambda: PhaseOptions(lr=0), "lr must be above 0"),
        (lambda: PhaseOptions(lr=math.nan), "lr must be above 0"),
        (lambda: PhaseOptions(warmup=1.0), "warmup is a share of the phase"),
        (lambda: PhaseOptions(max_epochs=0), "must be at least 1"),
        (lambda: PhaseOptions(patience=0), "must be at least 1"),
        (lambda: PhaseOptions(max_flops=math.nan), "max_flops must be above 0"),
        (lambda: PhaseOptions(weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: PhaseOptions(weight_decay=math.nan), "weight_decay must be at least 0"),
        (lambda: StagedConfig(trunk_budget=math.nan), "trunk_budget must be at least 0"),
    ],
)
def test_bad_configurations_are_refused_in_one_sentence(make: Callable[[], object], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_learning_rate_follows_its_schedule(schedule: Any, warmup: float) -> None:
    options = PhaseOptions(schedule=schedule, warmup=warmup)
    factors = [options.lr_factor(i / 100) for i in range(101)]
    start = int(100 * warmup)
    assert factors[start] == pytest.approx(1)
    assert factors[: start + 1] == sorted(factors[: start + 1])
    assert factors[start:] == sorted(factors[start:], reverse=True)
    assert factors[-1] == pytest.approx(1 if schedule == "constant" else 0.05)
    assert min(factors) > 0
