"""Scoring: what a policy does to every token, and what that adds up to.

`score` makes one really routed run and keeps a few numbers per token; every figure that ease shows (perplexity,
accuracy, hard-token perplexity, shares, costs, reliability) is a sum over those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.interface import IGNORE, Batch, ExitModel, eval_mode
from ease.policy import Policy
from ease.routing.forward import routed_forward, stop_flops


@dataclass(frozen=True)
class Scores:
    """One entry per scored token, in the order of the batches; N tokens."""

    losses: Tensor
    """(N,) cross entropy in nats."""
    correct: Tensor
    """(N,) true where the likeliest token is the target."""
    exits: Tensor
    """(N,) the exit whose prediction counted."""
    confidences: Tensor
    """(N,) its confidence."""
    num_layers: int
    """The layer at which the run ended, the measure of compute_cost unless told otherwise."""
    flops: float
    """Of the whole pass, every head evaluation included."""
    seconds: float
    """Wall-clock of the whole pass."""
    processed: int
    """Tokens that ran, scored or not; flops and seconds are theirs."""

    def figures(self, hard: Tensor | None = None, depth: int | None = None) -> dict[str, Any]:
        """The figures of a report.

        Args:
            hard: (N,) true for hard tokens; adds their perplexity and accuracy, and the easy tokens' perplexity.
            depth: layers that compute_cost is a share of; the model's own by default. Models of different depth
                in one table need one measure.
        """
        layers = sorted(set(self.exits.tolist()) | {self.num_layers})
        shares = {layer: (self.exits == layer).float().mean().item() for layer in layers}
        figures: dict[str, Any] = {
            "loss": self.losses.mean().item(),
            "ppl": perplexity(self.losses),
            "acc": self.correct.float().mean().item(),
            "shallow_ratio": 1 - shares[self.num_layers],
            # The seed's formula, for any number of exits: layers run over layers there are.
            "compute_cost": sum(share * layer for layer, share in shares.items()) / (depth or self.num_layers),
            "exit_shares": shares,
            "flops_per_token": self.flops / self.processed,
            "seconds": self.seconds,
            "tokens": self.losses.numel(),
        }
        if hard is not None:
            figures |= {
                "hard_ppl": perplexity(self.losses[hard]),
                "hard_acc": self.correct[hard].float().mean().item(),
                "easy_ppl": perplexity(self.losses[~hard]),
            }
        return figures

    def reliability(self, bins: int = 10) -> dict[str, Any]:
        """Confidence against accuracy in equal bins, and the expected calibration error (Guo et al. 2017)."""
        index = (self.confidences * bins).long().clamp(max=bins - 1)
        rows: list[dict[str, float]] = []
        for b in range(bins):
            inside = index == b
            if bool(inside.any()):
                rows.append(
                    {
                        "low": b / bins,
                        "high": (b + 1) / bins,
                        "confidence": self.confidences[inside].mean().item(),
                        "accuracy": self.correct[inside].float().mean().item(),
                        "share": inside.float().mean().item(),
                    }
                )
        error = sum(row["share"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
        return {"ece": error, "bins": rows}


def perplexity(losses: Tensor) -> float:
    """exp(mean loss); infinite where that overflows, NaN where there is no token."""
    if not losses.numel():
        return math.nan
    mean = losses.double().mean().item()
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def score(
    model: ExitModel,
    batches: Iterable[Any],
    policy: Policy | None = None,
    *,
    last: int | None = None,
    device: torch.device | str | None = None,
) -> Scores:
    """Runs the model over batches of (x, y) or `Batch` and scores every token with a target other than -100.

    Args:
        policy: who leaves where; without one every token runs to the end.
        last: the layer at which the run ends (the model's last by default): scores that exit alone.
        device: where the model is; its parameters' device by default.
    """
    policy = policy or Policy()
    policy.check(model.num_layers)
    device, end = next(model.parameters()).device if device is None else device, last or model.num_layers
    parts: list[Tensor] = []
    flops, processed, start = 0.0, 0, time.perf_counter()
    with eval_mode(model):
        for item in batches:
            batch = Batch(*item)
            if batch.x.shape != batch.y.shape:
                raise EaseError(f"x and y must have one shape, got {tuple(batch.x.shape)} and {tuple(batch.y.shape)}")
            batch = batch._replace(active=None, y=batch.y.long()).to(device)
            x, y, layout = batch.x, batch.y, batch.layout
            model.check_ids(y[y != IGNORE], model.config.outputs)
            columns = torch.zeros(*y.shape, 4, device=device)  # loss, correct, exit, confidence
            for stop in routed_forward(model, x, policy, layout=layout, last=last, read=partial(_read, y.flatten())):
                flops += stop_flops(model, stop, policy, end, layout)
                if stop.read is not None:
                    confidence = stop.confidence[stop.leaves]
                    exits = torch.full_like(confidence, stop.layer)
                    row = torch.cat([stop.read, torch.stack([exits, confidence], 1)], 1)
                    columns[stop.left] = row.float()
            processed += int(batch.running.sum())
            parts.append(columns[batch.scored].cpu())
    seconds = time.perf_counter() - start
    if not sum(map(len, parts)):
        raise EaseError("there is no token to score: give at least one batch with a target other than -100")
    losses, correct, exits, confidences = torch.cat(parts).unbind(1)
    return Scores(losses, correct > 0, exits.long(), confidences, end, flops, seconds, processed)


def _read(targets: Tensor, logits: Tensor, places: Tensor) -> Tensor:
    """(n, 2): cross entropy of logits (n, V) against their targets, and 1 where the likeliest token is it."""
    target = targets[places]
    losses = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE)
    if logits.dtype.itemsize < 4:  # in half precision logits tie, and only the first of them would be written
        correct = logits.argmax(-1) == target
    else:  # no logit above the target's: a tenth of argmax's time on a CPU
        correct = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1) >= logits.amax(-1)
    return torch.stack([losses, correct.to(losses)], 1)
