"""The context of a run: configuration, folder, corpus, device and progress, shared by all parts of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus
from ease.data.streaming import StreamBatches
from ease.models import StandardTransformer
from ease.progress import Progress
from ease.runs.config import RunConfig
from ease.runs.log import LOG_EVERY, METRICS, MetricsFile, MetricsLog
from ease.runs.text import EPOCH_BATCHES, StreamedCorpus
from ease.runs.tracking import Tracker
from ease.training.distributed import process, processes, shared_map


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
        trackers: receive the metrics of training.
        log_every: optimizer steps between two rows of metrics.jsonl.
    """

    config: RunConfig[Any]
    folder: Path
    corpus: Corpus
    device: str
    progress: Callable[[str], Progress]
    start: StandardTransformer | None = None
    trackers: Sequence[Tracker] = ()
    log_every: int = LOG_EVERY

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.folder / METRICS)

    @property
    def in_sample(self) -> bool:
        """Whether the strategy validates on tokens that it trains on."""
        return getattr(self.config.strategy, "protocol", None) == "original"

    def progress_of(self, line: str, label: str | None = None) -> Progress:
        """Progress of the training of a line, logged to metrics.jsonl and shown under `label`."""
        if process():
            return Progress()
        return MetricsLog(
            self.metrics,
            line,
            self.progress(label or line),
            device=self.device,
            trackers=self.trackers,
            label=label,
            every=self.log_every,
        )

    def train_batches(self) -> TokenBatches | StreamBatches:
        """Shuffled batches of the training text, from its beginning."""
        data, seed = self.config.data, self.config.seed
        if isinstance(self.corpus, StreamedCorpus):
            sizes = {"seq_len": data.seq_len, "batch_size": data.batch_size}
            length, encode_all = data.epoch_batches or EPOCH_BATCHES, shared_map if processes() > 1 else None
            return self.corpus.stream.train(**sizes, epoch_batches=length, seed=seed, encode_all=encode_all)
        return TokenBatches(
            self.corpus.train,
            data.seq_len,
            data.batch_size,
            shuffle=True,
            seed=seed,
            max_batches=data.epoch_batches,
        )

    def batches(self, split: str) -> TokenBatches:
        """Batches of "val" or "test", in order."""
        data = self.config.data
        ids = getattr(self.corpus, split)
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
