"""Search of exits and confidence measures for a target, and whether the best policy saves anything.

- Candidates are all exits alone and in pairs, each with every measure. Validation ranks them, from one pass at full
  depth per measure; the best ones are tested with routed runs on the sequences that decide. What the chosen policy
  saves is measured on sequences that chose nothing.
- The linear classifiers are fitted to text of their own. The model keeps none of them: the outcome has a view of the
  model with those of the chosen policy.
- A policy is chosen only if it saves counted FLOPs and measured time. Otherwise full depth stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.calibration import GOALS, Target, candidate_thresholds, choose, make_record, unreachable
from ease.evaluation.decoding_speed import time_shares
from ease.evaluation.scoring import Scores
from ease.evaluation.sequences import Sequences, Views
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import Progress
from ease.training.exit_classifiers import fit_classifiers, lessons, with_classifiers

LEARNED = ("agreement", "gain")
"""Targets of linear classifiers that the search fits itself."""

MEASURES = ("max-probability", "margin", *LEARNED)
"""Measures that are searched by default."""

TESTED = 10  # candidates that are tested with routed runs
TIMED = 4  # of them, those whose decoding is timed


class Found(NamedTuple):
    """The outcome of a search."""

    model: StandardTransformer
    """A view of the model with the chosen policy, and the classifiers that it needs."""
    record: dict[str, Any]
    """The record of `ease.calibrate` for the policy, and of the search; values fit for JSON."""


@dataclass(eq=False)
class _Candidate:
    """Exits with a measure."""

    base: StandardTransformer
    name: str
    """The name of the measure."""
    weights: dict[int, Tensor]
    """(D + 1,) by exit: the classifiers fitted for the policy."""
    policy: Policy
    proposed: list[tuple[float, ...]]
    """Thresholds from strict to loose."""
    estimate: float
    """By which candidates are ranked, from the best."""

    @property
    def model(self) -> StandardTransformer:
        """A view of the model with the candidate's classifiers and policy."""
        view = with_classifiers(self.base, self.weights)
        view.policy = self.policy
        return view

    def test(self, target: Target, deciding: Sequences) -> dict[str, Any]:
        """Chooses thresholds for the target; the row of the table, with what they reach on the deciding sequences."""
        sequences = deciding.under(self.model, self.policy)
        self.choice = choose(target, self.policy, self.proposed, sequences)
        self.policy = self.choice.policy
        metrics = sequences.metrics(self.policy)
        return {
            "exits": list(self.policy.exits),
            "measure": self.name,
            "thresholds": list(self.policy.thresholds),
            "reached": self.choice.passed > 0,
            **{key: metrics[key] for key in ("shallow_ratio", "agreement", "ppl", "ppl_full", "flops_share")},
            "time_share": None,
        }


class Preview(Sequences):
    """Sequences of which a policy is estimated from one pass at full depth, for the exits and measure of a `Sequences`.

    In a routed run, tokens that have left pass on the states they left with; here all tokens go to full depth.

    Args:
        seen: the sequences.
        exits: some of its exits.
    """

    def __init__(self, seen: Sequences, exits: tuple[int, ...]) -> None:
        rows = [seen.policy.exits.index(exit) for exit in exits]
        vars(self).update(vars(seen))
        vars(self).pop("costs", None)
        self.policy = replace(seen.policy, exits=exits, thresholds=(math.inf,) * len(exits))
        confidences, best, losses = seen.views
        self.views = Views(confidences[rows], best[[*rows, -1]], losses[[*rows, -1]])

    def _leave(self, policy: Policy) -> Tensor:
        """(1, N) the row of `views` at which each token leaves."""
        place = torch.full(self.views.losses.shape[1:], len(self.policy.exits))
        for row, threshold in reversed([*enumerate(policy.thresholds)]):
            place = torch.where(self.views.confidences[row] >= threshold, row, place)
        return place[None]

    @cached_property
    def full(self) -> Scores:
        return self.scores(Policy())

    def scores(self, policy: Policy) -> Scores:
        place, last, none = self._leave(policy), self.model.num_layers, torch.empty(0)
        exits = torch.tensor([*self.policy.exits, last])[place[0]]
        return Scores(self.views.losses.gather(0, place)[0], none, exits, none, last, math.nan, math.nan, 0)

    def agreement(self, policy: Policy) -> Tensor:
        return (self.views.best == self.views.best[-1]).gather(0, self._leave(policy))[0]


def search(
    model: StandardTransformer,
    target: Target,
    exits: Sequence[int],
    measures: Iterable[str],
    learn: Sequence[Any],
    propose: Iterable[Any],
    decide: Sequence[Any],
    held_out: Iterable[Any],
    progress: Progress | None = None,
    times: Callable[[Sequence[StandardTransformer], Sequence[Any]], list[float]] = time_shares,
) -> Found:
    """Searches exits and measures for the policy that satisfies a target at the lowest cost, or in a budget the best.

    Args:
        model: the model, which is not changed. Its policy's position-dependent thresholds apply to every candidate.
        target: the condition to satisfy. Its confidence is shared: with n candidates tested, each must satisfy it with
            the probability 1 - (1 - confidence) / n, so that the best of them satisfies it with the confidence.
        exits: exits to search, alone and in pairs.
        measures: names of confidence measures, and of `LEARNED` classifiers.
        learn: batches that classifiers are fitted to.
        propose: batches that thresholds are proposed on and candidates are ranked on.
        decide: batches that thresholds are tested on, and that FLOPs and time must be saved on.
        held_out: batches that the reported metrics are measured on.
        progress: receives the share that is done.
        times: gives the time of routed decoding with each of several models, as a share of full decoding's.

    Raises:
        EaseError: no candidate satisfies the target.
    """
    progress = progress or Progress()
    ranked = _ranked(model, target, tuple(exits), tuple(dict.fromkeys(measures)), learn, propose, progress)
    # The best of each measure, so that the table compares them, and then whatever ranks highest.
    best = {candidate.name: candidate for candidate in reversed(ranked)}.values()
    shortlist = sorted([*best, *(c for c in ranked if c not in best)][:TESTED], key=lambda c: c.estimate)
    shared = target
    if target.confidence is not None:
        shared = replace(target, confidence=1 - (1 - target.confidence) / len(shortlist))
    deciding, tested = Sequences(model, decide, Policy()), []
    for number, candidate in enumerate(shortlist):
        progress.step((1 + number / len(shortlist)) / 2)
        tested.append((candidate.test(shared, deciding), candidate))
    if not any(row["reached"] for row, _ in tested):
        raise unreachable(target, [candidate.choice for candidate in shortlist], len(deciding))

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        """Those that reach the target and save FLOPs first: in a budget by quality, otherwise by cost."""
        saves, budget = row["flops_share"] < 1, GOALS[target.kind].budget
        return not row["reached"], not saves, row["ppl"] if saves and budget else row["flops_share"]

    tested.sort(key=lambda pair: rank(pair[0]))
    timed = [(row, candidate) for row, candidate in tested if row["reached"]][:TIMED]
    for (row, _), share in zip(timed, times([candidate.model for _, candidate in timed], decide), strict=True):
        row["time_share"] = share
    saving = [(row, candidate) for row, candidate in timed if row["flops_share"] < 1 and row["time_share"] < 1]
    row, chosen = (saving or timed)[0]
    policy, view = Policy(), with_classifiers(model, {})
    if saving:
        policy, view = chosen.policy, chosen.model
    view.policy = policy
    unseen = Sequences(model, held_out, Policy()).under(view, policy)
    record = make_record(target, chosen.choice, deciding, unseen, policy)
    record |= {
        "installed": bool(saving),
        "best": row,
        "table": [row for row, _ in tested],
        "searched": len(ranked),
        "classifiers": {exit: weight.tolist() for exit, weight in chosen.weights.items()} if saving else {},
    }
    progress.step(1.0)
    return Found(view, record)


def _ranked(
    model: StandardTransformer,
    target: Target,
    exits: tuple[int, ...],
    measures: tuple[str, ...],
    learn: Sequence[Any],
    propose: Iterable[Any],
    progress: Progress,
) -> list[_Candidate]:
    """All candidates, ranked by the cost or, in a budget, by the loss that the target leaves them with.

    That is the first half of the search's progress.
    """
    learned = lessons(model, learn, exits) if set(LEARNED) & set(measures) else {}
    found = []
    for number, name in enumerate(measures):
        progress.step(number / len(measures) / 2)
        weights: dict[int, Tensor] = fit_classifiers(model, learned, name)[0] if name in LEARNED else {}
        at = exits
        if name == "classifier":
            at = tuple(e for e in exits if e in model.config.classifier_exits and e not in model.stale_classifiers)
        own = model.policy
        common = Policy(
            at,
            (1.0,) * len(at),
            "classifier" if name in LEARNED else name,
            patience=own.patience if name == "patience" else 0,
            half_life=own.half_life,
            always_deep=own.always_deep,
        )
        seen = Sequences(with_classifiers(model, weights), propose, common)
        for chosen in [*itertools.combinations(at, 1), *itertools.combinations(at, 2)]:
            preview = Preview(seen, chosen)
            proposed = candidate_thresholds(preview.views)
            choice = choose(replace(target, confidence=None), preview.policy, proposed, preview)
            scores, estimate = preview.scores(choice.policy), math.inf
            if choice.passed:
                budget = GOALS[target.kind].budget
                estimate = (scores.losses if budget else preview.costs[scores.exits]).mean().item()
            kept = {exit: weights[exit] for exit in chosen if weights}
            found.append(_Candidate(model, name, kept, preview.policy, proposed, estimate))
    if not found:
        raise EaseError("no exit has a classifier of its own: use the measure agreement or gain, which train one")
    return sorted(found, key=lambda candidate: candidate.estimate)
