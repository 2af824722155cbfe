"""Calibration: thresholds that keep a target for quality or cost, tested on tokens that did not choose them.

- Three sets of sequences, none of which the model was trained on: one proposes candidate thresholds, from strict to
  loose; one decides which of them keep the target; the reported metrics come from the third.
- Candidates are proposed from one pass at full depth, which differs from a routed run (tokens that have left pass on
  the states they left with). The decision and the report therefore use routed runs.
- With a confidence, the target holds with that probability: learn then test (Angelopoulos et al. 2021,
  arXiv:2110.01052) by fixed sequence testing. The unit is the sequence, since tokens of one sequence depend on each
  other.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError, check_number, check_string, checked
from ease.evaluation.bounds import passing, upper_bound
from ease.evaluation.sequences import Sequences, Views
from ease.interface import ExitModel
from ease.policy import LOOSEST, Policy
from ease.progress import Progress

CANDIDATES = 32  # steps from strict to loose; each one that is tested costs a routed run


CLIP = 1.0  # nats: the largest loss difference of a sequence, in either direction, where a bound needs bounded losses

TIE = 1e-6  # what the rank adds to a price, so that candidates differ among tokens of equal price

Kind = Literal["min_agreement", "max_ppl_increase", "target_ratio", "compute_budget"]


class Goal(NamedTuple):
    """A kind of target, as a loss per token whose mean over sequences must stay below a limit."""

    loss: Callable[[Sequences, Policy], Tensor]
    """(N,) loss of every scored token under a policy."""
    span: Callable[[Sequences], tuple[float, float]]
    """The smallest and the largest loss of a sequence."""
    to_limit: Callable[[float], float]
    """Turns the target's value into the limit of the mean loss."""
    to_value: Callable[[float], float]
    """Turns a mean loss into the target's unit; the inverse of `to_limit`."""
    largest: float
    """The largest value that a target may have."""
    budget: bool = False
    """Whether the target limits cost: the strictest candidate within it is chosen, otherwise the loosest."""


def _disagreement(sequences: Sequences, policy: Policy) -> Tensor:
    return ~sequences.agreement(policy)


def _loss_increase(sequences: Sequences, policy: Policy) -> Tensor:
    return sequences.scores(policy).losses - sequences.full.losses


def _at_last_layer(sequences: Sequences, policy: Policy) -> Tensor:
    return sequences.scores(policy).exits == sequences.model.num_layers


def _cost(sequences: Sequences, policy: Policy) -> Tensor:
    return sequences.costs[sequences.scores(policy).exits]


def _share(sequences: Sequences) -> tuple[float, float]:
    return (0, 1)


def _clipped(sequences: Sequences) -> tuple[float, float]:
    return (-CLIP, CLIP)


def _up_to_largest_cost(sequences: Sequences) -> tuple[float, float]:
    return (0, sequences.costs.max().item())


def _unchanged(value: float) -> float:
    return value


def _complement(value: float) -> float:
    return 1 - value


GOALS: dict[Kind, Goal] = {
    "min_agreement": Goal(_disagreement, _share, _complement, _complement, largest=1),
    "max_ppl_increase": Goal(_loss_increase, _clipped, math.log1p, math.expm1, largest=math.inf),
    "target_ratio": Goal(_at_last_layer, _share, _unchanged, _unchanged, largest=1, budget=True),
    "compute_budget": Goal(_cost, _up_to_largest_cost, _unchanged, _unchanged, largest=math.inf, budget=True),
}


@dataclass(frozen=True)
class Target:
    """A condition that thresholds must satisfy, on average over sequences.

    Args:
        kind: what is limited.
            "min_agreement": the share of tokens whose exit predicts what the last exit predicts, at least `value`.
            "max_ppl_increase": the relative increase of perplexity over full depth, at most `value`. With a confidence,
            the loss difference of a sequence is clipped to 1 nat.
            "target_ratio": the share of tokens that reach the last exit, at most `value`.
            "compute_budget": FLOPs per token, every head included and attention at its mean length, as a share of full
            depth without exits, at most `value`.
        value: the limit, a share: in [0, 1], or at least 0 for "max_ppl_increase" and "compute_budget".
        confidence: the probability in (0, 1) that the condition holds for the distribution of the deciding sequences;
            None requires it only on these sequences.

    Raises:
        EaseError: for an unknown kind, or a value or confidence out of range.

    Example:
        >>> target = ease.Target("min_agreement", 0.98, confidence=0.95)
    """

    kind: Kind
    value: float
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_string("kind", self.kind)
        if self.kind not in GOALS:
            raise EaseError(f"unknown target {self.kind!r}: use one of {', '.join(GOALS)}")
        check_number(self.kind, self.value)
        if self.confidence is not None:
            check_number("confidence", self.confidence)
        if not 0 <= self.value <= GOALS[self.kind].largest or math.isinf(self.value):
            allowed = "be a number of at least 0" if math.isinf(GOALS[self.kind].largest) else "lie in [0, 1]"
            raise EaseError(f"{self.kind} must {allowed}, got {self.value:g}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise EaseError(f"confidence must lie in (0, 1), such as 0.95, got {self.confidence:g}")

    def __str__(self) -> str:
        confidence = "" if self.confidence is None else f" with confidence {self.confidence:g}"
        return f"{self.kind.replace('_', ' ')} {self.value:g}{confidence}"


class Calibration(NamedTuple):
    """Calibrated thresholds, and a record of the calibration."""

    policy: Policy
    """The policy with the chosen thresholds."""
    record: dict[str, Any]
    """Policy, target, calibration (value, candidates, sequences, tokens), and held_out (value and metrics): values fit
    for JSON."""


@checked
def calibrate(
    model: ExitModel,
    policy: Policy,
    target: Target,
    propose: Iterable[Any],
    decide: Iterable[Any],
    held_out: Iterable[Any],
    progress: Progress | None = None,
) -> Calibration:
    """Chooses thresholds for all exits of a policy that satisfy a target.

    Among the candidates that satisfy it, a target for quality gets the thresholds with the lowest cost, a target for
    cost those with the highest quality.

    Args:
        model: the model; it runs in evaluation mode whatever its mode, which stays as it is.
        policy: exits and confidence measure; its thresholds are replaced.
        target: the condition to satisfy.
        propose: batches of (x, y) or `Batch` that candidates are computed from, such as the validation split.
        decide: batches that candidates are tested on. A target with a confidence holds for the distribution that these
            sequences were drawn from.
        held_out: batches that the reported metrics are measured on.
        progress: receives the share of the candidates tested so far.

    Returns:
        The policy with its new thresholds, and a record of how they were chosen and what they reach on `held_out`.

    Raises:
        EaseError: if no candidate satisfies the target (the message gives the best value), or if the policy has no
            exits.

    Example:
        >>> result = ease.calibrate(model, ease.Policy(exits=(2,), thresholds=(1.0,)),
        ...                         ease.Target("min_agreement", 0.98), val, decide, test)
        >>> model.policy = result.policy
    """
    if not policy.exits:
        raise EaseError("the policy has no exits to calibrate: give a policy with exits")
    model.check_policy(policy)
    progress = progress or Progress()
    candidates = candidate_thresholds(Sequences(model, propose, policy).views)
    deciding, unseen = Sequences(model, decide, policy), Sequences(model, held_out, policy)
    choice = choose(target, policy, candidates, deciding, progress)
    if not choice.passed:
        raise unreachable(target, [choice], len(deciding))
    return Calibration(choice.policy, make_record(target, choice, deciding, unseen))


class Choice(NamedTuple):
    """The outcome of choosing thresholds for a target."""

    policy: Policy
    """The policy with the thresholds chosen, or with the closest ones if none satisfies the target."""
    limit: float
    """The bound on its mean loss."""
    passed: int
    """Candidates that were found to satisfy the target; 0 if none does."""
    candidates: int


def choose(
    target: Target,
    policy: Policy,
    candidates: Sequence[tuple[float, ...]],
    deciding: Sequences,
    progress: Progress | None = None,
) -> Choice:
    """Chooses among candidate thresholds those that satisfy a target, by routed runs over the deciding sequences.

    With a confidence, candidates are tested in order up to the first that fails; without one, by bisection.

    Args:
        target: the condition to satisfy.
        policy: exits and confidence measure.
        candidates: thresholds from strict to loose.
        deciding: the sequences, under the same exits and measure.
        progress: receives the share of the candidates tested so far.
    """
    goal = GOALS[target.kind]
    ordered, limit = list(candidates)[:: -1 if goal.budget else 1], goal.to_limit(target.value)

    @functools.cache
    def bound(number: int) -> float:
        if progress is not None:
            progress.step(number / len(ordered))
        losses = deciding.means(goal.loss(deciding, replace(policy, thresholds=ordered[number])))
        return upper_bound(losses, target.confidence, goal.span(deciding))

    numbers = range(len(ordered))
    if target.confidence is None:
        passed = bisect.bisect_left(numbers, True, key=lambda number: bound(number) > limit)
    else:
        passed = len(passing(map(bound, numbers), limit))
    chosen = max(0, passed - 1)
    if progress is not None:
        progress.step(1.0)
    return Choice(replace(policy, thresholds=ordered[chosen]), bound(chosen), passed, len(ordered))


def unreachable(target: Target, choices: Sequence[Choice], sequences: int) -> EaseError:
    """The error that none of the choices satisfies the target, with the best value that one of them reaches."""
    # Rounded up, so that the four digits shown can be reached.
    best = max(0.0, GOALS[target.kind].to_value(min(choice.limit for choice in choices) + 1e-4))
    fix = "relax the target to that" + (", or calibrate on more sequences" if target.confidence else "")
    return EaseError(f"{target} cannot be reached: the best on these {sequences} sequences is {best:.4f}, so {fix}")


def make_record(
    target: Target, choice: Choice, deciding: Sequences, unseen: Sequences, policy: Policy | None = None
) -> dict[str, Any]:
    """The record of a choice, with what a policy (by default the chosen one) reaches on unseen sequences."""
    goal, policy = GOALS[target.kind], choice.policy if policy is None else policy
    loss = unseen.means(goal.loss(unseen, policy)).mean().item()
    return {
        "policy": asdict(policy),
        "target": asdict(target),
        "calibration": {
            "value": goal.to_value(choice.limit),
            "candidates": [choice.passed, choice.candidates],
            "sequences": len(deciding),
            "tokens": int(deciding.lengths.sum()),
        },
        "held_out": {"value": goal.to_value(loss), **unseen.metrics(policy)},
    }


def candidate_thresholds(views: Views) -> list[tuple[float, ...]]:
    """Candidate thresholds for all exits, from strict (no token leaves) to loose (all leave at the first exit).

    One number, the price, orders the candidates: a candidate lets all tokens up to its price leave, at every exit. The
    price of a token at an exit is the smallest rate of disagreement with the last exit among the thresholds at which
    the token leaves. Tokens of equal price are ordered by confidence. Prices are spaced so that from one candidate to
    the next about the same share of tokens leaves in addition.
    """
    confidences, order = views.confidences.sort(1, descending=True)
    wrong = (~views.agrees).gather(1, order).double()
    rank = torch.arange(1, wrong.shape[1] + 1)
    rate = wrong.cumsum(1) / rank
    rate[:, :-1][confidences[:, :-1] == confidences[:, 1:]] = math.inf  # no threshold separates equal confidences
    prices = rate.flip(1).cummin(1).values.flip(1) + TIE * rank / len(rank)
    lowest = torch.empty_like(prices).scatter_(1, order, prices).amin(0).sort().values
    chosen = lowest[torch.linspace(0, len(lowest) - 1, CANDIDATES).long()]
    leaving = torch.searchsorted(prices, chosen.expand(len(prices), -1).contiguous(), right=True)
    lowest_leaving = confidences.gather(1, (leaving - 1).clamp(min=0)).clamp(LOOSEST, 1)
    thresholds = torch.where(leaving > 0, lowest_leaving, 1.0)
    strictest, loosest = (1.0,) * len(prices), (LOOSEST,) * len(prices)
    return list(dict.fromkeys([strictest, *map(tuple, thresholds.T.tolist()), loosest]))
