"""The loss of a draft brick: distillation from the frozen model over the draft vocabulary, and regression of states.

The pass over a batch is here as well; the evaluation of a brick (`ease.evaluation.drafts`) takes the same one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.errors import EaseError
from ease.flops import draft_flops, draft_head_flops, run_flops
from ease.interface import Batch, Layout
from ease.models import StandardTransformer
from ease.training.distributed import total_count
from ease.training.losses import Distillation, Term, exit_loss


class DraftPass(NamedTuple):
    """Drafts at every place of a batch of T tokens, by the tokens of the text.

    Column t belongs to the prediction of the token after x_{t+1}.
    """

    drafts: list[Tensor]
    """g (B, T - 1, D) of the 1st draft of a round, of the 2nd, ..."""
    valid: list[Tensor]
    """(B, T - 1) true where that draft exists and is scored."""
    states: Tensor
    """(B, T - 1, D) the last layer's states, which the drafts stand for."""


def draft_pass(model: StandardTransformer, batch: Batch, length: int) -> DraftPass:
    """Runs the frozen model over a batch, and the brick for the 1st to `length`-th drafts.

    Raises:
        EaseError: the model has no draft brick, or ids lie outside the vocabulary.
    """
    if model.draft_brick is None:
        raise EaseError("the model has no draft brick: add one (model.add_draft_brick)")
    model.check_ids(batch.x, model.config.vocab_size)
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        states = model.run(model.embed(batch.x, layout=batch.layout), 1, model.num_layers, layout=batch.layout)
    segments, layout, after = torch.zeros_like(batch.x), None, None
    if batch.layout is not None:
        segments = batch.layout.segments
        layout = Layout(batch.layout.positions[:, :-1], segments[:, :-1])
        after = Layout(batch.layout.positions[:, 1:], segments[:, 1:])
    with torch.no_grad():  # as the brick does in decoding, whose first token is the second of the text
        next_embeddings = model.embed(batch.x[:, 1:], layout=after)
    drafts = model.draft_brick.chain(states[:, :-1], next_embeddings, length, layout)
    valid = []
    for k in range(1, length + 1):  # the k-th draft is made k tokens after the last real state
        whole = batch.scored[:, k:] & (segments[:, k:] == segments[:, :-k])
        valid.append(F.pad(whole, (k - 1, 0)))
    return DraftPass(drafts, valid, states[:, 1:])


def draft_loss(model: StandardTransformer, batch: Batch, length: int, regression: float) -> Tensor:
    """KL(model || brick) over the draft vocabulary, plus `regression` times the distance of states; a scalar, in nats.

    States are compared as the head reads them, by smooth L1 (as in EAGLE, arXiv:2401.15077, section 3.2). The loss is
    the mean over the 1st to `length`-th drafts.
    """
    found, brick, last = draft_pass(model, batch, length), model.draft_brick, model.num_layers
    assert brick is not None
    with torch.no_grad():
        targets = model.exit_norm(found.states, last)
    terms, apart = [], []
    for drafts, valid in zip(found.drafts, found.valid, strict=True):
        drafts, goal = drafts[valid], targets[valid]
        scored = torch.zeros(len(goal), dtype=torch.long, device=goal.device)
        terms.append(
            Term(brick.normed(drafts), scored, 1 / length, Distillation(), goal, brick.softcap, num_scored=len(goal))
        )
        distance = F.smooth_l1_loss(brick.normed(drafts).float(), goal.float(), reduction="sum")
        apart.append(distance / max(1, total_count(goal.numel())))
    loss = exit_loss(brick.head_rows(model.output_head.weight), terms)
    return loss + regression * torch.stack(apart).mean()


def draft_step_flops(model: StandardTransformer, batch: Batch, length: int) -> dict[str, float]:
    """FLOPs of one training step by kind: the frozen model once, the brick three times its forward."""
    config, running = model.config, batch._replace(active=None).running
    scored = sum(int(batch.scored[:, k:].sum()) for k in range(1, length + 1))
    # Both distributions are over the same rows of the head, which need no gradient of their own.
    head = (2 + 1) * draft_head_flops(config, scored)
    return {
        "training": 3 * draft_flops(config, running[:, 1:], length) + head,
        "trunk": run_flops(config, config.num_layers, running, batch.layout),
    }
