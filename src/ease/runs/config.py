"""Configuration of a run: model shape, data, strategy and the baselines to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from ease.errors import EaseError, check_counts, check_fields, check_number, check_seed
from ease.training.execution import Execution
from ease.training.phases import StrategyConfig

SELF = "self:"  # a source that begins so is text that the model makes itself, from prompts

Baseline = Literal["full-depth", "continued", "standard", "deep-supervision", "growth"]


@dataclass(frozen=True)
class ShapeConfig:
    """Shape of the model. The strategy sets its depth, the tokenizer its vocabulary size.

    Args:
        dim: width of the hidden state.
        num_heads: query heads per layer.
        num_kv_heads: key and value heads per layer; None means `num_heads`.
        hidden_dim: gated units of the feed-forward network; None means 8/3 of `dim`.
        dropout: dropout probability on the output of each branch.
        tie_embeddings: use the embedding matrix as the output head.
        memory_orders: lengths of the n-grams that the memory, brick 0, has rows for; empty means no memory.
        memory_rows: rows of the memory per order.
    """

    dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = False
    memory_orders: tuple[int, ...] = ()
    memory_rows: int = 32_768

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig:
    """Text source, tokenizer and batch sizes.

    Args:
        source: "stdlib", a folder with train.txt and valid.txt, a text file, a .jsonl, .json, .csv, .tsv or .parquet
            file with a column "text", "wikitext-2", "wikitext-103" or "hf:NAME/CONFIG"; or "self:PROMPTS", text
            that the model of `start` makes from the prompts of such a source (a text file has one in each line); or
            "stream:FILES" or "stream:hf:NAME/CONFIG", documents that are read while they are used: .jsonl, .json,
            .csv, .tsv, .parquet or .txt files, with * in the name (an empty line ends a document of a .txt file).
        tokenizer: "bpe:N", "word" or "byte".
        split_special_tokens: whether text that spells a special token of a checkpoint's tokenizer, such as
            <|im_start|>, stays text; None reads it as transformers does.
        seq_len: tokens per sequence.
        batch_size: sequences per batch.
        max_tokens: limit on the number of training tokens read, or made (200,000 by default).
        temperature: temperature of text that the model makes (that of the checkpoint's generation_config.json by
            default, or else 1).
        epoch_batches: training batches between two validations; None means all of them.
        eval_batches: limit on the batches scored of validation and of test.
        allow_overlap: accept a source whose splits share most of their text.

    Raises:
        EaseError: a field has the wrong type, or a size is below 1.
    """

    source: str = "stdlib"
    tokenizer: str = "bpe:2048"
    split_special_tokens: bool | None = None
    seq_len: int = 128
    batch_size: int = 32
    max_tokens: int | None = None
    epoch_batches: int | None = None
    eval_batches: int | None = None
    allow_overlap: bool = False
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.temperature is not None:
            check_number("temperature", self.temperature, 0)
            if not self.source.startswith(SELF):
                raise EaseError("temperature applies to text that the model makes (self:PROMPTS): leave it out")
        check_counts(1, seq_len=self.seq_len, batch_size=self.batch_size, max_tokens=self.max_tokens)
        check_counts(1, epoch_batches=self.epoch_batches, eval_batches=self.eval_batches)


S = TypeVar("S", bound=StrategyConfig, covariant=True)


@dataclass(frozen=True)
class RunConfig(Generic[S]):
    """Everything that determines a run.

    Args:
        strategy: configuration of the training strategy.
        name: name in the report and default name of the run folder.
        model: shape of the model; ignored when `start` is set.
        data: text, tokenizer and batches.
        compare: baselines, each trained with the FLOPs of the strategy's last line:
            "full-depth": the strategy's final model, scored without routing (no training);
            "continued": the model that the first later phase started from, trained further;
            "standard": a loss on the last layer only;
            "deep-supervision": a loss on every layer, routed at the same exits;
            "growth": progressive growth, all layers trained on all tokens.
        compare_layers: depths of the standard baselines; empty means the depth of the strategy's final model.
        seed: random seed of weights, batch order and dropout.
        device: "auto", "cpu", "cuda" or "mps".
        start: trained model to start from: a run folder, a checkpoint folder, or a name on the Hugging Face hub. It
            determines shape and tokenizer.
        dtype: dtype of the weights of a checkpoint given as `start`.
        note: remark printed in the report.
        execution: precision, accumulation, and what else changes speed and memory; the baselines share it.

    Raises:
        EaseError: the seed or a depth is out of range, or `dtype` or `data.split_special_tokens` is set without
            `start`.
    """

    strategy: S
    name: str = "run"
    model: ShapeConfig = field(default_factory=ShapeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compare: tuple[Baseline, ...] = ("continued", "standard", "deep-supervision")
    compare_layers: tuple[int, ...] = ()
    seed: int = 0
    device: str = "auto"
    start: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    note: str = ""
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_fields(self)
        for layers in self.compare_layers:
            check_counts(1, compare_layers=layers)
        if self.dtype != "float32" and self.start is None:
            raise EaseError(f"dtype {self.dtype} applies to a checkpoint: name one with --start, or leave it out")
        if self.data.source.startswith(SELF) and self.start is None:
            raise EaseError(f"{self.data.source} is made by a trained model: name one with --start, or another source")
        if self.data.split_special_tokens is not None and self.start is None:
            raise EaseError(
                "split_special_tokens applies to a checkpoint's tokenizer: name one with --start, or leave it out"
            )
