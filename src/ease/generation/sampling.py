"""ease.generation.sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ease.errors import EaseError, check_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token follows from logits.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest that together have this probability (Holtzman et al. 2020).
        repetition_penalty: logits of tokens seen before are divided by it, or multiplied where negative (Keskar
            et al. 2019); 1 changes nothing.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("temperature", self.temperature == 0 or self.temperature >= 1e-6, "0 or at least 1e-6"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise EaseError(f"{name} must be {rule}, got {getattr(self, name)}")
        if self.seed is not None:
            check_seed(self.seed)
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise EaseError("top_k and top_p choose what is drawn from, and temperature 0 draws nothing: raise it")

    def penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (n, V) after the penalty on tokens `seen` (n, V)."""
        if bool(logits.isnan().any()):
            raise EaseError("the model predicts no numbers (NaN): its weights are broken, restore them")
        if seen is None:
            return logits
        penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalised, logits)

    def distribution(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (n, V) -> the probabilities (n, V) that a token is drawn from, at a temperature above 0."""
        logits = self.penalise(logits, seen) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(1) - ordered >= self.top_p
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(outside, 0.0))
        return probabilities / probabilities.sum(1, keepdim=True)
