"""ease.runs.config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from ease.errors import EaseError, check_least, check_seed
from ease.training.phases import StrategyConfig

if TYPE_CHECKING:
    pass

Baseline = Literal["full-depth", "continued", "standard", "deep-supervision"]


@dataclass(frozen=True)
class ShapeConfig:
    """The shape of the model; its depth is the strategy's, its vocabulary the tokenizer's."""

    dim: int = 128
    """Width of the state."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (as many as query heads by default)."""
    hidden_dim: int | None = None
    """Gated units of the feed-forward (8/3 of dim by default)."""
    dropout: float = 0.0
    """Share of a branch's outputs zeroed in training."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    source: str = "stdlib"
    """stdlib, a folder with train.txt and valid.txt, a text file, wikitext-2, wikitext-103 or hf:NAME/CONFIG."""
    tokenizer: str = "bpe:2048"
    """bpe:N, word or byte."""
    seq_len: int = 128
    """Tokens in a sequence."""
    batch_size: int = 32
    """Sequences in a batch."""
    max_tokens: int | None = None
    """Read at most that many training tokens."""
    epoch_batches: int | None = None
    """Batches between validations (all of them by default)."""
    eval_batches: int | None = None
    """Score at most that many batches of validation and of test."""

    def __post_init__(self) -> None:
        check_least(1, seq_len=self.seq_len, batch_size=self.batch_size, max_tokens=self.max_tokens)
        check_least(1, epoch_batches=self.epoch_batches, eval_batches=self.eval_batches)


S = TypeVar("S", bound=StrategyConfig, covariant=True)


@dataclass(frozen=True)
class RunConfig(Generic[S]):
    """Everything that a run depends on."""

    strategy: S
    """The plan that yields phases."""
    name: str = "run"
    """Shown in the report; the run's folder is runs/NAME unless --out says otherwise."""
    model: ShapeConfig = field(default_factory=ShapeConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text, tokenizer and batches."""
    compare: tuple[Baseline, ...] = ("continued", "standard", "deep-supervision")
    """Lines beside it: the same model without routing, and others trained for the same FLOPs."""
    seed: int = 0
    """Of weights, order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    start: str | None = None
    """A finished model to start from: the folder of a run, or a checkpoint's folder or name on the Hugging Face hub. It
    brings its shape and its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights of a checkpoint that is started from."""
    note: str = ""
    """Said in the report: how to take these figures."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.dtype != "float32" and self.start is None:
            raise EaseError(f"dtype {self.dtype} is that of a checkpoint: name one with --start, or leave it out")
