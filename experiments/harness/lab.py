"""The lab of an experiment: the text, model sizes and training budget that all of its lines share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

import ease
from experiments.harness.candidates import SHARES
from experiments.harness.identity import default, non_defaults
from experiments.harness.probes import PROBES, Spans


@dataclass(frozen=True)
class Lab:
    """Everything that the lines of one experiment have in common."""

    text: Mapping[str, Any] = field(repr=False)
    """train, val and test, each 1-D token ids; other labs hold examples or batches (see `task_labs`)."""
    corpus: str
    """Description of the text."""
    vocab_size: int
    brick: int
    """Layers of phase 1, after which tokens may exit."""
    depth: int
    """The number of layers that "layers run" is a share of."""
    budget: float
    """Training FLOPs of every line."""
    lrs: tuple[float, ...]
    """Learning rates that every line tries."""
    dim: int
    seq: int
    batch: int
    heads: int = 4
    dropout: float = 0.0
    tie_embeddings: bool = True
    epoch_batches: int | None = None
    """Batches between validations (the whole text by default)."""
    eval_batches: tuple[int | None, int | None] = (None, None)
    """Batches of validation and of test that are scored (all by default)."""
    mine_epochs: int = 1
    """Epochs of batches that a phase on hard tokens mines."""
    shares: tuple[float, ...] = SHARES
    """Shares of the validation tokens that continue past an exit; each gives one routing."""
    pieces: tuple[str, ...] = field(default=(), repr=False)
    """The text of every token, where it is known; used only by `token_groups` and `probes`."""
    space: str = field(default="", repr=False)
    """The text between two tokens."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the text."""
        sha = hashlib.sha256()
        for split, ids in sorted(self.text.items()):
            sha.update(f"{split} {len(ids)} ".encode() + ids.int().numpy().tobytes())
        return sha.hexdigest()

    @property
    def tokens(self) -> dict[str, int]:
        """The number of tokens in each split."""
        return {split: len(ids) for split, ids in self.text.items()}

    def describe(self) -> dict[str, Any]:
        """The settings, the sizes of the splits and the hash of the text, as JSON."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return settings | {"tokens": self.tokens, "hash": self.hash}

    def identity(self) -> dict[str, Any]:
        """What determines a trial's result: the settings that differ from their defaults, and the text."""
        hidden = {f.name: default(f) for f in fields(self) if not f.repr}
        return non_defaults(replace(self, **{**hidden, "text": {}, "lrs": ()})) | {"hash": self.hash}

    def train(self, seed: int, part: tuple[float, float] = (0.0, 1.0)) -> ease.TokenBatches:
        """Training batches of the text between two shares of its length."""
        ids = self.text["train"]
        ids = ids[int(part[0] * len(ids)) : int(part[1] * len(ids))]
        return ease.TokenBatches(ids, self.seq, self.batch, shuffle=True, seed=seed, max_batches=self.epoch_batches)

    @property
    def val(self) -> ease.TokenBatches:
        return ease.TokenBatches(self.text["val"], self.seq, self.batch, max_batches=self.eval_batches[0])

    @property
    def test(self) -> ease.TokenBatches:
        return ease.TokenBatches(self.text["test"], self.seq, self.batch, max_batches=self.eval_batches[1])

    def model(self, layers: int, **shape: Any) -> ease.StandardTransformer:
        """A new model, for a line that does not start from another line's."""
        own = {"dropout": self.dropout, "tie_embeddings": self.tie_embeddings}
        return ease.StandardTransformer(self.vocab_size, self.dim, layers, self.heads, **own | shape)

    def build(self, shape: Mapping[str, Any]) -> ease.StandardTransformer:
        """A model of a saved configuration, before its weights are loaded."""
        return ease.StandardTransformer(**shape)

    def save(self, model: ease.StandardTransformer, file: Path) -> None:
        """Save a trained model's weights."""
        save_model(model, str(file))

    def load(self, model: ease.StandardTransformer, file: Path) -> None:
        """Load the weights that `save` wrote."""
        load_model(model, str(file))

    @cached_property
    def probes(self) -> dict[str, Spans]:
        """Probe -> its spans in the scored part of the test split, where the text of every token is known."""
        if not self.pieces:
            return {}
        targets = self.text["test"][1 : len(self.test) * self.batch * self.seq + 1]
        pieces = [self.pieces[token] + self.space for token in targets.tolist()]
        return {name: Spans.of(probe, pieces) for name, probe in PROBES.items()}

    def extra_metrics(
        self, model: ease.StandardTransformer, policy: ease.Policy, scores: ease.Scores
    ) -> dict[str, float]:
        """Metrics on the test split beyond those that every lab has; `scores` are the model's there."""
        return {name: spans.right(scores.correct) for name, spans in self.probes.items()}
