"""Sampling settings, and the distribution that a token is drawn from.

Exact decoding with sampling needs the probabilities of a draft and of full decoding, not only the drawn ids, so the
settings are turned into a distribution here and the draw itself is left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ease.errors import EaseError, check_integer, check_number, check_seed
from ease.routing.confidence import at_least_float32

NAN_LOGITS = "the model's logits are NaN: its weights are probably corrupt, restore them"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: 0 takes the most likely token (greedy); otherwise the logits are divided by it and a token is
            drawn.
        top_k: draw only among the k most likely tokens.
        top_p: draw only among the most likely tokens whose probabilities add up to this value, including the token
            that crosses it (Holtzman et al. 2020).
        repetition_penalty: positive logits of tokens seen before are divided by it, negative ones multiplied (Keskar
            et al. 2019). 1 has no effect.
        seed: random seed of the draws.

    Raises:
        EaseError: for a setting out of range, and for `top_k`, `top_p` or `seed` at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("repetition_penalty", self.repetition_penalty)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
        for name, valid, rule in (
            ("temperature", self.temperature == 0 or self.temperature >= 1e-6, "0 or at least 1e-6"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not valid:
                raise EaseError(f"{name} must be {rule}, got {getattr(self, name)}")
        if self.seed is not None:
            check_seed(self.seed)
        if self.temperature == 0 and (self.top_k or self.top_p or self.seed is not None):
            raise EaseError("top_k, top_p and seed have no effect at temperature 0: set a temperature above 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.temperature == 0

    def penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Applies the repetition penalty.

        Args:
            logits: (n, V).
            seen: (n, V), true for tokens that the penalty applies to; None for no penalty.

        Returns:
            The logits (n, V) after the penalty, in at least float32.

        Raises:
            EaseError: if a logit is NaN.
        """
        if bool(logits.isnan().any()):
            raise EaseError(NAN_LOGITS)
        return self._penalized(logits, seen)

    def most_likely(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (n, V) -> the most likely ids (n,) after the penalty; -1 where a logit is NaN, without a wait."""
        largest, ids = self._penalized(logits, seen).max(1)  # NaN where any logit is
        return ids.masked_fill(largest.isnan(), -1)

    def _penalized(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = at_least_float32(logits)
        if seen is None:
            return logits
        penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalized, logits)

    def distribution(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The probabilities (n, V) that a token is drawn from, given logits (n, V); for temperatures above 0."""
        logits = self.penalize(logits, seen) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(1) - ordered >= self.top_p
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(outside, 0.0))
        return probabilities / probabilities.sum(1, keepdim=True)
