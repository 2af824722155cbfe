"""ease.training.selection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.interface import ExitModel
from ease.routing.forward import compute_confidence

CLASSIFIER_SAMPLE_EVERY = (
    8  # one in so many tokens teaches an exit's classifier, and pays for the head that tells it the truth
)


@torch.no_grad()
def least_confident(
    model: ExitModel, state: Tensor, exit: int, arrived: Tensor, share: float, *, headless: bool = False
) -> Tensor:
    """(B, T): of the tokens that arrived, the share that `exit` is least sure of; at least one, if any arrived.

    How sure it is, its head says, or, where `headless`, its classifier.
    """
    if model.config.num_labels is not None:
        raise EaseError("going_on chooses among tokens, and this model decides once a sequence: leave it out")
    places = arrived.flatten().nonzero().squeeze(1)
    asked = state.flatten(0, 1)[places]
    confidence = model.exit_confidence(asked, exit) if headless else compute_confidence(model, asked, exit)
    count = min(len(places), max(1, round(share * len(places))))
    going = places[confidence.topk(count, largest=False).indices]
    return torch.zeros_like(arrived).flatten().index_fill(0, going, True).view_as(arrived)


def classifier_sample_size(tokens: int) -> int:
    """Of so many tokens, those that a classifier learns from."""
    return -(-tokens // CLASSIFIER_SAMPLE_EVERY)


def classifier_loss(model: ExitModel, state: Tensor, exit: int, targets: Tensor) -> Tensor:
    """Binary cross entropy (nats) of the classifier at `exit` against the probability that the exit gives the target.

    It learns from one in `LESSON` of the scored tokens, drawn at random: states (N, D), targets (N,). The gradient goes
    on into the state, which so learns to show how sure the exit is; through the probability there is none.
    """
    drawn = torch.randperm(len(targets))[: classifier_sample_size(len(targets))].to(state.device)
    state, targets = state[drawn], targets[drawn]
    with torch.no_grad():
        chance = (-F.cross_entropy(model.logits(state, exit).float(), targets, reduction="none")).exp()
    if not bool(chance.isfinite().all()):  # training has broken down, which its loss then says
        return chance.sum()
    lost = F.binary_cross_entropy(model.exit_confidence(state, exit).float(), chance, reduction="sum")
    return lost / max(1, len(targets))
