"""Sequences under a model: what each exit predicts for their tokens, and what a policy costs and loses on them.

The unit is the sequence, since tokens of one sequence depend on each other. Exits are compared on one pass at full
depth. Losses, agreement, and costs of a policy come from routed runs: a token that has left passes on the state it
left with, so routing changes later tokens too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.bounds import auroc
from ease.evaluation.scoring import Scores, perplexity, score
from ease.flops import exit_flops, layer_flops, run_flops
from ease.interface import IGNORE, Batch, ExitModel, evaluation_view, running_batches
from ease.policy import Policy
from ease.routing.confidence import at_least_float32, measure_named
from ease.routing.forward import head_chunk, routed_forward


class Views(NamedTuple):
    """Predictions of all exits for N scored tokens, each run to the last layer; E exits below the last."""

    confidences: Tensor
    """(E, N)."""
    best: Tensor
    """(E + 1, N) the most likely output of each exit; the last row is that of the last exit."""
    losses: Tensor
    """(E + 1, N) the loss of each exit in nats."""

    @property
    def agrees(self) -> Tensor:
        """(E, N) true where an exit's most likely output is that of the last exit."""
        return self.best[:-1] == self.best[-1]


class Sequences:
    """Sequences under a model, with the loss and cost of any policy over the same exits.

    Args:
        model: the model; it runs in evaluation mode whatever its mode, which stays as it is.
        batches: (x, y) or `Batch`; a row is a sequence.
        policy: exits and confidence measure; its thresholds are not used.

    Raises:
        EaseError: if no token has a target.
    """

    def __init__(self, model: ExitModel, batches: Iterable[Any], policy: Policy) -> None:
        self.model = model
        self.policy = replace(policy, thresholds=(math.inf,) * len(policy.exits))
        self.batches = [Batch.of(item)._replace(active=None) for item in batches]
        lengths = torch.cat([torch.zeros(0, dtype=torch.long), *(b.scored.sum(1).cpu() for b in self.batches)])
        self.lengths = lengths[lengths > 0]
        if not len(self.lengths):
            raise EaseError("there is no token to calibrate on: give at least one batch with a target other than -100")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    @torch.no_grad()
    def views(self) -> Views:
        """Predictions of all exits for every scored token, from one pass at full depth."""
        model = evaluation_view(self.model)
        device = next(model.parameters()).device
        parts = []
        for batch in running_batches(self.batches, device):
            columns = []
            for step in routed_forward(model, batch.x, self.policy, layout=batch.layout):
                best, losses = [], []
                states, y = step.state.flatten(0, 1)[step.places], batch.y.flatten()[step.places]
                for h, targets in zip(states.split(head_chunk(model)), y.split(head_chunk(model)), strict=True):
                    logits = at_least_float32(model.logits(h, step.layer))
                    best.append(logits.argmax(-1))
                    losses.append(F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE))
                for values in (step.confidence, torch.cat(best), torch.cat(losses)):
                    everywhere = values.new_zeros(batch.x.numel()).index_copy(0, step.places, values)
                    # float64 is exact for every vocabulary, and MPS does not have it.
                    columns.append(everywhere[batch.scored.flatten()].cpu().double())
            parts.append(torch.stack(columns))
        table = torch.cat(parts, 1)  # a row each of confidences, outputs, and losses per exit
        if not bool(table.isfinite().all()):
            raise EaseError("some confidences are NaN: the model's weights are probably corrupt, restore them")
        return Views(table[:-3:3], table[1::3].long(), table[2::3])

    def view(self, exit: int) -> tuple[Tensor, Tensor]:
        """Confidences (N,) at an exit, and (N,) true where its most likely output is that of the last exit."""
        row = self.policy.exits.index(exit)
        return self.views.confidences[row], self.views.agrees[row]

    @cached_property
    def full(self) -> Scores:
        """Scores at full depth without exits."""
        return score(self.model, self.batches)

    @cached_property
    def costs(self) -> Tensor:
        """(L + 1,) FLOPs of a token by the exit it takes, as a share of full depth without exits.

        They include every head evaluated on the way, and the keys and values that the token gives to the layers above
        its exit.
        """
        c, batch, last = self.model.config, self.batches[0], self.model.num_layers
        running, kind = batch.running, measure_named(self.policy.confidence)
        tokens = int(running.any(1).sum() if c.num_labels is not None else running.sum())  # that an exit evaluates
        keys_and_values = layer_flops(c, running.numel(), 0, 0)
        costs = torch.zeros(last + 1, dtype=torch.float64)
        measured = 0.0
        for exit in (*self.policy.exits, last):
            measured += kind.flops(c, tokens) if exit < last else 0
            layers = run_flops(c, exit, running, batch.layout) + (last - exit) * keys_and_values
            costs[exit] = layers + measured + exit_flops(c, tokens, exit)
            measured += exit_flops(c, tokens, exit) if kind.needs_head else 0
        return costs / (run_flops(c, last, running, batch.layout) + exit_flops(c, tokens, last))

    @cached_property
    def last_exit_targets(self) -> list[Batch]:
        """The batches with the last exit's most likely outputs as targets, so that accuracy is agreement with it."""
        best = self.views.best[-1].split([int(b.scored.sum()) for b in self.batches])
        return [
            b._replace(y=torch.full_like(b.y, IGNORE).masked_scatter(b.scored, targets.to(b.y)))
            for b, targets in zip(self.batches, best, strict=True)
        ]

    def under(self, model: ExitModel, policy: Policy) -> Self:
        """The same sequences with other exits or another measure; the scores at full depth are not computed again.

        Args:
            model: the model, or a view of it that differs in its exit classifiers alone.
            policy: exits and confidence measure.
        """
        other = copy.copy(self)
        vars(other).update(full=self.full, last_exit_targets=self.last_exit_targets)
        for name in ("views", "costs"):
            vars(other).pop(name, None)
        other.model, other.policy = model, replace(policy, thresholds=(math.inf,) * len(policy.exits))
        return other

    def scores(self, policy: Policy) -> Scores:
        """Scores of a routed run."""
        return score(self.model, self.batches, policy)

    def agreement(self, policy: Policy) -> Tensor:
        """(N,) true where the exit that a token takes predicts what the last exit predicts at full depth."""
        return score(self.model, self.last_exit_targets, policy).correct

    def means(self, values: Tensor) -> Tensor:
        """Values (N,) of tokens -> (S,) their means over each sequence."""
        rows = torch.arange(len(self)).repeat_interleave(self.lengths)
        return rows.bincount(values.double()) / self.lengths

    def metrics(self, policy: Policy) -> dict[str, Any]:
        """`Scores.metrics` of a routed run, and its difference from full depth.

        Returns:
            Also sequences, agreement (share of tokens), ppl_full, ppl_increase (relative), flops_share (of full depth),
            and auroc (by exit).
        """
        routed, full_perplexity = self.scores(policy), perplexity(self.full.losses)
        metrics = routed.metrics()
        return metrics | {
            "sequences": len(self),
            "agreement": self.agreement(policy).double().mean().item(),
            "ppl_full": full_perplexity,
            "ppl_increase": metrics["ppl"] / full_perplexity - 1,
            "flops_share": routed.flops / self.full.flops,
            "auroc": {exit: auroc(*self.view(exit)) for exit in policy.exits},
        }
