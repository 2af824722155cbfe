"""Thresholds under which given shares of the tokens continue past each exit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ease.evaluation.scoring import Scores, score
from ease.interface import Batches, ExitModel
from ease.policy import LOOSEST, Policy
from ease.training.mining import Quantile


def threshold_continuing(confidences: Tensor, share: float) -> float:
    """The threshold at which a share of the tokens continues past an exit.

    Args:
        confidences: (N,) confidences at the exit.
        share: tokens that continue, in [0, 1].

    Returns:
        A threshold in (0, 1]: `LOOSEST` if no token continues; 1, at which only a confidence of exactly 1 leaves, if
        all do or if there are no tokens.
    """
    if share <= 0:
        return LOOSEST
    if share >= 1 or not len(confidences):
        return 1.0
    quantile = Quantile()
    quantile.add(confidences)
    return max(LOOSEST, quantile(share))


def policy_for_shares(
    model: ExitModel,
    batches: Batches,
    exits: Sequence[int],
    shares: Sequence[float],
    confidence: str = "max-probability",
) -> tuple[Policy, float]:
    """The policy under which the given shares of the arriving tokens continue, exit by exit.

    Args:
        batches: tokens that the thresholds are chosen on.
        exits: from shallow to deep.
        shares: one in (0, 1] per exit.
        confidence: the confidence measure.

    Returns:
        The policy, and the FLOPs of the passes that it took.
    """
    thresholds: tuple[float, ...] = ()
    flops = 0.0
    for number, (exit, share) in enumerate(zip(exits, shares, strict=True), 1):
        # All tokens that arrive leave here, so that their confidences are recorded.
        scores = score(model, batches, Policy(tuple(exits[:number]), (*thresholds, LOOSEST), confidence))
        thresholds = (*thresholds, threshold_continuing(scores.confidences[scores.exits == exit], share))
        flops += scores.flops
    return Policy(tuple(exits), thresholds, confidence), flops


def matched_thresholds(
    model: ExitModel, batches: Batches, exits: tuple[int, ...], reference: Scores
) -> tuple[float, ...]:
    """Thresholds under which the same share of tokens continues past each exit as in `reference`.

    Args:
        model: the model to choose thresholds for.
        batches: the batches of `reference`.
        exits: from shallow to deep.
        reference: scores of another model on the same batches, routed at the same exits.
    """
    thresholds: tuple[float, ...] = ()
    for exit in exits:
        continuing = float((reference.exits > exit).float().mean())
        so_far = score(model, batches, Policy(exits[: len(thresholds)], thresholds), last=exit)
        arrived = so_far.confidences[so_far.exits == exit]
        share = continuing * len(so_far.exits) / max(1, len(arrived))
        thresholds = (*thresholds, threshold_continuing(arrived, share))
    return thresholds
