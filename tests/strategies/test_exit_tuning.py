"""Exit tuning: what learns is the exits, from the tokens chosen, and the model they stand on stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Data, EaseError, StandardTransformer, Trainer, TuneConfig, compute_confidence_threshold, score, train
from ease.flops import exit_flops, head_flops, run_flops
from ease.policy import Policy
from ease.strategies.exit_tuning import select

Make = Callable[..., StandardTransformer]


@pytest.fixture
def finished(learned: Callable[[int, int], tuple[StandardTransformer, Data]]) -> tuple[StandardTransformer, Data]:
    return learned(4, 3)


def tuned(model: StandardTransformer, data: Data, **options: Any) -> Any:
    plan = TuneConfig(**{"exits": (1, 2), "lr": 1e-2, "max_epochs": 3, "patience": None} | options)
    ((phase, history),) = train(model, plan.strategy(), data)
    return phase, history


def exit_loss_of(model: StandardTransformer, data: Data, exit: int) -> float:
    return score(model, data.val, last=exit).metrics()["loss"]


@pytest.mark.parametrize("adapter", ["none", "mlp"])
@pytest.mark.parametrize("objective", ["cross-entropy", "distillation", "both"])
def test_exits_learn_and_the_backbone_stays_bit_for_bit(adapter: Any, objective: Any, finished: Any) -> None:
    model, data = finished
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [exit_loss_of(model, data, exit) for exit in (1, 2)]
    x = data.val[0][0]
    deep = model(x)
    tuned(model, data, adapter=adapter, objective=objective)
    changed = {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}
    assert changed == {"exit_norms.0.weight", "exit_norms.1.weight"}
    assert torch.equal(model(x), deep)
    assert all(exit_loss_of(model, data, e) < 0.98 * loss for e, loss in zip((1, 2), losses))
    assert model.trained_exits == {1, 2, 4}
    assert all(p.requires_grad for p in model.parameters()), "the phase is over, so nothing is frozen"


def test_an_adapter_starts_as_the_identity_and_then_helps(finished: Any) -> None:
    model, data = finished
    plain, x = copy.deepcopy(model), data.val[0][0]
    logits = model.forward_all_layers(x)
    model.add_adapters((1,), 8)
    model.add_adapters((2,), 8)
    assert all(map(torch.equal, logits, model.forward_all_layers(x)))
    assert set(model.exit_adapters) == {"1", "2"}
    with pytest.raises(EaseError, match="adapters of 8 units: give new ones the same number, got 16"):
        model.add_adapters((3,), 16)
    tuned(plain, data, exits=(1,))
    tuned(model, data, exits=(1,), adapter="mlp")
    assert model.config.adapter_dim == 8, "a quarter of the width"
    assert exit_loss_of(model, data, 1) < exit_loss_of(plain, data, 1)
    state = torch.randn(1, 3, 32)
    assert not torch.equal(model.logits(state, 1), plain.logits(state, 1))


def test_the_trunk_runs_once_and_without_gradients(finished: Any) -> None:
    model, data = finished
    ran: list[tuple[int, bool]] = []
    for number, layer in enumerate(model.layers, 1):
        layer.register_forward_hook(lambda m, i, out, n=number: ran.append((n, out.requires_grad)))
    model.freeze_below(5, exits=(1, 3))
    plan = TuneConfig(exits=(1, 3), objective="distillation").strategy()
    phase = plan.next_phase(model, data)
    Trainer(phase.config, 256).compute_loss(model, *data.train[0], first=5).backward()
    assert ran == [(1, False), (2, False), (3, False), (4, False)]
    ran.clear()
    cheap = TuneConfig(exits=(1, 3)).strategy().next_phase(model, data)
    Trainer(cheap.config, 256).compute_loss(model, *data.train[0], first=5).backward()
    assert ran == [(1, False), (2, False), (3, False)], "without a teacher nothing above the last tuned exit runs"


@pytest.mark.parametrize(("objective", "deepest", "factor"), [("cross-entropy", 2, 2), ("both", 4, 3)])
def test_flops_are_those_of_one_frozen_pass_and_the_heads(
    objective: Any, deepest: int, factor: int, finished: Any
) -> None:
    model, data = finished
    _, history = tuned(model, data, max_epochs=1, adapter="mlp", objective=objective)
    x = data.train[0][0]
    everyone, batches = torch.ones_like(x, dtype=torch.bool), len(data.train)
    assert history.flops["trunk"] == batches * run_flops(model.config, deepest, everyone)
    assert exit_flops(model.config, 10, 1) == head_flops(model.config, 10) + 10 * 2 * 2 * 32 * 8
    heads = sum(exit_flops(model.config, x.numel(), exit) for exit in (1, 2))
    assert history.flops["training"] == batches * factor * heads


@pytest.mark.parametrize("tokens", ["hard", "kept"])
def test_tokens_are_selected_one_by_one_by_the_exit_named(tokens: Any, finished: Any) -> None:
    model, data = finished
    batches, flops = select(model, [data.train], 3, 0.3, tokens)
    threshold = compute_confidence_threshold(model, data.train, 0.3, exit=3)
    total = sum(y.numel() for _, y in data.train)
    chosen = sum(int(batch.scored.sum()) for batch in batches)
    assert chosen == pytest.approx(total * (0.3 if tokens == "hard" else 0.7), abs=1)
    for (x, y), batch in zip(data.train, batches):
        confidences = score(model, [(x, y)], last=3).confidences.view(y.shape)
        assert torch.equal(batch.scored, (confidences < threshold) == (tokens == "hard"))
        assert torch.equal(batch.y[batch.scored], y[batch.scored])
    assert flops > 0
    phase, _ = tuned(model, data, tokens=tokens, select_exit=3, hard_ratio=0.3, max_epochs=1)
    assert phase.spent["selecting"] == flops
    assert sum(int(batch.scored.sum()) for batch in phase.train) == chosen


def test_validation_routes_among_the_tuned_exits(finished: Any) -> None:
    """Layers above them would say the same every time, and patience would end the phase at once."""
    model, data = finished
    phase, history = tuned(model, data, routing_threshold=1.0, max_epochs=2)
    assert history.rows[-1]["val_loss"] == pytest.approx(exit_loss_of(model, data, 2))
    assert phase.config.policy == Policy((1, 2), (1.0, 1.0))


def test_exits_stand_at_thirds_by_default(finished: Any) -> None:
    model, data = finished
    strategy = TuneConfig().strategy()
    strategy.next_phase(model, data)
    assert strategy.policy() == Policy((1, 2), (0.9, 0.9))


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda m, d: tuned(m, d, exits=(2, 4)), "exit_layer 4 must lie below the last of the model's 4 layers"),
        (lambda m, d: tuned(m, d, exits=(2, 1)), "from shallow to deep"),
        (lambda m, d: TuneConfig(adapter="lora"), "adapter must be none or mlp"),
        (lambda m, d: TuneConfig(temperature=0.0, objective="both"), "temperature must be above 0"),
        (lambda m, d: TuneConfig(temperature=2.0), "belongs to distillation"),
        (lambda m, d: TuneConfig(adapter_dim=8), "set adapter to mlp"),
        (lambda m, d: TuneConfig(adapter="mlp", adapter_dim=0), "adapter_dim must be at least 1"),
        (lambda m, d: TuneConfig(hard_ratio=0.2), "hard_ratio is used only in a selection: set tokens to hard or kept"),
        (lambda m, d: TuneConfig(select_exit=2), "select_exit is used only in a selection"),
        (lambda m, d: TuneConfig(tokens="hard", select_exit=0), "select_exit must be at least 1"),
        (lambda m, d: tuned(m, d, tokens="hard", select_exit=9), "select_exit is 9 and the model has 4 layers"),
        (lambda m, d: TuneConfig(hard_ratio=0.0), r"must lie in \(0, 1\]"),
        (lambda m, d: TuneConfig(select_epochs=0), "select_epochs must be at least 1"),
        (lambda m, d: m.add_adapters((4,), 8), "name exits below the last layer"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(make: Any, fix: str, finished: Any) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        make(*finished)
    assert "\n" not in str(error.value)
