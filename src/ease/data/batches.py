"""ease.data.batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ease.errors import EaseError, check_least, check_seed

if TYPE_CHECKING:
    pass


# ---------------------------------------------------------------------------------------------------------
# Batches


class TokenBatches:
    """`(x, y)` batches of token windows; every `iter()` is one epoch.

    `ids` (1-D, integer) is cut into windows of `seq_len` tokens with no overlap. x is the window and y the
    same one token later, so every token but the first is predicted once; a rest that fills no window is left
    out. Both are int64 of shape (B, T) = (batch_size, seq_len); with `drop_last=False` the last batch may
    have fewer rows.

    With `shuffle`, a pass over the windows is a permutation that `seed` and the number of the pass determine;
    windows that fill no batch wait for the next one. `epoch` counts the epochs begun, and is all the state there is.

    `max_batches` makes an epoch a slice of a pass. Without `shuffle` it is always the first batches; with it,
    successive epochs go on through the same permutation before the next is drawn.

    Raises EaseError if there is not one full batch (one window, if `drop_last=False`).
    """

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
        check_least(1, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches)
        check_seed(seed)
        if ids.dim() != 1 or ids.is_floating_point():
            raise EaseError(f"ids is {ids.dtype} of shape {tuple(ids.shape)}: give a 1-D tensor of token ids")
        windows = max(0, len(ids) - 1) // seq_len
        if windows < (batch_size if drop_last else 1):
            raise EaseError(
                f"{len(ids)} tokens give {windows} windows of {seq_len}, fewer than a batch of {batch_size}: "
                "use more text, or a smaller seq_len or batch_size"
            )
        self.ids, self.seq_len, self.batch_size = ids, seq_len, batch_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.windows = ids.unfold(0, seq_len + 1, seq_len)  # (windows, T + 1), a view
        self.per_pass = windows // batch_size if drop_last else math.ceil(windows / batch_size)
        self.per_epoch = min(self.per_pass, max_batches or self.per_pass)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return self._batches(first=(self.epoch - 1) * self.per_epoch if self.shuffle else 0)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch = state["epoch"]

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch from batch number `first` of the endless stream of passes."""
        order, drawn = torch.arange(len(self.windows)), -1
        for batch in range(first, first + self.per_epoch):
            number, at = divmod(batch, self.per_pass)
            if self.shuffle and number != drawn:
                permutation = np.random.default_rng([self.seed, number]).permutation(len(self.windows))
                order, drawn = torch.from_numpy(permutation), number
            window = self.windows[order[at * self.batch_size : (at + 1) * self.batch_size]].long()
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
