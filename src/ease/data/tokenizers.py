"""ease.data.tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ease.errors import EaseError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and, for `word` only, 2

BYTE_VOCAB, LARGEST_VOCAB = 256 + len((PAD, EOS)), 2**20

CHUNK_CHARS = 1 << 16  # text is tokenized in pieces of about this size, in parallel


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def train_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """The `tokenizers.Tokenizer` that `spec` asks for, trained on `texts`.

    - "bpe:N": byte-level BPE with at most N tokens, N >= 259. Decoding gives back any text exactly.
    - "byte": the same without merges, 256 bytes and the special tokens. Decoding is exact, too.
    - "word": every word between white space in `texts`; others become `<unk>`. Decoding joins with spaces.

    `<pad>` has id 0 and `<eos>` id 1. Raises EaseError for any other spec.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = _bpe_size(spec)
    if size is None:
        special = [PAD, EOS, UNK]
        words = {word for text in texts for word in text.split()}
        vocab = {word: i for i, word in enumerate(special + sorted(words.difference(special)))}
        tok = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tok.add_special_tokens(special)
        return _tokenizer_from(tok.to_str())

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if size == BYTE_VOCAB:
        texts = ()  # without room for merges there is nothing to learn from them
    tok.train_from_iterator((chunk for text in texts for chunk in _chunks(text)), trainer)
    return _tokenizer_from(tok.to_str())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `tokenizer.save(path)` wrote. Raises EaseError if the file is missing or damaged."""
    try:
        return _tokenizer_from(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise EaseError(f"no tokenizer in {os.fspath(path)} ({error}): use a saved tokenizer.json") from error


def token_strings(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token, white space included: joined they show the text. For display only: a token
    that is part of a character shows as U+FFFD, and special tokens by their name."""
    # Decoded behind another token, each id keeps the space that decoders drop at the start of a text.
    anchor = tokenizer.encode("a", add_special_tokens=False).ids
    start = len(tokenizer.decode(anchor, skip_special_tokens=False))
    ids = list(ids)
    pieces = tokenizer.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
    first = tokenizer.decode(ids[:1], skip_special_tokens=False)
    return [first, *(piece[start:] for piece in pieces[1:])] if ids else []


def _bpe_size(spec: str) -> int | None:
    """The vocabulary size that a spec asks of BPE; None for `word`, whose vocabulary is not BPE's."""
    kind, _, size = spec.partition(":")
    if spec in ("byte", "word"):
        return BYTE_VOCAB if spec == "byte" else None
    if kind == "bpe" and size.isdecimal() and BYTE_VOCAB < int(size) <= LARGEST_VOCAB:
        return int(size)
    raise EaseError(f"unknown tokenizer {spec!r}: use bpe:N with N in {BYTE_VOCAB + 1}..{LARGEST_VOCAB}, byte or word")


def _tokenizer_from(json: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tok = Tokenizer.from_str(json)
    tok.encode_special_tokens = True  # a text that says "<eos>" does not end; JSON does not carry this flag
    return tok


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces that end at line ends, each a little over CHUNK_CHARS."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def encode(tok: Tokenizer, texts: list[str], eos: int | None) -> np.ndarray[Any, np.dtype[np.int32]]:
    """All texts in one row of ids, `eos` after each."""
    end = np.array([] if eos is None else [eos], np.int32)
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for text in texts:
        chunks = list(_chunks(text))
        for i in range(0, len(chunks), 256):  # not all at once: an encoding takes some 100 bytes a token
            parts += [
                np.array(e.ids, np.int32) for e in tok.encode_batch_fast(chunks[i : i + 256], add_special_tokens=False)
            ]
        parts.append(end)
    return np.concatenate(parts)
