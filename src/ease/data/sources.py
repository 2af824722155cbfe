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
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease.errors import EaseError, needs

if TYPE_CHECKING:
    pass

SPLITS = ("train", "val", "test")

WIKITEXT = {f"wikitext-{n}": ("Salesforce/wikitext", f"wikitext-{n}-raw-v1") for n in ("2", "103")}

CHARS_PER_TOKEN = 8  # a hub data set is read this far for each token asked for; text has 3 to 6

HELD_OUT_CHARS = 8_000_000  # no more than this is read of a hub data set's own validation or test split


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
