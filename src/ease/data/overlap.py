"""Splits that hold the same text: what training saw would be scored as held-out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

from ease.errors import EaseError

MOST_SHARED = 0.5  # share of the smaller of two splits; of prose and code, splits share about a tenth of their lines


def check_overlap(name: str, splits: Mapping[str, Iterable[str]]) -> None:
    """Raises `EaseError` if two splits share most of their text.

    Lines are compared, without the white space in them: of the smaller of two splits, lines that make up more than half
    of its characters may not occur in the other one.

    Args:
        name: what the message calls the source.
        splits: what the message calls a split -> its documents.
    """
    if len(splits) < 2:
        return
    found = {split: _lines(texts) for split, texts in splits.items()}
    for pair in itertools.combinations(found, 2):
        smaller, larger = sorted(pair, key=lambda split: found[split].total())
        shared = sum(size for line, size in found[smaller].items() if line in found[larger])
        if shared > MOST_SHARED * found[smaller].total():
            raise overlap_error(name, shared / found[smaller].total(), smaller, larger)


def _lines(texts: Iterable[str]) -> Counter[int]:
    """The hash of every line -> the characters that it makes up in the texts."""
    sizes: Counter[int] = Counter()
    for line in itertools.chain.from_iterable(text.splitlines() for text in texts):
        stripped = "".join(line.split())
        sizes[hash(stripped)] += len(stripped)
    return sizes


def overlap_error(name: str, share: float, split: str, other: str) -> EaseError:
    """The error for a share of `split` that is also in `other`."""
    return EaseError(
        f"{name} has the same text in two splits ({share:.0%} of {split} is also in {other}), so that scores are not "
        "those of unseen text: give another text for one of them, or allow it (--allow-overlap, allow_overlap=True)"
    )
