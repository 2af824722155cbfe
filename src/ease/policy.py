"""A routing policy as data: exits, thresholds, and a confidence measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from ease.errors import EaseError, check_integer, check_layers, check_list, check_names, check_number, check_string

LOOSEST = 1e-9  # a threshold that every confidence reaches; 0 would mean that the exit does not route


def exits_named(exit_layer: int | Sequence[int]) -> tuple[int, ...]:
    """The value of the option `exit_layer`, one exit or several, as a tuple."""
    return (int(exit_layer),) if isinstance(exit_layer, int | Integral) else check_layers("exit_layer", exit_layer)


def thresholds_named(routing_threshold: float | Sequence[float]) -> tuple[float, ...]:
    """The value of the option `routing_threshold`, one threshold or several, as a tuple."""
    if isinstance(routing_threshold, int | float | Real):
        return (routing_threshold,)
    return check_list("routing_threshold", routing_threshold)


@dataclass(frozen=True)
class Policy:
    """The exits at which tokens may leave, and the confidence that each requires.

    A policy holds for any model that has its exits. The name of the confidence measure is checked where it is used, by
    `ease.routing`.

    Args:
        exits: layers, from shallow to deep, all below the last one; 0 stands for embedding and memory.
        thresholds: one in (0, 1] per exit; a token leaves if its confidence is at least the threshold. With infinity no
            token leaves. An exit with threshold 0 does not route and is dropped.
        confidence: the confidence measure, a key of `ease.routing.confidence.MEASURES`.
        patience: number of exits that have to agree; for the measure "patience" only.
        half_life: number of tokens after which a threshold has fallen half of the way from 1 to its value: the first
            tokens of a text go deep, since all later ones attend to them (after CALM's decaying threshold, Schuster et
            al. 2022). None for thresholds that do not depend on the position.
        always_deep: number of tokens at the start of every text that never leave early.

    Raises:
        EaseError: exits are not in order, thresholds lie outside [0, 1], or their numbers differ.

    Example:
        >>> model.policy = ease.Policy(exits=(2, 4), thresholds=(0.9, 0.8))
    """

    exits: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    confidence: str = "max-probability"
    patience: int = 0
    half_life: float | None = None
    always_deep: int = 0

    def __post_init__(self) -> None:
        exits, thresholds = check_layers("exit_layer", self.exits), check_list("routing_threshold", self.thresholds)
        for threshold in thresholds:
            check_number("a routing_threshold", threshold, finite=False)
        thresholds = tuple(map(float, thresholds))
        if len(exits) != len(thresholds):
            raise EaseError(
                f"exit_layer names {len(exits)} exits and routing_threshold {len(thresholds)} thresholds: "
                "give one threshold per exit"
            )
        for threshold in thresholds:
            if not (0 <= threshold <= 1 or threshold == math.inf):
                raise EaseError(f"routing_threshold must lie in [0, 1], got {threshold}")
        if list(exits) != sorted(set(exits)) or (exits and exits[0] < 0):
            raise EaseError(
                "exit_layer must name layers from shallow to deep, counted from 1 (0: embedding and memory), got "
                f"{list(exits)}"
            )
        routing = [(e, t) for e, t in zip(exits, thresholds, strict=True) if t > 0]
        object.__setattr__(self, "exits", tuple(e for e, _ in routing))
        object.__setattr__(self, "thresholds", tuple(t for _, t in routing))
        check_string("confidence", self.confidence)
        check_integer("patience", self.patience)
        check_integer("always_deep", self.always_deep)
        if self.half_life is not None:
            check_number("half_life", self.half_life, finite=False)
        if (self.confidence == "patience") != (self.patience > 0):
            raise EaseError(
                f"patience is {self.patience} with the measure {self.confidence}: set patience to at least 1 for the "
                "measure patience alone, and leave it out otherwise"
            )
        if self.half_life is not None and not self.half_life > 0:
            raise EaseError(f"half_life must be above 0, got {self.half_life}")

    @classmethod
    def patient(cls, exits: int | Sequence[int], patience: int) -> Self:
        """A policy under which a token leaves when `patience` exits in a row agree on the likeliest output."""
        exits = exits_named(exits)
        return cls(exits, (1.0,) * len(exits), "patience", patience)

    @classmethod
    def of(cls, exit_layer: int | Sequence[int], routing_threshold: float | Sequence[float], **options: Any) -> Policy:
        """The policy of the two core options; a single threshold of 0 means no routing, whatever the exit.

        Args:
            exit_layer: the exit, or a sequence of exits from shallow to deep.
            routing_threshold: one threshold per exit.
            options: further fields of the policy.
        """
        check_names("a policy", options, [f.name for f in fields(cls)[2:]])
        exits = exits_named(exit_layer)
        thresholds = thresholds_named(routing_threshold)
        return cls() if thresholds == (0,) else cls(exits, thresholds, **options)

    def leaving_at(self, exit: int) -> Policy:
        """The policy under which all tokens leave at `exit`, with the same measure; empty if `exit` is not an exit."""
        if exit not in self.exits:
            return Policy()
        below = [e for e in self.exits if e < exit]  # some measures depend on the exits on the way
        return Policy((*below, exit), (*[math.inf] * len(below), LOOSEST), self.confidence, self.patience)

    @property
    def by_position(self) -> bool:
        """Whether the required confidence depends on a token's position."""
        return self.half_life is not None or self.always_deep > 0

    def limits(self, threshold: float, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The required confidence (n,) at positions (n,), which count from 0; above 1 where no token may leave."""
        # At least float32, which keeps thresholds apart, and no more than the model's: some devices lack float64.
        dtype = torch.promote_types(dtype, torch.float32)
        limits = torch.full(positions.shape, threshold, dtype=dtype, device=positions.device)
        if self.half_life is not None:
            limits = limits + (1 - threshold) * 0.5 ** (positions / self.half_life)
        return limits.masked_fill(positions < self.always_deep, torch.inf)

    @property
    def options(self) -> dict[str, Any]:
        """The fields other than exits and thresholds that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self)[2:] if getattr(self, f.name) != f.default}

    def check(self, num_layers: int, first_exit: int = 0) -> None:
        """Raises `EaseError` if a model of `num_layers` layers has one of the exits not below its last layer."""
        if self.exits and self.exits[0] < first_exit:
            raise EaseError("exit_layer 0 needs a model with a memory: set memory_orders, or choose exits from 1 on")
        if self.exits and self.exits[-1] >= num_layers:
            raise EaseError(
                f"exit_layer {self.exits[-1]} must lie below the last of the model's {num_layers} layers while "
                "routing is on: choose a lower exit, a deeper model, or routing_threshold=0.0"
            )
