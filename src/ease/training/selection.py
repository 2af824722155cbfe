"""Selection of tokens in training: which tokens continue past an exit, and which loss scores them.

A `TokenSelection` owns its choice, the loss of what it learns with, and the FLOPs of both. The gradient does not pass
through a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.devices import without_autocast
from ease.errors import EaseError
from ease.flops import classifier_flops, exit_flops
from ease.interface import Batch, ExitModel, to_device
from ease.model_config import ModelConfig
from ease.routing.forward import compute_confidence
from ease.training.distributed import first_process, gather, place
from ease.training.losses import Objective

CLASSIFIER_SAMPLE_EVERY = 8  # one token in this many trains an exit's classifier and pays for the head of its target


class Selected(NamedTuple):
    """The choice at one exit."""

    continuing: Tensor
    """(B, T) true for tokens that continue past the exit."""
    scored: Tensor
    """(B, T) true for tokens that the exit's loss scores."""
    loss: Tensor | None
    """Loss of what the selection learns with, before its weight."""


class TokenSelection(Protocol):
    """Selects, at some exits, the tokens that run the layers above. At least one token continues, if any arrived."""

    @property
    def keep(self) -> Mapping[int, float]:
        """Exit -> share in (0, 1] of the arriving tokens of a batch that continue."""

    @property
    def weight(self) -> float:
        """Weight of `Selected.loss`."""

    @property
    def classifiers(self) -> tuple[int, ...]:
        """Exits whose classifier is trained."""

    @property
    def scores_once(self) -> bool:
        """Whether a token is scored only at the exit where it leaves, so that the mean is over all tokens."""

    def check(self, deepest: int, objective: Objective) -> None:
        """Raises `EaseError` if the selection cannot be used with a loss whose deepest layer is `deepest`."""

    def select(self, model: ExitModel, state: Tensor, exit: int, batch: Batch) -> Selected:
        """Selects among the tokens that run in `batch`, from their states (B, T, D) at `exit`.

        Masks are where `batch` is: on the host a choice waits for the device once, for the tokens that continue.
        """

    def flops(self, config: ModelConfig, exit: int, arrived: int, scored: int) -> int:
        """FLOPs of one choice among `arrived` tokens, of which `scored` have a target."""


@dataclass(frozen=True)
class AllTokens:
    """Every token runs every layer."""

    keep: Mapping[int, float] = field(default_factory=dict, init=False)
    weight = 0.0
    classifiers = ()
    scores_once = False

    def check(self, deepest: int, objective: Objective) -> None:
        """There is nothing to check."""

    def select(self, model: ExitModel, state: Tensor, exit: int, batch: Batch) -> Selected:
        return Selected(batch.running, batch.scored, None)

    def flops(self, config: ModelConfig, exit: int, arrived: int, scored: int) -> int:
        return 0


@dataclass(frozen=True)
class LeastConfident:
    """The tokens continue that the exit's head is least confident of. A token that leaves is scored there, one that
    continues at every exit on its way.

    Args:
        keep: exit -> share in (0, 1] of the arriving tokens that continue.
    """

    keep: Mapping[int, float]
    weight = 0.0
    classifiers = ()
    scores_once = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", dict(sorted(self.keep.items())))

    def check(self, deepest: int, objective: Objective) -> None:
        check_keep(self.keep, deepest)

    def select(self, model: ExitModel, state: Tensor, exit: int, batch: Batch) -> Selected:
        continuing = least_confident(compute_confidence, model, state, exit, batch.running, self.keep[exit])
        return Selected(continuing, batch.scored, None)

    def flops(self, config: ModelConfig, exit: int, arrived: int, scored: int) -> int:
        return exit_flops(config, arrived, exit)


@dataclass(frozen=True)
class LearnedGate:
    """The tokens continue that a classifier at the exit, which learns along, gives the lowest confidence.

    No head is evaluated for the choice. A token is scored once, where it leaves, and the mean is over all tokens.

    Args:
        keep: exit -> share in (0, 1) of the arriving tokens that continue.
        weight: weight of the classifiers' loss, above 0.
    """

    keep: Mapping[int, float]
    weight: float = 0.3
    scores_once = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", dict(sorted(self.keep.items())))
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise EaseError(f"the weight of a learned gate must be finite and above 0, got {self.weight}")
        if not self.keep or 1 in self.keep.values():
            raise EaseError(
                "a learned gate needs at least one exit, and at each a share below 1 of tokens that continue"
            )

    @property
    def classifiers(self) -> tuple[int, ...]:
        return tuple(self.keep)

    def check(self, deepest: int, objective: Objective) -> None:
        check_keep(self.keep, deepest)
        if objective.teacher:
            raise EaseError(
                "with a learned gate a token that leaves has no teacher: use cross entropy as the objective, "
                "or another selection"
            )

    def select(self, model: ExitModel, state: Tensor, exit: int, batch: Batch) -> Selected:
        confidence = lambda model, states, exit: model.exit_confidence(states, exit)  # noqa: E731
        continuing = least_confident(confidence, model, state, exit, batch.running, self.keep[exit])
        pick = scored_selector(batch.scored, state.device)
        loss = classifier_loss(model, pick(state), exit, pick(to_device(batch.y, state.device)))
        return Selected(continuing, batch.scored & ~continuing, loss)

    def flops(self, config: ModelConfig, exit: int, arrived: int, scored: int) -> int:
        # The classifier is evaluated for every token and trained on a sample, whose targets need the head.
        sample = classifier_sample_size(scored)
        return (
            classifier_flops(config, arrived) + 3 * classifier_flops(config, sample) + exit_flops(config, sample, exit)
        )


def check_keep(keep: Mapping[int, float], deepest: int) -> None:
    """Raises `EaseError` for exits at or above layer `deepest`, and for shares outside (0, 1]."""
    for exit, share in keep.items():
        if not 0 <= exit < deepest:
            raise EaseError(f"the selection names exit {exit}: choose one below layer {deepest}, the last with a loss")
        if not 0 < share <= 1:
            raise EaseError(f"the share of tokens that continue past exit {exit} must lie in (0, 1], got {share}")


def scored_selector(scored: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that takes the scored tokens (B, T) out of (B, T, ...): a view if all are, since indexing copies.

    The tensors are on `device`. With `scored` on the host it does not wait for the device.
    """
    if bool(scored.all()):
        return lambda t: t.flatten(0, 1)
    places = to_device(scored.flatten().nonzero().squeeze(1), device)
    return lambda t: t.flatten(0, 1)[places]


@torch.no_grad()
def least_confident(
    confidence: Callable[[ExitModel, Tensor, int], Tensor],
    model: ExitModel,
    state: Tensor,
    exit: int,
    arrived: Tensor,
    share: float,
) -> Tensor:
    """(B, T) true for the share of the arrived tokens with the lowest confidence; at least one, if any arrived.

    Of several processes, each gets its part of the choice that one process would make among all arrived tokens.

    Args:
        confidence: model, states (n, D) and exit -> confidence (n,).
        state: (B, T, D) at the exit.
        arrived: (B, T); on the host, it takes one wait for the device.
    """
    if model.config.num_labels is not None:
        raise EaseError("tokens cannot be selected in a model that makes one decision per sequence: use AllTokens")
    places = arrived.flatten().nonzero().squeeze(1)
    values = confidence(model, state.flatten(0, 1)[to_device(places, state.device)], exit)
    before, arrived_in_all = place(len(places))
    count = min(arrived_in_all, max(1, round(share * arrived_in_all)))
    chosen = gather(values).topk(count, largest=False).indices.to(places.device) - before
    continuing = places[chosen[(chosen >= 0) & (chosen < len(places))]]
    return torch.zeros_like(arrived).flatten().index_fill(0, continuing, True).view_as(arrived)


def classifier_sample_size(tokens: int) -> int:
    """The number of tokens, out of `tokens`, that a classifier learns from."""
    return -(-tokens // CLASSIFIER_SAMPLE_EVERY)


def classifier_loss(model: ExitModel, state: Tensor, exit: int, targets: Tensor) -> Tensor:
    """Binary cross entropy (nats) of the classifier at `exit` against the probability that the exit gives the target.

    It is computed on a random sample of one in `CLASSIFIER_SAMPLE_EVERY` tokens. Its gradient reaches the state, which
    learns to show the exit's confidence; the probability is a constant.

    Args:
        state: (N, D) states of the scored tokens.
        targets: (N,) token ids.
    """
    before, tokens = place(len(targets))
    size = classifier_sample_size(tokens)
    sample = first_process(torch.randperm(tokens)[:size]) - before
    sample = to_device(sample[(sample >= 0) & (sample < len(targets))], state.device)
    state, targets = state[sample], targets[sample]
    with torch.no_grad():
        chance = (-F.cross_entropy(model.logits(state, exit).float(), targets, reduction="none")).exp()
    with without_autocast(state.device):  # which a binary cross entropy of probabilities refuses
        confidence = model.exit_confidence(state, exit).float()
        # It takes no NaN. Where there is one, training has diverged, which its loss reports.
        loss = F.binary_cross_entropy(confidence.nan_to_num(0.5), chance.nan_to_num(0.5), reduction="sum")
    return torch.where(chance.isfinite().all(), loss / max(1, size), chance.sum())
