"""Exits at work: how sure a prediction is, when a token leaves, and the routed forward.

`walk` is the one routed forward. Whatever needs routed runs (`route`, evaluation, mining) reads off it what it
wants: it yields at every exit, and the head of the exit a token takes is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.flops import classifier_flops, exit_flops, run_flops
from ease.interface import ExitModel, Layout
from ease.policy import Policy
from ease.routing.confidence import Evidence, kind, max_probability

HEAD_CHUNK = 512  # tokens whose logits exist at a time: small enough for a cache, large enough for the product


class ExitStep(NamedTuple):
    """What happened at one exit of a routed forward. N tokens were asked, in the order of `asked.nonzero()`."""

    first: int
    """The first of the layers run since the exit before."""
    layer: int
    """The exit: the last layer run so far."""
    state: Tensor
    """(B, T, D) with every token's state, those that left earlier included."""
    arrived: Tensor
    """(B, T) true for tokens that were on their way."""
    asked: Tensor
    """(B, T) true for those that the head was asked for: all, or the last of each row where it decides for the row."""
    by_row: bool
    """Whether one token decides for its row."""
    confidence: Tensor
    """(N,)."""
    leaves: Tensor
    """(N,) true for tokens that leave here; at the last exit, all."""
    gone: int
    """How many leave here."""
    heads: int
    """Tokens that the head was evaluated for: all N, or those that leave where the measure needs no head."""
    read: Tensor | None
    """What the caller's `read` made of the logits of those that leave, joined."""

    @property
    def left(self) -> Tensor:
        """(B, T) true for tokens that were asked and leave here."""
        return self.asked.masked_scatter(self.asked, self.leaves)

    @property
    def stays(self) -> Tensor:
        """(B, T) true for tokens that go on."""
        if not self.gone:  # the usual case, and not worth a kernel
            return self.arrived
        return self.arrived & ~(self.left.any(1, keepdim=True) if self.by_row else self.left)


def routed_forward(
    model: ExitModel,
    ids: Tensor,
    policy: Policy,
    *,
    layout: Layout | None = None,
    last: int | None = None,
    read: Callable[[Tensor, Tensor], Tensor] | None = None,
    wanted: Tensor | None = None,
    cache: Any = None,
) -> Iterator[ExitStep]:
    """Runs ids (B, T) through the model, stop by stop, until every token has left or layer `last` is done.

    Where the model classifies sequences, the last real token of a row is asked and the row leaves with it.

    Args:
        read: called with the logits (n, V) of tokens that leave and their places (n,) in `ids.flatten()`; what it
            returns (n, ...) is joined in `Stop.read`. `walk` itself never holds the logits of all tokens at once.
        wanted: (B, T) tokens whose prediction is wanted; the head of the last exit is asked for no others.
        cache: what the rows have read before; `ids` are what comes next.
    """
    last = model.num_layers if last is None else last
    steps = [(e, t) for e, t in zip(policy.exits, policy.thresholds, strict=True) if e < last]
    arrived = torch.ones_like(ids, dtype=torch.bool) if layout is None else layout.real
    by_row, size = model.config.num_labels is not None, ids.numel()
    measure, headless = kind(policy.confidence).make(model, policy, size), not kind(policy.confidence).needs_head
    # Counted from the right, the last real token of a row is the first.
    decides = arrived & (arrived.flip(1).cumsum(1).flip(1) == 1) if by_row else arrived
    if cache is not None:
        cache.check(policy)
    positions = None
    if policy.by_position:
        default = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if layout is None else layout.positions
        positions = default if cache is None else cache.next(arrived)
    state, first = model.embed(ids), 1
    if not bool(arrived.any()):
        return
    for layer, threshold in [*steps, (last, 0.0)]:
        before, final = state.flatten(0, 1), layer == last
        state = model.run(state, first, layer, layout=layout, active=arrived, cache=cache)
        asked = arrived & decides if by_row else arrived
        if wanted is not None and final:
            asked = asked & wanted
        confidences, leaving, readings, gone, heads = [], [], [], 0, 0
        for places in asked.flatten().nonzero().squeeze(1).split(HEAD_CHUNK):
            after = state.flatten(0, 1)
            if len(places) < size:
                after = after[places]
            logits = model.logits(after, layer) if final or not headless else None
            if final and logits is not None and headless:  # the last exit has nothing to agree with
                confidence = max_probability(logits)
            else:
                confidence = measure(Evidence(layer, before, after, logits, places))
            if final:  # all leave, also those whose confidence is NaN
                leaves, count = torch.ones_like(confidence, dtype=torch.bool), len(places)
            else:
                at: float | Tensor = threshold
                dtype = torch.promote_types(confidence.dtype, torch.float32)
                if positions is not None:
                    at = policy.limits(threshold, positions.flatten()[places], dtype)
                leaves = confidence.to(dtype) >= at
                count = int(leaves.count_nonzero())
            gone, heads = gone + count, heads + (len(places) if logits is not None else count)
            if read is not None and count:
                if logits is None:
                    logits = model.logits(after[leaves], layer)
                elif count < len(places):
                    logits = logits[leaves]
                readings.append(read(logits, places if count == len(places) else places[leaves]))
            confidences.append(confidence)
            leaving.append(leaves)
        sure, leaves = cat_or_empty(confidences, state), cat_or_empty(leaving, asked)
        reading = cat_or_empty(readings, state) if readings else None
        stop = ExitStep(first, layer, state, arrived, asked, by_row, sure, leaves, gone, heads, reading)
        yield stop
        arrived, first = stop.stays, layer + 1
        if gone and not bool(arrived.any()):
            return


def cat_or_empty(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts one after the other; one part as it is, and an empty tensor of like's kind where there is none."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0] if parts else like.new_zeros(0)


class Routed(NamedTuple):
    """Logits (B, T, V), exits (B, T; 0 for padding) and confidences (B, T) of a routed forward."""

    logits: Tensor
    exits: Tensor
    confidences: Tensor


@torch.no_grad()
def route(
    model: ExitModel,
    ids: Tensor,
    exit_layer: int | Sequence[int] | None = None,
    routing_threshold: float | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
) -> Routed:
    """The routed forward: each token leaves at the first exit that is sure of it; after that it only
    gives keys and values to the tokens that go on.

    Args:
        model: any model that keeps the seam. Run it in eval mode.
        ids: (B, T) integers.
        exit_layer, routing_threshold: the policy; the model's own by default.
        attention_mask: (B, T), true (or 1) for real tokens, false for padding on either side.

    Raises:
        EaseError: for a policy that the model cannot follow, or ids outside the vocabulary.
    """
    policy = Policy.of(
        model.exit_layer if exit_layer is None else exit_layer,
        model.routing_threshold if routing_threshold is None else routing_threshold,
        **model.policy_options,
    )
    policy.check(model.num_layers)
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise EaseError(f"attention_mask has shape {tuple(attention_mask.shape)}: give {tuple(ids.shape)}, as the ids")
    layout = None if attention_mask is None else Layout.from_attention_mask(attention_mask)
    head = model.output_head.weight
    logits = head.new_zeros(*ids.shape, head.shape[0])
    exits = torch.zeros_like(ids)
    confidences = head.new_zeros(ids.shape)
    for stop in routed_forward(model, ids, policy, layout=layout, read=lambda chunk, _: chunk):
        left = stop.left
        if stop.read is not None:
            logits[left], confidences[left] = stop.read.to(logits), stop.confidence[stop.leaves].to(confidences)
        exits[left] = stop.layer
    return Routed(logits, exits, confidences)


@torch.no_grad()
def compute_confidence(model: ExitModel, hidden_state: Tensor, exit: int | None = None) -> Tensor:
    """Confidence (B, T) of the predictions that `exit` (the last by default) makes from states (B, T, D)."""
    exit = model.num_layers if exit is None else exit
    chunks = hidden_state.flatten(0, -2).split(HEAD_CHUNK)
    return torch.cat([max_probability(model.logits(h, exit)) for h in chunks]).view(hidden_state.shape[:-1])


def stop_flops(model: ExitModel, stop: ExitStep, policy: Policy, last: int, layout: Layout | None = None) -> int:
    """FLOPs of a stop of a walk that ends at layer `last`: the layers since the stop before, heads and classifiers."""
    flops = run_flops(model.config, stop.layer - stop.first + 1, stop.arrived, layout)
    if policy.confidence == "classifier" and stop.layer < last:
        flops += classifier_flops(model.config, len(stop.confidence))
    return flops + exit_flops(model.config, stop.heads, stop.layer)
