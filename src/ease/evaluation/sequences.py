"""Sequences under a model: what each exit predicts for their tokens, and what a policy costs and loses on them.

The unit is the sequence, since tokens of one sequence depend on each other. Exits are compared on one pass at full
depth. Losses, agreement, and costs of a policy come from routed runs: a token that has left passes on the state it
left with, so routing changes later tokens too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.bounds import auroc
from ease.evaluation.scoring import Scores, perplexity, score
from ease.flops import layer_flops
from ease.interface import IGNORE, Batch, ExitModel, evaluation_view, running_batches
from ease.policy import Policy
from ease.routing.forward import head_chunk, routed_forward


class Views(NamedTuple):
    """Predictions of all exits for N scored tokens, each run to the last layer; E exits below the last."""

    confidences: Tensor
    """(E, N)."""
    best: Tensor
    """(E + 1, N) the most likely output of each exit; the last row is that of the last exit."""

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
                states = step.state.flatten(0, 1)[step.places].split(head_chunk(model))
                best = torch.cat([model.logits(h, step.layer).argmax(-1) for h in states])
                for values in (step.confidence, best):
                    everywhere = values.new_zeros(batch.x.numel()).index_copy(0, step.places, values)
                    # float64 is exact for every vocabulary, and MPS does not have it.
                    columns.append(everywhere[batch.scored.flatten()].cpu().double())
            parts.append(torch.stack(columns))
        table = torch.cat(parts, 1)  # a row of confidences and a row of outputs per exit
        if not bool(table.isfinite().all()):
            raise EaseError("some confidences are NaN: the model's weights are probably corrupt, restore them")
        return Views(table[:-2:2], table[1::2].long())

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
        first, last = self.batches[:1], self.model.num_layers
        costs = torch.zeros(last + 1, dtype=torch.float64)
        for exit in (*self.policy.exits, last):
            to_exit = score(self.model, first, self.policy, last=exit)
            keys_and_values = layer_flops(self.model.config, first[0].x.numel(), 0, 0)
            costs[exit] = to_exit.flops + (last - exit) * keys_and_values
        return costs / score(self.model, first).flops

    @cached_property
    def last_exit_targets(self) -> list[Batch]:
        """The batches with the last exit's most likely outputs as targets, so that accuracy is agreement with it."""
        best = self.views.best[-1].split([int(b.scored.sum()) for b in self.batches])
        return [
            b._replace(y=torch.full_like(b.y, IGNORE).masked_scatter(b.scored, targets.to(b.y)))
            for b, targets in zip(self.batches, best, strict=True)
        ]

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
