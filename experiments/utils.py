"""What the experiments share: seeds, the device, and WikiText in whole words.

The word level is the seed recipe's own: text lower-cased and split at white space, with a vocabulary of every
word of all three splits. Its perplexities compare with each other only, not with those of `ease.data`'s
corpora, whose vocabularies come from the training split alone.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from torch import Tensor

from ease.data.batches import TokenBatches
from ease.data.sources import SPLITS, read_splits
from ease.data.tokenizers import PAD, UNK
from ease.devices import choose_device
from ease.errors import EaseError


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, the accelerators' included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that other libraries draw from
    torch.manual_seed(seed)


def get_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    return torch.device(choose_device("auto"))


def load_wikitext_words(
    data_dir: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """WikiText-2 as word ids: {"train": ids, "val": ids, "test": ids}, each 1-D int64, and word -> id.

    Reads the hub, or the folder `data_dir` with train.txt, valid.txt and test.txt. The vocabulary is every
    lower-cased word of all splits with `<pad>` (id 0) and `<unk>` (id 1). The test split in batches:

        words, vocab = load_wikitext_words(data_dir)
        test = TokenBatches(words["test"], seq_len, batch_size)

    Raises EaseError as `ease.data.read_splits` does.
    """
    splits = read_splits("wikitext-2" if data_dir is None else data_dir)
    words = {split: " ".join(splits[split]).lower().split() for split in SPLITS}
    known = sorted(set().union(*words.values()) - {PAD, UNK})
    vocab = {word: i for i, word in enumerate([PAD, UNK, *known])}
    return {split: torch.tensor([vocab[word] for word in words[split]]) for split in SPLITS}, vocab


def create_wikitext_dataloaders(
    num_samples: int,
    batch_size: int,
    seq_len: int = 32,
    seed: int = 42,
    data_dir: str | os.PathLike[str] | None = None,
) -> tuple[TokenBatches, TokenBatches, int]:
    """The seed recipe's loaders over `load_wikitext_words`: (train, validation, vocabulary size).

    A sample is worth seq_len + 1 words. Train takes the first `num_samples` of them, shuffled by `seed`;
    validation the first num_samples // 5, or all there are if fewer, in order. Both give full batches of
    `(x, y)` only, int64 of shape (batch_size, seq_len).

    Raises EaseError if train has fewer words than `num_samples` takes or a split not one full batch.
    """
    words, vocab = load_wikitext_words(data_dir)
    sample = max(seq_len, 0) + 1  # a seq_len below 1 is refused with the batches
    wanted = num_samples * sample
    if not 0 < wanted <= len(words["train"]):
        most = len(words["train"]) // sample
        raise EaseError(f"num_samples is {num_samples}: use 1 to {most}, all that the training text has")
    train = TokenBatches(words["train"][:wanted], seq_len, batch_size, shuffle=True, seed=seed)
    val = TokenBatches(words["val"][: num_samples // 5 * sample], seq_len, batch_size)
    return train, val, len(vocab)
