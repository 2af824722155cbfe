"""A classifier per exit that estimates, without the head, the probability that the exit agrees with the last one.

It is a linear map of the exit's normalized state, trained in seconds on frozen states. A token that continues costs 2 D
FLOPs instead of the head's 2 D V. It is the confidence measure "classifier".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError, checked
from ease.interface import Batch, Batches, evaluation_view, re_iterable
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import head_chunk


@torch.no_grad()
def agreements(
    model: StandardTransformer, batches: Batches, exits: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Per exit, the states (N, D) of all scored tokens, and (N,) whether its likeliest output is the last exit's."""
    states: dict[int, list[Tensor]] = {exit: [] for exit in exits}
    agrees: dict[int, list[Tensor]] = {exit: [] for exit in exits}
    model = evaluation_view(model)
    device, last = next(model.parameters()).device, model.num_layers
    for item in re_iterable(batches):
        batch = Batch.of(item).to(device)
        state, first = model.embed(batch.x), 1
        at_exit: dict[int, Tensor] = {}
        for exit in (*exits, last):
            state = model.run(state, first, exit, layout=batch.layout)
            at_exit[exit], first = state[batch.scored], exit + 1
        likeliest = {
            exit: torch.cat([model.logits(part, exit).argmax(-1) for part in h.split(head_chunk(model))])
            for exit, h in at_exit.items()
        }
        for exit in exits:
            states[exit].append(at_exit[exit])
            agrees[exit].append(likeliest[exit] == likeliest[last])
    if not any(map(len, next(iter(states.values()), []))):
        raise EaseError("there is no scored token to learn the agreement from: give batches with targets")
    return {e: torch.cat(s) for e, s in states.items()}, {e: torch.cat(a) for e, a in agrees.items()}


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
    Policy.of(tuple(exits), (1.0,) * len(exits)).check(model.num_layers)
    if not exits:
        raise EaseError("no exit to learn the agreement of: name one or more")
    states, agrees = agreements(model, batches, exits)
    weights, losses = {}, {}
    for exit in exits:
        with torch.no_grad():
            normed, target = model.exit_norms[exit - 1](states[exit]).float(), agrees[exit].float()
        weights[exit], losses[exit] = _logistic(normed, target, steps, decay)
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
