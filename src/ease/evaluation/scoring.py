"""Per-token scores of a model under a policy, and the metrics computed from them.

`score` runs the routed forward once and keeps a few numbers per token. Every metric that ease reports (perplexity,
accuracy, hard-token perplexity, exit shares, costs, reliability) is computed from these, so that all of them describe
the same run.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.devices import as_device
from ease.errors import EaseError, checked
from ease.inputs import as_mask
from ease.interface import IGNORE, Batch, ExitModel, check_batches, evaluation_view, to_device
from ease.policy import Policy
from ease.routing.confidence import at_least_float32
from ease.routing.forward import routed_forward
from ease.training.distributed import gather_batches, part_of, total


@dataclass(frozen=True)
class Scores:
    """Loss, correctness, exit, and confidence of N scored tokens, in the order of the batches.

    Attributes:
        losses: (N,) cross entropy in nats.
        correct: (N,) true where the most likely token is the target.
        exits: (N,) the exit that each token took.
        confidences: (N,) the confidence of that exit.
        num_layers: the layer at which the run ended.
        flops: FLOPs of the whole pass, including every head evaluation.
        seconds: wall-clock time of the whole pass.
        processed: tokens that the model ran on, scored or not; `flops` and `seconds` are for all of them.
    """

    losses: Tensor
    correct: Tensor
    exits: Tensor
    confidences: Tensor
    num_layers: int
    flops: float
    seconds: float
    processed: int

    @checked
    def metrics(self, hard: Tensor | None = None, depth: int | None = None) -> dict[str, Any]:
        """Metrics over all scored tokens, as values fit for JSON.

        Args:
            hard: (N,) true for hard tokens; adds their perplexity and accuracy, and the easy tokens' perplexity.
            depth: number of layers that `compute_cost` is a share of (`num_layers` by default). Use one depth for all
                models of a table.

        Returns:
            loss (nats), ppl, acc, shallow_ratio (share of tokens that left early), compute_cost (mean layers run as a
            share of `depth`), exit_shares (by exit), flops_per_token, seconds, and tokens; with `hard` also hard_ppl,
            hard_acc, and easy_ppl.

        Example:
            >>> scores = ease.score(model, data.val, ease.Policy(exits=(2,), thresholds=(0.9,)))
            >>> scores.metrics()["ppl"], scores.metrics()["exit_shares"]
        """
        layers = sorted(set(self.exits.tolist()) | {self.num_layers})
        shares = {layer: (self.exits == layer).float().mean().item() for layer in layers}
        metrics: dict[str, Any] = {
            "loss": self.losses.mean().item(),
            "ppl": perplexity(self.losses),
            "acc": self.correct.float().mean().item(),
            "shallow_ratio": 1 - shares[self.num_layers],
            # The original recipe's formula, for any number of exits: layers run over layers in the model.
            "compute_cost": sum(share * layer for layer, share in shares.items()) / (depth or self.num_layers or 1),
            "exit_shares": shares,
            "flops_per_token": self.flops / self.processed,
            "seconds": self.seconds,
            "tokens": self.losses.numel(),
        }
        if hard is not None:
            hard = as_mask("hard", hard, self.losses)
            metrics |= {
                "hard_ppl": perplexity(self.losses[hard]),
                "hard_acc": self.correct[hard].float().mean().item(),
                "easy_ppl": perplexity(self.losses[~hard]),
            }
        return metrics

    def figures(self, hard: Tensor | None = None, depth: int | None = None) -> dict[str, Any]:
        """Deprecated name of `metrics`."""
        warnings.warn("Scores.figures is deprecated: use Scores.metrics", DeprecationWarning, stacklevel=2)
        return self.metrics(hard, depth)

    @checked
    def reliability(self, bins: int = 10) -> dict[str, Any]:
        """Confidence and accuracy in bins of equal width, and the expected calibration error (Guo et al. 2017).

        Returns:
            ece, the mean of |confidence - accuracy| over the bins, weighted by their tokens, and bins, one row per bin
            that has a token.
        """
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
    """exp of the mean of losses (N,) in nats; infinite where that overflows, NaN without a token."""
    if not losses.numel():
        return math.nan
    mean = losses.double().mean().item()
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
@checked
def score(
    model: ExitModel,
    batches: Iterable[Any],
    policy: Policy | None = None,
    *,
    last: int | None = None,
    device: torch.device | str | None = None,
) -> Scores:
    """Runs a model over batches and scores every token whose target is not -100.

    Of several processes, each runs its rows of every batch, and all get the scores of all tokens.

    Args:
        model: the model; the call runs in evaluation mode whatever its mode, which stays as it is.
        batches: an iterable of what `Batch.of` reads: (x, y) with integers (B, T), `Batch`, or dictionaries.
        policy: exits, thresholds, and confidence measure; by default every token runs to the end.
        last: the layer at which the run ends (the model's last by default). `last=k` without a policy scores exit k.
        device: device of the model; that of its parameters by default.

    Returns:
        The scores of all tokens, in the order of the batches.

    Raises:
        EaseError: no token to score, x and y of different shapes, a target outside the outputs, or a policy with exits
            that the model does not have.

    Example:
        >>> routed = ease.score(model, data.val, ease.Policy(exits=(2,), thresholds=(0.9,)))
        >>> routed.metrics()["ppl"], (routed.exits == 2).float().mean()
    """
    policy = policy or Policy()
    model.check_policy(policy)
    model = evaluation_view(model)
    device = next(model.parameters()).device if device is None else as_device(device)
    parts: list[Tensor] = []
    flops = 0.0
    processed = 0
    start = time.perf_counter()
    for item in check_batches(batches):
        batch = part_of(Batch.of(item)._replace(active=None))
        # Before the batch is moved to the device, since the host reads all of these.
        model.check_ids(batch.x, model.config.vocab_size)
        model.check_ids(batch.y[batch.y != IGNORE], model.config.outputs)
        scored = batch.scored.flatten().nonzero().squeeze(1)
        processed += int(batch.running.sum())
        batch = batch.to(device)
        read = partial(_loss_and_correct, batch.y.flatten())
        columns = torch.zeros(batch.y.numel(), 4, device=device)  # loss, correct, exit, confidence
        for step in routed_forward(model, batch.x, policy, layout=batch.layout, last=last, read=read):
            flops += step.flops
            if step.read is not None:
                exits = torch.full_like(step.leaving_confidence, step.layer)
                row = torch.cat([step.read, torch.stack([exits, step.leaving_confidence], 1)], 1)
                columns[step.leaving] = row.float()
        parts.append(columns[to_device(scored, device)])
    scored_tokens, flops, all_processed = total(sum(map(len, parts)), flops, processed)
    if not scored_tokens:
        raise EaseError("there is no token to score: give at least one batch with a target other than -100")
    losses, correct, exits, confidences = gather_batches(parts).cpu().unbind(1)
    seconds = time.perf_counter() - start
    last = model.num_layers if last is None else last
    return Scores(losses, correct > 0, exits.long(), confidences, last, flops, seconds, int(all_processed))


def _loss_and_correct(targets: Tensor, logits: Tensor, places: Tensor) -> Tensor:
    """(n, 2): cross entropy of logits (n, V) with targets[places], and 1 where the most likely token is the target."""
    target = targets[places]
    losses = F.cross_entropy(at_least_float32(logits), target, reduction="none", ignore_index=IGNORE)
    if logits.device.type != "cpu":  # the shorter way below would wait for the device
        return torch.stack([losses, (logits.argmax(-1) == target).to(losses)], 1)
    # A target is correct if no logit exceeds its own, which takes a tenth of argmax's time on a CPU. Of equal logits,
    # which are frequent in half precision, the first is the prediction.
    largest = logits.amax(-1, keepdim=True)
    correct = logits.gather(1, target.clamp(min=0)[:, None]) >= largest
    tied = (correct & ((logits == largest).sum(1, keepdim=True) > 1)).squeeze(1)
    correct = correct.squeeze(1)
    if bool(tied.any()):
        correct[tied] = logits[tied].argmax(-1) == target[tied]
    return torch.stack([losses, correct.to(losses)], 1)
