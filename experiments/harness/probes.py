"""Probes of running text: shares of words, brackets and indentations that greedy decoding completes without an error.

A probe is a kind of span, such as an identifier. One counts as right if the model's most likely token is the next token
of the text all along the span, which means that greedy decoding writes exactly the span after the text before it.
Perplexity can improve through probabilities alone; these shares cannot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PROBES = {
    "identifiers": r"\b[A-Za-z_]\w{3,}\b",
    "closing brackets": r"[)\]}]",
    "indentations": r"(?<=\n) +(?=\S)",
    "last words": r"\b[A-Za-z]{3,}\b(?= ?[.!?]\s)",
}
"""Probe -> the regular expression of its spans; a last word is the one before the end of a sentence."""
TASK_METRICS = tuple(PROBES)


class Spans(NamedTuple):
    """The spans of a probe, as places among the scored tokens."""

    first: Tensor
    """(S,) the token in which each span begins."""
    last: Tensor
    """(S,) the token in which it ends."""

    @classmethod
    def of(cls, probe: str, targets: Sequence[str]) -> Spans:
        """The spans in the text of the scored tokens.

        Args:
            probe: a regular expression.
            targets: the text of every scored token.
        """
        lengths = torch.tensor([len(piece) for piece in targets])
        ends = lengths.cumsum(0)
        found = list(re.finditer(probe, "".join(targets)))
        starts, stops = (
            torch.tensor(list(map(side, found)), dtype=torch.long) for side in (re.Match.start, re.Match.end)
        )
        return cls(torch.searchsorted(ends, starts, right=True), torch.searchsorted(ends, stops))

    def right(self, correct: Tensor) -> float:
        """The share of spans whose tokens are all correct; NaN without a span.

        Args:
            correct: (N,) whether each scored token is the most likely one.
        """
        wrong = torch.cat([torch.zeros(1, dtype=torch.long), (~correct).long().cumsum(0)])
        return (wrong[self.last + 1] == wrong[self.first]).double().mean().item()
