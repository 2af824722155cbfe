"""Data of the exit explorer: routed runs over a few held-out sequences, token by token."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus
from ease.data.tokenizers import token_strings
from ease.evaluation.scoring import perplexity, score
from ease.routing.forward import route
from ease.runs.lines import TrainedLine

EXPLORER_TOKENS = 384  # tokens of text in the explorer

TOP = 3  # most likely next tokens shown per token


@torch.no_grad()
def explorer_data(
    line: TrainedLine, corpus: Corpus, test: TokenBatches, points: list[dict[str, Any]]
) -> dict[str, Any]:
    """Route a few test sequences at several thresholds and record exit, confidence and predictions of every token.

    Args:
        line: the line to route with.
        corpus: the corpus, for its tokenizer.
        test: test batches; the first sequences are shown.
        points: points of the threshold sweep; without one, a single unrouted run is recorded.

    Returns:
        The content of explorer.json.
    """
    model = copy.copy(line.model)
    model.policy = line.policy
    device = next(model.parameters()).device
    rows = max(1, min(EXPLORER_TOKENS // test.seq_len, len(test.windows)))
    windows = test.windows[:rows].long().to(device)
    x, y = windows[:, :-1], windows[:, 1:]
    runs = []
    for point in points or [{"thresholds": []}]:
        policy = replace(line.policy, thresholds=tuple(point["thresholds"]))
        routed = route(model, x, policy.exits, policy.thresholds or 0.0)
        top = routed.logits.softmax(-1).topk(TOP)
        losses = torch.nn.functional.cross_entropy(routed.logits.flatten(0, 1), y.flatten(), reduction="none").cpu()
        scored = score(model, [(x, y)], policy).metrics()
        texts = corpus.tokenizer.decode_batch([[i] for i in top.indices.flatten().tolist()], skip_special_tokens=False)
        chances = [round(p, 4) for p in top.values.flatten().tolist()]
        pairs = list(zip(texts, chances, strict=True))
        runs.append(
            {
                "thresholds": list(policy.thresholds),
                "exits": routed.exits.flatten().tolist(),
                "confidences": [round(c, 4) for c in routed.confidences.flatten().tolist()],
                "top": [pairs[i : i + TOP] for i in range(0, len(pairs), TOP)],
                "totals": {
                    **{k: scored[k] for k in ("exit_shares", "compute_cost", "flops_per_token", "acc")},
                    "ppl": perplexity(losses),
                },
            }
        )
    tokens = token_strings(corpus.tokenizer, x.flatten().tolist())
    return {"split": "test", "tokens": tokens, "exits": [*line.policy.exits, model.num_layers], "runs": runs}
