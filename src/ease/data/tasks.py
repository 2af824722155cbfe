"""Other tasks on the same seam: texts with a label and prompts with a completion, from JSONL files to figures.

- An example is a row of ids and a row of targets, of which only some are scored: the completion's tokens, or the label
  at the last token. Batches, training, routing and scoring know no more than that.
- A folder has train.jsonl, valid.jsonl and test.jsonl. Labels and tokenizer come from train alone, and what train
  holds is not scored again elsewhere.
- Whatever is cut or left out is counted and said.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ease.data.tokenizers import EOS, train_tokenizer
from ease.errors import EaseError, check_seed, check_text
from ease.interface import IGNORE, Batch, Layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Label = str | int

FILES = {"train": "train.jsonl", "val": "valid.jsonl", "test": "test.jsonl"}

BUCKET = 50  # batches that are sorted by length together: enough for little padding, few enough to stay random


# ---------------------------------------------------------------------------------------------------------
# Files


class Record(NamedTuple):
    """One line of a file: where it stands, as FILE:LINE, and the fields that were asked for."""

    where: str
    fields: tuple[Any, ...]


def read_jsonl(path: str | os.PathLike[str], **fields: tuple[type, ...]) -> list[Record]:
    """The records of a JSONL file; empty lines are skipped.

    Args:
        fields: name -> the types that its value may have.

    Raises:
        EaseError: the file cannot be read or is empty; a line, named as FILE:LINE, does not parse or lacks a field.
    """
    path, records = Path(path), []
    try:
        with path.open(encoding="utf-8-sig") as file:  # all line ends become \n
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(_parse(line, f"{path}:{number}", fields))
    except (OSError, UnicodeDecodeError) as error:
        raise EaseError(f"cannot read {path} as UTF-8 ({error}): give a file of one JSON object a line") from error
    if not records:
        raise EaseError(f"{path} has no record: give one JSON object a line")
    return records


def _parse(line: str, where: str, fields: dict[str, tuple[type, ...]]) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EaseError(f"{where} is no JSON ({error}): mend the line or remove it") from error
    if not isinstance(record, dict):
        raise EaseError(f"{where} is no JSON object: give one with the fields {', '.join(fields)}")
    for name, types in fields.items():
        if name not in record:
            raise EaseError(f"{where} has no field {name!r} (only {', '.join(record) or 'none'}): add it")
        value, wanted = record[name], " or ".join(kind.__name__ for kind in types)
        if type(value) not in types:  # not isinstance: true and false are no integers here
            raise EaseError(f"{where}: {name!r} must be {wanted}, got {json.dumps(value)[:40]}: mend the line")
        if isinstance(value, str):
            check_text(f"{where}: {name!r}", value)
            if not value.strip():
                raise EaseError(f"{where}: {name!r} is empty: fill it or remove the line")
    return Record(where, tuple(record[name] for name in fields))


# ---------------------------------------------------------------------------------------------------------
# Tasks


class Example(NamedTuple):
    """A row: ids (T,) and targets (T,), int32; a target of -100 is not scored."""

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """The examples of the three splits, and what was needed to make them."""

    tokenizer: Tokenizer
    eos: int | None
    """The id that ends a row."""
    train: list[Example]
    val: list[Example]
    test: list[Example]
    labels: tuple[Label, ...] = ()
    """Of a classification: label number i is `labels[i]`."""


def load_classification(
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    seq_len: int = 128,
    labels: Sequence[Label] | None = None,
) -> Task:
    """Texts and their labels, from records `{"text": ..., "label": ...}`; a label is a string or an integer.

    The label is the target of the text's last token; of a text that is too long the end is cut.

    Args:
        tokenizer: a spec, of which one is trained on train's texts (`train_tokenizer`), or a finished one.
        eos: the id that ends a text, for a finished tokenizer (none by default).
        seq_len: tokens of a row at most.
        labels: those that a finished head knows, in its order; by default train's, sorted.

    Raises:
        EaseError: a file is missing or damaged, or a label (named by file and line) is not known.
    """
    records = _read(folder, text=(str,), label=(str, int))
    labels = _labels(records["train"]) if labels is None else tuple(labels)
    number = {label: i for i, label in enumerate(labels)}
    for record in (record for split in FILES for record in records[split]):
        if record.fields[1] not in number:
            raise EaseError(
                f"{record.where}: the label {record.fields[1]!r} is not among those the head knows "
                f"({', '.join(map(repr, labels[:20]))}): mend the line, or train with that label"
            )
    tok, eos = _tokenizer(tokenizer, eos, (record.fields[0] for record in records["train"]))

    def example(record: Record, text: list[int], notes: Counter[str]) -> Example:
        end = [] if eos is None else [eos]
        room = _room(seq_len, len(end))
        notes[f"texts are cut to {seq_len} tokens"] += len(text) > room
        ids = text[:room] + end
        return _example(ids, [IGNORE] * (len(ids) - 1) + [number[record.fields[1]]])

    return Task(tok, eos, *_splits(folder, records, tok, 1, example), labels)


def load_completion(
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    seq_len: int = 128,
) -> Task:
    """Prompts and their completions, from records `{"prompt": ..., "completion": ...}`.

    Prompt and completion are tokenized apart, and only the completion and the token that ends it are scored. Of a
    prompt that is too long the beginning is cut; a record whose completion does not fit is left out. Both are counted
    in a warning.

    Args:
        tokenizer, eos, seq_len: as in `load_classification`.

    Raises:
        EaseError: a file is missing or damaged, or no completion fits.
    """
    records = _read(folder, prompt=(str,), completion=(str,))
    tok, eos = _tokenizer(tokenizer, eos, (text for record in records["train"] for text in record.fields))

    def example(record: Record, prompt: list[int], completion: list[int], notes: Counter[str]) -> Example | None:
        end = completion + ([] if eos is None else [eos])
        room = _room(seq_len, 0) + 1 - len(end)  # the last token is a target only
        if room < 1:
            notes[f"records are left out, whose completion does not fit into {seq_len} tokens"] += 1
            return None
        notes["prompts lose their beginning"] += len(prompt) > room
        prompt = prompt[-room:]
        return _example((prompt + end)[:-1], [IGNORE] * (len(prompt) - 1) + end)

    return Task(tok, eos, *_splits(folder, records, tok, 2, example))


def _read(folder: str | os.PathLike[str], **fields: tuple[type, ...]) -> dict[str, list[Record]]:
    for name in FILES.values():
        if not (Path(folder) / name).is_file():
            raise EaseError(f"{os.fspath(folder)} has no {name}: put {', '.join(FILES.values())} there")
    return {split: read_jsonl(Path(folder) / name, **fields) for split, name in FILES.items()}


def _labels(records: list[Record]) -> tuple[Label, ...]:
    labels = {record.fields[1] for record in records}
    if len(labels) < 2 or len({type(label) for label in labels}) > 1:
        raise EaseError(
            f"train.jsonl has the labels {', '.join(sorted(map(repr, labels))[:20])}: "
            "give at least two, all strings or all integers"
        )
    return tuple(sorted(labels))


def _tokenizer(tokenizer: str | Tokenizer, eos: int | None, texts: Iterable[str]) -> tuple[Tokenizer, int | None]:
    if not isinstance(tokenizer, str):
        return tokenizer, eos
    trained = train_tokenizer(tokenizer, texts)
    return trained, trained.token_to_id(EOS)


def _room(seq_len: int, end: int) -> int:
    if seq_len <= end:
        raise EaseError(f"seq_len is {seq_len}: give at least {end + 1}")
    return seq_len - end


def _example(ids: list[int], targets: list[int]) -> Example:
    return Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(targets, dtype=torch.int32))


def _splits(
    folder: str | os.PathLike[str], records: dict[str, list[Record]], tok: Tokenizer, texts: int, example: Any
) -> tuple[list[Example], list[Example], list[Example]]:
    """The examples of train, val and test that `example(record, *ids of its first `texts` fields, notes)` makes."""
    splits: list[list[Example]] = []
    seen: set[bytes] = set()
    for split, name in FILES.items():
        notes: Counter[str] = Counter()
        examples: list[Example] = []
        for record in records[split]:
            encoded = [tok.encode(text, add_special_tokens=False).ids for text in record.fields[:texts]]
            if not all(encoded):
                raise EaseError(f"{record.where} holds a text without a token: fill it or remove the line")
            made = example(record, *encoded, notes)
            if made is not None:
                examples.append(made)
        if split == "train":
            seen = {_key(made) for made in examples}
        else:
            kept = [made for made in examples if _key(made) not in seen]
            notes["records are left out, which train.jsonl has too"] += len(examples) - len(kept)
            examples = kept
            seen |= {_key(made) for made in kept}  # what chose is not tested on either
        said = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        path = Path(folder) / name
        if not examples:
            raise EaseError(f"no record of {path} remains ({said}): raise seq_len, or give other records")
        if said:
            warnings.warn(f"of {len(records[split])} records in {path} {said}", stacklevel=3)
        splits.append(examples)
    train, val, test = splits
    return train, val, test


def _key(example: Example) -> bytes:
    return example.ids.numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------
# Batches


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Rows of ids (T_i,) -> ids (B, T), padded on the right to the longest, and their layout."""
    x = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).long()
    lengths = torch.tensor([len(row) for row in rows])
    return x, Layout.from_attention_mask(torch.arange(x.shape[1]) < lengths[:, None])


class ExampleBatches:
    """Examples in batches padded to their longest; every `iter()` is one epoch over all of them.

    With `shuffle`, the order is one that `seed` and the number of the epoch determine. With `bucket`, examples of like
    length come together, so that little is padded. `epoch` counts the epochs begun, and is all the state there is.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        shuffle: bool = False,
        bucket: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or not examples:
            raise EaseError(f"{len(examples)} examples in batches of {batch_size}: give at least 1 of each")
        check_seed(seed)
        self.examples, self.batch_size = examples, batch_size
        self.shuffle, self.bucket, self.seed, self.epoch = shuffle, bucket, seed, 0

    def __len__(self) -> int:
        """Batches in one epoch."""
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        return self._batches(np.random.default_rng([self.seed, self.epoch]))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch = state["epoch"]

    def _batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        order = list(range(len(self.examples)))
        if self.shuffle:
            rng.shuffle(order)
        if self.bucket:
            step = BUCKET * self.batch_size
            chunks = [order[i : i + step] for i in range(0, len(order), step)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(self.examples[i].ids))]
        starts = list(range(0, len(order), self.batch_size))
        if self.shuffle:
            rng.shuffle(starts)
        for start in starts:
            examples = [self.examples[i] for i in order[start : start + self.batch_size]]
            x, layout = pad([example.ids for example in examples])
            targets = [example.targets for example in examples]
            y = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE).long()
            yield Batch(x, y, layout=layout)
