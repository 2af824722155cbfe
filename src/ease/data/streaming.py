"""Streams of documents: corpora of any size, read, packed into full rows and shuffled during training.

- A row of a batch is packed with documents, each a segment with its own positions: no token attends across documents,
  and the last token of a document has no target. A document that exceeds its row continues in the next one, as a new
  segment.
- Rows are shuffled in a buffer of fixed size. The buffer's content is part of the stream's state, so that a stream
  resumed from its state gives bit-identical batches.
- Documents that validate or test are never trained on: they come from the corpus' own splits, or from the beginning of
  train, which training then skips.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ease.data.hub import hub_errors, hub_name, open_data_set
from ease.data.overlap import check_overlap
from ease.data.records import PLACE, Skipped, format_of, read_records, texts
from ease.data.sources import HELD_OUT_NAMES
from ease.data.tokenizers import EOS, encode, train_tokenizer
from ease.errors import EaseError, check_counts, check_seed, require
from ease.interface import IGNORE, Batch, Layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STREAM = "stream:"  # a source of a run that begins so is read while it is used

TOKENIZER_DOCUMENTS = 2000  # documents of train that a tokenizer is trained on

SHARED = 256  # documents that several processes read before they divide them and exchange their ids

EncodeAll = Callable[[Callable[[str], Tensor], Sequence[str]], Sequence[Tensor]]

# ---------------------------------------------------------------------------------------------------------
# Packing


class Packer:
    """Packs documents into full rows.

    Args:
        documents: 1-D int32 ids, one document after another.
        seq_len: tokens per row.
    """

    def __init__(self, documents: Iterator[Tensor], seq_len: int) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self.rest = torch.zeros(0, dtype=torch.int32)  # of the document that the next row begins with

    def row(self) -> Tensor | None:
        """The next row (3, T) int32: ids, targets and segments; None after the last document.

        Segments are -1 for padding, which only the last row has.
        """
        T, filled, segment = self.seq_len, 0, 0
        row = torch.tensor([[0], [IGNORE], [-1]], dtype=torch.int32).repeat(1, T)
        while filled < T:
            if not len(self.rest):
                self.rest = next(self.documents, self.rest)
                if not len(self.rest):
                    break
            ids = self.rest[: T - filled]
            targets = self.rest[1 : T - filled + 1]
            row[0, filled : filled + len(ids)] = ids
            row[1, filled : filled + len(targets)] = targets
            row[2, filled : filled + len(ids)] = segment
            self.rest = self.rest[len(ids) :]
            filled += len(ids)
            segment += 1
        return row if filled else None


def batch_of(rows: list[Tensor]) -> Batch:
    """Rows (3, T) of a packer -> a batch (B, T) with its layout; positions restart with each segment."""
    x, y, segments = torch.stack(rows).long().unbind(1)
    columns = torch.arange(x.shape[1]).expand_as(x)
    begins = segments.diff(dim=1, prepend=segments.new_full((len(rows), 1), -2)) != 0
    positions = columns - columns.masked_fill(~begins, 0).cummax(1).values
    return Batch(x, y, layout=Layout(positions, segments))


def documents(
    name: str, rows: Any, tokenizer: Tokenizer, eos: int | None, counts: Skipped | None = None
) -> Iterator[Tensor]:
    """The ids of each document that has any, 1-D int32, with `eos` after it; `counts` as in `texts`."""
    for chunk in _chunks(name, rows, tokenizer, eos, counts):
        yield from chunk


def _chunks(
    name: str,
    rows: Any,
    tokenizer: Tokenizer,
    eos: int | None,
    counts: Skipped | None = None,
    encode_all: EncodeAll | None = None,
) -> Iterator[list[Tensor]]:
    """The ids of `documents` in lists, of one or, with `encode_all` (see `StreamBatches`), of up to `SHARED` each."""
    given = (text for text in texts(name, rows, counts) if text.strip())

    def read() -> list[str]:
        with hub_errors(name):
            return list(islice(given, SHARED if encode_all else 1))

    def ids_of(text: str) -> Tensor:
        with hub_errors(name):
            return torch.from_numpy(encode(tokenizer, [text], eos))

    while chunk := read():
        # A normalizer may remove a whole text. `encode_all` may exchange ids between processes, and an error of that
        # exchange is not an error of the data set.
        yield [ids for ids in (encode_all or map)(ids_of, chunk) if len(ids)]


# ---------------------------------------------------------------------------------------------------------
# Batches


class StreamBatches:
    """Endless shuffled batches of packed rows (B, T): an epoch is a slice, and the next one continues after it.

    When the documents end, they start anew. `state_dict()`, taken between two batches, is the position of the stream as
    tensors, numbers and strings. A stream made with the same arguments that loads it continues with the same batches.

    Args:
        rows: a `datasets.IterableDataset` with a column "text", one document per row.
        tokenizer: encodes the documents.
        eos: the id that ends a document, or None.
        seq_len: tokens per row.
        batch_size: rows per batch.
        epoch_batches: batches per epoch.
        buffer: rows to shuffle among, and the most that are held; 1 keeps the order.
        seed: random seed of the order.
        name: the corpus' name, for errors.
        encode_all: maps a function over some documents; several processes that take the same batches may divide them
            (`ease.training.distributed.shared_map`). By default every document is encoded when it is used.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Tokenizer,
        *,
        eos: int | None,
        seq_len: int,
        batch_size: int,
        epoch_batches: int,
        buffer: int = 4096,
        seed: int = 0,
        name: str = "the stream",
        encode_all: EncodeAll | None = None,
    ) -> None:
        check_counts(1, seq_len=seq_len, batch_size=batch_size, epoch_batches=epoch_batches, buffer=buffer)
        check_seed(seed)
        self.rows = rows
        self.tokenizer = tokenizer
        self.eos = eos
        self.name = name
        self.batch_size = batch_size
        self.epoch_batches = epoch_batches
        self.buffer = buffer
        self.encode_all = encode_all
        self.counts = Skipped()
        self.passes = 0  # completed passes over the documents
        self.held: list[Tensor] = []
        self.ahead: list[Tensor] = []  # documents that were read and are not yet packed
        self.generator = torch.Generator().manual_seed(seed)
        self.packer = Packer(self._documents(), seq_len)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.epoch_batches

    def pass_over(self, epochs: int) -> None:
        """Skips epochs, which are read."""
        for _ in range(epochs * self.epoch_batches * self.batch_size):
            self._draw()

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.epoch_batches):
            yield batch_of([self._draw() for _ in range(self.batch_size)])

    def _draw(self) -> Tensor:
        """Takes a random row out of the full buffer."""
        while len(self.held) < self.buffer:
            row = self.packer.row()
            assert row is not None  # documents have no end
            self.held.append(row)
        at = int(torch.randint(len(self.held), (), generator=self.generator))
        self.held[at], self.held[-1] = self.held[-1], self.held[at]
        return self.held.pop()

    def _documents(self) -> Iterator[Tensor]:
        empty_passes = 0  # a state may have been taken at the end of a pass, so that one empty pass is no error
        while self.ahead:
            yield self.ahead.pop(0)
        while empty_passes < 2:
            empty_passes += 1
            self.rows.set_epoch(self.passes)  # a state that was loaded holds for its own pass alone
            given = (self.name, self.rows, self.tokenizer, self.eos, self.counts, self.encode_all)
            for self.ahead in _chunks(*given):
                while self.ahead:
                    empty_passes = 0
                    yield self.ahead.pop(0)
            self.passes += 1
        raise EaseError(f"{self.name} has no text to train on: give more documents, or hold out fewer")

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, as copies that later batches do not change."""
        return {
            "rows": self.rows.state_dict(),
            "passes": self.passes,
            "counts": [self.counts.seen, self.counts.skipped],
            "rest": self.packer.rest.clone(),
            "ahead": [ids.clone() for ids in self.ahead],
            "held": torch.stack(self.held) if self.held else torch.zeros(0, 3, self.packer.seq_len, dtype=torch.int32),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to where `state` was taken.

        Raises:
            EaseError: the state comes from a stream of another `seq_len` or with a larger buffer.
        """
        seq_len = state["held"].shape[2]
        if seq_len != self.packer.seq_len or len(state["held"]) > self.buffer:
            raise EaseError(
                f"the state holds {len(state['held'])} rows of {seq_len} tokens, and the stream is set to "
                f"{self.buffer} of {self.packer.seq_len}: use the buffer and seq_len that the state was saved with"
            )
        self.passes, self.counts = state["passes"], Skipped(*state["counts"])
        self.held, self.ahead = list(state["held"].clone()), [ids.clone() for ids in state.get("ahead", ())]
        self.generator.set_state(state["generator"])
        self.packer = Packer(self._documents(), seq_len)
        self.packer.rest = state["rest"].clone()
        self.rows.load_state_dict(state["rows"])


# ---------------------------------------------------------------------------------------------------------
# Loading


class Stream(NamedTuple):
    """A corpus that is read while it is used: an endless train split and two fixed held-out splits.

    Args:
        tokenizer: the tokenizer.
        eos: the id that ends a document, or None.
        train: endless batches.
        val, test: all batches of the split, in order.
    """

    tokenizer: Tokenizer
    eos: int | None
    train: StreamBatches
    val: list[Batch]
    test: list[Batch]


def load_stream(
    source: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "bpe:2048",
    *,
    eos: int | None = None,
    seq_len: int = 128,
    batch_size: int = 32,
    epoch_batches: int = 200,
    held_out: int = 200,
    buffer: int = 4096,
    seed: int = 0,
    allow_overlap: bool = False,
) -> Stream:
    """Opens a corpus of any size through `datasets` streaming.

    Args:
        source: "hf:NAME" or "hf:NAME/CONFIG" on the Hugging Face hub (hf:allenai/c4/en), or local .jsonl, .json, .csv,
            .tsv, .parquet or .txt files, with `*` allowed in the file name. A row is a document, with its text in the
            column "text"; in a .txt file an empty line ends a document. Rows without a text are skipped, with a warning
            that names the first, up to a tenth of all.
        tokenizer: a spec, which is trained on the first 2000 documents of train (`train_tokenizer`), or a tokenizer to
            use as it is.
        eos: the id that ends a document, with a tokenizer that is not a spec; none by default.
        seq_len: tokens per row.
        batch_size: rows per batch.
        epoch_batches: batches of train per epoch.
        held_out: documents of val, and of test. They are the first of the corpus' own split; without one, the first of
            train, for val and then for test, and training starts after them.
        buffer: rows of train to shuffle among.
        seed: random seed of the order.
        allow_overlap: accept a corpus whose own splits share most of their text.

    Returns:
        The tokenizer and the batches of the three splits.

    Raises:
        EaseError: the source is unknown, cannot be read, has no text for one of the splits or in more than a tenth of
            its rows, or two of its own splits share more than half of the held-out documents.

    Example:
        >>> stream = load_stream("hf:allenai/c4/en", "bpe:8192", seq_len=256, epoch_batches=500)
        >>> data = Data(stream.train, stream.val)
    """
    opened = open_stream(source, tokenizer, eos=eos, held_out=held_out, allow_overlap=allow_overlap)
    batches = {"seq_len": seq_len, "batch_size": batch_size}
    train = opened.train(**batches, epoch_batches=epoch_batches, buffer=buffer, seed=seed)
    val, test = (_pack_all(opened, split, **batches) for split in opened.held_out)
    return Stream(opened.tokenizer, opened.eos, train, val, test)


class OpenedStream(NamedTuple):
    """A corpus of any size with its tokenizer, of which nothing but the beginning has been read."""

    name: str
    tokenizer: Tokenizer
    eos: int | None
    train_rows: Any
    held_out: dict[str, Any]

    def train(self, **options: Any) -> StreamBatches:
        """New batches from the first training document on, with the options of `StreamBatches`."""
        # Rows remember where they were read. `deepcopy` of a data set fails while a file system joins fsspec's cache.
        rows = pickle.loads(pickle.dumps(self.train_rows))
        return StreamBatches(rows, self.tokenizer, eos=self.eos, name=self.name, **options)

    def documents(self, split: str) -> Iterator[Tensor]:
        """The ids of each document of "val" or "test"."""
        return documents(self.name, self.held_out[split], self.tokenizer, self.eos)


def open_stream(
    source: str | os.PathLike[str],
    tokenizer: str | Tokenizer,
    *,
    eos: int | None = None,
    held_out: int = 200,
    allow_overlap: bool = False,
) -> OpenedStream:
    """Opens a corpus as `load_stream` does, and trains its tokenizer."""
    name = os.fspath(source)
    check_counts(1, held_out=held_out)
    with hub_errors(name):
        data_set = _open(name)
        if "train" not in data_set:
            raise EaseError(f"{name} has no split 'train' (splits: {', '.join(data_set)}): use another data set")
        train_rows = data_set["train"]
        held_out_rows = {}
        skip = 0
        for split, hub_split in HELD_OUT_NAMES.items():
            if hub_split in data_set:
                held_out_rows[split] = data_set[hub_split].take(held_out)
            else:
                held_out_rows[split] = train_rows.skip(skip).take(held_out)
                skip += held_out
        train_rows = train_rows.skip(skip)
        own = {split: rows for split, rows in held_out_rows.items() if HELD_OUT_NAMES[split] in data_set}
        if own and not allow_overlap:
            first = {"train": train_rows.take(TOKENIZER_DOCUMENTS), **own}
            check_overlap(name, {split: texts(name, rows) for split, rows in first.items()})
        if isinstance(tokenizer, str):
            tokenizer = train_tokenizer(tokenizer, texts(name, train_rows.take(TOKENIZER_DOCUMENTS)))
            eos = tokenizer.token_to_id(EOS)
    return OpenedStream(name, tokenizer, eos, train_rows, held_out_rows)


def _open(name: str) -> Any:
    """The splits of a source, each an `IterableDataset`."""
    hub = hub_name(name)
    if hub is not None:
        return open_data_set(*hub)
    files = [str(file) for file in sorted(Path(name).parent.glob(Path(name).name))]
    if not files or not all(format_of(Path(file)) or Path(file).suffix == ".txt" for file in files):
        raise EaseError(
            f"no stream of documents at {name!r}: use hf:NAME/CONFIG, or .jsonl, .parquet or .txt files "
            "(or .json, .csv or .tsv)"
        )
    data_set = require("datasets", "hf").IterableDataset.from_generator(_read_all, gen_kwargs={"files": files})
    return {"train": data_set}


def _read_all(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from read_records(Path(file)) if format_of(Path(file)) else _read_paragraphs(file)


def _read_paragraphs(file: str) -> Iterator[dict[str, Any]]:
    """The documents of a text file, which an empty line separates."""
    lines: list[str] = []
    with Path(file).open(encoding="utf-8") as text:
        for number, line in enumerate(text, 1):
            lines.append(line)
            if not line.strip():
                yield {"text": "".join(lines), PLACE: f"{file}:{number}"}
                lines = []
    yield {"text": "".join(lines), PLACE: file}


def _pack_all(opened: OpenedStream, split: str, seq_len: int, batch_size: int) -> list[Batch]:
    """All documents of a held-out split, in order; the end of the last row is padding."""
    packer = Packer(opened.documents(split), seq_len)
    packed = list(iter(packer.row, None))
    batches = [batch_of(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)]
    if not any(bool(batch.scored.any()) for batch in batches):
        raise EaseError(f"{opened.name} leaves the {split} split without text: give more documents, or hold out fewer")
    return batches
