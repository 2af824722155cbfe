"""The two core options, the loss they make, and the one training loop."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease import (
    Batch,
    Data,
    EaseError,
    Layout,
    Phase,
    PhaseOptions,
    Policy,
    StageConfig,
    StandardConfig,
    StandardTransformer,
    TokenBatches,
    Trainer,
    TrainingConfig,
    create_standard_config,
    score,
    train,
)
from ease.flops import head_flops, run_flops
from ease.interface import re_iterable
from ease.progress import Progress, ProgressBatches, StepMetrics
from ease.training import engine
from ease.training.losses import CrossEntropy, Distillation
from ease.training.phases import Step
from ease.training.selection import LearnedGate, LeastConfident, classifier_loss

Make = Callable[..., StandardTransformer]
Pair = tuple[Tensor, Tensor]

# The four patterns that the two core options were made for: name, layers of the model, configuration, weights.
PATTERNS = [
    pytest.param(3, TrainingConfig([StageConfig((3, 3))]), {3: 1.0}, id="standard"),
    pytest.param(
        3,
        TrainingConfig([StageConfig((k, k), 0.33) for k in (1, 2, 3)]),
        {1: 0.33, 2: 0.33, 3: 0.33},
        id="deep supervision",
    ),
    pytest.param(
        4,
        TrainingConfig([StageConfig((1, 2)), StageConfig((3, 4))], routing_threshold=0.95, exit_layer=2),
        {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0},
        id="two bricks",
    ),
    pytest.param(
        3,
        TrainingConfig([StageConfig((1, 2), 0.7), StageConfig((3, 3), 0.3)]),
        {1: 0.7, 2: 0.7, 3: 0.3},
        id="asymmetric",
    ),
]


def pair(B: int = 2, T: int = 9, ignored: float = 0.0) -> Pair:
    x = torch.randint(256, (B, T))
    return x, x.roll(-1, 1).masked_fill(torch.rand(B, T) < ignored, -100)


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Configurations


@pytest.mark.parametrize(("layers", "config", "weights"), PATTERNS)
def test_patterns_reach_their_weights_and_reduce_the_loss(
    layers: int, config: TrainingConfig, weights: dict[int, float], tiny: Make, text_data: Callable[..., Data]
) -> None:
    assert config.weights == pytest.approx(weights)
    data, model, trainer = text_data(8, 2), tiny(layers), Trainer(config, 256)
    optimizer = trainer.create_optimizer(model, 3e-3)
    before = trainer.evaluate(model, data.val)["loss"]
    result = trainer.train_with_early_stopping(model, data.train, data.val, optimizer, 3, verbose=False)
    assert result["val_losses"][-1] < before - 0.5
    assert result["train_losses"] == sorted(result["train_losses"], reverse=True)
    after = trainer.evaluate(model, data.val)
    assert after["loss"] == pytest.approx(min(result["val_losses"]))
    assert after["ppl"] == pytest.approx(math.exp(after["loss"]), rel=1e-4)
    assert model.trained_exits == set(weights)


def test_a_model_too_shallow_for_its_stages_is_refused_everywhere(tiny: Make) -> None:
    trainer, model = Trainer(create_standard_config(3), 256), tiny(2)
    for use in (lambda: trainer.create_optimizer(model, 1e-3), lambda: trainer.compute_loss(model, *pair())):
        with pytest.raises(EaseError, match="shorten the stage or use a deeper model"):
            use()


def test_without_routing_the_exit_is_ignored(tiny: Make) -> None:
    x, y = pair()
    config = TrainingConfig([StageConfig((2, 2))], routing_threshold=0.0, exit_layer=77)
    figures = Trainer(config, 256).evaluate(tiny(2), [(x, y)])
    assert figures["exit_shares"] == {2: 1.0}
    assert figures["shallow_ratio"] == 0
    assert figures["compute_cost"] == 1


# The loss


def naive_loss(model: StandardTransformer, x: Tensor, y: Tensor, weights: dict[int, float]) -> Tensor:
    logits = model.forward_all_layers(x)
    parts = [w * F.cross_entropy(logits[k - 1].flatten(0, 1), y.flatten()) for k, w in weights.items()]
    return torch.stack(parts).sum()


@pytest.fixture(params=["fused", "fallback"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("head", ["tied", "untied", "frozen"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize(("layers", "config", "weights"), PATTERNS)
def test_the_loss_and_its_gradients_are_naive(
    layers: int, config: TrainingConfig, weights: dict[int, float], ignored: float, head: str, tiny: Make
) -> None:
    model = tiny(layers, sharp=True, tie_embeddings=head == "tied").double()
    if head == "frozen":
        model.output_head.requires_grad_(False)
    x, y = pair(ignored=ignored)
    expected = naive_loss(model, x, y, weights)
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, learning, allow_unused=True)
    loss = Trainer(config, 256).compute_loss(model, x, y)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for p, gradient in zip(learning, gradients):
        if gradient is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(Trainer(config, 256).compute_loss(model, x, y), expected)


def test_hard_tokens_alone_are_scored_each_in_its_full_sequence(tiny: Make) -> None:
    model, (x, y) = tiny(3, sharp=True).double(), pair(3, 9, ignored=0.2)
    active = torch.rand(3, 9) < 0.5
    config = TrainingConfig(layer_weights={2: 0.25, 3: 0.75})
    trunk = model.forward_to_layer(x, 1).detach()
    state, expected = trunk, torch.zeros((), dtype=torch.float64)
    for k, w in config.weights.items():
        state = model.run(state, k, k, active=active)
        scored = active & (y != -100)
        expected = expected + w * F.cross_entropy(model.logits(state[scored], k), y[scored])
    for given_state in (None, trunk):
        model.zero_grad()
        loss = Trainer(config, 256).compute_loss(model, x, y, active, state=given_state, first=2)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert model.layers[0].ffn.up_proj.weight.grad is None  # the trunk runs without gradients
        assert model.layers[1].ffn.up_proj.weight.grad is not None


def test_routing_never_changes_a_gradient(tiny: Make) -> None:
    """The threshold is for validation and inference: training without active tokens is the same bit for bit."""
    model, (x, y) = tiny(3, sharp=True), pair()
    gradients = []
    for threshold in (0.0, 0.01, 0.99):
        model.zero_grad()
        trainer = Trainer(TrainingConfig([StageConfig((1, 3))], threshold, 1), 256)
        trainer.compute_loss(model, x, y).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


@pytest.mark.parametrize(("layers", "config", "weights"), PATTERNS)
def test_a_head_is_computed_only_where_there_is_a_weight(
    layers: int, config: TrainingConfig, weights: dict[int, float], tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, ran = tiny(layers + 1), [], []
    norm = StandardTransformer.exit_norm
    monkeypatch.setattr(StandardTransformer, "exit_norm", lambda m, s, exit: calls.append(exit) or norm(m, s, exit))
    model.layers[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    trainer = Trainer(config, 256)
    trainer.train_epoch(model, [pair()], trainer.create_optimizer(model, 1e-3))
    assert calls == list(weights)
    assert not ran, "a layer above the deepest weight ran"


def test_a_weight_of_zero_computes_no_head(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    norm = StandardTransformer.exit_norm
    monkeypatch.setattr(StandardTransformer, "exit_norm", lambda m, s, exit: calls.append(exit) or norm(m, s, exit))
    config = TrainingConfig([StageConfig((1, 2), 0.0), StageConfig((3, 3), 1.0)])
    assert config.weights == {3: 1.0}
    assert replace(config, routing_threshold=0.5).weights == config.weights
    Trainer(config, 256).compute_loss(tiny(3), *pair())
    assert calls == [3]


# Only a share of the tokens goes on


def by_hand(
    model: StandardTransformer, batch: Batch, config: TrainingConfig, teacher: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch layer by layer and token by token, and who ran each layer."""
    active, state, ran, parts = batch.running, model.embed(batch.x), [], []
    for layer in range(1, max(config.weights) + 1):
        state = model.run(state, layer, layer, layout=batch.layout, active=active)
        ran.append(active)
        parts.append((layer, state, active & batch.scored))
        if layer in config.selection.keep:
            confidence = model.logits(state, layer).softmax(-1).amax(-1).masked_fill(~active, 2.0).flatten()
            count = max(1, round(config.selection.keep[layer] * int(active.sum())))
            active = torch.zeros_like(active)
            active.view(-1)[confidence.argsort()[:count]] = True
    goal = model.logits(state, layer).detach().log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for at, state, scored in parts:
        if at in config.weights:
            logits = model.logits(state, at)
            lost = F.cross_entropy(logits.transpose(1, 2), batch.y, reduction="none")
            if teacher and at < layer:
                apart = (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1)
                lost = torch.where(parts[-1][2], apart, lost)
            total = total + config.weights[at] * lost[scored].sum() / scored.sum()
    return total, ran


SHARES: list[dict[int, float]] = [{1: 0.5}, {2: 0.3}, {1: 0.6, 3: 0.4}]


@pytest.mark.parametrize("kind", ["plain", "active", "layout", "ignored"])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("keep", SHARES)
def test_only_the_least_sure_go_on_and_are_scored_above(
    keep: dict[int, float], teacher: bool, kind: str, tiny: Make
) -> None:
    """The loss, its gradients and the work done are those of a forward by hand."""
    model, (x, y) = tiny(4, sharp=True).double(), pair(3, 11, ignored=0.3 if kind == "ignored" else 0.0)
    batch = Batch(x, y, torch.rand(3, 11) < 0.7 if kind == "active" else None)
    if kind == "layout":
        batch = batch._replace(layout=Layout.from_attention_mask(torch.arange(11) >= torch.tensor([[0], [4], [9]])))
    objective = Distillation() if teacher else CrossEntropy()
    config = TrainingConfig(layer_weights={1: 0.2, 3: 0.3, 4: 0.5}, selection=LeastConfident(keep), objective=objective)
    expected, ran = by_hand(model, batch, config, teacher)
    learning = [p for name, p in model.named_parameters() if name != "exit_norms.1.weight"]  # exit 2 has no loss
    gradients = torch.autograd.grad(expected, learning)
    asked: list[int] = []
    for layer in model.layers:
        layer.ffn.register_forward_hook(lambda m, i, out: asked.append(i[0].numel() // 32))
    continued: dict[int, Tensor] = {}
    loss = Trainer(config, 256).compute_loss(model, *batch[:3], layout=batch.layout, continued=continued)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for p, gradient in zip(learning, gradients):
        torch.testing.assert_close(p.grad, gradient)
    assert asked == [int(active.sum()) for active in ran]
    assert asked[-1] < asked[0]
    assert all(torch.equal(continued[exit], ran[exit]) for exit in keep)
    with torch.no_grad():
        torch.testing.assert_close(Trainer(config, 256).compute_loss(model, *batch[:3], layout=batch.layout), expected)


@pytest.mark.parametrize("kind", ["plain", "active", "ignored"])
@pytest.mark.parametrize("keep", SHARES)
def test_where_classifiers_choose_every_token_is_scored_once(
    keep: dict[int, float], kind: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that a classifier is surest of leave and are scored there; the head is asked for few of the others."""
    model, (x, y) = tiny(4, sharp=True).double(), pair(3, 11, ignored=0.3 if kind == "ignored" else 0.0)
    model.set_classifiers({exit: 3 * torch.randn(33) for exit in keep})
    batch = Batch(x, y, torch.rand(3, 11) < 0.7 if kind == "active" else None)
    weights = {1: 0.2, 3: 0.3, 4: 0.5}
    config = TrainingConfig(layer_weights=weights, selection=LearnedGate(keep, 0.7))
    active, state = batch.running, model.embed(x)
    expected, taught = torch.zeros((), dtype=torch.float64), []
    for layer in range(1, 5):
        state, here = model.run(state, layer, layer, active=active), active & batch.scored
        if layer in keep:
            sure = model.exit_confidence(state, layer).masked_fill(~active, 2.0).flatten()
            arrived, count = here, max(1, round(keep[layer] * int(active.sum())))
            active = torch.zeros_like(active)
            active.view(-1)[sure.argsort()[:count]] = True
            here = here & ~active
            taught.append(-(-int(arrived.sum()) // 8))
        if layer in weights:
            lost = F.cross_entropy(model.logits(state, layer)[here], y[here])
            expected = expected + weights[layer] * lost * int(here.sum()) / int(batch.scored.sum())
    lessons: list[int] = []
    logits, frozen = model.logits, torch.tensor(0.25, dtype=torch.float64)
    monkeypatch.setattr(model, "logits", lambda s, exit: lessons.append(len(s)) or logits(s, exit))
    monkeypatch.setattr(F, "binary_cross_entropy", lambda sure, chance, **_: frozen * len(chance))
    continued: dict[int, Tensor] = {}
    loss = Trainer(config, 256).compute_loss(model, *batch[:3], continued=continued)
    torch.testing.assert_close(loss, expected + 0.7 * 0.25 * len(keep))
    assert lessons == taught
    assert torch.equal(continued[max(keep)], active)


def test_a_classifier_of_broken_states_gives_a_loss_that_is_no_number(tiny: Make) -> None:
    """Which training then refuses in one sentence, where torch would stop in the middle of it."""
    model = tiny(2)
    model.set_classifiers({1: torch.zeros(33)})
    assert classifier_loss(model, torch.full((8, 32), torch.nan), 1, torch.zeros(8, dtype=torch.long)).isnan()


def test_a_classifier_learns_where_the_exit_is_right(tiny: Make) -> None:
    """And nothing else gets a gradient from what it is taught, but the state."""
    model, (x, _) = tiny(2, sharp=True), pair(8, 32)
    model.set_classifiers({1: torch.zeros(33)})
    state = model.forward_to_layer(x, 1).flatten(0, 1).detach().requires_grad_()
    right = state[:, 0] > 0
    named = model.logits(state, 1).detach().argsort()
    targets = torch.where(right, named[:, -1], named[:, 0])
    optimizer = torch.optim.Adam(model.exit_classifiers.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        classifier_loss(model, state, 1, targets).backward()
        optimizer.step()
    told = model.exit_confidence(state, 1).detach()
    assert told[right].mean() > 3 * told[~right].mean()
    assert model.output_head.weight.grad is None
    assert state.grad is not None
    assert classifier_loss(model, state[:0], 1, targets[:0]).item() == 0


def test_a_share_goes_on_above_a_frozen_trunk(tiny: Make) -> None:
    model, (x, y) = tiny(4, sharp=True).double(), pair(3, 11)
    config = TrainingConfig(layer_weights={2: 0.4, 4: 0.6}, selection=LeastConfident({2: 0.5}))
    expected, _ = by_hand(model, Batch(x, y), config)
    for state in (None, model.forward_to_layer(x, 1).detach()):
        torch.testing.assert_close(Trainer(config, 256).compute_loss(model, x, y, state=state, first=2), expected)
    with pytest.raises(EaseError, match="in the frozen trunk below layer 3, which runs all tokens"):
        Trainer(config, 256).compute_loss(model, x, y, first=3)


def test_at_a_share_of_one_nothing_is_chosen(tiny: Make) -> None:
    model, (x, y), continued = tiny(3), pair(), {}
    weights = {1: 0.5, 3: 0.5}
    plain = Trainer(TrainingConfig(layer_weights=weights), 256).compute_loss(model, x, y)
    calls: list[int] = []
    model.output_head.register_forward_hook(lambda *_: calls.append(1))
    trainer = Trainer(TrainingConfig(layer_weights=weights, selection=LeastConfident({1: 1.0})), 256)
    assert torch.equal(trainer.compute_loss(model, x, y, continued=continued), plain)
    assert not calls
    assert not continued


@pytest.mark.parametrize(("tokens", "share", "going"), [((1, 1), 0.1, 1), ((2, 3), 0.01, 1), ((4, 5), 0.3, 6)])
def test_ties_and_tiny_batches_send_on_as_many_as_asked_and_at_least_one(
    tokens: tuple[int, int], share: float, going: int, tiny: Make
) -> None:
    model, (x, y), continued = tiny(2), pair(*tokens), {}
    with torch.no_grad():
        model.output_head.weight.zero_()  # every token is as unsure as any other
    config = TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, selection=LeastConfident({1: share}))
    loss = Trainer(config, 256).compute_loss(model, x, y, continued=continued)
    assert int(continued[1].sum()) == going
    assert loss.item() == pytest.approx(math.log(256))


def test_a_share_goes_on_where_layers_are_dropped(tiny: Make) -> None:
    """Always skipping layer 2 gives the loss of the model without it, with the same choice at layer 1."""
    model, (x, y) = tiny(3, sharp=True), pair(3, 11)
    skipped = Trainer(TrainingConfig(layer_weights={1: 0.5, 3: 0.5}, selection=LeastConfident({1: 0.4})), 256)
    loss = skipped.compute_loss(model, x, y, step=Step({1: 0.5, 3: 0.5}, {2: 1.0}))
    without = tiny(3, sharp=True)
    del without.layers[1], without.exit_norms[1]
    shorter = Trainer(TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, selection=LeastConfident({1: 0.4})), 256)
    torch.testing.assert_close(loss, shorter.compute_loss(without, x, y))


def test_a_choice_above_the_deepest_loss_of_a_step_is_not_made(tiny: Make) -> None:
    model, (x, y), continued = tiny(3), pair(), {}
    trainer = Trainer(TrainingConfig(layer_weights={1: 0.5, 3: 0.5}, selection=LeastConfident({1: 0.4})), 256)
    trainer.compute_loss(model, x, y, step=Step({1: 1.0}), continued=continued)
    assert not continued


def test_a_share_of_whole_sequences_is_refused(tiny: Make) -> None:
    trainer = Trainer(TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, selection=LeastConfident({1: 0.4})), 3)
    x, _ = pair()
    with pytest.raises(EaseError, match="one decision per sequence: use AllTokens"):
        trainer.compute_loss(tiny(2, num_labels=3), x, x % 3)


def test_a_history_counts_the_choices(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(3, 1), tiny(2)
    config = TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, selection=LeastConfident({1: 0.25}))
    phase = Phase("one", config, data.train, data.val, PhaseOptions(max_epochs=1))
    seen: list[float] = []
    inner = Trainer.compute_loss

    def noted(self: Trainer, model: Any, x: Tensor, y: Tensor, *args: Any, **options: Any) -> Tensor:
        loss = inner(self, model, x, y, *args, **options)
        going = options["continued"][1]
        c, everyone = model.config, torch.ones_like(x, dtype=torch.bool)
        layers = run_flops(c, 1, everyone) + run_flops(c, 1, going)
        seen.append(3 * layers + 4 * head_flops(c, x.numel()) + 3 * head_flops(c, int(going.sum())))
        return loss

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "compute_loss", noted)
        history = Trainer(config, 256).run(model, phase)
    assert history.flops["training"] == sum(seen)


def test_bad_batches_are_refused(tiny: Make) -> None:
    trainer, model = Trainer(create_standard_config(2), 256), tiny(2)
    x, y = pair()
    with pytest.raises(EaseError, match=r"x and y must have one shape, got \(2, 9\) and \(2, 8\)") as error:
        trainer.compute_loss(model, x, y[:, 1:])
    assert "\n" not in str(error.value)
    with pytest.raises(EaseError, match="use the tokenizer that the model was trained with, or a larger vocab_size"):
        trainer.compute_loss(model, x + 250, y)


# Batches


class Stream:
    """An iterator: it can be walked once."""

    def __iter__(self) -> Iterator[Pair]:
        return self

    def __next__(self) -> Pair:
        raise StopIteration


@pytest.mark.parametrize("make", [lambda: iter([pair()]), lambda: (pair() for _ in "ab"), Stream, lambda: zip([1])])
def test_a_one_shot_iterator_is_refused(make: Callable[[], Any], tiny: Make) -> None:
    trainer, model, good = Trainer(create_standard_config(2), 256), tiny(2), [pair()]
    optimizer = trainer.create_optimizer(model, 1e-3)
    uses = [
        lambda: trainer.train_epoch(model, make(), optimizer),
        lambda: trainer.evaluate(model, make()),
        lambda: trainer.train_with_early_stopping(model, make(), good, optimizer, 1, verbose=False),
        lambda: trainer.train_with_early_stopping(model, good, make(), optimizer, 1, verbose=False),
    ]
    for use in uses:
        with pytest.raises(EaseError, match="one-shot iterator: pass a list, or an object whose __iter__") as error:
            use()
        assert "\n" not in str(error.value)


def test_an_epoch_without_a_target_is_refused(tiny: Make) -> None:
    """A loss of 0 would be a false figure."""
    model, trainer = tiny(2), Trainer(create_standard_config(2), 256)
    optimizer, x = trainer.create_optimizer(model, 1e-3), torch.zeros(2, 4, dtype=torch.long)
    nothing = [(x, torch.full_like(x, -100))]
    for use in (
        lambda: trainer.train_epoch(model, [], optimizer),
        lambda: trainer.train_epoch(model, nothing, optimizer),
        lambda: trainer.train_with_early_stopping(model, nothing, [(x, x)], optimizer, 1, verbose=False),
    ):
        with pytest.raises(EaseError, match="has no token to learn from: use more text, or targets"):
            use()


def test_one_epoch_is_one_pass(tiny: Make, text: Tensor) -> None:
    """Looking whether batches can be walked again must not begin a pass: shuffled batches would skip windows."""
    batches = TokenBatches(text[:600], 16, 4, shuffle=True, max_batches=2)
    assert re_iterable(batches) is batches
    assert batches.epoch == 0
    trainer, model = Trainer(create_standard_config(1), 256), tiny(1)
    trainer.train_epoch(model, batches, trainer.create_optimizer(model, 1e-3))
    assert batches.epoch == 1
    val = TokenBatches(text[600:900], 16, 4)
    trainer.run(model, Phase("one", trainer.config, batches, val, PhaseOptions(max_epochs=3, patience=None)))
    assert batches.epoch == 4


def test_a_batch_with_nothing_to_score_is_skipped(tiny: Make) -> None:
    trainer, model = Trainer(create_standard_config(1), 256), tiny(1)
    x, y = pair()
    empty, nobody = (x, torch.full_like(y, -100)), Batch(x, y, torch.zeros_like(x, dtype=torch.bool))
    before = snapshot(model)
    optimizer = trainer.create_optimizer(model, 1e-3)
    with pytest.raises(EaseError, match="no token to learn from"):
        trainer.train_epoch(model, [empty, nobody], optimizer)
    assert same(model, before)
    loss = trainer.train_epoch(model, [empty, (x, y), nobody], optimizer)
    assert 4 < loss < 7
    assert not same(model, before)
    history = trainer.run(
        model, Phase("one", trainer.config, [empty, (x, y)], [empty, (x, y)], PhaseOptions(max_epochs=2))
    )
    assert history.steps == 2
    assert all(math.isfinite(value) for value in history.column("val_loss"))


def test_the_epoch_s_loss_is_the_mean_over_tokens(tiny: Make) -> None:
    trainer, model = Trainer(create_standard_config(1), 256), tiny(1)
    batches = [pair(2, 9), pair(1, 3), pair(4, 9, ignored=0.7)]
    counts = [int((y != -100).sum()) for _, y in batches]
    with torch.no_grad():
        losses = [trainer.compute_loss(model, x, y).item() for x, y in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    expected = sum(loss * n for loss, n in zip(losses, counts)) / sum(counts)
    assert trainer.train_epoch(model, batches, optimizer) == pytest.approx(expected, rel=1e-6)


def test_the_optimizer_takes_what_learns_and_decays_matrices_only(tiny: Make) -> None:
    model, trainer = tiny(3), Trainer(create_standard_config(3), 256)
    model.freeze_below(3)
    optimizer = trainer.create_optimizer(model, 2e-3, weight_decay=0.2)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    assert decayed["lr"] == free["lr"] == 2e-3
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    learning = {*model.layers[2].parameters(), *model.exit_norms[2].parameters()}
    assert {*decayed["params"], *free["params"]} == learning


@pytest.mark.parametrize("tied", [False, True])
def test_layers_learn_at_rates_of_their_own_and_schedules_keep_their_ratio(tied: bool, tiny: Make) -> None:
    scales = {1: 0.1, 2: 0.5}
    model, config = tiny(3, tie_embeddings=tied), TrainingConfig([StageConfig((3, 3))], layer_lr_scales=scales)
    trainer = Trainer(config, 256)
    optimizer = trainer.create_optimizer(model, 2e-3, weight_decay=0.2)
    rate = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for number, scale in (1, 0.1), (2, 0.5), (3, 1.0):
        assert rate[model.layers[number - 1].ffn.up_proj.weight] == pytest.approx((2e-3 * scale, 0.2))
        assert rate[model.layers[number - 1].ffn_norm.weight] == pytest.approx((2e-3 * scale, 0.0))
        assert rate[model.exit_norms[number - 1].weight] == pytest.approx((2e-3 * scale, 0.0))
    assert rate[model.output_head.weight] == (2e-3, 0.2)
    assert rate[model.embedding.weight] == pytest.approx((2e-3 if tied else 2e-4, 0.2))
    options = PhaseOptions(lr=2e-3, schedule="cosine", max_epochs=4, patience=None)
    history = trainer.fit(model, Phase("one", config, [pair()], [pair()], options), optimizer, Progress())
    assert history.column("lr") == pytest.approx([2e-3 * options.lr_factor(i / 4) for i in (1, 2, 3, 4)])
    assert sorted({g["lr"] / optimizer.param_groups[0]["lr"] for g in optimizer.param_groups}) == pytest.approx(
        [0.1, 0.5, 1.0]
    )


def test_what_is_frozen_has_no_rate_and_a_slow_layer_moves_less(tiny: Make) -> None:
    model, trainer = tiny(3), Trainer(TrainingConfig([StageConfig((3, 3))], layer_lr_scales={1: 1.0, 2: 1e-3}), 256)
    model.freeze_below(2)
    optimizer = trainer.create_optimizer(model, 1e-2, weight_decay=0.0)
    learning = {p for g in optimizer.param_groups for p in g["params"]}
    assert learning == {p for p in model.parameters() if p.requires_grad}
    before = snapshot(model)
    trainer.train_epoch(model, [pair()], optimizer)
    moved = [
        float((layer.ffn.up_proj.weight.detach() - before[f"layers.{i}.ffn.up_proj.weight"]).abs().max())
        for i, layer in enumerate(model.layers)
    ]
    assert moved[0] == 0
    assert moved[1] == pytest.approx(1e-5, rel=0.01)  # the first step of Adam is as long as the rate
    assert moved[2] == pytest.approx(1e-2, rel=0.01)


def test_gradients_are_clipped(tiny: Make) -> None:
    model, trainer = tiny(1), Trainer(TrainingConfig(layer_weights={1: 1e6}), 256)
    before = snapshot(model)
    trainer.train_epoch(model, [pair()], torch.optim.SGD(model.parameters(), lr=1.0))
    after = snapshot(model)
    moved = sum(float((after[n] - before[n]).square().sum()) for n, _ in model.named_parameters())
    assert moved**0.5 == pytest.approx(1.0, abs=1e-3)


# Early stopping


def script(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, Tensor]]:
    """Validation says what the script says; returns the weights of every epoch as they come."""
    epochs: list[dict[str, Tensor]] = []

    def scores(_: Trainer, model: StandardTransformer, batches: object, **options: object) -> SimpleNamespace:
        epochs.append(snapshot(model))
        loss = losses[len(epochs) - 1]
        return SimpleNamespace(flops=7.0, metrics=lambda: {"loss": loss, "ppl": math.exp(loss), "acc": 0.5})

    monkeypatch.setattr(Trainer, "scores", scores)
    return epochs


@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]), min_size=1, max_size=9),
    patience=st.integers(1, 4),
)
def test_early_stopping_waits_and_restores_the_best(losses: list[float], patience: int, tiny: Make) -> None:
    best, best_epoch, total, stopped = math.inf, 0, 0, False
    for epoch, loss in enumerate(losses, 1):
        total = epoch
        if loss < best:
            best, best_epoch = loss, epoch
        elif epoch - best_epoch >= patience:
            stopped = True
            break

    with pytest.MonkeyPatch.context() as monkeypatch:
        epochs = script(monkeypatch, losses)
        model, trainer, batch = tiny(1, dim=8), Trainer(create_standard_config(1), 256), pair()
        optimizer = trainer.create_optimizer(model, 1e-2)
        result = trainer.train_with_early_stopping(
            model, [batch], [batch], optimizer, len(losses), patience, verbose=False
        )
    assert set(result) == {"train_losses", "val_losses", "val_accs", "best_epoch", "total_epochs", "stopped_early"}
    assert result["best_epoch"] == best_epoch
    assert result["total_epochs"] == total == len(epochs)
    assert result["stopped_early"] is stopped
    assert result["val_losses"] == losses[:total]
    assert result["val_accs"] == [0.5] * total
    assert len(result["train_losses"]) == total
    assert same(model, epochs[best_epoch - 1])
    assert total == 1 or not same(model, epochs[0 if best_epoch > 1 else 1])


def test_patience_none_never_stops_and_the_last_weights_can_be_kept(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = script(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0])
    model, config, batch = tiny(1, dim=8), create_standard_config(1), pair()
    options = PhaseOptions(max_epochs=5, patience=None)
    phase = Phase("one", config, [batch], [batch], options, restore_best=False)
    history = Trainer(config, 256).run(model, phase)
    assert (len(history.rows), history.best_epoch, history.stopped_early) == (5, 1, False)
    assert same(model, epochs[-1])
    assert history.flops["validation"] == 35


def test_verbose_prints_a_line_per_epoch(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model, trainer, batch = tiny(1), Trainer(create_standard_config(1), 256), pair()
    optimizer = trainer.create_optimizer(model, 1e-3)
    trainer.train_with_early_stopping(model, [batch], [batch], optimizer, 2, 5)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "epoch   1" in out[0]
    assert "val PPL" in out[0]


@pytest.mark.parametrize("where", ["loss", "validation"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    where: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = script(monkeypatch, [1.0, math.nan if where == "validation" else 0.9, 0.8])
    model, config, batch = tiny(1, dim=8), create_standard_config(1), pair()
    compute, calls = Trainer.compute_loss, []

    def broken(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        loss = compute(*args, **options)
        return loss * math.nan if where == "loss" and len(calls) >= 4 else loss

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    phase = Phase("one", config, [batch, batch], [batch], PhaseOptions(max_epochs=3))
    monkeypatch.setattr(engine, "MAX_SKIPPED", 1)
    with pytest.raises(EaseError, match=r"loss is nan: .* last good weights .*; lower the learning rate") as error:
        Trainer(config, 256).run(model, phase)
    assert "\n" not in str(error.value)
    assert same(model, epochs[0])
    assert all(p.requires_grad for p in model.parameters())
    assert (len(calls), len(epochs)) == (4, 1 if where == "loss" else 2)


def test_an_interrupt_keeps_the_best_weights(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = script(monkeypatch, [1.0, 2.0, 3.0])
    model, config, batch = tiny(1, dim=8), create_standard_config(1), pair()

    class Impatient(Progress):
        def epoch(self, row: Any) -> None:
            if row["epoch"] == 2:
                raise KeyboardInterrupt

    phase = Phase("one", config, [batch], [batch], PhaseOptions(patience=None))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, 256).run(model, phase, Impatient())
    assert same(model, epochs[0])


# The loop


def test_the_schedule_reaches_the_optimizer(tiny: Make) -> None:
    model, config, batch = tiny(1, dim=8), create_standard_config(1), pair()
    options = PhaseOptions(lr=1e-3, schedule="cosine", max_epochs=4, patience=None)
    history = Trainer(config, 256).run(model, Phase("one", config, [batch], [batch], options))
    rates = history.column("lr")
    assert rates == pytest.approx([1e-3 * options.lr_factor(i / 4) for i in (1, 2, 3, 4)])
    assert [row["step"] for row in history.rows] == [1, 2, 3, 4]


@dataclass
class Log(Progress):
    steps: list[float] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    metrics: list[StepMetrics] = field(default_factory=list)

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.steps.append(fraction)
        if metrics:
            self.metrics.append(metrics)

    def epoch(self, row: Any) -> None:
        self.rows.append(row)


def test_a_phase_may_find_its_routing_before_every_validation(tiny: Make) -> None:
    """Who leaves where follows the model, and finding it is counted with the validation."""
    model, batch, asked = tiny(2, sharp=True), pair(4, 16), []
    config = TrainingConfig([StageConfig((1, 2), 0.5)])

    def route(model: Any) -> tuple[Policy, float]:
        asked.append(model.exit_norms[0].weight.clone())
        shallow = score(model, [batch], last=1)
        return Policy((1,), (shallow.confidences.median().item(),)), shallow.flops

    shown: list[Any] = []
    inner = Trainer.scores

    def noted(*args: Any, **options: Any) -> Any:
        shown.append(inner(*args, **options))
        return shown[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "scores", noted)
        options = PhaseOptions(lr=1e-2, max_epochs=2, patience=None)
        history = Trainer(config, 256).run(model, Phase("one", config, [batch], [batch], options, route=route))
    assert len(asked) == len(shown) == 2
    assert not torch.equal(*asked)
    assert all(s.metrics()["shallow_ratio"] == pytest.approx(0.5, abs=0.05) for s in shown)
    finding = run_flops(model.config, 1, torch.ones(4, 16, dtype=torch.bool)) + head_flops(model.config, 64)
    assert history.flops["validation"] == sum(s.flops for s in shown) + 2 * finding


def test_packed_and_padded_tokens_are_those_of_their_documents(tiny: Make) -> None:
    """Two documents in one row, and one padded on the left, give the loss, scores and FLOPs of each on its own."""
    model, trainer = tiny(3, sharp=True), Trainer(TrainingConfig([StageConfig((1, 3))], 0.3, 1), 256)
    ids = torch.randint(256, (1, 13))
    a, b = (ids[:, :4], ids[:, 1:5]), (ids[:, 5:12], ids[:, 6:13])
    positions = torch.tensor([[0, 0, *range(4), *range(7)]])
    segments = torch.tensor([[-1, -1, *[0] * 4, *[1] * 7]])
    padding = torch.zeros(1, 2, dtype=torch.long)
    x, y = (torch.cat([padding, first, second], 1) for first, second in zip(a, b))
    packed = Batch(x, y, layout=Layout(positions, segments))
    loss = trainer.compute_loss(model, x, y, layout=packed.layout)
    apart = (4 * trainer.compute_loss(model, *a) + 7 * trainer.compute_loss(model, *b)) / 11
    torch.testing.assert_close(loss, apart)
    together, alone = trainer.scores(model, [packed]), trainer.scores(model, [a, b])
    assert torch.equal(together.exits, alone.exits)
    assert len(set(alone.exits.tolist())) > 1, "one exit proves nothing"
    torch.testing.assert_close(together.losses, alone.losses)
    # The two padded places still give keys and values, so a padded row costs a little more.
    keys = 2 * 2 * 2 * model.config.dim * model.config.kv_heads * model.config.head_size
    assert together.flops == alone.flops + keys * 3
    assert together.processed == 11


def test_a_watch_is_told_of_every_step_and_epoch(tiny: Make) -> None:
    model, config, batch, log = tiny(1, dim=8), create_standard_config(1), pair(), Log()
    phase = Phase("one", config, [batch] * 3, [batch], PhaseOptions(max_epochs=2))
    history = Trainer(config, 256).run(model, phase, log)
    assert log.steps == pytest.approx([i / 6 for i in range(1, 7)])
    assert log.rows == history.rows
    keys = {"epoch", "step", "skipped", "train_loss", "val_loss", "val_ppl", "val_acc", "flops", "seconds", "lr"}
    assert set(history.rows[0]) == keys


def test_a_phase_that_patience_ends_is_done_all_the_same(tiny: Make) -> None:
    model, config, log = tiny(1, dim=8), create_standard_config(1), Log()
    train, val = [pair(1)], [pair(2)]  # random tokens: learning one batch makes the other worse
    history = Trainer(config, 256).run(model, Phase("one", config, train, val, PhaseOptions(lr=0.1, patience=1)), log)
    assert history.stopped_early
    assert log.steps[-1] == 1.0


def test_watched_batches_tell_how_far_they_are() -> None:
    log = Log()
    batches = ProgressBatches(["a", "b"], Progress(), epochs=2)  # type: ignore[arg-type]
    batches.progress = SimpleNamespace(step=log.steps.append)  # type: ignore[assignment]
    assert [*batches, *batches] == ["a", "b", "a", "b"]
    assert log.steps == [0.25, 0.5, 0.75, 1.0]


def test_a_model_of_another_vocabulary_is_refused(tiny: Make) -> None:
    with pytest.raises(EaseError, match="for 100 tokens and the model has 256"):
        Trainer(create_standard_config(2), 100).create_optimizer(tiny(2), 1e-3)


def test_the_same_seed_gives_the_same_weights(tiny: Make, text_data: Callable[..., Data]) -> None:
    ends = []
    for _ in range(2):
        data, model = text_data(4, 1), tiny(2, dropout=0.1)
        torch.manual_seed(7)
        phase = Phase("one", create_standard_config(2), data.train, data.val, PhaseOptions(max_epochs=2))
        Trainer(phase.config, 256).run(model, phase)
        ends.append(snapshot(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_routing_at_an_exit_that_nothing_trained_warns_once(tiny: Make) -> None:
    batch, model = pair(), tiny(3)
    trainer = Trainer(TrainingConfig([StageConfig((3, 3))], 0.5, 1), 256)
    with pytest.warns(UserWarning, match=r"routing at exit \[1\], which no loss has trained: give its layer"):
        trainer.evaluate(model, [batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.evaluate(model, [batch])
        # No warning where a loss is there, or was there in an earlier phase, or nothing routes.
        Trainer(TrainingConfig([StageConfig((1, 3))], 0.5, 1), 256).evaluate(model, [batch])
        Trainer(TrainingConfig([StageConfig((3, 3))], 0.0, 1), 256).evaluate(model, [batch])
        Trainer(create_standard_config(1), 256).compute_loss(model, *batch)
        Trainer(TrainingConfig([StageConfig((3, 3))], 0.5, 1), 256).evaluate(model, [batch])


def test_train_runs_a_strategy_s_phases_in_order(tiny: Make) -> None:
    batch, config = pair(), create_standard_config(2)
    names = iter(["a", "b", "c"])

    class Plan:
        def next_phase(self, model: Any, data: Data) -> Phase | None:
            name = next(names, None)
            return None if name is None else Phase(name, config, data.train, data.val, PhaseOptions(max_epochs=1))

        def policy(self) -> Policy:
            return Policy()

    watched: list[str] = []
    runs = list(train(tiny(2), Plan(), Data([batch], [batch]), progress=lambda p: watched.append(p.name) or Progress()))
    assert [phase.name for phase, _ in runs] == watched == ["a", "b", "c"]
    assert all(len(history.rows) == 1 for _, history in runs)


def test_evaluate_under_several_exits(tiny: Make) -> None:
    model, batch = tiny(4, sharp=True), pair(4, 20)
    config = TrainingConfig([StageConfig((1, 4))], (0.2, 0.2, 0.2), (1, 2, 3))
    figures = Trainer(config, 256).evaluate(model, [batch])
    assert sum(figures["exit_shares"].values()) == pytest.approx(1)
    cost = sum(layer * share for layer, share in figures["exit_shares"].items()) / 4
    assert figures["compute_cost"] == pytest.approx(cost)
    keys = {
        "ppl",
        "acc",
        "loss",
        "shallow_ratio",
        "compute_cost",
        "exit_shares",
        "flops_per_token",
        "seconds",
        "tokens",
    }
    assert set(figures) == keys


def test_training_that_is_not_iterated_over_warns(tiny: Make) -> None:
    data = Data([pair()], [pair()])
    with pytest.warns(RuntimeWarning, match="nothing was trained"):
        train(tiny(2), StandardConfig(num_layers=2).strategy(), data)


def test_a_strategy_trains_once(tiny: Make) -> None:
    strategy, data = StandardConfig(num_layers=2, max_epochs=1).strategy(), Data([pair()], [pair()])
    assert len(list(train(tiny(2), strategy, data))) == 1
    with pytest.raises(EaseError, match="create a new one for every training"):
        list(train(tiny(2), strategy, data))


def test_a_trainer_without_a_device_leaves_the_model_where_it_is(tiny: Make) -> None:
    config = create_standard_config(2)
    assert Trainer(config, 256).device_of(tiny(2).to("meta")) == torch.device("meta")
    assert Trainer(config, 256, "cpu").device_of(tiny(2).to("meta")) == torch.device("cpu")
