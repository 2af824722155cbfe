"""The routed forward: layer after layer, tokens leave at the first exit whose confidence reaches its threshold.

`routed_forward` is the only implementation. `route`, scoring, mining, and generation read what they need from the
`ExitStep` that it yields at every exit. The head of the exit that a token takes is evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError, checked
from ease.flops import exit_flops, run_flops
from ease.inputs import check_states, read_prompt
from ease.interface import ExitModel, Layout, evaluation_view, to_device
from ease.model_config import ModelConfig
from ease.policy import LOOSEST, Policy, exits_named, thresholds_named
from ease.routing.confidence import Evidence, Kind, Measure, max_probability, measure_named

HEAD_CHUNK = 512  # tokens whose logits exist at a time on a CPU: few enough for its cache, enough for the product
DEVICE_LOGITS = 2**27  # numbers in the logits at a time elsewhere, where every chunk costs a wait and launches


def head_chunk(model: ExitModel) -> int:
    """Tokens whose logits exist at a time."""
    none = model.new_logits(0)
    return HEAD_CHUNK if none.device.type == "cpu" else max(HEAD_CHUNK, DEVICE_LOGITS // none.shape[1])


@dataclass(frozen=True)
class ExitStep:
    """One step of a routed forward: the layers up to an exit, and the tokens that leave there.

    The exit is evaluated for N tokens, in the order of `queried.nonzero()`; n of them leave. Masks are on the host and
    everything else is on the model's device, so that an exit costs one wait for the device, for `leaves`.
    """

    first: int
    """The first layer of the step."""
    layer: int
    """The exit: the last layer of the step."""
    state: Tensor
    """(B, T, D) states of all tokens, of those that left earlier too."""
    arrived: Tensor
    """(B, T) true for the tokens that ran the step's layers."""
    queried: Tensor
    """(B, T) true for the tokens that the exit was evaluated for: all that arrived, or the last of each row where that
    token decides for the row."""
    by_row: bool
    """Whether one token decides for its row."""
    confidence: Tensor
    """(N,) confidence."""
    leaves: Tensor
    """(N,) true for tokens that leave; at the last exit, all."""
    leaving: Tensor
    """(n,) indices of the tokens that leave in the flattened ids, on the device."""
    num_heads: int
    """Number of head evaluations: N, or n where the confidence measure needs no head."""
    read: Tensor | None
    """The results of the caller's `read` for the tokens that leave, concatenated."""
    measure_flops: int
    """FLOPs of the confidence measure itself, beyond the head."""
    config: ModelConfig
    layout: Layout | None

    @property
    def num_leaving(self) -> int:
        """Number of tokens that leave."""
        return len(self.leaving)

    @cached_property
    def leaving_confidence(self) -> Tensor:
        """(n,) confidence of the tokens that leave."""
        if self.num_leaving == len(self.confidence):
            return self.confidence
        return self.confidence[to_device(self.leaves.nonzero().squeeze(1), self.confidence.device)]

    @cached_property
    def places(self) -> Tensor:
        """(N,) indices of the evaluated tokens in the flattened ids, on the device."""
        return to_device(self.queried.flatten().nonzero().squeeze(1), self.state.device)

    @cached_property
    def left(self) -> Tensor:
        """(B, T) true for tokens that leave at this exit."""
        return self.queried.masked_scatter(self.queried, self.leaves)

    @cached_property
    def remaining(self) -> Tensor:
        """(B, T) true for tokens that continue past the exit."""
        if not self.num_leaving:  # the most frequent case, which needs no kernel
            return self.arrived
        return self.arrived & ~(self.left.any(1, keepdim=True) if self.by_row else self.left)

    @property
    def flops(self) -> int:
        """FLOPs of the step: its layers, the confidence measure, and the heads."""
        layout = None if self.layout is None else self.layout.host
        layers = run_flops(self.config, self.layer - self.first + 1, self.arrived, layout)
        return layers + self.measure_flops + exit_flops(self.config, self.num_heads, self.layer)


class _Exit(NamedTuple):
    """What evaluating one exit gives; the fields are those of `ExitStep`."""

    confidence: Tensor
    leaves: Tensor
    leaving: Tensor
    num_heads: int
    read: Tensor | None


def routed_forward(
    model: ExitModel,
    ids: Tensor,
    policy: Policy,
    *,
    layout: Layout | None = None,
    last: int | None = None,
    read: Callable[[Tensor, Tensor], Tensor] | None = None,
    required: Tensor | None = None,
    cache: Any = None,
    state: Tensor | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[ExitStep]:
    """Runs ids (B, T) exit by exit until every token has left or layer `last` is done.

    In a model that classifies sequences the exit is evaluated for the last real token of a row, and the row leaves with
    that token.

    Args:
        layout: positions and segments; by default one segment a row without padding.
        last: the layer at which the run ends (the model's last by default).
        read: called with the logits (n, V) of leaving tokens and their indices (n,) into `ids.flatten()`; its results
            (n, ...) are concatenated in `ExitStep.read`. The logits of all tokens never exist at the same time.
        required: (B, T) tokens whose prediction the caller needs; the head at layer `last` is evaluated for no others.
        cache: keys and values of the tokens before `ids`, from `model.new_cache`.
        state: (B, T, D) states before layer 1, as `model.embed` gives them for `ids`, layout and cache.
        watch: called with the states (B, T, D) before layer 1 and after every layer that runs.

    Raises:
        EaseError: the policy's confidence measure is unknown, or the model lacks what the measure needs.
    """
    last = model.num_layers if last is None else last
    kind = measure_named(policy.confidence)
    measure = kind.make(model, policy, ids.numel())
    steps = [(e, t) for e, t in zip(policy.exits, policy.thresholds, strict=True) if e < last]
    real = torch.ones(ids.shape, dtype=torch.bool) if layout is None else layout.host.real
    arrived = real
    by_row = model.config.num_labels is not None
    # Counted from the right, the last real token of a row is the first.
    decides = arrived & (arrived.flip(1).cumsum(1).flip(1) == 1) if by_row else arrived
    if cache is not None:
        cache.check(policy)
    state, first = model.embed(ids, layout=layout, cache=cache) if state is None else state, 1
    positions = None
    if policy.by_position:
        default = torch.arange(ids.shape[1]).expand_as(ids) if layout is None else layout.host.positions
        positions = to_device((default if cache is None else torch.from_numpy(cache.slots)).flatten(), ids.device)
    required = None if required is None else required.cpu()
    if watch is not None:
        watch(state)
    if not bool(real.any()):
        return
    for layer, threshold in [*steps, (last, 0.0)]:
        before, final = state.flatten(0, 1), layer == last
        active: Tensor | None = arrived  # a cache does its bookkeeping on the host
        if cache is None:
            active = None if arrived is real else to_device(arrived, ids.device)
        for start, end in [(first, layer)] if watch is None else [(k, k) for k in range(first, layer + 1)]:
            state = model.run(state, start, end, layout=layout, active=active, cache=cache)
            if watch is not None:
                watch(state)
        queried = arrived & decides if by_row else arrived
        if required is not None and final:
            queried = queried & required

        def leave(confidence: Tensor, places: Tensor, threshold: float = threshold) -> Tensor:
            dtype = torch.promote_types(confidence.dtype, torch.float32)
            at: float | Tensor = threshold
            if positions is not None:
                at = policy.limits(threshold, positions[places], dtype)
            return confidence.to(dtype).clamp(min=LOOSEST) >= at  # at `LOOSEST` a confidence of 0 leaves, too

        exit = _evaluate(model, layer, before, state, queried, kind, measure, None if final else leave, read)
        measured = 0 if final else kind.flops(model.config, len(exit.confidence))
        step = ExitStep(
            first, layer, state, arrived, queried, by_row, *exit, measured, config=model.config, layout=layout
        )
        yield step
        arrived, first = step.remaining, layer + 1
        if step.num_leaving and not bool(arrived.any()):
            return


def _evaluate(
    model: ExitModel,
    layer: int,
    before: Tensor,
    state: Tensor,
    queried: Tensor,
    kind: Kind,
    measure: Measure,
    leave: Callable[[Tensor, Tensor], Tensor] | None,
    read: Callable[[Tensor, Tensor], Tensor] | None,
) -> _Exit:
    """Evaluates the exit after `layer` for the queried tokens, a chunk at a time.

    Args:
        before: (B T, D) states that entered the step.
        leave: the tokens that leave, from confidences (n,) and indices (n,); None at the last layer, where all leave,
            even those whose confidence is NaN.
    """
    flat, size = state.flatten(0, 1), queried.numel()
    confidences, all_leaves, leaving, readings = [], [], [], []
    num_heads = 0
    for on_host in queried.flatten().nonzero().squeeze(1).split(head_chunk(model)):
        places = to_device(on_host, state.device)
        after = flat if len(places) == size else flat[places]
        logits = model.logits(after, layer) if leave is None or kind.needs_head else None
        if leave is None and logits is not None and not kind.needs_head:  # a headless measure is for early exits
            confidence = max_probability(logits)
        else:
            confidence = measure(Evidence(layer, before, after, logits, places))
        leaves = torch.ones(len(places), dtype=torch.bool) if leave is None else leave(confidence, places).cpu()
        indices = leaves.nonzero().squeeze(1)
        num_heads += len(indices) if logits is None else len(places)
        if len(indices) < len(places):
            places = to_device(on_host[indices], state.device)
            if read is not None and len(indices):
                at = to_device(indices, state.device)
                logits = model.logits(after[at], layer) if logits is None else logits[at]
        elif logits is None and read is not None:
            logits = model.logits(after, layer)
        if read is not None and len(indices):
            assert logits is not None
            readings.append(read(logits, places))
        confidences.append(confidence)
        all_leaves.append(leaves)
        leaving.append(places)
    results = cat_or_empty(readings, state) if readings else None
    left = cat_or_empty(leaving, torch.zeros(0, dtype=torch.long, device=state.device))
    return _Exit(cat_or_empty(confidences, state), cat_or_empty(all_leaves, queried), left, num_heads, results)


def cat_or_empty(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts concatenated, a single part without a copy; (0,) of the dtype and device of `like` if there is none."""
    if not parts:
        return like.new_zeros(0)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class Routed(NamedTuple):
    """Result of `route`."""

    logits: Tensor
    """(B, T, V) logits of the exit that each token took."""
    exits: Tensor
    """(B, T) that exit; for padding 0, or -1 in a model with exit 0."""
    confidences: Tensor
    """(B, T) its confidence."""


@torch.no_grad()
@checked
def route(
    model: ExitModel,
    ids: Tensor,
    exit_layer: int | Sequence[int] | None = None,
    routing_threshold: float | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    policy: Policy | None = None,
) -> Routed:
    """Runs the routed forward: each token leaves at the first exit whose confidence reaches its threshold.

    A token that has left still gives keys and values to the tokens that continue.

    Args:
        model: an `ExitModel`; the call runs in evaluation mode whatever its mode, which stays as it is.
        ids: (B, T) token ids, or the dictionary that a tokenizer of transformers gives.
        exit_layer, routing_threshold: exits and thresholds that replace those of the policy.
        attention_mask: (B, T), true (or 1) for real tokens, false for padding on either side.
        policy: exits, thresholds, and confidence measure; `model.policy` by default.

    Returns:
        Logits, exits, and confidences of every token.

    Raises:
        EaseError: the model cannot follow the policy, or ids lie outside the vocabulary.

    Example:
        >>> routed = ease.route(model, ids, exit_layer=2, routing_threshold=0.9)
        >>> routed.exits  # the layer at which each token left
    """
    policy = model.policy if policy is None else policy
    if exit_layer is not None or routing_threshold is not None:
        exits = policy.exits if exit_layer is None else exits_named(exit_layer)
        thresholds = policy.thresholds if routing_threshold is None else thresholds_named(routing_threshold)
        if not exits and any(thresholds):
            raise EaseError("the model's policy has no exit: give exit_layer as well as routing_threshold")
        policy = Policy.of(exits, thresholds, **policy.options)
    model.check_policy(policy)
    ids, attention_mask = read_prompt(ids, attention_mask)
    model, device = evaluation_view(model), next(model.parameters()).device
    model.check_ids(ids, model.config.vocab_size)
    ids = to_device(ids, device)
    layout = None if attention_mask is None else Layout.from_attention_mask(attention_mask).to(device)
    logits = model.new_logits(*ids.shape)
    left_at = torch.full(ids.shape, model.first_exit - 1, dtype=ids.dtype, device=device)
    confidences = torch.zeros(ids.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for step in routed_forward(model, ids, policy, layout=layout, read=lambda chunk, _: chunk):
        if step.read is not None:
            logits.view(-1, logits.shape[-1])[step.leaving] = step.read.to(logits)
            confidences.view(-1)[step.leaving] = step.leaving_confidence.to(confidences)
        left_at.view(-1)[step.leaving] = step.layer
    return Routed(logits, left_at, confidences)


@torch.no_grad()
@checked
def compute_confidence(model: ExitModel, hidden_state: Tensor, exit: int | None = None) -> Tensor:
    """The largest softmax probability at an exit.

    Args:
        model: an `ExitModel`.
        hidden_state: (B, T, D) states.
        exit: the exit (the last layer by default).

    Returns:
        (B, T) confidence in [0, 1].
    """
    check_states("hidden_state", hidden_state, model.config.dim)
    exit = model.num_layers if exit is None else exit
    chunks = hidden_state.flatten(0, -2).split(head_chunk(model))
    return torch.cat([max_probability(model.logits(h, exit)) for h in chunks]).view(hidden_state.shape[:-1])
