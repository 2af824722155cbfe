"""JSONL files: one JSON object per line, checked field by field, with errors that name FILE:LINE."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ease.errors import EaseError, check_text


class Record(NamedTuple):
    """One line of a file.

    Args:
        where: the place of the line, as FILE:LINE.
        fields: the values of the fields that `read_jsonl` was called with, in that order.
    """

    where: str
    fields: tuple[Any, ...]


def read_jsonl(path: str | os.PathLike[str], **fields: tuple[type, ...]) -> list[Record]:
    """Reads the records of a JSONL file; empty lines are skipped.

    Args:
        path: the file, in UTF-8.
        fields: name -> the types that its value may have.

    Returns:
        One record per line that is not empty.

    Raises:
        EaseError: the file cannot be read or has no record; or a line, named as FILE:LINE, does not parse, lacks a
            field or has an empty one.

    Example:
        >>> read_jsonl("train.jsonl", text=(str,), label=(str, int))
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
        raise EaseError(f"{where} is not valid JSON ({error}): correct the line or remove it") from error
    if not isinstance(record, dict):
        raise EaseError(f"{where} is not a JSON object: give one with the fields {', '.join(fields)}")
    for name, types in fields.items():
        if name not in record:
            raise EaseError(f"{where} lacks the field {name!r} (fields: {', '.join(record) or 'none'}): add it")
        value = record[name]
        expected = " or ".join(kind.__name__ for kind in types)
        if type(value) not in types:  # not isinstance: true and false must not pass as integers
            raise EaseError(f"{where}: {name!r} must be {expected}, got {json.dumps(value)[:40]}: correct the line")
        if isinstance(value, str):
            check_text(f"{where}: {name!r}", value)
            if not value.strip():
                raise EaseError(f"{where}: {name!r} is empty: fill it or remove the line")
    return Record(where, tuple(record[name] for name in fields))
