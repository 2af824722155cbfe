"""How often a draft brick predicts what the full model predicts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.scoring import Scores
from ease.flops import draft_flops, draft_head_flops, head_flops, run_flops
from ease.interface import evaluation_view, running_batches
from ease.models import StandardTransformer
from ease.routing.confidence import at_least_float32
from ease.routing.forward import head_chunk
from ease.training.distributed import gather_batches, part_of, total
from ease.training.drafts import draft_pass

LONGEST_CHAIN = 3


@dataclass(frozen=True)
class DraftScores(Scores):
    """Scores of first drafts against the full model: `losses` are KL(model || brick), `correct` is agreement.

    Attributes:
        chains: for n = 1, 2, 3, the places at which a round of n drafts exists: true where each of them is the full
            model's most likely token. Drafts after the first read the tokens of the text.
    """

    chains: tuple[Tensor, ...] = ()

    def metrics(self, hard: Tensor | None = None, depth: int | None = None) -> dict[str, Any]:
        """As `Scores.metrics`, with agreement and, for chains of 2 and 3 drafts, agreement_2 and agreement_3."""
        shares = {f"agreement_{n}": part.float().mean().item() for n, part in enumerate(self.chains, 1)}
        return super().metrics(hard, depth) | {"agreement": shares.pop("agreement_1")} | shares


@torch.no_grad()
def score_drafts(model: StandardTransformer, batches: Iterable[Any]) -> DraftScores:
    """Compares a model's draft brick with the model itself at every scored token but the first of each row.

    Args:
        model: the model; the call runs in evaluation mode whatever its mode, which stays as it is.
        batches: what `Batch.of` reads.

    Raises:
        EaseError: the model has no draft brick, or there is no token to score.

    Example:
        >>> score_drafts(model, data.val).metrics()["agreement"]
    """
    model, start = evaluation_view(model), time.perf_counter()
    config, last = model.config, model.num_layers
    losses, confidences, flops, processed = [], [], 0.0, 0
    chains: list[list[Tensor]] = [[] for _ in range(LONGEST_CHAIN)]
    for whole in running_batches(batches, next(model.parameters()).device):
        batch = part_of(whole._replace(active=None))
        found, running = draft_pass(model, batch, LONGEST_CHAIN), batch.running
        full = _in_chunks(model, found.states, lambda part: model.logits(part, last).argmax(-1))
        agreed = torch.ones_like(full, dtype=torch.bool)
        for n, (drafts, valid) in enumerate(zip(found.drafts, found.valid, strict=True)):
            drafted = _in_chunks(model, drafts, lambda part: model.draft_tokens(part)[0])
            # A chain of n ends at t if one of n - 1 ends at t - 1, which says False before the first place.
            agreed = (F.pad(agreed, (1, 0))[:, :-1] if n else agreed) & (drafted == full)
            chains[n].append(agreed[valid])
        first, valid = found.drafts[0], found.valid[0]
        states = model.exit_norm(found.states[valid], last)
        chunks = list(zip(first[valid].split(head_chunk(model)), states.split(head_chunk(model)), strict=True))
        losses.append(torch.cat([_divergence(model, *chunk) for chunk in chunks]))
        confidences.append(torch.cat([model.draft_tokens(part)[1] for part, _ in chunks]))
        flops += run_flops(config, last, running, batch.layout) + head_flops(config, len(states))
        flops += draft_flops(config, running[:, 1:], LONGEST_CHAIN)
        flops += draft_head_flops(config, sum(int(part.sum()) for part in found.valid))
        processed += int(running.sum())
    scored_tokens, flops, all_processed = total(sum(map(len, losses)), flops, processed)
    if not scored_tokens:
        raise EaseError("there is no token to score: give at least one batch of two tokens per row")
    joined = tuple(gather_batches(parts).cpu() for parts in chains)
    exits, seconds = torch.full((len(joined[0]),), last), time.perf_counter() - start
    found_losses, found_confidences = (gather_batches(parts).float().cpu() for parts in (losses, confidences))
    return DraftScores(
        found_losses, joined[0], exits, found_confidences, last, flops, seconds, int(all_processed), chains=joined
    )


def _divergence(model: StandardTransformer, drafts: Tensor, states: Tensor) -> Tensor:
    """KL(model || brick) (n,) over the draft vocabulary, of g (n, D) and the normalized states (n, D)."""
    brick = model.draft_brick
    assert brick is not None
    logits = F.linear(states, brick.head_rows(model.output_head.weight))
    goal = at_least_float32(brick.capped(logits)).log_softmax(-1)
    own = at_least_float32(model.draft_logits(drafts)).log_softmax(-1)
    return F.kl_div(own, goal, reduction="none", log_target=True).sum(-1)


def _in_chunks(model: StandardTransformer, states: Tensor, read: Any) -> Tensor:
    """`read` of states (B, T, D), so many at a time that their logits fit in memory: (B, T)."""
    parts = [read(part) for part in states.flatten(0, 1).split(head_chunk(model))]
    return torch.cat(parts).view(states.shape[:2])
