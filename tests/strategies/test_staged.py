"""N-stage training: three phases end to end on real text, how they nest, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import (
    Data,
    EaseError,
    MinedBatches,
    Phase,
    PhaseConfig,
    Policy,
    StagedConfig,
    StandardTransformer,
    Trainer,
    route,
    train,
)
from ease.progress import Progress, StepMetrics
from ease.training.phases import History

Make = Callable[..., StandardTransformer]
PLAN = ((2, 1.0), (4, 0.5), (6, 0.2))


def config(*plans: tuple[int, float], **options: Any) -> StagedConfig:
    options = {"lr": 3e-3, "max_epochs": 1} | options
    return StagedConfig(tuple(PhaseConfig(layers=n, ratio=r, **options) for n, r in plans))


@pytest.fixture(scope="module")
def done(
    tiny: Make, text_data: Callable[..., Data]
) -> tuple[StandardTransformer, Any, list[tuple[Phase, History]], Data]:
    """Three phases, 2 -> 4 -> 6 layers, on all, a half and a fifth of the tokens."""
    data, model, strategy = text_data(8, 2), tiny(2), config(*PLAN, max_epochs=2).strategy()
    return model, strategy, list(train(model, strategy, data)), data


def test_the_default_is_the_plan_of_three() -> None:
    phases = StagedConfig().phases
    assert [(phase.layers, phase.ratio) for phase in phases] == [*PLAN]
    assert StagedConfig().num_layers == 2


def test_three_phases_run_and_leave_a_policy_of_two_exits(done: Any) -> None:
    model, strategy, runs, data = done
    assert [phase.name for phase, _ in runs] == ["phase 1", "phase 2", "phase 3"]
    assert [phase.first for phase, _ in runs] == [0, 3, 5]
    assert [phase.config.weights for phase, _ in runs] == [{2: 1.0}, {4: 1.0}, {6: 1.0}]
    assert [phase.config.policy.exits for phase, _ in runs] == [(), (2,), (2, 4)]
    assert strategy.policy() == runs[-1][0].config.policy
    assert all(0 < t < 1 for t in strategy.policy().thresholds)
    assert model.num_layers == 6
    assert model.trained_exits == {2, 4, 6}
    assert strategy.next_phase(model, data) is None
    # No phase ends worse than it began: new layers start as the identity and the best weights are kept.
    losses = [min(history.column("val_loss")) for _, history in runs]
    assert losses[1] < losses[0] + 0.01
    assert losses[2] < losses[1] + 0.01


def test_all_exits_are_taken_in_the_shares_asked_for(done: Any) -> None:
    model, strategy, _, data = done
    policy = strategy.policy()
    x = torch.cat([x for x, _ in data.train])
    result = route(model.eval(), x, policy.exits, policy.thresholds)
    shares = {layer: (result.exits == layer).double().mean().item() for layer in (2, 4, 6)}
    assert shares == pytest.approx({2: 0.5, 4: 0.3, 6: 0.2}, abs=0.005)
    held_out = Trainer(runs_config(done), 256).evaluate(model, data.val)["exit_shares"]
    assert set(held_out) == {2, 4, 6}
    assert all(0.05 < share < 0.8 for share in held_out.values())


def test_the_states_of_a_mined_phase_are_freed_at_its_end(done: Any) -> None:
    mined = [phase.train for phase, _ in done[2][1:]]
    assert all(isinstance(batches, MinedBatches) and batches.hard for batches in mined)
    assert all(batch.state is None for batches in mined for batch in batches.batches)


def runs_config(done: Any) -> Any:
    return done[2][-1][0].config


def test_phases_nest(done: Any) -> None:
    """What phase 3 trains on is part of what phase 2 trained on, token by token."""
    _, strategy, runs, data = done
    second, third = (phase.train for phase, _ in runs[1:])
    assert isinstance(second, MinedBatches)
    assert isinstance(third, MinedBatches)
    total = sum(y.numel() for _, y in data.train)
    assert (second.hard, third.hard) == (total // 2, pytest.approx(0.2 * total, abs=1))
    for (x, _), a, b in zip(data.train, second.batches, third.batches):
        assert torch.equal(a.x, x)
        assert torch.equal(b.x, x)
        assert not (b.active & ~a.active).any()
    assert strategy.mined == [
        {"threshold": mined.threshold, "count": mined.hard, "of": total} for mined in (second, third)
    ]


def test_what_a_phase_trains_is_what_inference_sends_there(done: Any) -> None:
    model, strategy, runs, _ = done
    policy = strategy.policy()
    for batch in runs[2][0].train.batches:
        exits = route(model, batch.x, policy.exits, policy.thresholds).exits
        assert torch.equal(batch.active, exits == 6)


@pytest.mark.parametrize("supervise", ["last", "every"])
def test_deep_supervision_within_a_brick(supervise: Any, tiny: Make, text_data: Callable[..., Data]) -> None:
    plan, model = config((1, 1.0), (3, 0.5), supervise=supervise), tiny(1)
    runs = list(train(model, plan.strategy(), text_data(2, 1)))
    expected = {2: 0.5, 3: 0.5} if supervise == "every" else {3: 1.0}
    assert [phase.config.weights for phase, _ in runs] == [{1: 1.0}, expected]
    assert model.trained_exits == {1, *expected}


def test_mining_says_how_far_it_is(tiny: Make, text_data: Callable[..., Data]) -> None:
    told: dict[str, list[float]] = {}

    class Log(Progress):
        def __init__(self, name: str) -> None:
            self.steps = told.setdefault(name, [])

        def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
            self.steps.append(fraction)

    data = text_data(4, 1)._replace(progress=Log)
    list(train(tiny(1), config((1, 1.0), (2, 0.5)).strategy(), data))
    assert told == {"mining": [0.25, 0.5, 0.75, 1.0]}


def test_a_phase_of_all_tokens(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(2, 1), tiny(1)
    strategy = config((1, 1.0), (2, 1.0)).strategy()
    runs = list(train(model, strategy, data))
    assert all(batch.active.all() for batch in runs[1][0].train)
    assert runs[1][1].flops["training"] > 0


def test_one_phase_is_plain_training(tiny: Make, text_data: Callable[..., Data]) -> None:
    model = tiny(2)
    strategy = config((2, 1.0)).strategy()
    ((phase, _),) = train(model, strategy, text_data(2, 1))
    assert phase.first == 0
    assert strategy.policy() == Policy()


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: StagedConfig(()), "needs at least one phase"),
        (lambda: config((2, 1.0), (2, 0.5)), "phase 2 must be deeper than phase 1: got 2 layers after 2"),
        (lambda: config((2, 1.0), (4, 0.5), (3, 0.5)), "phase 3 must be deeper than phase 2"),
        (lambda: PhaseConfig(layers=2, ratio=0.0), r"must lie in \(0, 1\]"),
        (lambda: PhaseConfig(layers=2, ratio=1.1), r"must lie in \(0, 1\]"),
        (lambda: PhaseConfig(layers=2, lr=-1.0), "lr must be above 0"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(make: Callable[[], object], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_model_of_another_depth_is_refused(tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="the model has 3: plan phase 1 with 3 layers"):
        config((2, 1.0)).strategy().next_phase(tiny(3), text_data(1, 1))
