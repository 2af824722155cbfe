"""Thresholds for a target: how much may be lost, or spent, and what then holds on tokens that chose nothing.

- Three sets, none of which the model was trained on: one proposes candidates, from strict to loose; one decides which
  of them keep the target; the figures come from the third.
- Candidates are proposed from one pass at full depth. That is not what a routed run does (tokens that left offer the
  states they left with), so what decides, and what is reported, comes from really routed runs.
- With a confidence the target holds with that probability: learn then test (Angelopoulos et al. 2021, arXiv:2110.01052)
  by fixed sequence testing. The unit is the sequence, since tokens of one sequence depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.bounds import CLIP, auroc, passing, upper_bound
from ease.evaluation.scoring import Scores, perplexity, score
from ease.flops import layer_flops
from ease.interface import IGNORE, Batch, ExitModel, eval_mode
from ease.policy import Policy
from ease.progress import Progress
from ease.routing.forward import HEAD_CHUNK, routed_forward

CANDIDATES = 32  # steps from strict to loose; each that is tested costs a routed run

LOOSEST = 1e-9  # a threshold that every confidence reaches; 0 would mean that the exit does not route


# ---------------------------------------------------------------------------------------------------------
# What a policy does to sequences


class Views(NamedTuple):
    """What every exit makes of N scored tokens when all of them go to the end; E exits below the last."""

    confidences: Tensor
    """(E, N)."""
    best: Tensor
    """(E + 1, N) the likeliest output; the last row is the last exit's."""

    @property
    def agrees(self) -> Tensor:
        """(E, N) true where an exit names what the last one names."""
        return self.best[:-1] == self.best[-1]


class Sequences:
    """Sequences under a model; each is a draw of its own, its tokens are not.

    Args:
        batches: (x, y) or `Batch`; a row is a sequence.
        policy: exits and measure of confidence; its thresholds do not matter here.
    """

    def __init__(self, model: ExitModel, batches: Iterable[Any], policy: Policy) -> None:
        self.model, self.policy = model, replace(policy, thresholds=(math.inf,) * len(policy.exits))
        self.batches = [Batch(*item)._replace(active=None) for item in batches]
        self.lengths = torch.cat([torch.zeros(0, dtype=torch.long), *(b.scored.sum(1).cpu() for b in self.batches)])
        self.lengths = self.lengths[self.lengths > 0]
        if not len(self.lengths):
            raise EaseError("there is no token to calibrate on: give at least one batch with a target other than -100")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    @torch.no_grad()
    def views(self) -> Views:
        device = next(self.model.parameters()).device
        parts = []
        with eval_mode(self.model):
            for batch in (b.to(device) for b in self.batches if bool(b.running.any())):
                columns = []
                for stop in routed_forward(self.model, batch.x, self.policy, layout=batch.layout):
                    states = stop.state[stop.asked].split(HEAD_CHUNK)
                    best = torch.cat([self.model.logits(h, stop.layer).argmax(-1) for h in states])
                    for values in (stop.confidence, best):
                        everywhere = values.new_zeros(batch.x.shape).masked_scatter(stop.asked, values)
                        columns.append(everywhere[batch.scored].double().cpu())  # exact for every vocabulary
                parts.append(torch.stack(columns))
        table = torch.cat(parts, 1)
        if not bool(table.isfinite().all()):
            raise EaseError("some confidences are no numbers (NaN): the model's weights are broken, restore them")
        return Views(table[:-2:2], table[1::2].long())

    @cached_property
    def full(self) -> Scores:
        """Every token at full depth, without exits."""
        return score(self.model, self.batches)

    @cached_property
    def costs(self) -> Tensor:
        """(layers + 1,) FLOPs of a token by its exit, as a share of full depth without exits.

        Every head on the way is in them, and the keys and values that it gives above its exit.
        """
        first, last = self.batches[:1], self.model.num_layers
        costs = torch.zeros(last + 1, dtype=torch.float64)
        for exit in (*self.policy.exits, last):
            arriving = score(self.model, first, self.policy, last=exit)
            keys = layer_flops(self.model.config, first[0].x.numel(), 0, 0)
            costs[exit] = arriving.flops + (last - exit) * keys
        return costs / score(self.model, first).flops

    @cached_property
    def told_by_last(self) -> list[Batch]:
        """The same sequences; the targets are what the last exit names, so that accuracy is agreement with it."""
        best = self.views.best[-1].split([int(b.scored.sum()) for b in self.batches])
        return [
            b._replace(y=torch.full_like(b.y, IGNORE).masked_scatter(b.scored, told.to(b.y)))
            for b, told in zip(self.batches, best, strict=True)
        ]

    def scores(self, policy: Policy) -> Scores:
        return score(self.model, self.batches, policy)

    def agreement(self, policy: Policy) -> Tensor:
        """(N,) true where the exit that a token takes names what the last exit names at full depth."""
        return score(self.model, self.told_by_last, policy).correct

    def means(self, values: Tensor) -> Tensor:
        """Values (N,) of tokens -> (S,) their means over each sequence."""
        rows = torch.arange(len(self)).repeat_interleave(self.lengths)
        return rows.bincount(values.double()) / self.lengths

    def figures(self, policy: Policy) -> dict[str, Any]:
        """The figures of a report, and what routing changes: agreement, perplexity, FLOPs, and AUROC by exit."""
        routed, full = self.scores(policy), perplexity(self.full.losses)
        figures = routed.figures()
        return figures | {
            "sequences": len(self),
            "agreement": self.agreement(policy).double().mean().item(),
            "ppl_full": full,
            "ppl_increase": figures["ppl"] / full - 1,
            "flops_share": routed.flops / self.full.flops,
            "auroc": {e: auroc(*self.view(e)) for e in policy.exits},
        }

    def view(self, exit: int) -> tuple[Tensor, Tensor]:
        """Confidences (N,) at an exit, and (N,) whether it names what the last exit names."""
        row = self.policy.exits.index(exit)
        return self.views.confidences[row], self.views.agrees[row]


# ---------------------------------------------------------------------------------------------------------
# Targets


TIE = 1e-6  # what the rank adds to a price


# ---------------------------------------------------------------------------------------------------------
# Proposing, testing


def path(views: Views) -> list[tuple[float, ...]]:
    """Candidate thresholds for all exits, from strict (none leaves) to loose (all leave at the first exit).

    One number, the price, orders the candidates: at each exit the lowest threshold is taken at which no larger share
    than this of the tokens that are as sure disagrees with the last exit. Of tokens that have one price the surer
    come first. Prices are spread so that about the same share of tokens more leaves from one candidate to the next.
    """
    sure, order = views.confidences.sort(1, descending=True)
    wrong = (~views.agrees).gather(1, order).double()
    rank = torch.arange(1, wrong.shape[1] + 1)
    rate = wrong.cumsum(1) / rank
    rate[:, :-1][sure[:, :-1] == sure[:, 1:]] = math.inf  # a threshold does not part equals
    prices = rate.flip(1).cummin(1).values.flip(1) + TIE * rank / len(rank)
    lowest = torch.empty_like(prices).scatter_(1, order, prices).amin(0).sort().values
    chosen = lowest[torch.linspace(0, len(lowest) - 1, CANDIDATES).long()]
    leaving = torch.searchsorted(prices, chosen.expand(len(prices), -1).contiguous(), right=True)
    thresholds = torch.where(leaving > 0, sure.gather(1, (leaving - 1).clamp(min=0)).clamp(LOOSEST, 1), 1.0)
    exits = len(prices)
    return list(dict.fromkeys([(1.0,) * exits, *map(tuple, thresholds.T.tolist()), (LOOSEST,) * exits]))


class Goal(NamedTuple):
    """One kind of target: a loss per token whose mean over sequences has a limit."""

    lost: Callable[[Sequences, Policy], Tensor]
    span: Callable[[Sequences], tuple[float, float]]
    """The least and the most that a sequence can lose."""
    limit: Callable[[float], float]
    """From what is asked for to the limit of the mean loss."""
    value: Callable[[float], float]
    """And back."""
    largest: float
    """What may be asked for at most."""
    budget: bool = False
    """Whether it asks for exits to be taken, so that of several candidates the strictest is wanted."""


def _same(value: float) -> float:
    return value


def _rest(value: float) -> float:
    return 1 - value


Kind = Literal["min_agreement", "max_ppl_increase", "target_ratio", "compute_budget"]

GOALS: dict[Kind, Goal] = {
    "min_agreement": Goal(lambda s, p: ~s.agreement(p), lambda s: (0, 1), _rest, _rest, 1),
    "max_ppl_increase": Goal(
        lambda s, p: s.scores(p).losses - s.full.losses, lambda s: (-CLIP, CLIP), math.log1p, math.expm1, math.inf
    ),
    "target_ratio": Goal(
        lambda s, p: s.scores(p).exits == s.model.num_layers, lambda s: (0, 1), _same, _same, 1, budget=True
    ),
    "compute_budget": Goal(
        lambda s, p: s.costs[s.scores(p).exits],
        lambda s: (0, s.costs.max().item()),
        _same,
        _same,
        math.inf,
        budget=True,
    ),
}


@dataclass(frozen=True)
class Target:
    """What thresholds have to keep, on average over sequences.

    Args:
        kind: "min_agreement", the share of tokens for which the exit taken names what the last exit names;
            "max_ppl_increase", by what share perplexity may be above that of full depth (with a confidence, a
            sequence's loss counts as at most 1 nat higher or lower);
            "target_ratio", the share of tokens that may reach the last exit;
            "compute_budget", FLOPs per token, every head in them, as a share of full depth without exits, attention
            at its mean length.
        value: how much of it.
        confidence: the probability with which it holds; None for what is only seen on the calibration sequences.
    """

    kind: Kind
    value: float
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in GOALS:
            raise EaseError(f"no target {self.kind!r}: use one of {', '.join(GOALS)}")
        if not 0 <= self.value <= GOALS[self.kind].largest or math.isinf(self.value):
            most = "0 or more" if math.isinf(GOALS[self.kind].largest) else "in [0, 1]"
            raise EaseError(f"{self} is no target: give a share, {most}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise EaseError(f"a confidence of {self.confidence} is none: give one in (0, 1), such as 0.95")

    def __str__(self) -> str:
        surely = "" if self.confidence is None else f" with confidence {self.confidence:g}"
        return f"{self.kind.replace('_', ' ')} {self.value:g}{surely}"


class Calibration(NamedTuple):
    """Thresholds that keep a target, and what is known of them: values fit for JSON."""

    policy: Policy
    record: dict[str, Any]


def calibrate(
    model: ExitModel,
    policy: Policy,
    target: Target,
    propose: Iterable[Any],
    decide: Iterable[Any],
    held_out: Iterable[Any],
    progress: Progress | None = None,
) -> Calibration:
    """Thresholds for all exits of a policy: of those that keep the target the ones that save, or agree, most.

    Args:
        policy: exits and measure of confidence; its thresholds are what is chosen.
        propose: batches of (x, y) or `Batch` that candidates are taken from, such as the validation split.
        decide: those on which candidates are tested. A target with a confidence holds for what these were drawn from.
        held_out: those that the figures are measured on.
        watch: told how many of the candidates have been tested.

    Raises:
        EaseError: the target cannot be kept, or the policy has no exits.
    """
    if not policy.exits:
        raise EaseError("there are no exits to calibrate: give a policy with exits")
    policy.check(model.num_layers)
    goal, progress = GOALS[target.kind], progress or Progress()
    candidates = path(Sequences(model, propose, policy).views)
    if goal.budget:
        candidates.reverse()
    sequences, unseen = Sequences(model, decide, policy), Sequences(model, held_out, policy)

    def bound(number: int) -> float:
        progress.step(number / len(candidates))
        losses = sequences.means(goal.lost(sequences, replace(policy, thresholds=candidates[number])))
        return upper_bound(losses, target.confidence, goal.span(sequences))

    bounds = passing(map(bound, range(len(candidates))), goal.limit(target.value))
    if not bounds:
        best = max(0.0, goal.value(bound(0) + 1e-4))  # so that the four digits shown can be had
        more = ", or calibrate on more sequences" if target.confidence else ""
        raise EaseError(
            f"{target} cannot be had: the best on these {len(sequences)} sequences is {best:.4f}, so ask for that{more}"
        )
    chosen = replace(policy, thresholds=candidates[len(bounds) - 1])
    progress.step(1.0)
    lost = unseen.means(goal.lost(unseen, chosen)).mean().item()
    record = {
        "policy": asdict(chosen),
        "target": asdict(target),
        "calibration": {
            "value": goal.value(bounds[-1]),
            "candidates": [len(bounds), len(candidates)],
            "sequences": len(sequences),
            "tokens": int(sequences.lengths.sum()),
        },
        "held_out": {"value": goal.value(lost), **unseen.figures(chosen)},
    }
    return Calibration(chosen, record)
