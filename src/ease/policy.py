"""ease.policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ease.errors import EaseError


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
