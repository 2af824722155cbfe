"""Drafts from text alone: the row's own, and a table of counts of other text. They take no time of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ease.data.counts import CountTable
from ease.generation.lookup import PromptLookup
from ease.generation.request import Request
from ease.generation.sources.base import Drafts, Source

Chain = tuple[Sequence[int], Sequence[float]]


class TextSource(Source):
    """Drafts what followed the row's last tokens earlier in the row, or most often in the text behind a table.

    Args:
        table: counts of a training text; None: the row's own text only.
    """

    name, prior = "lookup", 0.05

    def __init__(self, request: Request, table: CountTable | None = None) -> None:
        super().__init__(request)
        self.table, self.rows = table, [PromptLookup() for _ in request.texts]

    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        chains: list[Chain] = []
        for row, text, limit, price in zip(self.rows, self.request.texts, limits.tolist(), least, strict=True):
            row.append(text[len(row.tokens) :])
            best, expected = self._paying(row.propose(limit), price)
            if self.table is not None:
                other, gain = self._paying(self.table.propose(text, limit), price)
                best = other if gain > expected else best
            chains.append(best)
        return self.drafts_of(chains)

    def _paying(self, chain: Chain, least: float) -> tuple[Chain, float]:
        """The start of a chain that pays, and the number of its tokens that are expected to be right."""
        tokens, confidences = chain
        right = self.reliability(confidences).cumprod()
        length = int((right >= least).sum())
        return (tokens[:length], confidences[:length]), float(right[:length].sum())
