"""Counting of n-grams: the arrays of a `CountTable`.

Weights are those of interpolated Kneser-Ney smoothing: what a context leaves over goes to the context that is one
shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MULTIPLIER, MASK = 0x9E3779B97F4A7C15, 2**64 - 1  # 2^64 over the golden ratio, as in splitmix64

SUREST = 1 - 2**-20  # the most that a context gives to its own n-grams, so that other tokens keep a probability


def hashes_of(text: Array, place: Array, orders: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """Each length of contexts, and the hashes (N,) of the contexts that end at each token.

    From the last token of a context to its first, the token is added, multiplied by an odd number and folded. Each step
    is one to one in the hash before it, so that different tokens never have the same hash, and longer contexts have it
    by chance only. Where a piece has fewer tokens than the context, the hash is not one of a context.
    """
    hashes = np.zeros(len(text), np.uint64)
    for n in range(orders[-1] + 1):
        tail = hashes[n - 1 :] if n else hashes[:0]
        tail += text[: len(tail)].astype(np.uint64) + np.uint64(1)
        tail *= np.uint64(MULTIPLIER)
        tail ^= tail >> np.uint64(32)
        if n in orders:
            yield n, hashes


def starts_of(values: Array) -> Array:
    """(N,) true where a value of a sorted array stands for the first time."""
    return np.append(np.ones(len(values[:1]), bool), values[1:] != values[:-1])


def _discount(count: Array) -> float:
    """The absolute discount of Ney, Essen and Kneser (1994), from the numbers of n-grams with the counts 1 and 2."""
    once, twice = int((count == 1).sum()), int((count == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5  # texts of a few words


class Level(NamedTuple):
    """The C contexts of one length and their P n-grams, by context and token; numbers go on from the level before."""

    keys: Array
    """(C,) hashes."""
    parents: Array
    """(C,) the number of the next shorter context, -1 for none."""
    contexts: Array
    """(P,) the number of each n-gram's context."""
    tokens: Array
    """(P,)."""
    weights: Array
    """(P,) float32."""
    occurrences: Array
    """(P,) in the text."""
    shorter: Array
    """(P,) the number of the n-gram with the next shorter context, -1 for none."""


def count_levels(text: Array, place: Array, at: Array, orders: Sequence[int], vocab_size: int) -> list[Level]:
    """The n-grams of a text with contexts of 0 tokens and of each order.

    Args:
        text: (N,) ids of all pieces.
        place: (N,) the place of each token in its piece.
        at: places of the tokens that have a next one.
        orders: lengths of contexts, ascending.
    """
    levels: list[Level] = []
    # The longest context so far that ends at each token, and its n-gram with the token after it.
    context_at, ngram_at = np.full((2, len(text)), -1, np.int32)
    contexts = ngrams = 0
    for n, hashes in hashes_of(text, place, (0, *orders)):
        at = at[place[at] >= n - 1]
        at = at[np.argsort(hashes[at])]
        new = starts_of(hashes[at])
        # A context that occurs once is left out, and so are the longer ones that end with it.
        frequent = ~(new & np.append(new[1:], True)) if len(at) else new
        at, new = at[frequent], new[frequent]
        if not len(at):
            break
        pairs = (np.cumsum(new) - 1) * vocab_size + text[at + 1]
        order = np.argsort(pairs)
        at, pairs = at[order], pairs[order]
        first = starts_of(pairs)
        context, token = np.divmod(pairs[first], vocab_size)
        ngram = np.cumsum(first) - 1
        count = occurrences = np.bincount(ngram)
        if n < orders[-1]:  # nothing backs off to the longest, which are counted as they are
            before = np.full(len(text), vocab_size)
            before[n:] = np.where(place[n:] >= n, text[: len(text) - n], vocab_size)
            different = np.sort(ngram * (vocab_size + 1) + before[at])
            count = np.bincount(different[starts_of(different)] // (vocab_size + 1))
        weights = (count - _discount(count)) / np.bincount(context, count)[context]
        weights /= np.maximum(1, np.bincount(context, weights) / SUREST)[context]
        place_of = at[first]  # one place of each n-gram
        example = place_of[starts_of(context)]
        levels.append(
            Level(
                hashes[example],
                context_at[example],
                contexts + context,
                token,
                weights.astype(np.float32),
                occurrences,
                ngram_at[place_of],
            )
        )
        context_at[at], ngram_at[at] = contexts + context[ngram], ngrams + ngram
        contexts, ngrams = contexts + len(example), ngrams + len(count)
    return levels


def table_of(levels: list[Level], vocab_size: int, max_ngrams: int) -> tuple[Array, ...]:
    """The arrays of a CountTable with the n-grams that are worth most."""
    empty = [np.zeros(0, kind) for kind in (np.uint64, int, int, int, np.float32, int, int)]
    table = Level(*map(np.concatenate, zip(empty, *levels)))
    bounds = np.cumsum([0, *(len(level.tokens) for level in levels)])

    def interpolate(weights: Array) -> tuple[Array, Array, Array]:
        """r(h) (C,), p(w | h') (P,) and p(w | h) (P,)."""
        rest = 1 - np.bincount(table.contexts, weights, len(table.keys))
        lower, probability = np.full((2, len(weights)), 1 / vocab_size)
        for begin, end in pairwise(bounds):
            if begin:
                lower[begin:end] = probability[table.shorter[begin:end]]
            probability[begin:end] = weights[begin:end] + rest[table.contexts[begin:end]] * lower[begin:end]
        return rest, lower, probability

    weights = table.weights
    rest, lower, probability = interpolate(weights)
    if len(weights) > max_ngrams:
        gain = table.occurrences * np.log(probability / lower)
        weights = np.zeros_like(weights)
        worth = np.argsort(-gain, kind="stable")[:max_ngrams]
        weights[worth] = table.weights[worth]
        rest, _, probability = interpolate(weights)
    kept = np.flatnonzero(weights)
    contexts, tokens = table.contexts[kept], table.tokens[kept]
    sizes = np.bincount(contexts, minlength=len(table.keys))

    # The most probable token is one of a context's own or that of its parent, since the parent's probabilities of all
    # others are scaled alike. The last entry, which the parent -1 reads, stands for no context at all.
    best, confidences = np.zeros(len(sizes) + 1, np.int32), np.zeros(len(sizes) + 1)
    np.maximum.at(confidences, contexts, probability[kept])
    most = np.flatnonzero(probability[kept] == confidences[contexts])[::-1]
    best[contexts[most]] = tokens[most]  # of equals the first, which is written last
    confidences[-1] = 1 / vocab_size
    for _ in levels:  # a pass passes it on to contexts of the next length
        inherited = rest * confidences[table.parents]
        better = np.flatnonzero(inherited > confidences[:-1])
        best[better], confidences[better] = best[table.parents[better]], inherited[better]
    rows = np.flatnonzero(sizes)
    rows = rows[np.argsort(table.keys[rows])]
    place = np.zeros(len(sizes), int)
    place[rows] = np.arange(len(rows))
    by_row = np.argsort(place[contexts], kind="stable")
    return (
        table.keys[rows],
        sizes[rows].astype(np.int32),
        tokens[by_row].astype(np.int32),
        weights[kept][by_row],
        best[rows],
        np.minimum(confidences[rows], SUREST).astype(np.float32),
    )
