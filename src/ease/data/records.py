"""Files of records with named columns (JSON Lines, JSON, CSV, TSV, Parquet), and the text in each record.

- A file is read one record at a time, and every record comes with its place, as FILE:LINE.
- The text of a record is its column "text". Records without one are skipped and counted, and refused above a share.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ease.errors import EaseError, check_text, first_line, require

COLUMN = "text"

PLACE = "ease: place"  # the column that `read_records` adds

MOST_SKIPPED = 0.1  # the largest share of records without a text, of at least `FEWEST` records or of the whole source

FEWEST = 1000

Records = Iterator[dict[str, Any]]

# ---------------------------------------------------------------------------------------------------------
# Files


def _read_lines(path: Path, file: IO[bytes]) -> Records:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path, file: IO[bytes]) -> Records:
    """A list of objects; a file that begins otherwise is JSON Lines under another name."""
    content = file.read()
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _read_lines(path, io.BytesIO(content))
        return
    for number, record in enumerate(_parse(content, str(path)), 1):
        yield _object(record, f"{path}, record {number}")


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EaseError(f"cannot read {where} as JSON ({first_line(error)}): correct it or remove it") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise EaseError(f"cannot read {where}: give a JSON object with a field {COLUMN!r}")
    return {**record, PLACE: where}


def _read_table(delimiter: str) -> Callable[[Path, IO[bytes]], Records]:
    def read(path: Path, file: IO[bytes]) -> Records:
        csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
        rows = csv.DictReader(codecs.iterdecode(file, "utf-8-sig"), delimiter=delimiter)
        line = 1
        while True:
            try:
                line, row = rows.line_num + 1, next(rows, None)
            except csv.Error as error:
                raise EaseError(f"cannot read {path}:{line} ({error}): correct the line") from error
            if row is None:
                return
            yield {**row, PLACE: f"{path}:{line}"}

    return read


def _read_parquet(path: Path, file: IO[bytes]) -> Records:
    parquet = require("pyarrow.parquet", "hf")
    try:
        table = parquet.ParquetFile(file)
        columns = [COLUMN] if COLUMN in table.schema_arrow.names else None
        rows = (row for batch in table.iter_batches(1024, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield {**row, PLACE: f"{path}, record {number}"}
    except (EaseError, OSError):
        raise
    except Exception as error:  # pyarrow raises many types for a damaged file
        raise EaseError(f"cannot read {path} ({first_line(error)}): restore it") from error


READERS: dict[str, Callable[[Path, IO[bytes]], Records]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
}

FORMATS = ".jsonl, .json, .csv, .tsv or .parquet"


def format_of(path: Path) -> str | None:
    """The suffix, without .gz, if it is that of a format of records."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def read_records(path: Path) -> Records:
    """The records of a file in one of the `READERS`' formats, perhaps compressed by gzip.

    Yields:
        Each record by column, with its place as FILE:LINE under `PLACE`.

    Raises:
        EaseError: the file cannot be read, or is not what its name says.
    """
    suffix = format_of(path)
    assert suffix is not None
    with _file_errors(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        check_no_utf16(path, file.peek(2)[:2])
        yield from READERS[suffix](path, cast(IO[bytes], file))


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EaseError(f"cannot read {path} ({first_line(error)}): restore it, or convert it to UTF-8") from error


def check_no_utf16(path: Path, start: bytes) -> None:
    """Raises `EaseError` if a file starts as one in UTF-16 does."""
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise EaseError(f"cannot read {path} as UTF-8, since it is in UTF-16: convert it (iconv -f UTF-16 -t UTF-8)")


# ---------------------------------------------------------------------------------------------------------
# Texts


class Skipped:
    """Counts records, and those that were skipped for want of a text."""

    def __init__(self, seen: int = 0, skipped: int = 0) -> None:
        self.seen, self.skipped = seen, skipped
        self.note = ""  # a warning that is issued with the next text; without one, an error follows and says the same
        self.finished = False

    def skip(self, name: str, where: str, problem: str) -> None:
        """Counts a record without a text, and notes the 1st, 10th, 100th, ...

        Raises:
            EaseError: there are more than the share allows.
        """
        self.skipped += 1
        self.last = where, problem
        if self.skipped > MOST_SKIPPED * max(self.seen, FEWEST):
            self._refuse(name)
        if str(self.skipped).strip("0") == "1":
            self.note = f"{where} {problem} and is skipped ({self.skipped} of {self.seen} records of {name} so far)"

    def tell(self) -> None:
        """Issues the pending warning."""
        if self.note:
            note, self.note = self.note, ""
            warnings.warn(note, stacklevel=3)

    def finish(self, name: str) -> None:
        """Checks the share at the end of the source, and warns of the number that was skipped the first time."""
        if self.skipped > MOST_SKIPPED * self.seen:
            self._refuse(name)
        self.tell()
        if self.skipped > 1 and not self.finished:
            self.note = f"{self.skipped} of {self.seen} records of {name} have no text and are skipped"
            self.tell()
        self.finished = True

    def _refuse(self, name: str) -> None:
        where, problem = self.last
        raise EaseError(
            f"{name} has no text column {COLUMN!r} in {self.skipped} of {self.seen} records, more than "
            f"{MOST_SKIPPED:.0%} ({where} {problem}): name the column {COLUMN!r}, or fill or remove these records"
        )


def texts(name: str, rows: Iterable[Mapping[str, Any]], counts: Skipped | None = None) -> Iterator[str]:
    """The text of each record, with every line end as "\\n".

    Args:
        name: what messages call the source.
        rows: the records. Messages name the place that `read_records` adds to a record, or else its number.
        counts: counts to continue, for a source that is read in parts.

    Warns:
        UserWarning: a record has no text; it is skipped.

    Raises:
        EaseError: more than a tenth of the records have no text.
    """
    counts = counts or Skipped()
    for row in rows:
        counts.seen += 1
        if problem := _problem(row):
            counts.skip(name, row.get(PLACE, f"record {counts.seen} of {name}"), problem)
        else:
            counts.tell()
            yield row[COLUMN].replace("\r\n", "\n").replace("\r", "\n")
    counts.finish(name)


def _problem(row: Mapping[str, Any]) -> str:
    """Why a record has no text; empty if it has one."""
    if COLUMN not in row:
        columns = [str(column) for column in row if column != PLACE]
        known = "; `ease.load_completion` reads prompts and completions" if "completion" in columns else ""
        return f"has the columns {', '.join(columns[:20]) or 'of none'}{known}"
    if not isinstance(row[COLUMN], str):
        return "has a null as text" if row[COLUMN] is None else f"has a text of type {type(row[COLUMN]).__name__}"
    try:
        check_text(COLUMN, row[COLUMN])
    except EaseError:
        return "has a text that is not valid Unicode"
    return ""
