"""ease.evaluation.tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ease.data.tasks import (
    Example,
    ExampleBatches,
    Task,
    pad,
)
from ease.errors import needs
from ease.evaluation.scoring import score
from ease.generation.decode import generate
from ease.interface import IGNORE, ExitModel, Layout, eval_mode
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import routed_forward

if TYPE_CHECKING:
    pass


# ---------------------------------------------------------------------------------------------------------
# Figures


@torch.no_grad()
def predict(
    model: ExitModel, x: Tensor, layout: Layout | None = None, policy: Policy | None = None
) -> tuple[Tensor, Tensor]:
    """Ids (B, T) -> the likeliest output at each token (B, T) and the exit it left by (B, T), in a routed forward.

    Both are -1 where no head was asked: at padding and, in a classifier, before the last token.
    """
    likeliest, exits = torch.full_like(x, -1), torch.full_like(x, -1)
    with eval_mode(model):
        for stop in routed_forward(
            model, x, policy or Policy(), layout=layout, read=lambda logits, _: logits.argmax(-1)
        ):
            if stop.read is not None:
                likeliest[stop.left], exits[stop.left] = stop.read, stop.layer
    return likeliest, exits


def macro_f1(predicted: Tensor, targets: Tensor) -> float:
    """The mean F1 over the labels that occur, predicted and targets (N,): 2 hits / (times predicted + times right)."""
    size = int(max(predicted.max(), targets.max())) + 1
    hits = torch.bincount(targets[predicted == targets], minlength=size)
    named = torch.bincount(predicted, minlength=size) + torch.bincount(targets, minlength=size)
    return (2 * hits[named > 0] / named[named > 0]).mean().item()


def classification_figures(model: ExitModel, batches: ExampleBatches, policy: Policy | None = None) -> dict[str, Any]:
    """Accuracy `acc`, macro `f1`, `loss`, and what routing made of it, as `Scores.figures` says for tokens.

    `exit_shares`, `shallow_ratio` and `compute_cost` count sequences; `flops_per_token` is per token read.
    """
    figures = score(model, batches, policy).figures()
    device = next(model.parameters()).device
    pairs = []
    for batch in (batch.to(device) for batch in batches):
        likeliest, _ = predict(model, batch.x, batch.layout, policy)
        pairs.append(torch.stack([likeliest[batch.scored], batch.y[batch.scored]]))
    names = ("acc", "loss", "exit_shares", "shallow_ratio", "compute_cost", "flops_per_token", "seconds")
    return {"f1": macro_f1(*torch.cat(pairs, 1)), **{name: figures[name] for name in names}}


def complete(
    model: StandardTransformer,
    task: Task,
    prompts: Sequence[Tensor],
    *,
    mode: Literal["full", "routed"] = "full",
    max_new_tokens: int = 64,
) -> list[str]:
    """The likeliest completion of each prompt (T_i,), as one batch.

    "routed" is by the model's own policy, and full where that has no exits.
    """
    x, layout = pad(prompts)
    eos = -1 if task.eos is None else task.eos
    mode = mode if Policy.own(model).exits else "full"
    made = generate(model, x, max_new_tokens, mode, attention_mask=layout.real, stop=eos)
    rows = [tokens[(exits > 0) & (tokens != eos)].tolist() for tokens, exits in zip(made.tokens, made.exits)]
    return [task.tokenizer.decode(row) for row in rows]


def completion_figures(
    model: StandardTransformer,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    *,
    mode: Literal["full", "routed"] = "full",
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """`Scores.figures` over the completions' tokens, and `rouge_l` of what the model writes after each prompt.

    "routed" is by the model's own policy, and full where that has no exits.
    """
    written, wanted = [], []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        prompts = [e.ids[: int((e.targets == IGNORE).sum()) + 1] for e in part]
        written += complete(model, task, prompts, mode=mode, max_new_tokens=max_new_tokens)
        wanted += [task.tokenizer.decode(e.targets[e.targets != IGNORE].tolist()) for e in part]
    policy = Policy.own(model) if mode == "routed" else Policy()
    figures = score(model, ExampleBatches(examples, batch_size), policy).figures()
    return {**figures, "rouge_l": rouge_l(written, wanted)}


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> float:
    """The mean ROUGE-L F-measure (Lin 2004) in [0, 1], by `rouge-score` without stemming; it reads a-z and 0-9 only."""
    scorer = needs("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"])
    pairs = zip(wanted, written, strict=True)
    return float(np.mean([scorer.score(target, prediction)["rougeL"].fmeasure for target, prediction in pairs]))


def cheapest(
    measure: Callable[[Policy], dict[str, Any]], policies: Iterable[Policy], quality: str = "acc"
) -> tuple[Policy, list[dict[str, Any]]]:
    """The policy of fewest FLOPs a token whose `quality` is no worse than without routing; none is one of them, too.

    Args:
        measure: the figures of a policy, on validation.

    Returns:
        The policy, and the figures of each that was tried, with the policy's fields as `policy`.
    """
    tried = [(policy, measure(policy)) for policy in (Policy(), *policies)]
    good = [(policy, f) for policy, f in tried if f[quality] >= tried[0][1][quality]]
    best, _ = min(good, key=lambda pair: pair[1]["flops_per_token"])
    return best, [{"policy": asdict(policy), **figures} for policy, figures in tried]
