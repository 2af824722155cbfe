"""Exits at work: how sure a prediction is, when a token leaves, and the routed forward.

`walk` is the one routed forward. Whatever needs routed runs (`route`, evaluation, mining) reads off it what it
wants: it yields at every exit, and the head of the exit a token takes is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ease.confidence import Evidence, kind, max_probability
from ease.errors import EaseError
from ease.seam import ExitModel, Layout

HEAD_CHUNK = 512  # tokens whose logits exist at a time: small enough for a cache, large enough for the product


def exits_named(exit_layer: int | Sequence[int]) -> tuple[int, ...]:
    """One exit or several, as the core option names them."""
    return (exit_layer,) if isinstance(exit_layer, int) else tuple(exit_layer)


@dataclass(frozen=True)
class Policy:
    """Which exits tokens may take, and the confidence that each asks for.

    Args:
        exits: layers, from shallow to deep, all below the last one.
        thresholds: one in (0, 1] per exit; a token leaves when its confidence is at least that. Infinity lets none
            leave; an exit whose threshold is 0 does not route, so it is no exit and left out.
        confidence: the measure that thresholds are compared with, one of `confidence.MEASURES`.
        patience: exits that have to agree, for the measure "patience".
        half_life: tokens after which a threshold has fallen half of its way from 1: the first tokens of a text
            go deep, since what they say is read by all that follow (as CALM's decaying threshold, Schuster et
            al. 2022). None: the same everywhere.
        always_deep: so many tokens at the start of every text never leave early.
    """

    exits: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    confidence: str = "max-probability"
    patience: int = 0
    half_life: float | None = None
    always_deep: int = 0

    def __post_init__(self) -> None:
        kind(self.confidence)
        exits, thresholds = tuple(self.exits), tuple(map(float, self.thresholds))
        if len(exits) != len(thresholds):
            raise EaseError(
                f"exit_layer names {len(exits)} exits and routing_threshold {len(thresholds)} thresholds: "
                "give one threshold per exit"
            )
        for threshold in thresholds:
            if not (0 <= threshold <= 1 or threshold == math.inf):
                raise EaseError(f"routing_threshold must lie in [0, 1], got {threshold}")
        if list(exits) != sorted(set(exits)) or (exits and exits[0] < 1):
            raise EaseError(f"exit_layer must name layers from shallow to deep, counted from 1, got {list(exits)}")
        routing = [(e, t) for e, t in zip(exits, thresholds, strict=True) if t > 0]
        object.__setattr__(self, "exits", tuple(e for e, _ in routing))
        object.__setattr__(self, "thresholds", tuple(t for _, t in routing))
        if (self.confidence == "patience") != (self.patience > 0):
            raise EaseError(
                f"patience is {self.patience} and the measure {self.confidence}: give at least 1 exit that has to "
                "agree, to the measure patience alone"
            )
        if (self.half_life is not None and not self.half_life > 0) or self.always_deep < 0:
            raise EaseError(
                f"half_life ({self.half_life}) must be above 0 and always_deep ({self.always_deep}) not below"
            )

    @classmethod
    def patient(cls, exits: Sequence[int], patience: int) -> Self:
        """A token leaves when `patience` exits in a row agree on the likeliest output."""
        return cls(tuple(exits), (1.0,) * len(exits), "patience", patience)

    @property
    def by_position(self) -> bool:
        """Whether what is asked for depends on where a token stands."""
        return self.half_life is not None or self.always_deep > 0

    def limits(self, threshold: float, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The confidence that is asked for at positions (n,), counted from 0: (n,), above 1 where none may leave."""
        # At least float32, in which thresholds are told apart, and no more than the model's: some devices lack float64.
        dtype = torch.promote_types(dtype, torch.float32)
        limits = torch.full(positions.shape, threshold, dtype=dtype, device=positions.device)
        if self.half_life is not None:
            limits = limits + (1 - threshold) * 0.5 ** (positions / self.half_life)
        return limits.masked_fill(positions < self.always_deep, torch.inf)

    @classmethod
    def of(cls, exit_layer: int | Sequence[int], routing_threshold: float | Sequence[float], **options: Any) -> Policy:
        """From the two core options; a single threshold of 0 means no routing, whatever the exit says.

        `options` are the further fields.
        """
        exits = exits_named(exit_layer)
        thresholds = (routing_threshold,) if isinstance(routing_threshold, int | float) else tuple(routing_threshold)
        return cls() if thresholds == (0,) else cls(exits, thresholds, **options)

    @classmethod
    def own(cls, model: ExitModel) -> Policy:
        """The policy that a model has of its own."""
        return cls.of(model.exit_layer, model.routing_threshold, **model.policy_options)

    @property
    def options(self) -> dict[str, Any]:
        """The fields beside exits and thresholds that are not as by default."""
        return {f.name: getattr(self, f.name) for f in fields(self)[2:] if getattr(self, f.name) != f.default}

    def check(self, num_layers: int) -> None:
        """Refuses exits that a model of `num_layers` layers does not have below its last."""
        if self.exits and self.exits[-1] >= num_layers:
            raise EaseError(
                f"exit_layer {self.exits[-1]} must lie below the last of the model's {num_layers} layers while "
                "routing is on: choose a lower exit, a deeper model, or routing_threshold=0.0"
            )


class Stop(NamedTuple):
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


def walk(
    model: ExitModel,
    ids: Tensor,
    policy: Policy,
    *,
    layout: Layout | None = None,
    last: int | None = None,
    read: Callable[[Tensor, Tensor], Tensor] | None = None,
    wanted: Tensor | None = None,
    cache: Any = None,
) -> Iterator[Stop]:
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
        sure, leaves = joined(confidences, state), joined(leaving, asked)
        reading = joined(readings, state) if readings else None
        stop = Stop(first, layer, state, arrived, asked, by_row, sure, leaves, gone, heads, reading)
        yield stop
        arrived, first = stop.stays, layer + 1
        if gone and not bool(arrived.any()):
            return


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
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
    for stop in walk(model, ids, policy, layout=layout, read=lambda chunk, _: chunk):
        left = stop.left
        if stop.read is not None:
            logits[left], confidences[left] = stop.read.to(logits), stop.confidence[stop.leaves].to(confidences)
        exits[left] = stop.layer
    return Routed(logits, exits, confidences)
