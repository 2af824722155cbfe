"""The context of a run: configuration, folder, corpus, device and progress, shared by all parts of the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus
from ease.models import StandardTransformer
from ease.progress import Progress, StepMetrics
from ease.runs.config import RunConfig
from ease.training.distributed import process


class MetricsLog(Progress):
    """Progress that appends every epoch to metrics.jsonl and passes all events on.

    Args:
        path: the file.
        line: name of the line, written into every row.
        inner: the progress that receives the same events.
    """

    def __init__(self, path: Path, line: str, inner: Progress) -> None:
        self.path, self.line, self.inner = path, line, inner

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.inner.step(fraction, metrics)

    def epoch(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"line": self.line, **row}) + "\n")
        self.inner.epoch(row)

    def resumed(self, epoch: int, step: int) -> None:
        self.inner.resumed(epoch, step)


@dataclass
class RunContext:
    """Everything that the parts of a run share.

    Args:
        config: configuration of the run.
        folder: folder that the run is written to.
        corpus: train, validation and test tokens, and the tokenizer.
        device: device to train and score on.
        progress: makes the progress of a named piece of work.
        start: trained model to start from, or None.
    """

    config: RunConfig[Any]
    folder: Path
    corpus: Corpus
    device: str
    progress: Callable[[str], Progress]
    start: StandardTransformer | None = None

    @property
    def in_sample(self) -> bool:
        """Whether the strategy validates on tokens that it trains on."""
        return getattr(self.config.strategy, "protocol", None) == "original"

    def progress_of(self, line: str, label: str | None = None) -> Progress:
        """Progress of the training of a line, logged to metrics.jsonl and shown under `label`."""
        if process():
            return Progress()
        return MetricsLog(self.folder / "metrics.jsonl", line, self.progress(label or line))

    def batches(self, split: str) -> TokenBatches:
        """Batches of a split: "train" (shuffled), "val" or "test"."""
        data = self.config.data
        ids = getattr(self.corpus, split)
        if split == "train":
            return TokenBatches(
                ids,
                data.seq_len,
                data.batch_size,
                shuffle=True,
                seed=self.config.seed,
                max_batches=data.epoch_batches,
            )
        return TokenBatches(ids, data.seq_len, data.batch_size, max_batches=data.eval_batches)

    def new_model(self, num_layers: int) -> StandardTransformer:
        """A model with new weights, drawn with the run's random seed."""
        torch.manual_seed(self.config.seed)
        if self.start is None:
            shape = {"vocab_size": self.corpus.vocab_size, **asdict(self.config.model)}
        else:
            shape = asdict(self.start.config)
            shape |= {"adapter_exits": (), "adapter_dim": 0, "classifier_exits": ()}
            shape |= {"draft_brick": False, "draft_vocabulary": None}
        return StandardTransformer(**{**shape, "num_layers": num_layers}).to(self.device)
