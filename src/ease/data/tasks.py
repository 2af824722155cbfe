"""Labelled and prompted examples: texts with a label and prompts with a completion, from JSONL files.

- An example is a row of ids and a row of targets, of which only some are scored: the completion's tokens, or the label
  at the last token. Training, routing and scoring treat both as they treat text.
- A folder has train.jsonl, valid.jsonl and test.jsonl. Labels and tokenizer come from train alone. A record of valid or
  test that an earlier split contains is left out; splits that share most of their records are refused.
- A warning counts every text that is cut and every record that is left out.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ease.data.batches import Example
from ease.data.jsonl import Record, read_jsonl
from ease.data.overlap import MOST_SHARED, overlap_error
from ease.data.tokenizers import EOS, surrounding_tokens, train_tokenizer
from ease.errors import EaseError
from ease.interface import IGNORE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Label = str | int

FILES = {"train": "train.jsonl", "val": "valid.jsonl", "test": "test.jsonl"}


@dataclass(frozen=True, eq=False)
class Task:
    """The examples of three splits, with the tokenizer and labels they were made with.

    Attributes:
        tokenizer: the tokenizer.
        eos: the id that ends a row, or None.
        train, val, test: the examples of each split.
        labels: for a classification, the label of each class number; otherwise empty.
    """

    tokenizer: Tokenizer
    eos: int | None
    train: list[Example]
    val: list[Example]
    test: list[Example]
    labels: tuple[Label, ...] = ()


def load_classification(
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    seq_len: int = 128,
    labels: Sequence[Label] | None = None,
    allow_overlap: bool = False,
) -> Task:
    """Loads texts and their labels from records `{"text": ..., "label": ...}`.

    The class number of the label is the target of the text's last token. Texts that are too long lose their end.

    Args:
        folder: has train.jsonl, valid.jsonl and test.jsonl.
        tokenizer: a spec, which is trained on the texts of train (`train_tokenizer`), or a tokenizer to use as it is.
        eos: the id that ends a text, with a tokenizer that is not a spec; none by default.
        seq_len: tokens per row at most, `eos` included.
        labels: the labels of a model's head, in its order; by default those of train, sorted.
        allow_overlap: keep records that an earlier split contains.

    Returns:
        The task; labels are strings or integers, as in the files.

    Raises:
        EaseError: a file is missing or damaged, a label (named by file and line) is not among `labels`, or two splits
            share more than half of the smaller one.

    Example:
        >>> task = load_classification("reviews", "bpe:2048", seq_len=256)
        >>> model = StandardTransformer(task.tokenizer.get_vocab_size(), num_labels=len(task.labels))
        >>> train = ExampleBatches(task.train, 32, shuffle=True, bucket=True)
    """
    records = _read_files(folder, text=(str,), label=(str, int))
    labels = _labels(records["train"]) if labels is None else tuple(labels)
    class_of = {label: i for i, label in enumerate(labels)}
    for record in (record for split in FILES for record in records[split]):
        if record.fields[1] not in class_of:
            raise EaseError(
                f"{record.where}: unknown label {record.fields[1]!r} (known: {', '.join(map(repr, labels[:20]))}): "
                "correct the line, or train with that label"
            )
    tokenizer, eos = _prepare_tokenizer(tokenizer, eos, (record.fields[0] for record in records["train"]))
    before, after = surrounding_tokens(tokenizer, eos)

    def example(record: Record, encoded: list[list[int]], notes: Counter[str]) -> Example:
        (text,) = encoded
        room = _room(seq_len, len(before) + len(after))
        notes[f"texts are cut to {seq_len} tokens"] += len(text) > room
        ids = before + text[:room] + after
        return _example(ids, [IGNORE] * (len(ids) - 1) + [class_of[record.fields[1]]])

    return Task(tokenizer, eos, *_make_splits(folder, records, tokenizer, 1, example, allow_overlap), labels)


def load_completion(
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    seq_len: int = 128,
    allow_overlap: bool = False,
) -> Task:
    """Loads prompts and their completions from records `{"prompt": ..., "completion": ...}`.

    Prompt and completion are tokenized separately, and only the completion and the token that ends it are scored.
    Prompts that are too long lose their beginning; a record whose completion does not fit is left out.

    Args:
        folder: has train.jsonl, valid.jsonl and test.jsonl.
        tokenizer: a spec, which is trained on the texts of train (`train_tokenizer`), or a tokenizer to use as it is.
        eos: the id that ends a completion, with a tokenizer that is not a spec; none by default.
        seq_len: tokens per row at most.
        allow_overlap: keep records that an earlier split contains.

    Returns:
        The task, without labels.

    Raises:
        EaseError: a file is missing or damaged, no completion fits, or two splits share more than half of the smaller
            one.

    Example:
        >>> task = load_completion("questions", "bpe:2048")
        >>> train = ExampleBatches(task.train, 32, shuffle=True, bucket=True)
    """
    records = _read_files(folder, prompt=(str,), completion=(str,))
    tokenizer, eos = _prepare_tokenizer(tokenizer, eos, (text for record in records["train"] for text in record.fields))
    before, after = surrounding_tokens(tokenizer, eos)

    def example(record: Record, encoded: list[list[int]], notes: Counter[str]) -> Example | None:
        prompt, completion = encoded
        end = completion + after
        room = _room(seq_len, 0) + 1 - len(before) - len(end)  # the last token is a target only
        if room < 1:
            notes[f"records are left out because their completion does not fit into {seq_len} tokens"] += 1
            return None
        notes["prompts lose their beginning"] += len(prompt) > room
        prompt = before + prompt[-room:]
        return _example((prompt + end)[:-1], [IGNORE] * (len(prompt) - 1) + end)

    return Task(tokenizer, eos, *_make_splits(folder, records, tokenizer, 2, example, allow_overlap))


def _read_files(folder: str | os.PathLike[str], **fields: tuple[type, ...]) -> dict[str, list[Record]]:
    """Split -> records."""
    for name in FILES.values():
        if not (Path(folder) / name).is_file():
            raise EaseError(f"{os.fspath(folder)} has no {name}: put {', '.join(FILES.values())} there")
    return {split: read_jsonl(Path(folder) / name, **fields) for split, name in FILES.items()}


def _labels(records: list[Record]) -> tuple[Label, ...]:
    """The labels of a classification's records, sorted."""
    labels = {record.fields[1] for record in records}
    if len(labels) < 2 or len({type(label) for label in labels}) > 1:
        raise EaseError(
            f"train.jsonl has the labels {', '.join(sorted(map(repr, labels))[:20])}: "
            "give at least two, all strings or all integers"
        )
    return tuple(sorted(labels))


def _prepare_tokenizer(
    tokenizer: str | Tokenizer, eos: int | None, texts: Iterable[str]
) -> tuple[Tokenizer, int | None]:
    """The tokenizer and its end-of-text id; a spec is trained on `texts`."""
    if not isinstance(tokenizer, str):
        return tokenizer, eos
    trained = train_tokenizer(tokenizer, texts)
    return trained, trained.token_to_id(EOS)


def _room(seq_len: int, special: int) -> int:
    """Tokens left in a row after `special` tokens that open and close it."""
    if seq_len <= special:
        raise EaseError(f"seq_len must be at least {special + 1}, got {seq_len}")
    return seq_len - special


def _example(ids: list[int], targets: list[int]) -> Example:
    return Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(targets, dtype=torch.int32))


def _make_splits(
    folder: str | os.PathLike[str],
    records: dict[str, list[Record]],
    tokenizer: Tokenizer,
    num_texts: int,
    make_example: Callable[[Record, list[list[int]], Counter[str]], Example | None],
    allow_overlap: bool,
) -> tuple[list[Example], list[Example], list[Example]]:
    """The examples of train, val and test.

    Args:
        records: split -> records.
        num_texts: the first fields of a record, as many as are texts to encode.
        make_example: (record, ids of each text, counts for the warning) -> the example, or None to leave it out.
        allow_overlap: keep records that an earlier split contains.
    """
    splits: list[list[Example]] = []
    seen: dict[str, set[bytes]] = {}
    for split, name in FILES.items():
        notes: Counter[str] = Counter()
        examples: list[Example] = []
        for record in records[split]:
            encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in record.fields[:num_texts]]
            if not all(encoded):
                raise EaseError(f"{record.where}: a text gives no token: fill it or remove the line")
            example = make_example(record, encoded, notes)
            if example is not None:
                examples.append(example)
        if not allow_overlap:
            keys = {_key(example) for example in examples}
            for other, known in seen.items():
                share = len(keys & known) / max(1, min(len(keys), len(known)))
                if share > MOST_SHARED:
                    raise overlap_error(os.fspath(folder), share, name, FILES[other])
            if split != "train":
                kept = [example for example in examples if not any(_key(example) in known for known in seen.values())]
                notes["records are left out because an earlier split contains them"] += len(examples) - len(kept)
                examples = kept  # a record that selects a policy must not test it
            seen[split] = keys
        summary = ", ".join(f"{count} {note}" for note, count in notes.items() if count)
        path = Path(folder) / name
        if not examples:
            raise EaseError(f"no record of {path} remains ({summary}): raise seq_len, or give other records")
        if summary:
            warnings.warn(f"{path} ({len(records[split])} records): {summary}", stacklevel=3)
        splits.append(examples)
    train, val, test = splits
    return train, val, test


def _key(example: Example) -> bytes:
    return example.ids.numpy().tobytes()
