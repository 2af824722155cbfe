"""ease.data.corpus."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ease.data.sources import (
    SPLITS,
    WIKITEXT,
    hub_name,
    read_splits,
)
from ease.data.tokenizers import (
    EOS,
    _bpe_size,
    _tokenizer_from,
    encode,
    train_tokenizer,
)
from ease.errors import check_least

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CACHE_VERSION = 1  # raise it when the same text should give other tokens


# ---------------------------------------------------------------------------------------------------------
# Corpus


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text in three splits that share no document.

    `train`, `val` and `test` are 1-D int32 tensors of token ids below `vocab_size`. `tokenizer_spec` is what
    `load_corpus` was asked for, `tokenizer` the object it led to. `hash` is the SHA-256 of everything that
    decides the tokens: the text of the splits, the tokenizer's spec and `max_tokens`.
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
        """What a report or a checkpoint says about the corpus: plain values, fit for JSON."""
        return {
            "name": self.name,
            "tokenizer": self.tokenizer_spec,
            "vocab_size": self.vocab_size,
            "hash": self.hash,
            "tokens": {split: len(getattr(self, split)) for split in SPLITS},
        }


def load_corpus(
    source: str | os.PathLike[str] = "stdlib",
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    max_tokens: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Read `source` (`read_splits`), train `tokenizer` on its train split (`train_tokenizer`), encode it all.

    A `tokenizers.Tokenizer` is taken as it is, and `eos` is then the id that ends a text (none by default).
    Only the first `max_tokens` tokens of train are kept; of a hub data set no more is read than they take.
    The result is cached in `cache_dir`, by default `$EASE_CACHE` or `~/.cache/ease`. A data set on the hub is
    fetched once, then taken from the cache; any other source is read every time, so its changes are seen.

    Raises EaseError for an unknown source or tokenizer, missing or empty text, and a hub out of reach.
    """
    source = os.fspath(source)
    given, spec = (None, tokenizer) if isinstance(tokenizer, str) else (tokenizer, "given")
    if given is None:
        _bpe_size(spec)  # a wrong spec should not wait for the reading
    check_least(1, max_tokens=max_tokens)

    hub = hub_name(source)
    remote = hub is not None and not Path(hub[0]).exists()
    splits = None if remote else read_splits(source, max_tokens)
    identity = [f"{CACHE_VERSION} {spec} {max_tokens}", *([given.to_str(), str(eos)] if given else [])]
    key = _digest([*identity, source] if splits is None else identity + _flat(splits))
    folder = Path(cache_dir or os.environ.get("EASE_CACHE") or "~/.cache/ease").expanduser()
    path = folder / f"{key}.npz"

    stored = _read_cache(path)
    if stored is None:
        splits = splits or read_splits(source, max_tokens)
        with _spinner(f"tokenizing {source} ({spec})"):
            trained = given or train_tokenizer(spec, splits["train"])
            end = eos if given else trained.token_to_id(EOS)
            stored = {split: encode(trained, splits[split], end) for split in SPLITS}
        stored["train"] = stored["train"][:max_tokens]
        stored["tokenizer"] = np.array(trained.to_str())
        stored["hash"] = np.array(_digest(identity + _flat(splits)))
        _write_cache(path, stored)

    tok = _tokenizer_from(str(stored["tokenizer"]))
    return Corpus(
        name=_display_name(source),
        tokenizer_spec=spec,
        tokenizer=tok,
        vocab_size=tok.get_vocab_size(),
        hash=str(stored["hash"]),
        **{split: torch.from_numpy(stored[split]) for split in SPLITS},
    )


def _display_name(source: str) -> str:
    """The name that reports show: the Python's version belongs to it, a path on this machine does not."""
    if source == "stdlib":
        return f"stdlib-{platform.python_version()}"
    local = Path(source.removeprefix("hf:"))
    return local.resolve().name if local.exists() and source not in WIKITEXT else source


def _flat(splits: dict[str, list[str]]) -> list[str]:
    return [part for split in SPLITS for part in (split, *splits[split])]


def _digest(parts: Iterable[str]) -> str:
    """SHA-256 over the parts, each with its length before it, so that moving a boundary changes the hash."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(b"%d:" % len(data) + data)
    return sha.hexdigest()


def _read_cache(path: Path) -> dict[str, Any] | None:
    """What `_write_cache` put there, or None if it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays.zip.testzip():  # reading alone stops short of the checksum if a shape is damaged
                return None
            return {name: arrays[name] for name in (*SPLITS, "tokenizer", "hash")}
    except Exception:  # whatever a damaged file makes numpy and zipfile raise, the cure is to build it again
        return None


def _write_cache(path: Path, arrays: dict[str, Any]) -> None:
    """A kill at any moment leaves the old file or the new one."""
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
