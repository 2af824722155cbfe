"""A table of n-gram counts: a language model without a network, made from a training text in seconds.

- An entry is an n-gram, a context and the token after it. Contexts of all lengths are one sorted array of 64-bit
  hashes, so that a context is found by one search.
- Probabilities are those of interpolated Kneser-Ney smoothing, which gives what a context leaves over to the context
  that is one shorter. They sum to 1 over the vocabulary.
- The size is bounded: the n-grams stay that raise the likelihood of the training text most.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ease.data.ngrams import MASK, MULTIPLIER, Array, count_levels, hashes_of, table_of
from ease.errors import EaseError, check_integer, check_layers, first_line
from ease.files import parse_json, set_usual_mode
from ease.inputs import as_integers

ORDERS = (1, 2, 3, 4, 5, 6, 8)

LONGEST = 64  # tokens of a context, at most

LARGEST_VOCAB = 2**31 - 1  # ids are stored in 32 bits

FORMAT = 1

FIX = "make the table again with CountTable.of"


class CountScores(NamedTuple):
    """How well a table foretells a text."""

    accuracy: float
    """Share of the tokens that are the most probable one."""
    perplexity: float
    tokens: int
    """Number of tokens scored: all but the first of each piece."""


class Predictions(NamedTuple):
    """What a table says of each token of a text but the first of each piece; arrays (N,)."""

    tokens: Array
    """The most probable token, int32."""
    confidences: Array
    """Its probability."""
    probabilities: Array
    """The probability of the token that the text has."""


@dataclass(frozen=True, eq=False)
class CountTable:
    """A model of P n-grams with R different contexts; `of` makes it and `load` reads it.

    With c(h, w) the count of token w after the context h, c(h) their sum over w, and h' the next shorter context,

        p(w | h) = max(c(h, w) - d, 0) / c(h) + r(h) p(w | h')

    where r(h) makes the sum over w equal to 1, and p(w | h) = p(w | h') for an unknown context. For all but the longest
    contexts, c(h, w) is the number of different tokens that precede h w in the text: a shorter context is asked how
    likely w is where the longer one is unknown. The discount of each length is d = n1 / (n1 + 2 n2), where n1 and n2
    are the numbers of n-grams with the counts 1 and 2. The counts of n-grams left out belong to r(h). (Interpolated
    Kneser-Ney smoothing: Kneser and Ney 1995; Chen and Goodman 1999, "An empirical study of smoothing techniques for
    language modeling", section 2.7.)

    A context is identified by a 64-bit hash. An unknown context is taken for a known one with probability R / 2^64,
    which is 6e-14 for R = 2^20.

    Attributes:
        vocab_size: V; every id lies below it.
        orders: the lengths of contexts, ascending.
        keys: (R,) uint64 hashes of the contexts, ascending; that of the empty context, which all texts end with, is 0.
        sizes: (R,) int32, the number of n-grams of each context, which are consecutive.
        tokens: (P,) int32, the last token of each n-gram, ascending within a context.
        weights: (P,) float32, the first summand of p(w | h).
        best: (R,) int32, the most probable next token of each context.
        confidences: (R,) float32, its probability.

    Example:
        >>> corpus = ease.load_corpus("stdlib", tokenizer="bpe:2048")
        >>> table = ease.CountTable.of(corpus.train, corpus.vocab_size)
        >>> table.score(corpus.val).perplexity
    """

    vocab_size: int
    orders: tuple[int, ...]
    keys: Array = field(repr=False)
    sizes: Array = field(repr=False)
    tokens: Array = field(repr=False)
    weights: Array = field(repr=False)
    best: Array = field(repr=False)
    confidences: Array = field(repr=False)

    @classmethod
    def of(
        cls,
        ids: Tensor | Sequence[Any],
        vocab_size: int,
        *,
        orders: Sequence[int] = ORDERS,
        max_ngrams: int = 2**20,
    ) -> CountTable:
        """Counts a training text.

        Args:
            ids: (N,) token ids, or a list of such pieces; no context extends over two pieces.
            vocab_size: V.
            orders: the lengths of contexts, up to 64. Contexts that occur once are left out.
            max_ngrams: P at most. The n-grams stay that add most to the log likelihood of the text, compared with the
                next shorter context (the weighted difference of Seymore and Rosenfeld 1996).

        Raises:
            EaseError: an id lies outside the vocabulary, or no piece has two tokens.
        """
        check_integer("vocab_size", vocab_size, 1, LARGEST_VOCAB)
        check_integer("max_ngrams", max_ngrams, 1)
        orders = tuple(sorted(set(check_layers("orders", orders, LONGEST))))
        if not orders or orders[0] < 1:
            raise EaseError(f"orders must be lengths of contexts in 1..{LONGEST}, got {orders}")
        text, place, at = _join(ids, vocab_size)
        if not len(at):
            raise EaseError("a table of counts needs a text of at least 2 tokens, in one piece")
        levels = count_levels(text, place, at, orders, vocab_size)
        return cls(vocab_size, orders, *table_of(levels, vocab_size, max_ngrams))

    # ---------------------------------------------------------------------------------------------------------
    # Drafting

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises EaseError unless the table was made for a vocabulary of `vocab_size`."""
        if vocab_size != self.vocab_size:
            raise EaseError(
                f"the table of counts was made for {self.vocab_size} ids, and the model has {vocab_size}: make one "
                "from a text in the model's tokens"
            )

    def propose(self, history: Sequence[int] | Array, length: int) -> tuple[list[int], list[float]]:
        """The most probable next token, the most probable one after it, and so on, by the longest known context.

        Args:
            history: (T,) ids so far.
            length: number of tokens at most; fewer are returned where no context is known.

        Returns:
            The tokens, and for each its probability given that the ones before it are right.
        """
        keys, best, confidences, reach = self._search
        size, longest = len(keys), self.orders[-1]
        recent = list(map(int, history[-longest:]))[::-1]
        tokens: list[int] = []
        sure: list[float] = []
        while len(tokens) < length:
            value, values = 0, []
            for token in recent:  # the same hash as in `hashes_of`
                value = (value + token + 1) * MULTIPLIER & MASK
                value ^= value >> 32
                values.append(value)
            for n in self._descending:
                if n <= len(values):
                    value = values[n - 1]
                    guess = value * size >> 64
                    i = bisect_left(keys, value, max(0, guess - reach), min(size, guess + reach))
                    if i < size and keys[i] == value:
                        break
            else:
                break
            tokens.append(best[i])
            sure.append(confidences[i])
            recent.insert(0, best[i])
            del recent[longest:]
        return tokens, sure

    @cached_property
    def _descending(self) -> tuple[int, ...]:
        return self.orders[::-1]

    @cached_property
    def _search(self) -> tuple[Any, Any, Any, int]:
        """What `propose` reads, and how far a key lies at most from where it lies if keys are evenly spaced."""
        size = len(self.keys)
        even = self.keys.astype(np.float64) * (size / 2.0**64)
        reach = 2 + int(np.abs(even - np.arange(size)).max(initial=0))
        return self.keys.data, self.best.data, self.confidences.data, reach

    # ---------------------------------------------------------------------------------------------------------
    # Scoring

    def predict(self, ids: Tensor | Sequence[Any]) -> Predictions:
        """Predicts each token of a text from those before it.

        Args:
            ids: (N,) token ids, or a list of such pieces.
        """
        text, place, at = _join(ids, self.vocab_size)
        targets = text[at + 1]
        tokens = np.zeros(len(at), np.int32)
        confidences, probabilities = np.full((2, len(at)), 1 / self.vocab_size)
        for where, rows in self._known(text, place, at):
            ngrams = rows * self.vocab_size + targets[where]
            found = np.minimum(np.searchsorted(self._ngrams, ngrams), len(self.tokens) - 1)
            own = np.where(self._ngrams[found] == ngrams, self.weights[found], 0)
            probabilities[where] = own + self._rest[rows] * probabilities[where]
            tokens[where], confidences[where] = self.best[rows], self.confidences[rows]
        return Predictions(tokens, confidences, probabilities)

    def score(self, ids: Tensor | Sequence[Any]) -> CountScores:
        """Accuracy and perplexity on a text, which should not be the one that was counted.

        Args:
            ids: (N,) token ids, or a list of such pieces.

        Raises:
            EaseError: an id lies outside the vocabulary, or no piece has two tokens.
        """
        text, _, at = _join(ids, self.vocab_size)
        if not len(at):
            raise EaseError("a text to score needs at least 2 tokens, in one piece")
        tokens, _, probabilities = self.predict(ids)
        accuracy = float((tokens == text[at + 1]).mean())
        return CountScores(accuracy, math.exp(-np.log(probabilities).mean()), len(at))

    def distribution(self, contexts: Tensor | Array | Sequence[Sequence[int]]) -> Array:
        """Probabilities (N, V) of the next token, in float64, after each of the contexts (N, T), T >= 1."""
        ids = as_integers("contexts", contexts, dims=2)
        count, length = ids.shape
        check_integer("the length of contexts", length, 1)
        text, place, _ = _join(list(ids), self.vocab_size)
        probabilities = np.full((count, self.vocab_size), 1 / self.vocab_size)
        ends = np.cumsum(self.sizes)
        for where, rows in self._known(text, place, np.arange(1, count + 1) * length - 1):
            probabilities[where] *= self._rest[rows][:, None]
            for i, row in zip(where, rows):
                own = slice(ends[row] - self.sizes[row], ends[row])
                probabilities[i, self.tokens[own]] += self.weights[own]
        return probabilities

    def _known(self, text: Array, place: Array, at: Array) -> Iterator[tuple[Array, Array]]:
        """For each length of contexts, the indices into `at` of the known contexts that end there, and their rows."""
        if not len(self.keys):
            return
        for n, hashes in hashes_of(text, place, (0, *self.orders)):
            wanted = hashes[at]
            rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            where = np.flatnonzero((place[at] >= n - 1) & (self.keys[rows] == wanted))
            yield where, rows[where]

    @cached_property
    def _ngrams(self) -> Array:
        """(P,) the row of each n-gram times V, plus its token, which is ascending."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes) * self.vocab_size + self.tokens

    @cached_property
    def _rest(self) -> Array:
        """(R,) r(h)."""
        rows = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return 1 - np.bincount(rows, self.weights, len(self.sizes))

    # ---------------------------------------------------------------------------------------------------------
    # Files

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the table as safetensors, with a checksum, completely or not at all.

        Args:
            path: the file, such as "counts.safetensors".
            overwrite: replace the file if there is one.

        Raises:
            EaseError: the file exists, or cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        file = Path(path)
        if file.exists() and not (overwrite and file.is_file()):
            raise EaseError(f"{file} exists already: choose another file, or pass overwrite=True")
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in DTYPES}
        header = json.dumps({"format": FORMAT, "vocab_size": self.vocab_size, "orders": self.orders})
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        try:
            save_file(arrays, partial, {HEADER: header, "checksum": _checksum(header, arrays)})
            set_usual_mode(partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise EaseError(f"{file} could not be written ({error}): make room, or choose another folder") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CountTable:
        """Reads a table that `save` wrote.

        Raises:
            EaseError: the file is missing, damaged, or no table of counts.
        """
        from safetensors import safe_open

        file = Path(path)
        try:
            with safe_open(file, "np") as opened:
                metadata = opened.metadata() or {}
                names = opened.keys()
                if HEADER not in metadata or set(names) != DTYPES.keys():
                    raise EaseError("it is no table of counts")
                arrays = {name: opened.get_tensor(name) for name in names}
            if metadata.get("checksum") != _checksum(metadata[HEADER], arrays):
                raise EaseError("its checksum differs")
            header = parse_json(metadata[HEADER], file, FIX)
            if header.get("format") != FORMAT:
                raise EaseError(f"its format is not {FORMAT}")
            check_integer("vocab_size", header.get("vocab_size"), 1, LARGEST_VOCAB)
            orders = check_layers("orders", header.get("orders"), LONGEST)
            table = cls(header["vocab_size"], orders, **arrays)
            _check_table(table)
            return table
        except FileNotFoundError as error:
            raise EaseError(f"{file} is missing: {FIX}") from error
        except Exception as error:  # a damaged file makes the library raise errors without a common base class
            raise EaseError(f"{file} is damaged ({first_line(error)}): {FIX}") from error


# ---------------------------------------------------------------------------------------------------------
# Files

HEADER = "counts"  # the key of the file's metadata under which everything but the arrays is, as JSON

DTYPES = {
    "keys": np.uint64,
    "sizes": np.int32,
    "tokens": np.int32,
    "weights": np.float32,
    "best": np.int32,
    "confidences": np.float32,
}


def _checksum(header: str, arrays: Mapping[str, Array]) -> str:
    """SHA-256 over the header and every array's name, type, shape and bytes."""
    sha = hashlib.sha256(header.encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def _check_table(table: CountTable) -> None:
    """Raises EaseError unless what `propose` and `predict` say is an id and a probability."""
    contexts, ngrams = len(table.keys), len(table.tokens)
    for name, dtype in DTYPES.items():
        array, size = getattr(table, name), ngrams if name in ("tokens", "weights") else contexts
        if array.dtype != dtype or array.shape != (size,):
            raise EaseError(f"{name} has the type {array.dtype} and the shape {array.shape}")
    sound = {
        "orders": table.orders and table.orders[0] >= 1 and all(a < b for a, b in pairwise(table.orders)),
        "keys": (table.keys[1:] > table.keys[:-1]).all(),
        "sizes": (table.sizes >= 1).all() and table.sizes.sum(dtype=np.int64) == ngrams,
        "best": ((table.best >= 0) & (table.best < table.vocab_size)).all(),
        "confidences": ((table.confidences > 0) & (table.confidences < 1)).all(),
    }
    if sound["sizes"]:
        in_range = ((table.tokens >= 0) & (table.tokens < table.vocab_size)).all()
        sound["tokens"] = in_range and (np.diff(table._ngrams) > 0).all()
        sound["weights"] = (table.weights > 0).all() and (table._rest > 0).all()
    for name, holds in sound.items():
        if not holds:
            raise EaseError(f"{name} holds values that no table has")


# ---------------------------------------------------------------------------------------------------------
# Counting


def _join(ids: Any, vocab_size: int) -> tuple[Array, Array, Array]:
    """The pieces as one text (N,), the place of each token in its piece (N,), and the places that have a next token.

    Raises:
        EaseError: the ids are not integers in one dimension, or one lies outside the vocabulary.
    """
    several = isinstance(ids, list | tuple) and not all(isinstance(token, Integral) for token in ids)
    pieces = [as_integers("ids", piece, dims=1).long().numpy(force=True) for piece in (ids if several else [ids])]
    text = np.concatenate([np.zeros(0, np.int64), *pieces])
    if len(text) and not 0 <= text.min() <= text.max() < vocab_size:
        raise EaseError(
            f"ids must lie in 0..{vocab_size - 1}, got {text.min()}..{text.max()}: give the vocab_size of these ids"
        )
    place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(piece)) for piece in pieces)])
    return text, place, np.flatnonzero(place[1:] > 0)
