"""Text generation with a cache, in three modes: full, routed, and exact.

- full runs every layer for every token.
- routed lets each token leave at the first exit that is confident enough; only the remaining rows of the batch run the
  deeper layers.
- exact gives the same tokens as full in less time: a source drafts, and one pass checks several drafts at once and
  keeps those that full decoding would have chosen (speculative decoding, Leviathan et al. 2023, arXiv:2211.17192). An
  exit as the source shares its layers with the check (self-speculative decoding, LayerSkip, arXiv:2404.16710). Rows
  accept independently. The two modes compute the same numbers in other shapes, and so with other rounding: where the
  two best logits are closer than that, which is frequent in half precision only, either may be chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from ease.data.counts import CountTable
from ease.devices import free_memory
from ease.errors import EaseError, check_choice, check_integer, check_list, check_number, checked
from ease.generation.exact import DraftCounts, decode_exactly
from ease.generation.request import Request, Token
from ease.generation.sampling import Sampling
from ease.generation.sources import BrickSource, ExitSource, MixedSource, NoDrafts, Source, TextSource
from ease.inputs import read_prompt
from ease.interface import to_device
from ease.models import StandardTransformer
from ease.policy import Policy

Mode = Literal["full", "routed", "exact"]

DraftSource = Literal["auto", "none", "lookup", "brick", "exit"]


@dataclass(frozen=True)
class Generation:
    """Generated tokens of B rows, at most N each."""

    tokens: Tensor
    """(B, N) ids; 0 after the end of a row."""
    exits: Tensor
    """(B, N) the exit that predicted each token; after the end of a row 0, or -1 in a model with exit 0. In exact mode
    the exit that drafted it, and the last one for tokens that no exit drafted or that replaced a draft."""
    confidences: Tensor
    """(B, N) the confidence of that exit."""
    stats: dict[str, Any]
    """tokens, seconds, prefill_seconds, tokens_per_second, and layers_per_token (rejected drafts count); in exact mode
    also draft_source, drafted, accepted, acceptance, rounds (passes over the model after the prompt), and
    tokens_per_round, over the rows that were running."""


@torch.no_grad()
@checked
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
    draft_source: DraftSource = "auto",
    draft_exit: int | Literal["auto"] = "auto",
    draft_confidence: float | None = None,
    count_table: CountTable | None = None,
    max_memory: float | None = None,
) -> Generation:
    """Continues each of B prompts by up to `max_new_tokens` tokens.

    Args:
        model: the model; the call runs in evaluation mode whatever its mode, which stays as it is.
        ids: (B, T) integers, the prompts, or the dictionary that a tokenizer of transformers gives.
        max_new_tokens: the largest number of tokens generated per row.
        mode: "full", "routed" (by `model.policy`), or "exact" (the tokens of full decoding up to rounding,
            of which several are checked at once).
        attention_mask: (B, T), true (or 1) for real tokens; padding may be on either side.
        temperature, top_k, top_p, repetition_penalty, seed: as in `Sampling`. In exact mode without `draft_confidence`
            the number of draws depends on measured times, so a seed does not reproduce a sample: set both
            `draft_source` (or `draft_exit`) and `draft_confidence`.
        stop: ids that end a row; the generated tokens include them.
        stream: called with each `Token` as it is generated.
        draft_source: in exact mode, what drafts: "lookup" (what followed the same tokens earlier in the row, or in the
            text of `count_table`), "brick" (the model's draft brick), "exit", or "none"; "auto" measures them on this
            request and uses the fastest.
        draft_exit: in exact mode, the exit that drafts; "auto" measures the exits of the policy, or those trained.
        draft_confidence: in exact mode, a row drafts as long as the probability that all of its drafts are right is at
            least this; by default, as long as another draft gains more than it costs, which is measured.
        count_table: in exact mode, counts of a training text to draft from.
        max_memory: bytes that the cache may occupy (by default, the free memory of the device).

    Returns:
        The tokens of each row, with the exit and the confidence of each token, and statistics of the call.

    Raises:
        EaseError: for a prompt without a real token, one too long for the model's positions, ids outside the
            vocabulary, a setting out of range or without effect in this mode, an exit that the model does not have,
            logits that are NaN, or a cache that does not fit.

    Example:
        >>> model.policy = ease.Policy(exits=(2,), thresholds=(0.9,))
        >>> result = ease.generate(model, prompts, 64, "routed", temperature=0.8, top_p=0.95, seed=0)
        >>> result.tokens.shape, result.stats["layers_per_token"]
    """
    check_choice("mode", mode, ("full", "routed", "exact"))
    if model.config.num_labels is not None:
        raise EaseError("a sequence classifier does not generate text: use ease.evaluation.tasks.predict")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    check_integer("max_new_tokens", max_new_tokens, 1)
    stops = (stop,) if isinstance(stop, Integral) else check_list("stop", stop)
    for token in stops:
        check_integer("an id in stop", token)
    if max_memory is not None:
        check_number("max_memory", max_memory, 0, finite=False)
    ids, attention_mask = read_prompt(ids, attention_mask)
    real = _real_tokens(ids, attention_mask)
    policy = _routing_policy(model) if mode == "routed" else Policy()
    _check_drafting(model, mode, draft_source, draft_exit, draft_confidence, count_table)
    capacity = _required_capacity(model, int(real.sum(1).max()), max_new_tokens)
    names = _source_names(model, draft_source, draft_exit) if mode == "exact" else ["none"]
    brick = any("brick" in str(name) for name in names)
    _check_memory(model, len(ids), capacity, max_memory, brick)
    model.check_ids(ids, model.config.vocab_size)
    model, real = model.decoding_view(), real.cpu()
    texts = [row[keep].tolist() for row, keep in zip(ids.cpu(), real, strict=True)]
    ids = to_device(ids, next(model.parameters()).device)

    start = time.perf_counter()  # allocating the cache counts as prefill
    request = Request(
        model,
        ids,
        real,
        texts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=frozenset(map(int, stops)),
        cache=model.new_cache(len(ids), capacity, key=policy),
        stream=stream,
    )
    request.step(ids, real, policy)
    prefilled = time.perf_counter()
    drafts = DraftCounts()
    if mode == "routed":
        while request.unfinished:
            request.step(request.current[:, None], request.running[:, None], policy)
    else:
        drafts = decode_exactly(request, [_source(request, n, count_table) for n in names], draft_confidence)
    end = time.perf_counter()
    stats = _timing(request, start, prefilled, end)
    if mode == "exact":
        stats |= _draft_stats(drafts, request.num_generated - len(ids))
    return Generation(*_padded(request.answers, model.first_exit - 1), stats)


def _real_tokens(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T) true for real tokens; refuses prompts without one."""
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
    if not len(ids) or not bool(real.any(1).all()):
        raise EaseError("a prompt is empty: every row of ids needs at least one real token")
    return real


def _routing_policy(model: StandardTransformer) -> Policy:
    """The model's policy; refuses one without exits, or with exits that the model does not have."""
    model.check_policy(model.policy)
    if not model.policy.exits:
        raise EaseError(
            "the model's policy has no exits: set model.policy = ease.Policy(exits=(1,), thresholds=(0.9,)), or use "
            'mode "full"'
        )
    return model.policy


def _check_drafting(
    model: StandardTransformer,
    mode: Mode,
    draft_source: DraftSource,
    draft_exit: int | Literal["auto"],
    draft_confidence: float | None,
    count_table: CountTable | None,
) -> None:
    """Refuses drafting options out of range, or without effect."""
    if mode != "exact":
        for name, value, default in (
            ("draft_source", draft_source, "auto"),
            ("draft_exit", draft_exit, "auto"),
            ("draft_confidence", draft_confidence, None),
            ("count_table", count_table, None),
        ):
            if value != default:
                raise EaseError(f'{name} has no effect in mode "{mode}": omit it, or use mode "exact"')
    if draft_confidence is not None and not 0 <= draft_confidence <= 1:
        raise EaseError(f"draft_confidence must lie in [0, 1], got {draft_confidence}")
    if draft_confidence is not None and draft_source == "none":
        raise EaseError('draft_confidence has no effect with draft_source "none": omit one of them')
    if draft_exit != "auto":
        if not model.first_exit <= draft_exit < model.num_layers:
            raise EaseError(f"draft_exit must lie in {model.first_exit}..{model.num_layers - 1}, got {draft_exit}")
        if draft_source not in ("auto", "exit"):
            raise EaseError(f'draft_exit has no effect with draft_source "{draft_source}": omit one of them')
    if count_table is not None:
        count_table.check_vocab_size(model.config.vocab_size)
        if draft_source not in ("auto", "lookup") or draft_exit != "auto":
            raise EaseError('count_table has an effect with draft_source "lookup" or "auto" only: omit it')
    if draft_source == "brick" and model.draft_brick is None:
        raise EaseError("the model has no draft brick: train one (ease tune --adapter brick), or use another source")
    if draft_source == "exit" and draft_exit == "auto" and not _exits(model):
        raise EaseError("the model has no trained exits: train some (ease tune), or set draft_exit")


def _exits(model: StandardTransformer) -> tuple[int, ...]:
    """The exits that may draft; refuses a policy with exits that the model does not have."""
    model.check_policy(model.policy)
    return model.policy.exits or model.early_exits


def _source_names(
    model: StandardTransformer, draft_source: DraftSource, draft_exit: int | Literal["auto"]
) -> list[str | int]:
    """The sources to choose from, the cheapest first; an exit is named by its number."""
    if draft_exit != "auto":
        return [draft_exit]
    if draft_source == "exit":
        return list(_exits(model))
    if draft_source != "auto":
        return [draft_source]
    # Lookup takes no time where it finds nothing, so that it stands for full decoding as well.
    bricks = [] if model.draft_brick is None else ["lookup, brick"]
    return ["lookup", *bricks, *_exits(model)]


def _source(request: Request, name: str | int, count_table: CountTable | None) -> Source:
    if isinstance(name, int):
        return ExitSource(request, name)
    if name == "none":
        return NoDrafts(request)
    if name == "lookup":
        return TextSource(request, count_table)
    brick = BrickSource(request)
    return brick if name == "brick" else MixedSource(TextSource(request, count_table), brick)


def _required_capacity(model: StandardTransformer, longest_prompt: int, max_new_tokens: int) -> int:
    """Tokens that a row of the cache needs room for; refuses more than the model has positions."""
    positions = model.config.max_positions
    if positions is not None and longest_prompt + max_new_tokens - 1 > positions:  # the last token is never read
        raise EaseError(
            f"a prompt of {longest_prompt} tokens and {max_new_tokens} new ones exceed the model's {positions} "
            "positions: shorten the prompt or lower max_new_tokens"
        )
    return longest_prompt + max_new_tokens


def _check_memory(model: StandardTransformer, rows: int, capacity: int, max_memory: float | None, brick: bool) -> None:
    """Refuses a cache larger than `max_memory` bytes, or than the free memory of the model's device."""
    required = bytes_per_token(model, brick) * capacity * rows
    available = free_memory(next(model.parameters()).device) if max_memory is None else max_memory
    if required > available:
        raise EaseError(
            f"the cache for {rows} rows of {capacity} tokens needs {required / 1e6:.0f} MB, but only "
            f"{available / 1e6:.0f} MB are available: use fewer rows, or lower max_new_tokens"
        )


def bytes_per_token(model: StandardTransformer, brick: bool = False) -> int:
    """Bytes that a cache holds per token: keys and values of every layer, and the state that the token left with.

    Args:
        brick: whether the draft brick has a cache, of one layer, as well.
    """
    c = model.config
    layers, states = c.num_layers + brick, 1 + brick
    return (2 * layers * c.kv_heads * c.head_size + states * c.dim) * model.embedding.weight.element_size()


def _padded(answers: list[list[Token]], no_exit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, exits, and confidences (B, N) of the answers, padded with zeros, exits with `no_exit`."""
    shape = len(answers), max(map(len, answers))
    tokens, exits = torch.zeros(shape, dtype=torch.long), torch.full(shape, no_exit)
    confidences = torch.zeros(shape)
    for row, answer in enumerate(answers):
        for column, token in enumerate(answer):
            tokens[row, column] = token.token
            exits[row, column] = token.exit
            confidences[row, column] = token.confidence
    return tokens, exits, confidences


def _timing(request: Request, start: float, prefilled: float, end: float) -> dict[str, Any]:
    return {
        "tokens": request.num_generated,
        "seconds": end - start,
        "prefill_seconds": prefilled - start,
        "tokens_per_second": request.num_generated / (end - start),
        "layers_per_token": request.layers_run / max(1, int(request.cache.length.sum())),
    }


def _draft_stats(drafts: DraftCounts, tokens: int) -> dict[str, Any]:
    return {
        "draft_source": drafts.source,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "acceptance": drafts.accepted / drafts.drafted if drafts.drafted else None,
        "rounds": drafts.rounds,
        "tokens_per_round": tokens / drafts.rows if drafts.rounds else None,
    }
