"""The text of a run: a corpus in memory, or one whose training part is a stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ease.data.corpus import Corpus, load_corpus
from ease.data.streaming import STREAM, OpenedStream, open_stream
from ease.errors import EaseError
from ease.storage import digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EPOCH_BATCHES = 200  # batches of an epoch of a stream, which has no end, if the run does not set them

HELD_OUT = 500  # documents of validation, and of test


@dataclass(frozen=True, eq=False)
class StreamedCorpus(Corpus):
    """A corpus whose `train` is empty, since its documents are read while training uses them."""

    stream: OpenedStream

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described | {"tokens": {**described["tokens"], "train": None}}


def load_text(source: str, tokenizer: str | Tokenizer, *, eos: int | None = None, **options: Any) -> Corpus:
    """The corpus of a source, as `load_corpus` with these options; with "stream:" before it, as a stream.

    Raises:
        EaseError: the source cannot be read, or an option is for text that is read as a whole.
    """
    if not source.startswith(STREAM):
        return load_corpus(source, tokenizer, eos=eos, **options)
    if options.get("max_tokens") is not None:
        raise EaseError("max_tokens limits a text that is read as a whole: limit a stream by epochs or FLOPs")
    name, overlap = source.removeprefix(STREAM), options.get("allow_overlap", False)
    opened = open_stream(name, tokenizer, eos=eos, held_out=HELD_OUT, allow_overlap=overlap)
    none = torch.zeros(0, dtype=torch.int32)
    held_out = {split: torch.cat([none, *opened.documents(split)]) for split in opened.held_out}
    for split, ids in held_out.items():
        if not len(ids):
            raise EaseError(f"{source} leaves the {split} split without text: give more than {2 * HELD_OUT} documents")
    files = sorted(Path(name).parent.glob(Path(name).name)) if not name.startswith("hf:") else []
    listed = json.dumps([name if not files else "", *((file.name, file.stat().st_size) for file in files)])
    return StreamedCorpus(
        name=STREAM + (Path(name).name if files else name),
        tokenizer_spec=tokenizer if isinstance(tokenizer, str) else "given",
        tokenizer=opened.tokenizer,
        vocab_size=opened.tokenizer.get_vocab_size(),
        train=none,
        hash=digest(listed, held_out["val"], held_out["test"]),
        stream=opened,
        **held_out,
    )
