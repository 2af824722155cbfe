"""Promise 5: one count of FLOPs, equal to torch's own on plain math kernels, and every budget counts everything.

Torch counts what the math kernels really compute: attention over the whole rectangle of queries and keys, masked
or not. So wherever attention is in a count, ours is asked about that rectangle, and `real_pairs`, the pairs that
a mask really lets through, is held against a count by hand.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ease import (
    ASHEMConfig,
    Batch,
    Data,
    EaseError,
    Layout,
    MinedBatches,
    Phase,
    PhaseOptions,
    Policy,
    StandardTransformer,
    Trainer,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
    flops,
    score,
    train,
)
from ease.flops import full_depth_flops, head_flops, layer_flops, real_pairs, run_flops
from ease.training import losses
from ease.training.drafts import draft_loss, draft_step_flops
from ease.training.selection import LearnedGate, LeastConfident

Make = Callable[..., StandardTransformer]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"head_dim": 6, "num_kv_heads": 1, "hidden_dim": 40},
    {"tie_embeddings": False},
]


def counted(work: Callable[[], object]) -> int:
    """FLOPs of `work` by torch's count on plain math kernels."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def rectangle(active: Tensor, layout: object = None) -> int:
    """Query-key pairs that plain kernels compute: per row as many queries as the row with most has, all keys."""
    return active.numel() * int(active.sum(1).max())


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain cross entropy (torch counts nothing in the chunked one), and attention over the rectangle."""

    def plain_loss(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, head), targets, reduction="sum")

    monkeypatch.setattr(losses, "token_loss_sum", plain_loss)
    monkeypatch.setattr(flops, "real_pairs", rectangle)


# Against torch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_run_costs_what_torch_counts(shape: dict[str, Any], tiny: Make) -> None:
    B, T, model = 3, 11, tiny(3, **shape)
    with torch.no_grad():
        state = model.embed(torch.randint(256, (B, T)))
        assert counted(lambda: model.run(state, 1, 3)) == 3 * layer_flops(model.config, B * T, B * T, B * T * T)
        active = torch.rand(B, T) < 0.4
        expected = 2 * layer_flops(model.config, B * T, int(active.sum()), rectangle(active))
        assert counted(lambda: model.run(state, 2, 3, active=active)) == expected
        assert counted(lambda: model.logits(state[active], 2)) == head_flops(model.config, int(active.sum()))


@given(st.data())
def test_real_pairs_are_those_that_attention_lets_through(data: st.DataObject) -> None:
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    draw = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=B * T, max_size=B * T))  # noqa: E731
    active = torch.tensor(draw(0, 1)).view(B, T) > 0
    assert real_pairs(active) == sum(t + 1 for _, t in active.nonzero().tolist())

    mask = torch.tensor(draw(0, 1)).view(B, T).sort(1).values  # left padding
    packed = torch.tensor(draw(0, 2)).view(B, T).sort(1).values - 1  # and padding, then up to two documents
    positions = torch.tensor([[row[:t].count(row[t]) for t in range(T)] for row in packed.tolist()])
    for layout in (Layout.from_attention_mask(mask), Layout(positions, packed)):
        pairs = 0
        for b, t in (active & layout.real).nonzero().tolist():
            segment, position = layout.segments[b, t], layout.positions[b, t]
            pairs += int(((layout.segments[b] == segment) & (layout.positions[b] <= position)).sum())
        assert real_pairs(active, layout) == pairs


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("create", [create_standard_config, create_deep_supervision_config])
def test_a_whole_training_step_costs_what_torch_counts(
    create: Callable[[int], TrainingConfig], shape: dict[str, Any], tiny: Make
) -> None:
    model, trainer = tiny(3, **shape), Trainer(create(3), 256)
    x = torch.randint(256, (2, 9))
    y = x.roll(-1, 1)
    y[:, -2:] = -100
    expected = trainer.step_flops(model, Batch(x, y), scored=14)
    assert expected["trunk"] == 0
    assert counted(lambda: trainer.compute_loss(model, x, y).backward()) == expected["training"]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("freeze_head", [True, False])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("hard", [False, True])
def test_a_step_on_a_frozen_trunk_costs_what_torch_counts(
    hard: bool, stored: bool, freeze_head: bool, tiny: Make
) -> None:
    """Exactly: the trunk gets no gradient, but the first norm that learns does, so its projections hand one back."""
    model = tiny(6, tie_embeddings=freeze_head)
    model.freeze_below(3, head=freeze_head)
    trainer = Trainer(TrainingConfig(layer_weights={6: 1.0}), 256)
    x = torch.randint(256, (2, 9))
    active = torch.rand(2, 9) < 0.5 if hard else None
    asking = int(active.sum()) if active is not None else 18
    state = model.forward_to_layer(x, 2).detach() if stored else None
    expected = trainer.step_flops(model, Batch(x, x, active, state), scored=asking, first=3)
    work = counted(lambda: trainer.compute_loss(model, x, x, active, state=state, first=3).backward())
    assert work == expected["training"] + expected["trunk"]
    assert bool(expected["trunk"]) != stored
    model.freeze_below(1)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drafts", [1, 2])
def test_a_step_of_a_draft_brick_costs_what_torch_counts(drafts: int, shape: dict[str, Any], tiny: Make) -> None:
    B, T, model = 2, 9, tiny(3, **shape)
    model.add_draft_brick(torch.arange(100), torch.randn(9, 32))
    model.requires_grad_(False).draft_brick.requires_grad_(True)
    x = torch.randint(256, (B, T))
    y = x.roll(-1, 1)
    y[:, -2:] = -100
    expected = sum(draft_step_flops(model, Batch(x, y), drafts).values())
    # The second draft's queries are multiplied with twice as many keys, of which the mask leaves as many as before.
    expected += 3 * (drafts - 1) * layer_flops(model.config, 0, 0, B * (T - 1) ** 2)
    assert counted(lambda: draft_loss(model, Batch(x, y), drafts, 0.1).backward()) == expected


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("keep", "teacher", "classifier"),
    [
        (keep, teacher, classifier)
        for keep in ({2: 0.4}, {2: 0.6, 3: 0.3}, {3: 1.0})
        for teacher, classifier in ((False, 0.0), (True, 0.0), (False, 0.3))
        if not classifier or max(keep.values()) < 1
    ],
)
@pytest.mark.parametrize(("first", "stored", "freeze_head"), [(1, False, False), (2, False, True), (2, True, False)])
def test_a_step_in_which_a_share_goes_on_costs_what_torch_counts(
    keep: dict[int, float],
    first: int,
    stored: bool,
    freeze_head: bool,
    teacher: bool,
    classifier: float,
    tiny: Make,
) -> None:
    model = tiny(4, sharp=True)
    model.set_classifiers({exit: torch.randn(33) for exit in keep})
    model.freeze_below(first, head=freeze_head, classifiers=tuple(keep))
    objective = losses.Distillation(2.0, 0.5) if teacher else losses.CrossEntropy()
    weights = {2: 0.2, 3: 0.3, 4: 0.5}
    selection = LearnedGate(keep, classifier) if classifier else LeastConfident(keep)
    trainer = Trainer(TrainingConfig(layer_weights=weights, objective=objective, selection=selection), 256)
    x = torch.randint(256, (3, 11))
    y = x.roll(-1, 1)
    y[:, -2:] = -100
    layout = Layout.from_attention_mask(torch.arange(11) < torch.tensor([[11], [7], [9]]))
    state = model.run(model.embed(x), 1, first - 1, layout=layout).detach() if stored else None
    batch = Batch(x, y, torch.rand(3, 11) < 0.9, state, layout=layout)
    continued: dict[int, Tensor] = {}

    def step() -> None:
        options: dict[str, Any] = {"state": state, "layout": layout, "first": first, "continued": continued}
        trainer.compute_loss(model, x, y, batch.active, **options).backward()

    work = counted(step)
    assert list(continued) == [exit for exit, share in keep.items() if share < 1]
    expected = trainer.step_flops(model, batch, int(batch.scored.sum()), first, continued=continued)
    assert work == expected["training"] + expected["trunk"]
    model.freeze_below(1)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("exits", [(), (1,), (1, 3)])
def test_a_routed_pass_costs_what_torch_counts(
    exits: tuple[int, ...], tiny: Make, even_policy: Callable[..., Policy]
) -> None:
    model, x = tiny(4, sharp=True), torch.randint(256, (2, 3, 9))
    policy = even_policy(model, x.flatten(0, 1), exits) if exits else Policy()
    found = []
    work = counted(lambda: found.append(score(model, [(ids, ids) for ids in x], policy)))
    assert found[0].flops == work
    heads = sum(int((found[0].exits >= layer).sum()) for layer in (*exits, 4))
    assert heads == 54 if not exits else heads > 54
    assert found[0].metrics()["flops_per_token"] == work / 54


@pytest.mark.usefixtures("plain")
def test_mining_costs_what_torch_counts(trained: StandardTransformer, text_data: Callable[..., Data]) -> None:
    data, found = text_data(3), []
    work = counted(lambda: found.append(MinedBatches(trained, data.train, Policy(), 0.5)))
    assert found[0].flops == work
    again = MinedBatches(trained, data.train, Policy(), 0.5, budget=0)
    # Running the trunk again asks no head.
    heads = sum(head_flops(trained.config, x.numel()) for x, _ in data.train)
    assert counted(lambda: found.append(sum(batch.flops for batch in again))) == found[1] == work - heads


def test_full_depth_is_the_plain_pass(tiny: Make) -> None:
    model = tiny(3)
    everyone = torch.ones(1, 7, dtype=torch.bool)
    total = run_flops(model.config, 3, everyone) + head_flops(model.config, 7)
    assert full_depth_flops(model.config, 7) * 7 == total
    x = torch.randint(256, (1, 7))
    assert score(model, [(x, x)]).metrics()["flops_per_token"] == pytest.approx(total / 7)


# Budgets


def test_a_history_counts_training_trunk_mining_and_validation(tiny: Make, text_data: Callable[..., Data]) -> None:
    data = text_data(3, 1)
    shape = {"phase1_layers": 1, "phase2_layers": 2, "phase1_max_epochs": 2, "phase2_max_epochs": 2}
    everyone = torch.ones(8, 32, dtype=torch.bool)
    kinds = {}
    for budget in (2e9, 0.0):
        model = tiny(1)
        runs = list(train(model, ASHEMConfig(**shape, trunk_budget=budget).strategy(), data))  # type: ignore[arg-type]
        for _, history in runs:
            assert sum(history.flops.values()) == history.rows[-1]["flops"]
            steps = history.column("flops")
            assert all(a < b for a, b in zip(steps, steps[1:]))
        (_, first), (phase, second) = runs
        one = run_flops(model.config, 1, everyone) + head_flops(model.config, 256)
        assert first.flops == {"training": 6 * 3 * one, "trunk": 0, "validation": 2 * one}
        assert isinstance(phase.train, MinedBatches)
        assert second.flops["mining"] == phase.train.flops == 3 * one
        headless = run_flops(model.config, 1, everyone)
        assert second.flops["trunk"] == (0 if budget else 2 * 3 * headless)
        # Validation is routed: the shallow exit for all, the second layer and head for those that stay.
        assert 2 * one < second.flops["validation"] < 4 * one
        active = [batch.active for batch in phase.train if batch.active is not None]
        layers = sum(run_flops(model.config, 1, a) for a in active)
        heads = sum(head_flops(model.config, int(a.sum())) for a in active)
        assert second.flops["training"] == 2 * (3 * layers + 2 * heads)
        kinds[budget] = second.flops
    assert kinds[2e9]["training"] == kinds[0.0]["training"]
    assert kinds[2e9]["validation"] == kinds[0.0]["validation"]


@pytest.mark.parametrize("share", [0.3, 1.0, 2.31, 5.2])
def test_a_budget_is_kept_to_within_a_step_and_a_validation(
    share: float, tiny: Make, text_data: Callable[..., Data]
) -> None:
    data, model = text_data(3, 1), tiny(1)
    config = create_standard_config(1)
    everyone = torch.ones(8, 32, dtype=torch.bool)
    forward = run_flops(model.config, 1, everyone) + head_flops(model.config, 256)
    step, validation = 3 * forward, forward
    budget = share * (3 * step + validation)  # in epochs
    options = PhaseOptions(max_flops=budget, patience=None)
    for spent in (0.0, 2.0 * step, 10.0 * budget):
        phase = Phase("one", config, data.train, data.val, options, spent={"mining": spent})
        if spent >= budget:
            with pytest.raises(EaseError, match="raise max_flops, or use less text for it"):
                Trainer(config, 256).run(model, phase)
            continue
        history = Trainer(config, 256).run(model, phase)
        used = sum(history.flops.values())
        # The first epoch cannot know what its validation will cost; later ones keep room for it.
        room = validation if len(history.rows) == 1 else 0
        assert budget - validation < used <= max(budget, spent) + step + room
        assert history.flops["mining"] == spent
