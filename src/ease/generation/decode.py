"""Generation with a cache, in three ways: full, routed and exact.

- full runs every layer for every token.
- routed lets each row of the batch leave on its own; only rows still on their way run the deeper layers.
- exact gives the tokens of full, faster: an exit drafts, then the remaining layers run once over the drafted states and
  keep what they agree with (self-speculative decoding, Zhang et al. 2023, arXiv:2309.08168; the early layers' states
  are shared as in LayerSkip, arXiv:2404.16710). No layer runs twice for a token, and rows accept independently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ease.errors import EaseError, check_choice, check_least
from ease.generation.drafting import DRAFT_CONFIDENCE, LONGEST_DRAFT, Drafts, draft
from ease.generation.request import Generation, Request, Token
from ease.generation.sampling import Sampling
from ease.interface import eval_mode
from ease.models import StandardTransformer
from ease.policy import Policy

Mode = Literal["full", "routed", "exact"]


@torch.no_grad()
def generate(
    model: StandardTransformer,
    ids: Tensor,
    max_new_tokens: int,
    mode: Mode = "full",
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] = (),
    seed: int | None = None,
    stream: Callable[[Token], None] | None = None,
    draft_exit: int | Literal["auto"] = "auto",
    draft_confidence: float | None = None,
    max_memory: float | None = None,
) -> Generation:
    """Continues each of B prompts by up to `max_new_tokens` tokens.

    Args:
        ids: (B, T) prompts.
        mode: "full", "routed" by the model's own policy, or "exact".
        attention_mask: (B, T), true (or 1) for real tokens, on either side of the padding.
        temperature, top_k, top_p, repetition_penalty, seed: as in `Sampling`. In exact mode with "auto" the number of
            draws depends on the clock, so that there a seed does not repeat a sample: name the exit.
        stop: ids that end a row; they belong to the answer.
        stream: called with each `Token` as it is decided.
        draft_exit: in exact mode, the exit that drafts; "auto" measures on this request and picks the fastest, full
            decoding included.
        draft_confidence: in exact mode, a row stops drafting after a token less confident than this (0.15 by
            default).
        max_memory: bytes that the cache may take (what is free by default); a request beyond is refused before it
            starts.

    Raises:
        EaseError: for prompts without a token or longer than the model's positions, ids outside the vocabulary,
            settings out of range or without a meaning in this mode, exits that the model does not have, weights that
            are no numbers, or a cache that does not fit.
    """
    check_choice("mode", mode, ("full", "routed", "exact"))
    if model.config.num_labels is not None:
        raise EaseError("a classifier writes no text: use ease.tasks.predict, or a model that predicts tokens")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    check_least(1, max_new_tokens=max_new_tokens)
    if ids.ndim != 2 or ids.is_floating_point():
        raise EaseError(f"prompts are integers (B, T), got {ids.dtype} of shape {tuple(ids.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != ids.shape or not len(ids) or not bool(real.any(1).all()):
        raise EaseError("every prompt needs at least one real token, and the mask the shape of the ids")
    policy = Policy.own(model) if mode == "routed" else Policy()
    policy.check(model.num_layers)
    if mode == "routed" and not policy.exits:
        raise EaseError("this model has no exits to route at: set exit_layer and routing_threshold, or use mode full")
    if mode != "exact" and draft_exit != "auto":
        raise EaseError(f"draft_exit is for mode exact, and this is {mode}: leave it out")
    if mode != "exact" and draft_confidence is not None:
        raise EaseError(f"draft_confidence is for mode exact, and this is {mode}: leave it out")
    if draft_confidence is not None and not 0 <= draft_confidence <= 1:
        raise EaseError(f"draft_confidence must lie in [0, 1], got {draft_confidence}")
    if draft_exit != "auto" and not 1 <= draft_exit < model.num_layers:
        raise EaseError(f"draft_exit must lie in 1..{model.num_layers - 1}, got {draft_exit}")
    longest, most = int(real.sum(1).max()), model.config.max_positions
    if most is not None and longest + max_new_tokens - 1 > most:  # the last token is not read
        raise EaseError(
            f"{longest} tokens of a prompt and {max_new_tokens} new ones are more than the {most} positions of the "
            "model: shorten the prompt, or ask for fewer"
        )
    capacity = longest + max_new_tokens + (LONGEST_DRAFT if mode == "exact" else 0)
    needed = bytes_per_token(model) * capacity * len(ids)
    allowed = free_memory(next(model.parameters()).device) if max_memory is None else max_memory
    if needed > allowed:
        raise EaseError(
            f"a cache for {len(ids)} rows of {capacity} tokens takes {needed / 1e6:.0f} MB, more than the "
            f"{allowed / 1e6:.0f} MB there are: use fewer rows, or fewer tokens"
        )
    device = next(model.parameters()).device
    ids, real = ids.to(device), real.to(device)
    model.check_ids(ids, model.config.vocab_size)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(ids), model.config.vocab_size, dtype=torch.bool, device=device)
        rows, cols = real.nonzero(as_tuple=True)
        seen[rows, ids[rows, cols]] = True
    start = time.perf_counter()  # making the cache takes time as well
    request = Request(
        model,
        sampling,
        frozenset([stop] if isinstance(stop, int) else stop),
        max_new_tokens,
        model.new_cache(len(ids), capacity, key=policy),
        None if seed is None else torch.Generator(device).manual_seed(seed),
        stream,
        seen,
        [[] for _ in ids],
    )
    request.running = torch.ones(len(ids), dtype=torch.bool, device=device)
    request.current = ids[:, -1]
    with eval_mode(model):
        request.step(ids, real, policy)
        begun = time.perf_counter()
        drafted = Drafts()
        if mode == "exact":
            confidence = DRAFT_CONFIDENCE if draft_confidence is None else draft_confidence
            drafted = draft(request, draft_exit, confidence)
        while bool(request.running.any()):
            request.step(request.current[:, None], request.running[:, None], policy)
    return finish(request, mode, start, begun, drafted)


def bytes_per_token(model: StandardTransformer) -> int:
    """What a cache takes per token: keys and values of every layer, and the state that the token left with."""
    c = model.config
    return (2 * c.num_layers * c.kv_heads * c.head_size + c.dim) * model.embedding.weight.element_size()


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.exists():  # what counts as free there leaves out what the system would give up for a request
        available = next((line for line in told.read_text().splitlines() if line.startswith("MemAvailable")), "")
        return float(available.split()[1]) * 1024 if available else math.inf
    return math.inf


def finish(request: Request, mode: str, start: float, begun: float, drafted: Drafts) -> Generation:
    """The answers as tensors, with what they took."""
    end, rows = time.perf_counter(), request.found
    width = max(map(len, rows))
    tokens, exits = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    confidences = torch.zeros(len(rows), width)
    for row, found in enumerate(rows):
        for column, token in enumerate(found):
            tokens[row, column], exits[row, column], confidences[row, column] = token[1:]
    made = sum(map(len, rows))
    stats: dict[str, Any] = {
        "tokens": made,
        "seconds": end - start,
        "prefill_seconds": begun - start,
        "tokens_per_second": made / (end - start),
        "layers_per_token": request.layers_run / max(1, int(request.cache.length.sum())),
    }
    if mode == "exact":
        rate = drafted.accepted / drafted.drafted if drafted.drafted else None
        stats |= {"draft_exit": drafted.exit, "drafted": drafted.drafted, "accepted": drafted.accepted}
        stats["acceptance"] = rate
    return Generation(tokens, exits, confidences, stats)
