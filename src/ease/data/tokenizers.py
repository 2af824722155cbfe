"""Tokenizers trained on a text, saved ones, and the encoding of whole corpora.

A tokenizer is a `tokenizers.Tokenizer`. Text that spells a special token stays text: "<eos>" in a document never
becomes the end-of-text id.
"""

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

BYTE_VOCAB = 256 + len((PAD, EOS))

LARGEST_VOCAB = 2**20

CHUNK_CHARS = 1 << 16  # characters per piece of text; pieces are tokenized in parallel


def bpe_vocab_size(spec: str) -> int | None:
    """The BPE vocabulary size that a tokenizer spec stands for; None for "word", which is not BPE.

    Raises:
        EaseError: the spec is none of "bpe:N", "byte" and "word".
    """
    kind, _, size = spec.partition(":")
    if spec in ("byte", "word"):
        return BYTE_VOCAB if spec == "byte" else None
    if kind == "bpe" and size.isdecimal() and BYTE_VOCAB < int(size) <= LARGEST_VOCAB:
        return int(size)
    raise EaseError(f"unknown tokenizer {spec!r}: use bpe:N with N in {BYTE_VOCAB + 1}..{LARGEST_VOCAB}, byte or word")


def train_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Trains the tokenizer that `spec` describes on `texts`. `<pad>` has id 0 and `<eos>` id 1.

    Args:
        spec: one of

            - "bpe:N": byte-level BPE with at most N tokens, N >= 259. Decoding gives back any text exactly.
            - "byte": byte-level without merges: 256 bytes and the special tokens. Decoding is exact.
            - "word": every whitespace-separated word of `texts`; unknown words become `<unk>`. Decoding joins the
              words with single spaces.
        texts: the documents to train on; "byte" reads none of them.

    Raises:
        EaseError: the spec is unknown.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = bpe_vocab_size(spec)
    if size is None:
        special = [PAD, EOS, UNK]
        words = {word for text in texts for word in text.split()}
        vocab = {word: i for i, word in enumerate(special + sorted(words.difference(special)))}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(special)
        return tokenizer_from_json(tokenizer.to_str())

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if size == BYTE_VOCAB:
        texts = ()  # without room for merges there is nothing to learn from them
    tokenizer.train_from_iterator((chunk for text in texts for chunk in _chunks(text)), trainer)
    return tokenizer_from_json(tokenizer.to_str())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer that `tokenizer.save(path)` wrote.

    Raises:
        EaseError: the file is missing or damaged.
    """
    try:
        return tokenizer_from_json(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise EaseError(f"no tokenizer in {os.fspath(path)} ({error}): use a saved tokenizer.json") from error


def tokenizer_from_json(json: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, given as a string."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json)
    tokenizer.encode_special_tokens = True  # "<eos>" in a text stays text; JSON does not carry this flag
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], eos: int | None) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Encodes all texts into one row of ids (N,), with `eos` after each text unless it is None."""
    end = np.array([] if eos is None else [eos], np.int32)
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for text in texts:
        chunks = list(_chunks(text))
        for i in range(0, len(chunks), 256):  # not all at once: an encoding takes some 100 bytes a token
            encodings = tokenizer.encode_batch_fast(chunks[i : i + 256], add_special_tokens=False)
            parts += [np.array(encoding.ids, np.int32) for encoding in encodings]
        parts.append(end)
    return np.concatenate(parts)


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces that end at line ends, each a little over CHUNK_CHARS."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def token_strings(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token, white space included, so that the strings joined are the text.

    For display only: a token that is part of a character becomes U+FFFD, and special tokens show their name.
    """
    # Decoded behind another token, each id keeps the space that decoders drop at the start of a text.
    anchor = tokenizer.encode("a", add_special_tokens=False).ids
    start = len(tokenizer.decode(anchor, skip_special_tokens=False))
    ids = list(ids)
    pieces = tokenizer.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
    first = tokenizer.decode(ids[:1], skip_special_tokens=False)
    return [first, *(piece[start:] for piece in pieces[1:])] if ids else []
