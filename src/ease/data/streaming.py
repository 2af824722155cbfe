"""Corpora of any size: documents are read, packed into full rows and shuffled while training goes on.

- A row of a batch is full of documents, each a segment with positions of its own: no token attends across documents,
  and the last token of one has no target. A document that ends beyond its row goes on in the next, as a new segment.
- Rows are shuffled in a buffer of fixed size. Its content belongs to the stream's state, so that a stream resumed from
  its state gives the same batches to the bit.
- Documents that validate or test are never trained on: they come from the corpus' own splits, or from the front of
  train, which training then skips.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ease.data.sources import hub_name, open_data_set, reading, text_column
from ease.data.tokenizers import EOS, encode, train_tokenizer
from ease.errors import EaseError, check_least, check_seed
from ease.interface import IGNORE, Batch, Layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_DOCUMENTS = 2000  # documents of train that a tokenizer is trained on


class Packer:
    """Cuts documents, 1-D tensors of ids one after another, into full rows."""

    def __init__(self, documents: Iterator[Tensor], seq_len: int) -> None:
        self.documents, self.seq_len = documents, seq_len
        self.rest = torch.zeros(0, dtype=torch.int32)  # of the document that the next row begins with

    def row(self) -> Tensor | None:
        """(3, T) int32: ids, targets and segments, -1 for padding where the documents end; None after that."""
        T, filled, segment = self.seq_len, 0, 0
        row = torch.tensor([[0], [IGNORE], [-1]], dtype=torch.int32).repeat(1, T)
        while filled < T:
            if not len(self.rest):
                self.rest = next(self.documents, self.rest)
                if not len(self.rest):
                    break
            ids, targets = self.rest[: T - filled], self.rest[1 : T - filled + 1]
            row[0, filled : filled + len(ids)] = ids
            row[1, filled : filled + len(targets)] = targets
            row[2, filled : filled + len(ids)] = segment
            self.rest, filled, segment = self.rest[len(ids) :], filled + len(ids), segment + 1
        return row if filled else None


def batch_of(rows: list[Tensor]) -> Batch:
    """Rows (3, T) of a packer -> a batch (B, T) with its layout; positions restart with each segment."""
    x, y, segments = torch.stack(rows).long().unbind(1)
    places = torch.arange(x.shape[1]).expand_as(x)
    begins = segments.diff(dim=1, prepend=segments.new_full((len(rows), 1), -2)) != 0
    positions = places - places.masked_fill(~begins, 0).cummax(1).values
    return Batch(x, y, layout=Layout(positions, segments))


class StreamBatches:
    """Shuffled batches of packed rows (B, T), without end: an epoch is a slice, and the next one goes on behind it.

    When the documents end they start anew. `state_dict()`, taken between two batches, is where the stream stands:
    tensors, numbers and strings. A stream made with the same arguments that loads it goes on with the same batches.

    Args:
        rows: a `datasets.IterableDataset` with a column "text", a row a document.
        eos: the id that ends a document (None: none).
        epoch_batches: batches in an epoch.
        buffer: rows to shuffle among; no more are ever held. 1 keeps the order.
        seed: of the order.
        name: of the corpus, for errors.
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
    ) -> None:
        check_least(1, seq_len=seq_len, batch_size=batch_size, epoch_batches=epoch_batches, buffer=buffer)
        check_seed(seed)
        self.rows, self.tokenizer, self.eos, self.name = rows, tokenizer, eos, name
        self.batch_size, self.epoch_batches, self.buffer = batch_size, epoch_batches, buffer
        self.passes = 0  # over the documents, those before this one
        self.held: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.packer = Packer(self._documents(), seq_len)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.epoch_batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.epoch_batches):
            yield batch_of([self._draw() for _ in range(self.batch_size)])

    def _draw(self) -> Tensor:
        while len(self.held) < self.buffer:
            row = self.packer.row()
            assert row is not None  # documents have no end
            self.held.append(row)
        at = int(torch.randint(len(self.held), (), generator=self.generator))
        self.held[at], self.held[-1] = self.held[-1], self.held[at]
        return self.held.pop()

    def _documents(self) -> Iterator[Tensor]:
        idle = 0  # passes without a document; the one that a state was taken in may have been over
        while idle < 2:
            idle += 1
            self.rows.set_epoch(self.passes)  # a state that was loaded holds for its own pass alone
            for ids in documents(self.name, self.rows, self.tokenizer, self.eos):
                idle = 0
                yield ids
            self.passes += 1
        raise EaseError(f"{self.name} has no text to train on: give more documents, or hold out fewer")

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; nothing in it changes as the stream goes on."""
        return {
            "rows": self.rows.state_dict(),
            "passes": self.passes,
            "rest": self.packer.rest.clone(),
            "held": torch.stack(self.held) if self.held else torch.zeros(0, 3, self.packer.seq_len, dtype=torch.int32),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken; raises `EaseError` if that was a stream of another shape."""
        seq_len = state["held"].shape[2]
        if seq_len != self.packer.seq_len or len(state["held"]) > self.buffer:
            raise EaseError(
                f"this state holds {len(state['held'])} rows of {seq_len} tokens, and the stream is for "
                f"{self.buffer} of {self.packer.seq_len}: make it with the settings that the state was taken with"
            )
        self.passes, self.held = state["passes"], list(state["held"].clone())
        self.generator.set_state(state["generator"])
        self.packer = Packer(self._documents(), seq_len)
        self.packer.rest = state["rest"].clone()
        self.rows.load_state_dict(state["rows"])


def documents(name: str, rows: Any, tokenizer: Tokenizer, eos: int | None) -> Iterator[Tensor]:
    """The ids of each document that has any, 1-D int32, `eos` behind it."""
    with reading(name):
        for text in text_column(name, rows):
            if text.strip() and len(ids := encode(tokenizer, [text], eos)):  # a tokenizer may leave nothing of a text
                yield torch.from_numpy(ids)


class Stream(NamedTuple):
    """A corpus that is read as it is needed: an endless train split and two fixed ones held out."""

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
) -> Stream:
    """Opens a corpus of any size, through `datasets` streaming.

    Args:
        source: "hf:NAME" or "hf:NAME/CONFIG" on the Hugging Face hub (hf:allenai/c4/en), or local files, .jsonl or
            .parquet, `*` allowed in the name; a row is a document, its text in the column "text".
        tokenizer: a spec, of which one is trained on the first 2000 documents of train, or a finished one.
        eos: the id that ends a document, for a finished tokenizer (none by default).
        epoch_batches: batches of train in an epoch.
        held_out: documents of val, and of test: the first of the corpus' own split, or, where it has none, the first of
            train, for val and then for test. Train begins behind them.
        buffer: rows of train to shuffle among.

    Raises:
        EaseError: the source is unknown, cannot be read, or has no text for one of the splits.
    """
    name = os.fspath(source)
    check_least(1, held_out=held_out)
    with reading(name):
        found = _open(name)
        if "train" not in found:
            raise EaseError(f"{name} has no split 'train' (only {', '.join(found)}): use another")
        kept, skip = {}, 0
        for split, theirs in (("val", "validation"), ("test", "test")):
            kept[split] = found[theirs].take(held_out) if theirs in found else found["train"].skip(skip).take(held_out)
            skip += 0 if theirs in found else held_out
        learn = found["train"].skip(skip)
        if isinstance(tokenizer, str):
            tokenizer = train_tokenizer(tokenizer, text_column(name, learn.take(TOKENIZER_DOCUMENTS)))
            eos = tokenizer.token_to_id(EOS)
    train = StreamBatches(
        learn,
        tokenizer,
        eos=eos,
        seq_len=seq_len,
        batch_size=batch_size,
        epoch_batches=epoch_batches,
        buffer=buffer,
        seed=seed,
        name=name,
    )
    val, test = (_fixed(name, split, kept[split], tokenizer, eos, seq_len, batch_size) for split in ("val", "test"))
    return Stream(tokenizer, eos, train, val, test)


def _open(name: str) -> Any:
    """The splits of a source, each an `IterableDataset`."""
    hub = hub_name(name)
    if hub is not None:
        return open_data_set(*hub)
    files = sorted(Path(name).parent.glob(Path(name).name))
    kinds = {"json" if ".json" in file.name else file.suffix[1:] for file in files}
    if kinds not in ({"json"}, {"parquet"}):
        raise EaseError(f"no stream of documents at {name!r}: use hf:NAME/CONFIG, or .jsonl or .parquet files")
    return open_data_set(kinds.pop(), data_files={"train": [str(file) for file in files]})


def _fixed(
    name: str, split: str, rows: Any, tokenizer: Tokenizer, eos: int | None, seq_len: int, batch_size: int
) -> list[Batch]:
    """All documents of a split that is held out, in order; the end of the last row is padding."""
    packer = Packer(documents(name, rows, tokenizer, eos), seq_len)
    packed = list(iter(packer.row, None))
    batches = [batch_of(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)]
    if not any(bool(batch.scored.any()) for batch in batches):
        raise EaseError(f"{name} leaves the {split} split without text: give more documents, or hold out fewer")
    return batches
