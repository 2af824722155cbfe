"""Draft sources: what offers tokens for exact decoding to check, and how many of them pay.

A source offers each row a chain of tokens with confidences. One pass of the model checks all of them, so that another
draft costs a small part of a step, its price, and gains a token with the probability that the whole chain up to it is
right. A chain ends where this probability falls below the price.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ease.generation.request import Request
from ease.interface import to_device

LONGEST_DRAFT = 16  # tokens that a source offers a row at most

MEMORY = 0.9  # weight of what was known before each round, so that about ten rounds count

LEAST_SLOPE = 0.2  # the lowest cost of another draft, as a share of the one expected before it was measured


class Drafts(NamedTuple):
    """Offered tokens of one round: K places, of which each row uses the first ones."""

    tokens: Tensor
    """(B, K) ids, on the model's device."""
    mask: Tensor
    """(B, K) true where a row has a draft, on the host."""
    confidences: NDArray[np.float64]
    """(B, K) the source's confidence in each draft, on the host."""
    exit: int = 0
    """The layer up to which current tokens and drafts have run."""
    states: Tensor | None = None
    """(B, K + 1, D) states after that layer; None if the source did not run the model."""
    distributions: Sequence[tuple[Tensor, Tensor]] = ()
    """Per place, the rows (B,) with a drawn token, on the host, and the probabilities (n, V) that these were drawn
    from; empty where the source always offers the same token in the same place."""


class Reliability:
    """The share of drafts that were right, by the confidence that a source had in them.

    Each of ten bins of confidence starts as if `PRIOR_DRAFTS` had been checked, of which the share that the source
    stated was right.
    """

    PRIOR_DRAFTS = 4.0

    def __init__(self) -> None:
        self.right, self.all = np.zeros(10), np.zeros(10)

    def __call__(self, said: NDArray[np.float64] | Sequence[float]) -> NDArray[np.float64]:
        """Confidences (n,) -> the share (n,) of such drafts that was right."""
        confidences = np.asarray(said)
        bins = self._bins(confidences)
        share: NDArray[np.float64] = (self.right[bins] + self.PRIOR_DRAFTS * confidences) / (
            self.all[bins] + self.PRIOR_DRAFTS
        )
        return share

    def learn(self, confidences: NDArray[np.float64], right: NDArray[np.bool_]) -> None:
        """Adds drafts (n,) that were checked."""
        bins = self._bins(confidences)
        for counts, weights in ((self.all, None), (self.right, right)):
            counts *= MEMORY
            counts += np.bincount(bins, weights, 10)

    @staticmethod
    def _bins(confidences: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.minimum(confidences * 10, 9).astype(np.int64)


class Pace:
    """Seconds and tokens of the recent rounds of a source, and the price of another draft.

    The seconds of a round are fitted by a line over its tokens, read and drafted, which starts out as
    `prior` steps per draft.
    """

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.sums = np.zeros(6)  # of 1, places, places squared, seconds, places x seconds, tokens

    def record(self, places: int, seconds: float, tokens: int) -> None:
        """Adds a round that read `places` tokens and appended `tokens`, over all rows."""
        self.sums *= MEMORY
        self.sums += (1, places, places**2, seconds, places * seconds, tokens)

    @property
    def seconds_per_token(self) -> float:
        return float(self.sums[3] / max(1e-9, self.sums[5]))

    def prices(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The price (B,) of another draft in each row: the tokens that decoding gains in the time the draft takes.

        A token spares the row a place of a later round. If the rounds that are left depend on the row, because it is
        the last to finish, it also spares a part of a round.

        Args:
            shares: (B,) how much the number of rounds depends on each row, 1 in all.
        """
        n, x, xx, t, xt, tokens = self.sums
        if t <= 0:  # nothing recorded, or a clock too coarse
            return self.prior / (self.prior + shares)
        rows = len(shares)
        # The slope of the prior counts as much as two rounds, each one place away from the mean.
        expected = self.prior * t / (n + self.prior * max(0.0, x - rows * n))
        slope = (2 * expected + xt - x * t / n) / (2 + xx - x * x / n)
        slope = np.maximum(expected * LEAST_SLOPE, slope)  # a single slow round may tilt the line
        fixed = max(0.0, t - slope * x) / max(1.0, tokens / rows)  # per token of a row
        return np.asarray(slope / (slope + shares * fixed))


class Source(ABC):
    """One way to draft for a request.

    Attributes:
        name: as in `Generation.stats`.
        prior: the cost of another draft, in steps, before it has been measured.
        reliability: of its confidences in this request.
    """

    name: str
    prior: float

    def __init__(self, request: Request) -> None:
        self.request, self.reliability = request, Reliability()

    @abstractmethod
    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        """Drafts for the running rows.

        Args:
            limits: (B,) the most tokens that each row can use, on the host; 0 for rows that are finished.
            least: (B,) a row's chain ends where the probability that all of it is right falls below this.
        """

    def learn(self, drafts: Drafts, accepted: Tensor) -> None:
        """Takes note of the leading drafts (B,) of each row that were accepted, on the host.

        Drafts after a rejected one say nothing about the source.
        """
        checked = drafts.mask.numpy() & (np.arange(drafts.mask.shape[1]) <= accepted.numpy()[:, None])
        right = np.arange(drafts.mask.shape[1]) < accepted.numpy()[:, None]
        self.reliability.learn(drafts.confidences[checked], right[checked])

    def drafts_of(self, chains: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Drafts:
        """Drafts from each row's tokens and confidences."""
        K = max((len(tokens) for tokens, _ in chains), default=0)
        ids, confidences = np.zeros((len(chains), K), np.int64), np.zeros((len(chains), K))
        mask = np.zeros((len(chains), K), np.bool_)
        for row, (tokens, values) in enumerate(chains):
            ids[row, : len(tokens)], confidences[row, : len(tokens)] = tokens, values
            mask[row, : len(tokens)] = True
        device = self.request.current.device
        return Drafts(to_device(torch.from_numpy(ids), device), torch.from_numpy(mask), confidences)

    def no_drafts(self) -> Drafts:
        """Drafts of which no row has one."""
        return self.drafts_of([((), ())] * len(self.request.texts))


class Chains:
    """Chains of drafts in the making, one a row: each step adds a draft to those whose probability is high enough.

    Args:
        source: what drafts.
        rows: (B,) true for rows that draft, on the host.
        limits, least: as in `Source.offer`.

    Attributes:
        alive: (B,) true for the rows whose chain has not ended, on the host.
    """

    def __init__(self, source: Source, rows: Tensor, limits: Tensor, least: NDArray[np.float64]) -> None:
        self.source, self.alive, self.limits, self.least = source, rows, limits, least
        self.right = np.ones(len(limits))
        self.steps: list[tuple[Tensor, Tensor, NDArray[np.float64]]] = []

    def asked(self) -> Tensor:
        """(B,) true for the rows that can use another draft, on the host."""
        return self.alive & (self.limits > len(self.steps))

    def add(self, tokens: Tensor, confidences: NDArray[np.float64]) -> bool:
        """Adds a draft of tokens (B,) with confidences (B,) where it was asked for and pays; whether it does anywhere.

        The decision depends on the distribution and not on the token drawn from it, or sampling would be biased.
        """
        self.right *= self.source.reliability(confidences)
        self.alive = self.asked() & torch.from_numpy(self.right >= self.least)
        paying = bool(self.alive.any())
        if paying:
            self.steps.append((tokens, self.alive, confidences))
        return paying

    def drafts(self, **rest: Any) -> Drafts:
        """The drafts of all steps; `rest` as in `Drafts`."""
        if not self.steps:
            return self.source.no_drafts()._replace(**rest)
        tokens, masks, confidences = zip(*self.steps, strict=True)
        return Drafts(torch.stack(tokens, 1), torch.stack(masks, 1), np.stack(confidences, 1), **rest)


class NoDrafts(Source):
    """Nothing is drafted: every round is a step of full decoding."""

    name, prior = "none", 1.0

    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        return self.no_drafts()
