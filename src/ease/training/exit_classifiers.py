"""A small classifier per exit that knows, without the head, how likely the exit agrees with the last one.

One linear map on the exit's normed state, learned in seconds on frozen states: a token that stays pays 2 D
floating-point operations for it instead of the head's 2 D V. It is the measure of confidence called "classifier".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.interface import Batch, Batches, eval_mode, re_iterable
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import HEAD_CHUNK


@torch.no_grad()
def agreements(
    model: StandardTransformer, batches: Batches, exits: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Per exit the states (N, D) of all scored tokens, and whether it names the last exit's likeliest output (N,)."""
    states: dict[int, list[Tensor]] = {exit: [] for exit in exits}
    agrees: dict[int, list[Tensor]] = {exit: [] for exit in exits}
    device, last = next(model.parameters()).device, model.num_layers
    with eval_mode(model):
        for item in re_iterable(batches):
            batch = Batch(*item).to(device)
            state, first, found = model.embed(batch.x), 1, {}
            for exit in (*exits, last):
                state = model.run(state, first, exit, layout=batch.layout)
                found[exit], first = state[batch.scored], exit + 1
            named = {
                exit: torch.cat([model.logits(part, exit).argmax(-1) for part in h.split(HEAD_CHUNK)])
                for exit, h in found.items()
            }
            for exit in exits:
                states[exit].append(found[exit])
                agrees[exit].append(named[exit] == named[last])
    if not any(map(len, next(iter(states.values()), []))):
        raise EaseError("there is no scored token to learn the agreement from: give batches with targets")
    return {e: torch.cat(s) for e, s in states.items()}, {e: torch.cat(a) for e, a in agrees.items()}


def learn_agreement(
    model: StandardTransformer, batches: Batches, exits: Sequence[int], *, steps: int = 200, decay: float = 1e-3
) -> dict[int, float]:
    """Trains a classifier for each exit, by logistic regression; nothing else of the model changes.

    Args:
        batches: text that the exits were not trained on, where there is some: on text they know they agree too often.
        steps: of L-BFGS at most.
        decay: weight of the squared norm.

    Returns:
        Per exit the loss (nats) that was reached.

    Raises:
        EaseError: exits that the model does not have below its last layer.
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

    for _ in range(2):  # the second tells where the first has led
        loss = optimizer.step(closure).item()
    return weight.detach(), loss
