"""Two sources in one: where the first has nothing to offer, the second drafts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ease.generation.sources.base import Drafts, Source
from ease.interface import to_device


class MixedSource(Source):
    """Drafts of `first`, and those of `second` for rows that got none.

    Args:
        first, second: sources whose drafts no layer of the model has read.
    """

    def __init__(self, first: Source, second: Source) -> None:
        super().__init__(first.request)
        self.first, self.second = first, second
        self.parts: tuple[Drafts, Drafts]
        self.name, self.prior = f"{first.name}, {second.name}", second.prior

    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        first = self.first.offer(limits, least)
        second = self.second.offer(limits.masked_fill(first.mask.any(1), 0), least)
        K = max(first.mask.shape[1], second.mask.shape[1])
        self.parts = first, second = _padded(first, K), _padded(second, K)
        taken = first.mask.any(1)
        tokens = torch.where(to_device(taken[:, None], first.tokens.device), first.tokens, second.tokens)
        return Drafts(tokens, first.mask | second.mask, np.where(taken[:, None], first.confidences, second.confidences))

    def learn(self, drafts: Drafts, accepted: Tensor) -> None:
        for source, part in zip((self.first, self.second), self.parts, strict=True):
            source.learn(part, accepted)


def _padded(drafts: Drafts, width: int) -> Drafts:
    more = width - drafts.mask.shape[1]
    return Drafts(
        F.pad(drafts.tokens, (0, more)), F.pad(drafts.mask, (0, more)), np.pad(drafts.confidences, ((0, 0), (0, more)))
    )
