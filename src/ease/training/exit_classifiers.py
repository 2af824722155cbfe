"""A classifier per exit that estimates, without the head, whether a token may leave.

It is a linear map of the exit's normalized state, trained in seconds on frozen states. A token that continues costs 2 D
FLOPs instead of the head's 2 D V. It is the confidence measure "classifier".

What it is trained on is its target: whether the exit agrees with the last one, or what depth gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError, checked
from ease.interface import Batch, Batches, evaluation_view, re_iterable
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.confidence import at_least_float32
from ease.routing.forward import head_chunk


class Lesson(NamedTuple):
    """What the classifier of one exit is trained on, for N scored tokens."""

    states: Tensor
    """(N, D) states at the exit."""
    targets: dict[str, Tensor]
    """(N,) by name, in [0, 1]. "agreement": 1 where the exit's likeliest output is that of the last exit. "gain":
    p / (p + q), where the exit gives the probability p to the true token and the last exit q: the sigmoid of minus the
    loss, in nats, that depth saves. It is 1/2 where depth gains nothing."""


@torch.no_grad()
def lessons(model: StandardTransformer, batches: Batches, exits: Sequence[int]) -> dict[int, Lesson]:
    """The `Lesson` of each exit, from one pass at full depth over the batches."""
    parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {exit: [] for exit in exits}
    model = evaluation_view(model)
    device, last = next(model.parameters()).device, model.num_layers
    for item in re_iterable(batches):
        batch = Batch.of(item).to(device)
        state, first = model.embed(batch.x, layout=batch.layout), 1
        at_exit: dict[int, Tensor] = {}
        for exit in (*exits, last):
            state = model.run(state, first, exit, layout=batch.layout)
            at_exit[exit], first = state[batch.scored], exit + 1
        y = batch.y[batch.scored]
        best, loss = _likeliest_and_losses(model, at_exit[last], last, y)
        for exit in exits:
            best_here, loss_here = _likeliest_and_losses(model, at_exit[exit], exit, y)
            parts[exit].append((at_exit[exit], (best_here == best).float(), (loss - loss_here).sigmoid()))
    if not any(len(states) for rows in parts.values() for states, *_ in rows):
        raise EaseError("there is no scored token to learn the agreement from: give batches with targets")
    found = {}
    for exit, rows in parts.items():
        states, agreement, gain = map(torch.cat, zip(*rows, strict=True))
        found[exit] = Lesson(states, {"agreement": agreement, "gain": gain})
    return found


def _likeliest_and_losses(
    model: StandardTransformer, states: Tensor, exit: int, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """States (N, D) at an exit -> its likeliest outputs (N,), and its losses (N,) in nats for targets (N,)."""
    best, losses, size = [], [], head_chunk(model)
    for h, y in zip(states.split(size), targets.split(size), strict=True):
        logits = at_least_float32(model.logits(h, exit))
        best.append(logits.argmax(-1))
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.cat(best), torch.cat(losses)


def fit_classifiers(
    model: StandardTransformer,
    learned: Mapping[int, Lesson],
    target: str,
    *,
    steps: int = 200,
    decay: float = 1e-3,
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Fits a classifier to a target of each exit's lesson, without adding it to the model.

    Returns:
        By exit, weights (D + 1,) for `StandardTransformer.set_classifiers`, and the final loss in nats.
    """
    weights, losses = {}, {}
    for exit, lesson in learned.items():
        with torch.no_grad():
            normed = model.exit_norms[exit - 1](lesson.states).float()
        weights[exit], losses[exit] = _logistic(normed, lesson.targets[target].float(), steps, decay)
    return weights, losses


def with_classifiers(model: StandardTransformer, weights: Mapping[int, Tensor]) -> StandardTransformer:
    """A copy in evaluation mode that shares the weights and has these classifiers; the model keeps its own."""
    view = evaluation_view(model)
    view.stale_classifiers = set(model.stale_classifiers)
    view.set_classifiers(weights)
    return view


@checked
def learn_agreement(
    model: StandardTransformer, batches: Batches, exits: Sequence[int], *, steps: int = 200, decay: float = 1e-3
) -> dict[int, float]:
    """Trains a classifier at each exit by logistic regression; nothing else in the model changes.

    Call it again after training in any other way than with `ease.train` or `Trainer`, which mark classifiers as stale.

    Args:
        model: the model.
        batches: text that the exits were not trained on, if possible: on training text they agree too often.
        exits: exits below the last layer.
        steps: maximum number of L-BFGS steps.
        decay: weight of the squared norm of the weights.

    Returns:
        The final loss of each exit, in nats.

    Raises:
        EaseError: no exit is given, or one is not below the last layer, or no token is scored.
    """
    model.check_policy(Policy.of(tuple(exits), (1.0,) * len(exits)))
    if not exits:
        raise EaseError("no exit to learn the agreement of: name one or more")
    weights, losses = fit_classifiers(model, lessons(model, batches, exits), "agreement", steps=steps, decay=decay)
    model.set_classifiers(weights)
    return losses


def _logistic(x: Tensor, y: Tensor, steps: int, decay: float) -> tuple[Tensor, float]:
    """Weights (D + 1,) of a logistic regression from x (N, D) to y (N,), and its loss."""
    weight = torch.zeros(x.shape[1] + 1, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight[:-1] + weight[-1], y)
        loss = loss + decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    for _ in range(2):  # the loss that the second call returns is that of the first call's result
        loss = optimizer.step(closure).item()
    return weight.detach(), loss
