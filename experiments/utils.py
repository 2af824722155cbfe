"""Random seeds, the device, and WikiText in whole words.

The word level is that of the original recipe: text lower-cased and split at white space, with a vocabulary of every
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
    """Seed the generators of Python, numpy and torch, including those of accelerators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that other libraries draw from
    torch.manual_seed(seed)


def get_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    return torch.device(choose_device("auto"))


def load_wikitext_words(
    data_dir: str | os.PathLike[str] | None = None, *, allow_overlap: bool = False
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """WikiText-2 as word ids: {"train": ids, "val": ids, "test": ids}, each 1-D int64, and word -> id.

    Reads the hub, or the folder `data_dir` with train.txt, valid.txt and test.txt. The vocabulary is every
    lower-cased word of all splits with `<pad>` (id 0) and `<unk>` (id 1). The test split in batches:

        words, vocab = load_wikitext_words(data_dir)
        test = TokenBatches(words["test"], seq_len, batch_size)

    Raises EaseError as `ease.data.read_splits` does, which also says what `allow_overlap` accepts.
    """
    splits = read_splits("wikitext-2" if data_dir is None else data_dir, allow_overlap=allow_overlap)
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
    """The original recipe's loaders over `load_wikitext_words`: (train, validation, vocabulary size).

    A sample has seq_len + 1 words. Training takes the first `num_samples` of them, shuffled; validation the first
    num_samples // 5, or all if there are fewer, in order.

    Args:
        num_samples: training samples.
        batch_size: sequences per batch.
        seq_len: tokens per sequence.
        seed: random seed of the training order.
        data_dir: see `load_wikitext_words`.

    Returns:
        Loaders of full batches `(x, y)`, int64 of shape (batch_size, seq_len), and the vocabulary size.

    Raises:
        EaseError: the training text has fewer words than `num_samples` requires, or a split less than one full batch.
    """
    words, vocab = load_wikitext_words(data_dir)
    sample = max(seq_len, 0) + 1  # TokenBatches rejects a seq_len below 1
    required = num_samples * sample
    if not 0 < required <= len(words["train"]):
        most = len(words["train"]) // sample
        raise EaseError(f"num_samples must be 1 to {most} for this training text, got {num_samples}")
    train = TokenBatches(words["train"][:required], seq_len, batch_size, shuffle=True, seed=seed)
    val = TokenBatches(words["val"][: num_samples // 5 * sample], seq_len, batch_size)
    return train, val, len(vocab)
