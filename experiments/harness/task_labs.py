"""Labs for other data than running text: records with a label or a completion, document streams, and checkpoints.

A lab defines what lines are trained on and what their models start from. `Examples` and `Stream` change the data,
`Checkpoint` the model, so that a checkpoint can be combined with any data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import ease
from ease.data.batches import ExampleBatches
from ease.data.streaming import StreamBatches
from ease.data.tasks import Task
from ease.evaluation.tasks import classification_metrics, completion_metrics
from ease.hf import checkpoint as hf
from ease.interface import Batch
from experiments.harness.lab import Lab


@dataclass(frozen=True)
class Examples(Lab):
    """Texts with labels, or prompts with completions; `text` holds the examples of each split."""

    labels: int | None = None
    """The number of labels; None for completions."""
    written: int = 100
    """Completions of the test split that are generated for ROUGE-L."""
    task: Task | None = field(default=None, repr=False)

    @cached_property
    def hash(self) -> str:
        sha = hashlib.sha256()
        for split, examples in sorted(self.text.items()):
            for example in examples:
                sha.update(f"{split} {len(example.ids)} ".encode())
                sha.update(example.ids.numpy().tobytes() + example.targets.numpy().tobytes())
        return sha.hexdigest()

    @property
    def tokens(self) -> dict[str, int]:
        return {split: sum(len(example.ids) for example in examples) for split, examples in self.text.items()}

    def train(self, seed: int, part: tuple[float, float] = (0.0, 1.0)) -> ExampleBatches:
        examples = self.text["train"]
        examples = examples[int(part[0] * len(examples)) : int(part[1] * len(examples))]
        return ExampleBatches(examples, self.batch, shuffle=True, bucket=True, seed=seed)

    @property
    def val(self) -> ExampleBatches:
        return self._some("val", self.eval_batches[0])

    @property
    def test(self) -> ExampleBatches:
        return self._some("test", self.eval_batches[1])

    def _some(self, split: str, batches: int | None) -> ExampleBatches:
        return ExampleBatches(self.text[split][: batches and batches * self.batch], self.batch)

    def model(self, layers: int | None, **shape: Any) -> ease.StandardTransformer:
        return super().model(layers, **({"num_labels": self.labels} if self.labels else {}) | shape)

    def extra_metrics(
        self, model: ease.StandardTransformer, policy: ease.Policy, scores: ease.Scores
    ) -> dict[str, float]:
        """F1, or ROUGE-L of the completions that the model generates under the policy."""
        if self.labels:
            return {"f1": classification_metrics(model, self.test, policy)["f1"]}
        assert self.task is not None
        model.policy = policy
        some = self.text["test"][: self.written]
        longest = max(int((example.targets >= 0).sum()) for example in some)
        made = completion_metrics(model, self.task, some, self.batch, mode="routed", max_new_tokens=longest)
        return {"rouge_l": made["rouge_l"]}


class Slices:
    """The epochs of a stream, counted. Setting `epoch` skips the batches before it when the next epoch is read."""

    def __init__(self, stream: StreamBatches) -> None:
        self.stream, self.epoch, self.place = stream, 0, 0

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        while self.place < self.epoch:
            for _ in self.stream:
                pass
            self.place += 1
        self.epoch, self.place = self.epoch + 1, self.place + 1
        yield from self.stream


@dataclass(frozen=True)
class Stream(Lab):
    """Documents that are read on demand; `text` holds the batches of validation and test."""

    buffer: int = 4096
    """Rows of the shuffle buffer."""
    stream: StreamBatches | None = field(default=None, repr=False)
    """The stream of the training split, from which new ones are made."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer and the held-out batches; the training stream may never be read to its end."""
        assert self.stream is not None
        sha = hashlib.sha256(self.stream.tokenizer.to_str().encode())
        for split, batches in sorted(self.text.items()):
            for batch in batches:
                sha.update(f"{split} {tuple(batch.x.shape)} ".encode() + batch.x.int().numpy().tobytes())
        return sha.hexdigest()

    @property
    def tokens(self) -> dict[str, int]:
        return {split: sum(int(b.running.sum()) for b in batches) for split, batches in self.text.items()}

    def train(self, seed: int, part: tuple[float, float] = (0.0, 1.0)) -> Slices:  # type: ignore[override]
        assert self.stream is not None
        assert part == (0.0, 1.0), "a stream has no known length, so a part of it is undefined"
        own = self.stream
        options = {"seq_len": self.seq, "batch_size": self.batch, "epoch_batches": self.epoch_batches}
        options |= {"eos": own.eos, "buffer": self.buffer, "seed": seed, "name": own.name}
        return Slices(StreamBatches(own.rows, own.tokenizer, **options))  # type: ignore[arg-type]

    @property
    def val(self) -> Sequence[Batch]:  # type: ignore[override]
        return self.text["val"][: self.eval_batches[0]]

    @property
    def test(self) -> Sequence[Batch]:  # type: ignore[override]
        return self.text["test"][: self.eval_batches[1]]


@dataclass(frozen=True)
class Checkpoint(Lab):
    """Lines add exits to a checkpoint with frozen layers, which a process holds once for all of its models.

    Only the parameters of a line's exits are saved.
    """

    path: str = field(default="", repr=False)
    device: str = field(default="cpu", repr=False)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the text and the checkpoint's files."""
        sha = hashlib.sha256(super().hash.encode())
        folder = hf.checkpoint_folder(self.path)
        for file in (folder / hf.CONFIG, *sorted(folder.glob("*.safetensors"))):
            with file.open("rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
        return sha.hexdigest()

    @cached_property
    def backbone(self) -> ease.StandardTransformer:
        return hf.from_pretrained(self.path, dtype="float32", device=self.device)

    def model(self, layers: int | None, **shape: Any) -> ease.StandardTransformer:
        """The first `layers` layers of the checkpoint, or all of them if None."""
        fresh = {"num_layers": layers or self.depth, "adapter_exits": (), "adapter_dim": 0, "classifier_exits": ()}
        model = self.build(asdict(self.backbone.config) | fresh | shape)
        model.trained_exits = {self.depth} if layers is None else set()
        return model

    def build(self, shape: Mapping[str, Any]) -> ease.StandardTransformer:
        """A model that shares every weight of the checkpoint except the parameters of exits."""
        with torch.device("meta"):
            model = ease.StandardTransformer(**shape)
        known, like, state = self.backbone.state_dict(), self.backbone.embedding.weight, dict[str, torch.Tensor]()
        for name, value in model.state_dict().items():
            if name not in known:  # filled from a file, or initialised by the strategy that adds it
                state[name] = like.new_zeros(value.shape)
            else:
                state[name] = known[name].clone() if of_exit(name) else known[name]
        model.load_state_dict(state, assign=True)
        if model.config.tie_embeddings:
            model.output_head.weight = model.embedding.weight
        return model

    def save(self, model: ease.StandardTransformer, file: Path) -> None:
        save_file({name: value.cpu() for name, value in model.state_dict().items() if of_exit(name)}, file)

    def load(self, model: ease.StandardTransformer, file: Path) -> None:
        model.load_state_dict(load_file(file), strict=False)


def of_exit(name: str) -> bool:
    """Whether a parameter belongs to an exit."""
    return name.startswith("exit_")


@dataclass(frozen=True)
class CheckpointExamples(Checkpoint, Examples):
    """Completions, with exits on a checkpoint."""


@dataclass(frozen=True)
class CheckpointStream(Checkpoint, Stream):
    """A stream of documents, with exits on a checkpoint."""
