"""Predictions and metrics of classification and completion, under routing or at full depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ease.data.batches import Example, ExampleBatches, pad
from ease.data.tasks import Task
from ease.errors import checked, require
from ease.evaluation.scoring import score
from ease.generation.decode import generate
from ease.inputs import as_ids
from ease.interface import IGNORE, ExitModel, Layout, evaluation_view, to_device
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import routed_forward

# ---------------------------------------------------------------------------------------------------------
# Classification


@torch.no_grad()
@checked
def predict(
    model: ExitModel, x: Tensor, layout: Layout | None = None, policy: Policy | None = None
) -> tuple[Tensor, Tensor]:
    """Predicts the most likely output of every token in a routed forward.

    Args:
        model: a classifier or a language model; the call runs in evaluation mode whatever the model's mode, which
            stays as it is.
        x: (B, T) ids.
        layout: positions and segments; by default one segment a row without padding.
        policy: exits and thresholds; full depth by default.

    Returns:
        Outputs (B, T) and exits (B, T). Both are -1 where the head is not evaluated: at padding and, in a classifier,
        before the last token of a row.
    """
    model, device = evaluation_view(model), next(model.parameters()).device
    x = as_ids("x", x)
    model.check_ids(x, model.config.vocab_size)
    x, layout = to_device(x, device).contiguous(), None if layout is None else layout.to(device)
    predictions, exits = torch.full_like(x, -1), torch.full_like(x, -1)
    for step in routed_forward(model, x, policy or Policy(), layout=layout, read=lambda logits, _: logits.argmax(-1)):
        if step.read is not None:
            predictions.view(-1)[step.leaving] = step.read
            exits.view(-1)[step.leaving] = step.layer
    return predictions, exits


def macro_f1(predicted: Tensor, targets: Tensor) -> float:
    """The mean F1 over the labels that occur.

    Per label, F1 is 2 * hits / (times predicted + times in the targets).

    Args:
        predicted, targets: (N,) class numbers.
    """
    size = int(max(predicted.max(), targets.max())) + 1
    hits = torch.bincount(targets[predicted == targets], minlength=size)
    occurrences = torch.bincount(predicted, minlength=size) + torch.bincount(targets, minlength=size)
    occurs = occurrences > 0
    return (2 * hits[occurs] / occurrences[occurs]).mean().item()


def classification_metrics(model: ExitModel, batches: ExampleBatches, policy: Policy | None = None) -> dict[str, Any]:
    """Scores a classifier under a policy.

    Args:
        model: a model with `num_labels`.
        batches: the examples.
        policy: exits and thresholds; full depth by default.

    Returns:
        "f1" (macro), and of `Scores.metrics` "acc", "loss", "exit_shares", "shallow_ratio", "compute_cost",
        "flops_per_token" and "seconds". FLOPs are per token read; all else counts sequences.
    """
    metrics = score(model, batches, policy).metrics()
    device = next(model.parameters()).device
    pairs = []
    for batch in (batch.to(device) for batch in batches):
        predictions, _ = predict(model, batch.x, batch.layout, policy)
        pairs.append(torch.stack([predictions[batch.scored], batch.y[batch.scored]]))
    names = ("acc", "loss", "exit_shares", "shallow_ratio", "compute_cost", "flops_per_token", "seconds")
    return {"f1": macro_f1(*torch.cat(pairs, 1)), **{name: metrics[name] for name in names}}


# ---------------------------------------------------------------------------------------------------------
# Completion


def complete(
    model: StandardTransformer,
    task: Task,
    prompts: Sequence[Tensor],
    *,
    mode: Literal["full", "routed"] = "full",
    max_new_tokens: int = 64,
) -> list[str]:
    """Completes prompts by greedy decoding, as one batch.

    Args:
        model: a language model.
        task: its tokenizer decodes the completions, and its `eos` ends them.
        prompts: ids (T_i,) of each prompt.
        mode: "routed" follows `model.policy`; if that has no exit, it is the same as "full".
        max_new_tokens: tokens per completion at most.

    Returns:
        The text of each completion.
    """
    x, layout = pad(prompts)
    eos = -1 if task.eos is None else task.eos
    mode = mode if model.policy.exits else "full"
    result = generate(model, x, max_new_tokens, mode, attention_mask=layout.real, stop=eos)
    rows = [
        tokens[(exits >= model.first_exit) & (tokens != eos)].tolist()
        for tokens, exits in zip(result.tokens, result.exits)
    ]
    return [task.tokenizer.decode(row) for row in rows]


def completion_metrics(
    model: StandardTransformer,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    *,
    mode: Literal["full", "routed"] = "full",
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Scores the completions of examples, as likelihood and as generated text.

    Args:
        model: a language model.
        task: the task that the examples come from.
        examples: prompts with their completions.
        batch_size: examples per batch.
        mode: "routed" follows `model.policy`; if that has no exit, it is the same as "full".
        max_new_tokens: tokens per generated completion at most.

    Returns:
        `Scores.metrics` over the tokens of the completions, and "rouge_l" of the generated text.

    Raises:
        EaseError: the package rouge-score is not installed.
    """
    predictions, references = [], []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        prompts = [example.ids[: int((example.targets == IGNORE).sum()) + 1] for example in part]
        predictions += complete(model, task, prompts, mode=mode, max_new_tokens=max_new_tokens)
        references += [task.tokenizer.decode(example.targets[example.targets != IGNORE].tolist()) for example in part]
    policy = model.policy if mode == "routed" else Policy()
    metrics = score(model, ExampleBatches(examples, batch_size), policy).metrics()
    return {**metrics, "rouge_l": rouge_l(predictions, references)}


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean ROUGE-L F-measure (Lin 2004) in [0, 1].

    Computed by `rouge-score` without stemming, which ignores all characters but a-z and 0-9.

    Raises:
        EaseError: the package rouge-score is not installed.
    """
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"])
    pairs = zip(references, predictions, strict=True)
    return float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]))


# ---------------------------------------------------------------------------------------------------------
# Choice of a policy


def cheapest_policy(
    measure: Callable[[Policy], dict[str, Any]], policies: Iterable[Policy], quality: str = "acc"
) -> tuple[Policy, list[dict[str, Any]]]:
    """Chooses the policy with the fewest FLOPs per token among those that lose no quality.

    Full depth is always a candidate, so that there is a choice even if every policy loses quality.

    Args:
        measure: the metrics of a policy, on validation.
        policies: the candidates.
        quality: the metric that must not fall below its value at full depth; higher is better.

    Returns:
        The policy, and the metrics of every candidate, each with the policy's fields as "policy".

    Example:
        >>> policies = [Policy((1, 2), (t, t)) for t in (0.7, 0.9)]
        >>> policy, tried = cheapest_policy(lambda policy: classification_metrics(model, val, policy), policies)
    """
    tried = [(policy, measure(policy)) for policy in (Policy(), *policies)]
    full_depth = tried[0][1][quality]
    lossless = [(policy, metrics) for policy, metrics in tried if metrics[quality] >= full_depth]
    best, _ = min(lossless, key=lambda pair: pair[1]["flops_per_token"])
    return best, [{"policy": asdict(policy), **metrics} for policy, metrics in tried]
