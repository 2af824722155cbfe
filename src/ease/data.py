"""Corpora, tokenizers and batches: from a source of text to `(x, y)`.

- `stdlib` is real text that every machine has: the sources of the running Python's standard library.
- A corpus has three splits, and no document is in two of them. The tokenizer learns from train alone.
- Line ends are always "\\n"; every document ends with the token `<eos>`.
- A tokenized corpus is cached under the hash of its text, so the cache can be deleted but never be stale.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ease.errors import EaseError, check_least, check_seed, needs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "val", "test")
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and, for `word` only, 2
WIKITEXT = {f"wikitext-{n}": ("Salesforce/wikitext", f"wikitext-{n}-raw-v1") for n in ("2", "103")}
BYTE_VOCAB, LARGEST_VOCAB = 256 + len((PAD, EOS)), 2**20
CHUNK_CHARS = 1 << 16  # text is tokenized in pieces of about this size, in parallel
CHARS_PER_TOKEN = 8  # a hub data set is read this far for each token asked for; text has 3 to 6
HELD_OUT_CHARS = 8_000_000  # no more than this is read of a hub data set's own validation or test split
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


# ---------------------------------------------------------------------------------------------------------
# Sources: each gives the documents of the three splits


def read_splits(source: str | os.PathLike[str], max_tokens: int | None = None) -> dict[str, list[str]]:
    """The documents of each split of `source`: {"train": [...], "val": [...], "test": [...]}.

    - "stdlib": the Python files of the standard library, split by top-level module or package.
    - a folder: train.txt, valid.txt and test.txt, a document each. Without test.txt the first half of
      valid.txt (by characters, to the end of the line) is val and the rest is test.
    - a text file: the first 80% of it (by characters, to the end of the line) is train, the next 10% val, the
      last 10% test.
    - "wikitext-2", "wikitext-103": the raw texts from the Hugging Face hub, one document a split.
    - "hf:NAME" or "hf:NAME/CONFIG": a hub data set with a column "text", a row a document. NAME is OWNER/NAME
      as on the hub, or a local path that `datasets.load_dataset` opens. If there is no validation split, rows
      0, 20, 40, ... of train are val; if there is no test split, rows 1, 21, 41, ... are test.

    `max_tokens` ends the reading of a hub data set's train split once it has 8 characters for each token.
    Raises EaseError if the source is unknown, cannot be read, or leaves a split without text.
    """
    source = os.fspath(source)
    hub = hub_name(source)
    if source == "stdlib":
        splits = _read_stdlib()
    elif hub:
        splits = _read_hub(*hub, max_tokens)
    elif Path(source).is_dir():
        splits = _read_folder(Path(source))
    elif Path(source).is_file():
        splits = _read_file(Path(source))
    else:
        raise EaseError(
            f"no data at {source!r}: use stdlib, wikitext-2, wikitext-103, hf:NAME/CONFIG, a text file, "
            "or a folder with train.txt and valid.txt"
        )
    for split in SPLITS:
        if not any(text.strip() for text in splits[split]):
            raise EaseError(f"{source} leaves the {split} split without text: give a longer text")
    return splits


# Tests and data tables are not the prose of a library, and what is installed differs by machine.
STDLIB_SKIP = {
    *("test", "tests", "idle_test", "turtledemo", "__phello__"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),
    *("site-packages", "dist-packages", "lib-dynload", "_bundled", "sitecustomize.py", "usercustomize.py"),
}


def _read_stdlib() -> dict[str, list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIP and not name.startswith("config-")]
        paths += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and name not in STDLIB_SKIP and not name.startswith("_sysconfigdata")
        ]
    if not paths:
        raise EaseError(f"this Python has no sources in {root}: use a folder of texts instead of stdlib")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(paths, key=_number):  # shuffled once and for all: every prefix is a fair sample
        splits[_stdlib_split(path)].append(_read_text(root / path, errors="replace"))
    return splits


def _stdlib_split(path: str) -> str:
    """The split of a library file, by its top-level name alone, so that no package is in two splits.

    With this salt val and test each hold 10 to 13% of the bytes in every Python from 3.8 to 3.13.
    """
    top = path.split("/")[0].removesuffix(".py")
    return {0: "val", 1: "test"}.get(_number(f"lego/{top}") % 10, "train")


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _read_folder(folder: Path) -> dict[str, list[str]]:
    for name in ("train.txt", "valid.txt"):
        if not (folder / name).is_file():
            raise EaseError(f"{folder} has no {name}: put train.txt, valid.txt and maybe test.txt there")
    val = _read_text(folder / "valid.txt")
    if (folder / "test.txt").is_file():
        test = _read_text(folder / "test.txt")
    else:
        val, test = _cut(val, 0.5)
    return {"train": [_read_text(folder / "train.txt")], "val": [val], "test": [test]}


def _read_file(path: Path) -> dict[str, list[str]]:
    train, held_out = _cut(_read_text(path), 0.8)
    val, test = _cut(held_out, 0.5)
    return {"train": [train], "val": [val], "test": [test]}


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Two parts, cut at the first end of a line after `fraction` of the characters."""
    at = text.find("\n", int(fraction * len(text))) + 1 or len(text)
    return text[:at], text[at:]


def _read_text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)  # all line ends become \n
    except (OSError, UnicodeDecodeError) as error:
        raise EaseError(f"cannot read {path} as UTF-8 ({error}): convert it or use another file") from error


def hub_name(source: str) -> tuple[str, str | None] | None:
    """The arguments of `load_dataset`, or None for a source that is not read through `datasets`."""
    if source in WIKITEXT:
        return WIKITEXT[source]
    if not source.startswith("hf:"):
        return None
    name = source.removeprefix("hf:")
    if not name:
        raise EaseError("hf: names no data set: use hf:NAME or hf:NAME/CONFIG")
    owner_and_name, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    return (name, None) if Path(name).exists() or not config else (owner_and_name, config)


def _read_hub(name: str, config: str | None, max_tokens: int | None) -> dict[str, list[str]]:
    with reading(name):
        found = open_data_set(name, config)
        rows = {split: text_column(name, found[split]) for split in found}
        splits = _assign(name, rows, math.inf if max_tokens is None else CHARS_PER_TOKEN * max_tokens)
    if name == WIKITEXT["wikitext-2"][0]:  # its rows are the lines of one text
        return {split: ["".join(lines)] for split, lines in splits.items()}
    return splits


def open_data_set(name: str, config: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, as a stream: split -> rows. To be used inside `reading`."""
    return needs("datasets", "hf").load_dataset(name, config, streaming=True, **options)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever goes wrong in `datasets` inside becomes one sentence about `name`."""
    try:
        yield
    except EaseError:
        raise
    except Exception as error:  # the hub's, the network's and the builders' errors share no base class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise EaseError(
            f"cannot read {name} through Hugging Face datasets ({reason}): check the name and the network, "
            "or use a local folder with train.txt and valid.txt (--data DIR) or --data stdlib"
        ) from error


def text_column(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The column "text" of rows; every line end is a newline."""
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise EaseError(f"{name} has no text in a column 'text' (only {', '.join(row)}): use another")
        yield row["text"].replace("\r\n", "\n").replace("\r", "\n")


def _assign(name: str, rows: dict[str, Iterator[str]], train_chars: float) -> dict[str, list[str]]:
    if "train" not in rows:
        raise EaseError(f"{name} has no split 'train' (only {', '.join(rows)}): use another")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    held_out = [("val", "validation"), ("test", "test")]
    lent = {i: split for i, (split, theirs) in enumerate(held_out) if theirs not in rows}
    for i, text in enumerate(rows["train"]):
        split = lent.get(i % 20, "train")
        splits[split].append(text)
        train_chars -= len(text) if split == "train" else 0
        if train_chars <= 0:
            break
    for split, theirs in held_out:
        chars = 0
        for text in rows.get(theirs, ()):
            splits[split].append(text)
            chars += len(text)
            if chars >= HELD_OUT_CHARS:
                break
    return splits


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
