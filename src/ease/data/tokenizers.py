"""Tokenizers trained on a text, saved ones, and the encoding of whole corpora.

A tokenizer is a `tokenizers.Tokenizer`. With one that ease trains, text that spells a special token stays text: "<eos>"
in a document never becomes the end-of-text id. With that of a checkpoint, such text is the special token, as in
transformers. `tokenizer.encode_special_tokens` holds this choice.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ease.errors import EaseError, check_integer, first_line
from ease.files import read_json, write_text
from ease.interrupts import interruptible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and, for `word` only, 2

BYTE_VOCAB = 256 + len((PAD, EOS))

LARGEST_VOCAB = 2**20

LARGEST_ID = 2**24  # above every vocabulary, and quick to count up to

LONGEST_WORD = 10_000  # characters of a word that a tokenizer is trained on; longer ones are cut

# A word is a run without white space, with one space before it, or a run of white space (Unicode's, as in the trainer).
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# From the start of a run only, which keeps the search linear.
LONG_RUN = re.compile(f"(?<![^{_SPACE}])[^{_SPACE}]{{{LONGEST_WORD}}}|(?<![{_SPACE}])[{_SPACE}]{{{LONGEST_WORD}}}")

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
        return tokenizer_from_json(tokenizer.to_str(), split_special_tokens=True)

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
    chunks = (piece for text in texts for chunk in _chunks(text) for piece in _bounded(chunk))
    interruptible(lambda: tokenizer.train_from_iterator(chunks, trainer))
    return tokenizer_from_json(tokenizer.to_str(), split_special_tokens=True)


def load_tokenizer(
    path: str | os.PathLike[str], vocab_size: int | None = None, *, split_special_tokens: bool | None = None
) -> Tokenizer:
    """Loads a tokenizer that `save_tokenizer` or `tokenizer.save(path)` wrote.

    Args:
        path: the file tokenizer.json.
        vocab_size: rows of the embedding that the ids are for; None if it is not known.
        split_special_tokens: whether text that spells a special token stays text. By default as the
            tokenizer_config.json beside the file says; without one, true for a tokenizer that ease trained and false,
            as in transformers, for others.

    Raises:
        EaseError: the file is missing or damaged, or an id has no row in the embedding.
    """
    file = Path(path)
    content = read_tokenizer_json(file, vocab_size)
    if split_special_tokens is None:
        split_special_tokens = _splits_special_tokens(file, content)
    try:
        return tokenizer_from_json(file.read_text(encoding="utf-8"), split_special_tokens)
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EaseError(f"no tokenizer in {file} ({first_line(error)}): use a saved tokenizer.json") from error


def read_tokenizer_json(file: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The content of a tokenizer.json that is safe to load: every id has a row in the embedding.

    Raises:
        EaseError: the file is missing or damaged, or an id has no row in the embedding.
    """
    fix = "use the tokenizer.json that the model was trained with"
    content = read_json(file, f"it has no tokenizer, so {fix}")
    _check_sizes(file, content, LARGEST_ID if vocab_size is None else vocab_size, fix)
    return content


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer as JSON, completely or not at all; raises OSError, unlike the library, if it cannot."""
    write_text(path, tokenizer.to_str(pretty=True))


def _check_sizes(file: Path, content: dict[str, Any], vocab_size: int, fix: str) -> None:
    """Checks the numbers that the library would allocate memory for or count up to."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.items()) if isinstance(vocab, dict) else []
    added = content.get("added_tokens") or ()
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise EaseError(f"{file} is damaged (added_tokens must be a list of objects): {fix}")
    ids += [(token.get("content"), token.get("id")) for token in added]
    for token, i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise EaseError(
                f"{file} gives the token {reprlib.repr(token)} the id {reprlib.repr(i)}, and ids must lie in "
                f"0..{vocab_size - 1}: {fix}"
            )
    padding = content.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, dict) else None
        for name, size in (("strategy", fixed), ("pad_to_multiple_of", padding.get("pad_to_multiple_of"))):
            if size is not None:
                check_integer(f"padding {name} in {file}", size, 0, LARGEST_ID)


def _splits_special_tokens(file: Path, content: dict[str, Any]) -> bool:
    """What `split_special_tokens` is by default for a tokenizer.json with this content."""
    if (config := file.with_name("tokenizer_config.json")).is_file():
        return bool(read_json(config, "restore it, or remove it").get("split_special_tokens"))
    checkpoint = file.with_name("config.json")
    own = {token.get("content") for token in content.get("added_tokens") or ()} <= {PAD, EOS, UNK}
    return own and not (checkpoint.is_file() and "model_type" in read_json(checkpoint))


def tokenizer_from_json(json: str, split_special_tokens: bool) -> Tokenizer:
    """The tokenizer of a tokenizer.json, given as a string."""
    from tokenizers import Tokenizer

    return prepare(Tokenizer.from_str(json), split_special_tokens)


def prepare(tokenizer: Tokenizer, split_special_tokens: bool) -> Tokenizer:
    """Sets whether text that spells a special token stays text, and returns the tokenizer."""
    tokenizer.encode_special_tokens = split_special_tokens  # JSON does not carry this flag
    tokenizer.no_truncation()  # as in transformers: a saved file has what the last call before it had set
    tokenizer.no_padding()
    return tokenizer


def surrounding_tokens(tokenizer: Tokenizer, eos: int | None) -> tuple[list[int], list[int]]:
    """The ids before and after a text: those that the tokenizer adds, such as bos, and then `eos` unless it is None."""
    encoding = tokenizer.encode("a")
    pairs = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    before, after = ([i for i, _ in takewhile(lambda pair: pair[1], side)] for side in (pairs, pairs[::-1]))
    after = after[::-1] if len(before) < len(pairs) else []
    return before, after if eos is None or after[-1:] == [eos] else [*after, eos]


def encode(
    tokenizer: Tokenizer, texts: list[str], eos: int | None, *, add_special_tokens: bool = True
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Encodes all texts into one row of ids (N,).

    Args:
        tokenizer: the tokenizer.
        texts: the documents.
        eos: the id after each document, or None.
        add_special_tokens: add what the tokenizer adds to a text, such as bos.
    """
    before, after = surrounding_tokens(tokenizer, eos) if add_special_tokens else ([], [] if eos is None else [eos])
    begin, end = np.array(before, np.int32), np.array(after, np.int32)
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for text in texts:
        parts.append(begin)
        chunks = list(_chunks(text))
        for i in range(0, len(chunks), 256):  # not all at once: an encoding takes some 100 bytes a token
            encode_some = partial(tokenizer.encode_batch_fast, chunks[i : i + 256], add_special_tokens=False)
            # A document of a stream is encoded sooner than a thread for it is started.
            encodings = encode_some() if len(text) <= CHUNK_CHARS else interruptible(encode_some)
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


def _bounded(chunk: str) -> Iterator[str]:
    """The chunk, cut inside words above LONGEST_WORD characters: the trainer is quadratic in the length of a word.

    200,000 letters as one word took it 60 s and 100,000 took 15 s; a million in words of 10,000 took 28 s. All words
    up to that length, and so the vocabulary of ordinary text, stay the same.
    """
    from tokenizers import pre_tokenizers

    start = 0
    if LONG_RUN.search(chunk):  # otherwise no word can be that long
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # the tokenizer's own is locked while it trains
        for _, (first, end) in words.pre_tokenize_str(chunk):
            for cut in range(first + LONGEST_WORD // 2, end - LONGEST_WORD // 2 + 1, LONGEST_WORD // 2):
                if end - first > LONGEST_WORD:
                    yield chunk[start:cut]
                    start = cut
    yield chunk[start:]


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
