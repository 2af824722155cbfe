"""Sources of text, each read into the documents of three splits.

`SOURCES` at the end of this file lists them. To add one, write a function `read(source, max_tokens) -> splits` and give
it a line there. No document is in two splits, every line end is "\\n", and what a source gives depends on nothing but
the source: the standard library, for one, is split by a hash of module names.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ease.data.hub import WIKITEXT, hub_errors, hub_name, open_data_set
from ease.data.overlap import check_overlap
from ease.data.records import FORMATS, check_no_utf16, format_of, read_records, texts
from ease.errors import EaseError

SPLITS = ("train", "val", "test")

FILE_NAMES = {"train": "train", "val": "valid", "test": "test"}  # our split -> the name of its file in a folder

Splits = dict[str, list[str]]  # split -> documents

Own = tuple[str, ...]  # the splits that a source itself has and that may overlap; the others are cut from them

SHORTEST = 1000  # characters of a text that is cut within a line; a shorter one fills no batch

# ---------------------------------------------------------------------------------------------------------
# The standard library

# Tests and data tables are not the prose of a library, and what is installed differs by machine.
STDLIB_SKIP = {
    *("test", "tests", "idle_test", "turtledemo", "__phello__"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),
    *("site-packages", "dist-packages", "lib-dynload", "_bundled", "sitecustomize.py", "usercustomize.py"),
}


def _read_stdlib(source: str, max_tokens: int | None) -> tuple[Splits, Own]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_SKIP and not name.startswith("config-")]
        paths += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and name not in STDLIB_SKIP and not name.startswith("_sysconfigdata")
        ]
    if not paths:
        raise EaseError(f"this Python has no sources in {root}: use a folder of texts instead of stdlib")
    splits: Splits = {split: [] for split in SPLITS}
    for path in sorted(paths, key=_hash_number):  # one fixed shuffle, so that every prefix is a fair sample
        splits[_stdlib_split(path)].append(_read_text(root / path, errors="replace"))
    return splits, ("train",)


def _stdlib_split(path: str) -> str:
    """The split of a library file, by its top-level name alone, so that no package is in two splits.

    With this salt val and test each hold 10 to 13% of the bytes in every Python from 3.8 to 3.13.
    """
    top = path.split("/")[0].removesuffix(".py")
    return {0: "val", 1: "test"}.get(_hash_number(f"lego/{top}") % 10, "train")


def _hash_number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


# ---------------------------------------------------------------------------------------------------------
# Local text


def _read_folder(source: str, max_tokens: int | None) -> tuple[Splits, Own]:
    found = {split: _file_of(Path(source), name) for split, name in FILE_NAMES.items()}
    for split in ("train", "val"):
        if found[split] is None:
            raise EaseError(
                f"{source} has no {FILE_NAMES[split]}.txt: put train.txt, valid.txt and optionally test.txt there, or "
                f"files of these names that end in {FORMATS}"
            )
    files = {split: file for split, file in found.items() if file is not None}
    splits = {split: _read_documents(file) for split, file in files.items()}
    if "test" not in splits:
        val = splits["val"]
        if len(val) == 1:
            splits["val"], splits["test"] = ([part] for part in _cut(val[0], 0.5))
        else:
            splits["val"], splits["test"] = val[: (len(val) + 1) // 2], val[(len(val) + 1) // 2 :]
    return splits, tuple(files)


def _file_of(folder: Path, name: str) -> Path | None:
    """The file of a split: its text, or its records."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name.split(".")[0] == name and (file.suffix == ".txt" or format_of(file))
    ]
    if len(files) > 1:
        raise EaseError(f"{folder} has {' and '.join(file.name for file in files)}: leave one of them there")
    return files[0] if files else None


def _read_documents(file: Path) -> list[str]:
    return list(texts(str(file), read_records(file))) if format_of(file) else [_read_text(file)]


def _read_file(source: str, max_tokens: int | None) -> tuple[Splits, Own]:
    if format_of(Path(source)):
        rows = {"train": texts(source, read_records(Path(source)))}
        return _read_rows(source, rows, _most_chars(max_tokens)), ("train",)
    train, held_out = _cut(_read_text(Path(source)), 0.8)
    val, test = _cut(held_out, 0.5)
    return {"train": [train], "val": [val], "test": [test]}, ("train",)


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Two parts, cut at the first line end after `fraction` of the characters.

    If it takes more than half of the rest to get there, the cut is at the first white space instead, and if that is no
    nearer, or the text too short to fill a batch, at that character.
    """
    at = int(fraction * len(text))
    near = at + (len(text) - at) // 2
    if end := text.find("\n", at, near) + 1:
        return text[:end], text[end:]
    if len(text) < SHORTEST:
        end = text.find("\n", at) + 1 or len(text)
    else:
        space = re.compile(r"\s").search(text, at, near)
        end = space.end() if space else at
    return text[:end], text[end:]


def _read_text(path: Path, errors: str = "strict") -> str:
    try:
        with path.open("rb") as file:
            check_no_utf16(path, file.read(2))
        text = path.read_text(encoding="utf-8-sig", errors=errors)  # all line ends become \n
    except (OSError, UnicodeDecodeError) as error:
        raise EaseError(f"cannot read {path} as UTF-8 ({error}): convert it or use another file") from error
    if "\0" in text:
        raise EaseError(f"{path} holds NUL characters, so it is not a text in UTF-8: convert it or use another file")
    return text


# ---------------------------------------------------------------------------------------------------------
# Hugging Face data sets

CHARS_PER_TOKEN = 8  # characters of a hub data set read for each token of `max_tokens`; text has 3 to 6 a token

HELD_OUT_CHARS = 8_000_000  # characters read at most of a hub data set's own validation or test split

HELD_OUT_NAMES = {"val": "validation", "test": "test"}  # our split -> the split of a data set on the hub


def _most_chars(max_tokens: int | None) -> float:
    return math.inf if max_tokens is None else CHARS_PER_TOKEN * max_tokens


def _read_hub(source: str, max_tokens: int | None) -> tuple[Splits, Own]:
    name, config = hub_name(source) or (source, None)
    with hub_errors(name):
        data_set = open_data_set(name, config)
        rows = {split: texts(name, data_set[split]) for split in data_set}
        splits = _read_rows(name, rows, _most_chars(max_tokens))
    if name == WIKITEXT["wikitext-2"][0]:  # its rows are the lines of one text, and its splits are known to be disjoint
        return {split: ["".join(lines)] for split, lines in splits.items()}, ("train",)
    return splits, ("train", *(split for split, hub_split in HELD_OUT_NAMES.items() if hub_split in rows))


def _read_rows(name: str, rows: dict[str, Iterator[str]], train_chars: float) -> Splits:
    """Up to `train_chars` characters of train; val and test from their own splits or from every 20th row of train."""
    if "train" not in rows:
        raise EaseError(f"{name} has no split 'train' (splits: {', '.join(rows)}): use another data set")
    splits: Splits = {split: [] for split in SPLITS}
    from_train = {i: split for i, (split, hub_split) in enumerate(HELD_OUT_NAMES.items()) if hub_split not in rows}
    for i, text in enumerate(rows["train"]):
        split = from_train.get(i % 20, "train")
        splits[split].append(text)
        train_chars -= len(text) if split == "train" else 0
        if train_chars <= 0:
            break
    for split, hub_split in HELD_OUT_NAMES.items():
        chars = 0
        for text in rows.get(hub_split, ()):
            splits[split].append(text)
            chars += len(text)
            if chars >= HELD_OUT_CHARS:
                break
    return splits


# ---------------------------------------------------------------------------------------------------------
# All sources


class Source(NamedTuple):
    """One kind of source.

    Args:
        usage: what a user writes to name it, for error messages.
        matches: whether a string names a source of this kind.
        read: (source, max_tokens) -> the documents of each split, and the splits that are the source's own.
    """

    usage: str
    matches: Callable[[str], bool]
    read: Callable[[str, int | None], tuple[Splits, Own]]


# The first that matches is read.
SOURCES = (
    Source("stdlib", lambda source: source == "stdlib", _read_stdlib),
    Source("wikitext-2, wikitext-103, hf:NAME/CONFIG", lambda source: hub_name(source) is not None, _read_hub),
    Source(f"a text file, a {FORMATS} file with a column 'text'", lambda source: Path(source).is_file(), _read_file),
    Source("a folder with train.txt and valid.txt", lambda source: Path(source).is_dir(), _read_folder),
)


def read_splits(
    source: str | os.PathLike[str], max_tokens: int | None = None, *, allow_overlap: bool = False
) -> Splits:
    """Reads the documents of each split of `source`: {"train": [...], "val": [...], "test": [...]}.

    Args:
        source: one of

            - "stdlib": the Python files of the standard library, split by top-level module or package.
            - a folder: train.txt, valid.txt and test.txt, one document each. Without test.txt the first half of
              valid.txt (by characters, to the end of the line) is val and the rest is test. Files of records, such as
              train.jsonl, have one document per record.
            - a text file: the first 80% (by characters, to the end of the line) are train, the next 10% val, the
              last 10% test. Where no line ends near, the cut is at white space, or within a word.
            - a .jsonl, .json, .csv, .tsv or .parquet file, perhaps with .gz after it: the column "text", one document
              per record. Records 0, 20, 40, ... are val, records 1, 21, 41, ... are test.
            - "wikitext-2", "wikitext-103": the raw texts from the Hugging Face hub, one document per split.
            - "hf:NAME" or "hf:NAME/CONFIG": a hub data set with a column "text", one document per row. NAME is
              OWNER/NAME as on the hub, or a local path that `datasets.load_dataset` opens. Without a validation
              split, rows 0, 20, 40, ... of train are val; without a test split, rows 1, 21, 41, ... are test.
        max_tokens: stops reading the records of train after 8 characters for each token.
        allow_overlap: accept splits that share most of their text.

    Returns:
        Split -> documents.

    Raises:
        EaseError: the source is unknown, cannot be read, leaves a split without text, or has two splits that share more
            than half of the smaller one.
    """
    source = os.fspath(source)
    read = next((kind.read for kind in SOURCES if kind.matches(source)), None)
    if read is None:
        *usages, last_usage = (kind.usage for kind in SOURCES)
        raise EaseError(f"no data at {source!r}: use {', '.join(usages)}, or {last_usage}")
    splits, own = read(source, max_tokens)
    for split in SPLITS:
        if not any(text.strip() for text in splits[split]):
            raise EaseError(f"{source} leaves the {split} split without text: give a longer text")
    if not allow_overlap:
        check_overlap(source, {split: splits[split] for split in own})
    return splits
