"""The loss over exits equals the naive sum, in value and gradient, with and without PyTorch's fused loss."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease.interface import IGNORE
from ease.training import losses
from ease.training.losses import CrossEntropy, Distillation, Objective, Term, exit_loss, token_loss_sum


def naive(head: Tensor, targets: Tensor, exits: list[Tensor], weights: list[float]) -> Tensor:
    parts = [w * F.cross_entropy(h @ head.T, targets, ignore_index=IGNORE) for h, w in zip(exits, weights)]
    return torch.stack(parts).sum()


@pytest.fixture(params=["fused", "fallback"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)


@pytest.mark.usefixtures("_both")
def test_value_and_gradients_are_those_of_the_naive_sum() -> None:
    @given(
        tokens=st.integers(1, 40),
        weights=st.lists(st.floats(0.01, 3), min_size=1, max_size=3),
        ignored=st.floats(0, 0.9),
        frozen=st.booleans(),
        upstream=st.floats(-2, 2),
    )
    def check(tokens: int, weights: list[float], ignored: float, frozen: bool, upstream: float) -> None:
        head = torch.randn(13, 6, dtype=torch.float64).requires_grad_(not frozen)
        exits = [torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True) for _ in weights]
        targets = torch.randint(13, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORE)
        targets[0] = 5
        inputs = exits if frozen else [head, *exits]
        expected = naive(head, targets, exits, weights)
        expected_grads = torch.autograd.grad(upstream * expected, inputs)
        terms = [Term(states, targets, weight) for states, weight in zip(exits, weights)]
        found = exit_loss(head, terms)
        grads = torch.autograd.grad(upstream * found, inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads, expected_grads)
        with torch.no_grad():
            torch.testing.assert_close(exit_loss(head, terms), expected)

    check()


@pytest.mark.usefixtures("_both")
def test_each_term_is_a_mean_over_tokens_of_its_own() -> None:
    head = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (30, 7, 0)]
    targets = [torch.randint(13, (len(h),)) for h in states]
    targets[0][3] = IGNORE
    weights = (0.3, 1.5, 2.0)
    expected = sum(naive(head, y, [h], [w]) for h, y, w in zip(states[:2], targets, weights))
    found = exit_loss(head, [Term(*term) for term in zip(states, targets, weights)])
    torch.testing.assert_close(found, expected)
    inputs = [head, *states[:2]]
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(one, other)


def test_the_logits_of_one_term_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def plain(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        assert all(logits() is None for logits in alive)
        logits = F.linear(states, head)
        alive.append(weakref.ref(logits))
        return F.cross_entropy(logits, targets, reduction="sum")

    monkeypatch.setattr(losses, "token_loss_sum", plain)
    head, states = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    terms = [Term(states[:n], torch.arange(5)[:n], 1.0) for n in (5, 3, 4)]
    exit_loss(head, terms).backward()
    assert len(alive) == 3


def test_tokens_without_a_teacher_learn_from_the_text() -> None:
    head = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    states = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    targets, teacher = torch.randint(13, (20,)), torch.randn(8, 6, dtype=torch.float64)
    seen = torch.zeros(20, dtype=torch.bool)
    seen[torch.randperm(20)[:8]] = True
    term = Term(states, targets, 0.7, Distillation(2.0, 0.5))
    lost = F.cross_entropy(states @ head.T, targets, reduction="none")
    goal = (teacher @ head.detach().T / 2).log_softmax(-1)
    student = (states[seen] @ head.T / 2).log_softmax(-1)
    apart = (goal.exp() * (goal - student)).sum(-1)
    expected = 0.7 * (lost[~seen].sum() + 0.5 * lost[seen].sum() + 0.5 * 4 * apart.sum()) / 20
    found = exit_loss(head, term.taught(seen, teacher))
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (head, states)) for loss in (expected, found))):
        torch.testing.assert_close(one, other)
    (whole,) = term.taught(torch.ones_like(seen), states)
    assert whole.states is states
    nobody = term.taught(torch.zeros_like(seen), teacher[:0])
    torch.testing.assert_close(exit_loss(head, nobody), exit_loss(head, [term._replace(objective=CrossEntropy())]))


@pytest.mark.usefixtures("_both")
def test_more_tokens_than_a_chunk() -> None:
    n = 2 * losses.CHUNK + 3
    head, states = torch.randn(11, 4, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)
    targets = torch.randint(11, (n,)).masked_fill(torch.arange(n) % 5 == 0, IGNORE)
    plain = F.cross_entropy(states @ head.T, targets, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(token_loss_sum(states, head, targets), plain)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("tokens", [0, 3])
def test_with_nothing_scored_the_loss_is_zero(tokens: int) -> None:
    head = torch.randn(7, 4, requires_grad=True)
    states = torch.randn(tokens, 4, requires_grad=True)
    loss = exit_loss(head, [Term(states, torch.full((tokens,), IGNORE), 1.0)])
    loss.backward()
    assert loss.item() == 0
    assert head.grad is not None
    assert not head.grad.any()


def test_a_frozen_head_gets_no_gradient_and_costs_no_buffer() -> None:
    head, states = torch.randn(7, 4), torch.randn(5, 4, requires_grad=True)
    loss = exit_loss(head, [Term(states, torch.arange(5), weight) for weight in (1.0, 2.0)])
    assert loss.grad_fn is not None
    assert loss.grad_fn.grads[0] is None  # type: ignore[attr-defined]
    loss.backward()
    assert head.grad is None
    assert states.grad is not None


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.0, 0.5)])
def test_distillation_is_the_divergence_from_the_last_exit(
    temperature: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 1)  # so that the tokens come in several parts
    head = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    states = torch.randn(300, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(300, 6, dtype=torch.float64)
    targets = torch.randint(13, (300,)).masked_fill(torch.rand(300) < 0.3, IGNORE)
    scored = targets != IGNORE
    goal = ((teacher @ head.detach().T) / temperature).softmax(-1)
    student = ((states @ head.T) / temperature).log_softmax(-1)
    divergence = (goal * (goal.log() - student)).sum(-1)[scored].mean()
    expected = share * temperature**2 * divergence + (1 - share) * naive(head, targets, [states], [1.0])
    found = exit_loss(head, [Term(states, targets, 1.0, Distillation(temperature, share), teacher)])
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (head, states)) for loss in (expected, found))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", [CrossEntropy(), Distillation(2.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision_is_that_of_its_logits_in_float32(
    dtype: torch.dtype, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 1)  # so that the tokens come in several parts
    head, states, teacher = (torch.randn(n, 8).to(dtype) for n in (50, 900, 900))
    targets = torch.randint(50, (900,)).masked_fill(torch.arange(900) % 7 == 0, IGNORE)
    logits, goal = F.linear(states, head).float(), F.linear(teacher, head).float()
    expected = F.cross_entropy(logits, targets)
    if objective.teacher:
        scored = targets != IGNORE
        apart = F.kl_div((logits / 2).log_softmax(-1), (goal / 2).softmax(-1), reduction="none").sum(-1)[scored].mean()
        expected = 0.5 * 4 * apart + 0.5 * expected
    term = Term(states, targets, 1.0, objective, teacher)
    with torch.no_grad():
        evaluated = exit_loss(head, [term])
    trained = exit_loss(head.requires_grad_(), [term._replace(states=states.requires_grad_())])
    for found in (evaluated, trained):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=True)
    trained.backward()
    assert states.grad is not None
    assert states.grad.dtype == dtype
