"""Batches of a fixed text and of examples: re-iterable, shuffled by seed and epoch, resumable.

The order of an epoch follows from the seed and the number of the epoch alone, so that the number is all the state that
a resumed run needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ease.errors import EaseError, check_counts, check_seed, checked
from ease.inputs import IGNORE, as_integers
from ease.interface import Batch, Layout

# ---------------------------------------------------------------------------------------------------------
# Windows of a text


class TokenBatches:
    """Batches `(x, y)` of token windows; every `iter()` is one epoch.

    The ids are cut into windows of `seq_len` tokens without overlap; a trailing partial window is dropped. y is x one
    token later, so that every token but the first is predicted once. Both are int64 of shape (B, T) = (batch_size,
    seq_len).

    Args:
        ids: (N,) integers, a text.
        seq_len: tokens per window.
        batch_size: windows per batch.
        shuffle: visits the windows of every pass in a new order, which follows from `seed` and the number of the pass.
            Windows that fill no batch are dropped from that pass.
        seed: random seed of the order.
        max_batches: batches per epoch at most, which makes an epoch a slice of a pass. Without `shuffle` it is always
            the first batches; with it, successive epochs continue through the same pass before the next begins.
        drop_last: drops the windows that fill no batch; False gives them as a smaller last batch.

    Attributes:
        epoch: epochs begun, and the whole of `state_dict()`.

    Raises:
        EaseError: the text is shorter than one batch (one window, with `drop_last=False`).

    Example:
        >>> corpus = load_corpus("stdlib", "byte")
        >>> for x, y in TokenBatches(corpus.train, seq_len=64, batch_size=8, shuffle=True):
        ...     ...
    """

    @checked
    def __init__(
        self,
        ids: Tensor,
        seq_len: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        max_batches: int | None = None,
        drop_last: bool = True,
    ) -> None:
        check_counts(1, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches)
        check_seed(seed)
        ids = as_integers("ids", ids, dims=1)
        windows = max(0, len(ids) - 1) // seq_len
        if windows < (batch_size if drop_last else 1):
            raise EaseError(
                f"{len(ids)} tokens give {windows} windows of {seq_len}, fewer than a batch of {batch_size}: "
                "use more text, or a smaller seq_len or batch_size"
            )
        self.ids = ids
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.windows = ids.unfold(0, seq_len + 1, seq_len)  # (windows, T + 1), a view
        self.per_pass = windows // batch_size if drop_last else math.ceil(windows / batch_size)
        self.per_epoch = min(self.per_pass, max_batches or self.per_pass)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return self._batches(first=(self.epoch - 1) * self.per_epoch if self.shuffle else 0)

    def pass_over(self, epochs: int) -> None:
        """Skips epochs."""
        self.epoch += epochs

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch = state["epoch"]

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch from batch number `first` of the endless stream of passes."""
        order = torch.arange(len(self.windows))
        shuffled_pass = -1
        for batch in range(first, first + self.per_epoch):
            number, at = divmod(batch, self.per_pass)
            if self.shuffle and number != shuffled_pass:
                permutation = np.random.default_rng([self.seed, number]).permutation(len(self.windows))
                order = torch.from_numpy(permutation)
                shuffled_pass = number
            window = self.windows[order[at * self.batch_size : (at + 1) * self.batch_size]].long()
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------------
# Examples of different lengths

BUCKET = 50  # batches that are sorted by length together: enough for little padding, few enough to stay random


class Example(NamedTuple):
    """One row: ids (T,) and targets (T,), int32; a target of -100 is not scored."""

    ids: Tensor
    targets: Tensor


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Rows of ids (T_i,) -> ids (B, T), padded on the right to the longest, and their layout."""
    x = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).long()
    lengths = torch.tensor([len(row) for row in rows])
    return x, Layout.from_attention_mask(torch.arange(x.shape[1]) < lengths[:, None])


class ExampleBatches:
    """Batches of examples, each padded on the right to its longest; every `iter()` is one epoch over all of them.

    Args:
        examples: rows of ids and targets.
        batch_size: rows per batch; the last batch may be smaller.
        shuffle: draws a new order for every epoch.
        bucket: groups examples of similar length, which leaves less padding.
        seed: random seed of the order.

    Attributes:
        epoch: epochs begun, and the whole of `state_dict()`.

    Raises:
        EaseError: there is no example.

    Example:
        >>> task = load_classification("reviews")
        >>> train = ExampleBatches(task.train, 32, shuffle=True, bucket=True)
        >>> val = ExampleBatches(task.val, 32)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        shuffle: bool = False,
        bucket: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or not examples:
            raise EaseError(
                f"a batch needs at least 1 example, got {len(examples)} examples with batch_size {batch_size}"
            )
        check_seed(seed)
        self.examples = examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.bucket = bucket
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in one epoch."""
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        return self._batches(np.random.default_rng([self.seed, self.epoch]))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch = state["epoch"]

    def _batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        order = list(range(len(self.examples)))
        if self.shuffle:
            rng.shuffle(order)
        if self.bucket:
            step = BUCKET * self.batch_size
            chunks = [order[i : i + step] for i in range(0, len(order), step)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(self.examples[i].ids))]
        starts = list(range(0, len(order), self.batch_size))
        if self.shuffle:
            rng.shuffle(starts)
        for start in starts:
            examples = [self.examples[i] for i in order[start : start + self.batch_size]]
            x, layout = pad([example.ids for example in examples])
            targets = [example.targets for example in examples]
            y = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE).long()
            yield Batch(x, y, layout=layout)
