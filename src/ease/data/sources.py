"""Sources of text, each read into the documents of three splits.

`SOURCES` at the end of this file lists them. To add one, write a function `read(source, max_tokens) -> splits` and give
it a line there. No document is in two splits, every line end is "\\n", and what a source gives depends on nothing but
the source: the standard library, for one, is split by a hash of module names.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ease.data.hub import WIKITEXT, hub_errors, hub_name, open_data_set, text_column
from ease.errors import EaseError

SPLITS = ("train", "val", "test")

Splits = dict[str, list[str]]  # split -> documents

# ---------------------------------------------------------------------------------------------------------
# The standard library

# Tests and data tables are not the prose of a library, and what is installed differs by machine.
STDLIB_SKIP = {
    *("test", "tests", "idle_test", "turtledemo", "__phello__"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),
    *("site-packages", "dist-packages", "lib-dynload", "_bundled", "sitecustomize.py", "usercustomize.py"),
}


def _read_stdlib(source: str, max_tokens: int | None) -> Splits:
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
    return splits


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


def _read_folder(source: str, max_tokens: int | None) -> Splits:
    folder = Path(source)
    for name in ("train.txt", "valid.txt"):
        if not (folder / name).is_file():
            raise EaseError(f"{folder} has no {name}: put train.txt, valid.txt and optionally test.txt there")
    val = _read_text(folder / "valid.txt")
    if (folder / "test.txt").is_file():
        test = _read_text(folder / "test.txt")
    else:
        val, test = _cut(val, 0.5)
    return {"train": [_read_text(folder / "train.txt")], "val": [val], "test": [test]}


def _read_file(source: str, max_tokens: int | None) -> Splits:
    train, held_out = _cut(_read_text(Path(source)), 0.8)
    val, test = _cut(held_out, 0.5)
    return {"train": [train], "val": [val], "test": [test]}


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Two parts, cut at the first line end after `fraction` of the characters."""
    at = text.find("\n", int(fraction * len(text))) + 1 or len(text)
    return text[:at], text[at:]


def _read_text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)  # all line ends become \n
    except (OSError, UnicodeDecodeError) as error:
        raise EaseError(f"cannot read {path} as UTF-8 ({error}): convert it or use another file") from error


# ---------------------------------------------------------------------------------------------------------
# Hugging Face data sets

CHARS_PER_TOKEN = 8  # characters of a hub data set read for each token of `max_tokens`; text has 3 to 6 a token

HELD_OUT_CHARS = 8_000_000  # characters read at most of a hub data set's own validation or test split

HELD_OUT_NAMES = {"val": "validation", "test": "test"}  # our split -> the split of a data set on the hub


def _read_hub(source: str, max_tokens: int | None) -> Splits:
    name, config = hub_name(source) or (source, None)
    with hub_errors(name):
        data_set = open_data_set(name, config)
        rows = {split: text_column(name, data_set[split]) for split in data_set}
        splits = _read_rows(name, rows, math.inf if max_tokens is None else CHARS_PER_TOKEN * max_tokens)
    if name == WIKITEXT["wikitext-2"][0]:  # its rows are the lines of one text
        return {split: ["".join(lines)] for split, lines in splits.items()}
    return splits


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
        read: (source, max_tokens) -> the documents of each split.
    """

    usage: str
    matches: Callable[[str], bool]
    read: Callable[[str, int | None], Splits]


# The first that matches is read.
SOURCES = (
    Source("stdlib", lambda source: source == "stdlib", _read_stdlib),
    Source("wikitext-2, wikitext-103, hf:NAME/CONFIG", lambda source: hub_name(source) is not None, _read_hub),
    Source("a text file", lambda source: Path(source).is_file(), _read_file),
    Source("a folder with train.txt and valid.txt", lambda source: Path(source).is_dir(), _read_folder),
)


def read_splits(source: str | os.PathLike[str], max_tokens: int | None = None) -> Splits:
    """Reads the documents of each split of `source`: {"train": [...], "val": [...], "test": [...]}.

    Args:
        source: one of

            - "stdlib": the Python files of the standard library, split by top-level module or package.
            - a folder: train.txt, valid.txt and test.txt, one document each. Without test.txt the first half of
              valid.txt (by characters, to the end of the line) is val and the rest is test.
            - a text file: the first 80% (by characters, to the end of the line) are train, the next 10% val, the
              last 10% test.
            - "wikitext-2", "wikitext-103": the raw texts from the Hugging Face hub, one document per split.
            - "hf:NAME" or "hf:NAME/CONFIG": a hub data set with a column "text", one document per row. NAME is
              OWNER/NAME as on the hub, or a local path that `datasets.load_dataset` opens. Without a validation
              split, rows 0, 20, 40, ... of train are val; without a test split, rows 1, 21, 41, ... are test.
        max_tokens: stops reading a hub data set's train split after 8 characters for each token.

    Returns:
        Split -> documents.

    Raises:
        EaseError: the source is unknown, cannot be read, or leaves a split without text.
    """
    source = os.fspath(source)
    read = next((kind.read for kind in SOURCES if kind.matches(source)), None)
    if read is None:
        *usages, last_usage = (kind.usage for kind in SOURCES)
        raise EaseError(f"no data at {source!r}: use {', '.join(usages)}, or {last_usage}")
    splits = read(source, max_tokens)
    for split in SPLITS:
        if not any(text.strip() for text in splits[split]):
            raise EaseError(f"{source} leaves the {split} split without text: give a longer text")
    return splits
