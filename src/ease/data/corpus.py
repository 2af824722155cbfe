"""A tokenized corpus: text of a source in three splits, as ids, cached on disk.

- The tokenizer is trained on the train split alone; every document ends with the token `<eos>`.
- A cache file is named after a hash of its text, so that it can be deleted at any time and is never stale.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ease.data.hub import WIKITEXT, hub_name
from ease.data.sources import SPLITS, Splits, read_splits
from ease.data.tokenizers import (
    EOS,
    bpe_vocab_size,
    encode,
    surrounding_tokens,
    tokenizer_from_json,
    train_tokenizer,
)
from ease.errors import check_counts, checked
from ease.files import cache_folder

CACHE_VERSION = 1  # raise it when the same text should give other tokens


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text in three splits that share no document.

    Attributes:
        name: what reports call the corpus.
        tokenizer_spec: the spec that the tokenizer was trained from, or "given".
        tokenizer: the tokenizer.
        vocab_size: its number of tokens; every id lies below it.
        train, val, test: 1-D int32 tensors of token ids.
        hash: SHA-256 of everything that decides the tokens: the text of the splits, the tokenizer's spec and
            `max_tokens`.
    """

    name: str
    tokenizer_spec: str
    tokenizer: Tokenizer
    vocab_size: int
    train: Tensor
    val: Tensor
    test: Tensor
    hash: str

    def describe(self) -> dict[str, Any]:
        """What reports and checkpoints record about the corpus: plain values, fit for JSON."""
        return {
            "name": self.name,
            "tokenizer": self.tokenizer_spec,
            "vocab_size": self.vocab_size,
            "hash": self.hash,
            "tokens": {split: len(getattr(self, split)) for split in SPLITS},
        }


@checked
def load_corpus(
    source: str | os.PathLike[str] = "stdlib",
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    allow_overlap: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Loads a text, trains a tokenizer on its train split, and encodes all three splits.

    A data set on the hub is fetched once and then taken from the cache. Every other source is read each time, so that
    changes to its files are seen.

    Args:
        source: "stdlib", a text file, a .jsonl, .json, .csv, .tsv or .parquet file with a column "text", a folder with
            train.txt and valid.txt, "wikitext-2", "wikitext-103" or "hf:NAME/CONFIG"; `ease.data.sources.read_splits`
            says how each is split.
        tokenizer: a spec ("bpe:N", "byte" or "word", see `train_tokenizer`), or a tokenizer to use as it is; its
            `encode_special_tokens` decides whether text that spells a special token stays text.
        eos: the id that ends a document, with a tokenizer that is not a spec; none by default.
        add_special_tokens: add to each document what a given tokenizer adds to a text, such as bos.
        max_tokens: tokens of train to keep; of a hub data set no more is read than they take.
        allow_overlap: accept a source whose splits share most of their text.
        cache_dir: where to cache the result; `$EASE_CACHE` or `~/.cache/ease` by default.

    Returns:
        The corpus, its splits as 1-D int32 tensors.

    Raises:
        EaseError: the source or the spec is unknown, a text is missing or empty, two splits share more than half of the
            smaller one, or the hub cannot be reached.

    Example:
        >>> corpus = load_corpus("stdlib", "bpe:2048", max_tokens=100_000)
        >>> batches = TokenBatches(corpus.train, seq_len=64, batch_size=8, shuffle=True)
    """
    source = os.fspath(source)
    given_tokenizer, spec = (None, tokenizer) if isinstance(tokenizer, str) else (tokenizer, "given")
    if given_tokenizer is None:
        bpe_vocab_size(spec)  # refuse a wrong spec before the text is read
    check_counts(1, max_tokens=max_tokens)

    hub = hub_name(source)
    remote = hub is not None and not Path(hub[0]).exists()
    splits = None if remote else read_splits(source, max_tokens, allow_overlap=allow_overlap)
    identity = [f"{CACHE_VERSION} {spec} {max_tokens}"]
    if given_tokenizer:
        identity += [given_tokenizer.to_str(), str(eos)]
        # Only where the tokens differ from those of earlier versions, so that their runs keep their hash.
        if not given_tokenizer.encode_special_tokens:
            identity.append("special tokens in the text")
        if add_special_tokens and any(surrounding_tokens(given_tokenizer, None)):
            identity.append("special tokens around the text")
    if remote and allow_overlap:  # what was not checked must not be taken from the cache by a call that checks
        identity.append("overlap allowed")
    key = _digest([*identity, source] if splits is None else identity + _flat(splits))
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    path = folder / f"{key}.npz"

    arrays = _read_cache(path)
    if arrays is None:
        splits = splits or read_splits(source, max_tokens, allow_overlap=allow_overlap)
        with _spinner(f"tokenizing {source} ({spec})"):
            trained = given_tokenizer or train_tokenizer(spec, splits["train"])
            end = eos if given_tokenizer else trained.token_to_id(EOS)
            arrays = {
                split: encode(trained, splits[split], end, add_special_tokens=add_special_tokens) for split in SPLITS
            }
        arrays["train"] = arrays["train"][:max_tokens]
        arrays["tokenizer"] = np.array(trained.to_str())
        arrays["hash"] = np.array(_digest(identity + _flat(splits)))
        _write_cache(path, arrays)

    loaded_tokenizer = given_tokenizer
    if loaded_tokenizer is None:
        loaded_tokenizer = tokenizer_from_json(str(arrays["tokenizer"]), split_special_tokens=True)
    return Corpus(
        name=_display_name(source),
        tokenizer_spec=spec,
        tokenizer=loaded_tokenizer,
        vocab_size=loaded_tokenizer.get_vocab_size(),
        hash=str(arrays["hash"]),
        **{split: torch.from_numpy(arrays[split]) for split in SPLITS},
    )


def _display_name(source: str) -> str:
    """The name that reports show: the Python's version belongs to it, a path on this machine does not."""
    if source == "stdlib":
        return f"stdlib-{platform.python_version()}"
    local = Path(source.removeprefix("hf:"))
    return local.resolve().name if local.exists() and source not in WIKITEXT else source


def _flat(splits: Splits) -> list[str]:
    """Every split's name followed by its documents."""
    return [part for split in SPLITS for part in (split, *splits[split])]


def _digest(parts: Iterable[str]) -> str:
    """SHA-256 over the parts, each with its length before it, so that moving a boundary changes the hash."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(b"%d:" % len(data) + data)
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# The cache


def _read_cache(path: Path) -> dict[str, Any] | None:
    """The arrays that `_write_cache` stored, or None if the file is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays.zip.testzip():  # reading alone stops short of the checksum if a shape is damaged
                return None
            return {name: arrays[name] for name in (*SPLITS, "tokenizer", "hash")}
    except Exception:  # numpy and zipfile raise many types for a damaged file; it is rebuilt in every case
        return None


def _write_cache(path: Path, arrays: dict[str, Any]) -> None:
    """Replaces the file in one step, so that a kill at any moment leaves the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(f"corpus not cached ({error}): set EASE_CACHE to a writable folder", stacklevel=3)


@contextmanager
def _spinner(message: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield
