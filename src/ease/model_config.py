"""The shape of a model, as data: every field of a checkpoint's configuration that changes what its layers compute."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, fields

from torch import Tensor

from ease.errors import EaseError, check_boolean, check_integer, check_layers, check_number


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Fields that are None follow from the other fields."""

    vocab_size: int
    """Size of the vocabulary."""
    dim: int = 64
    """Width D of the state."""
    num_layers: int = 3
    """Layers, numbered from 1."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads (as many by default)."""
    head_dim: int | None = None
    """Width of a head (dim / num_heads by default)."""
    hidden_dim: int | None = None
    """Gated units of the feed-forward (8/3 of dim by default, rounded up to a multiple of 8)."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    dropout: float = 0.0
    """Share of a branch's outputs zeroed in training."""
    tie_embeddings: bool = False
    """Use the embedding as the output head (experiments/studies/tied_head.py measures both)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values, as in Qwen2."""
    qk_norm: bool = False
    """An RMSNorm per head on queries and keys before the rotary turn, as in Qwen3."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's stretched rotary positions (None: plain ones)."""
    adapter_exits: tuple[int, ...] = ()
    """Exits below the last one that have an adapter between their norm and the head."""
    adapter_dim: int = 0
    """Units of an adapter."""
    classifier_exits: tuple[int, ...] = ()
    """Exits below the last one that have a classifier, which gives a confidence without the head."""
    num_labels: int | None = None
    """Number of classes of a sequence classifier, which makes one decision per sequence (None: a language model)."""
    max_positions: int | None = None
    """Number of positions that the model was trained for (None: unknown). It limits requests, not computation."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads"):
            check_integer(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "head_dim", "hidden_dim", "max_positions"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("adapter_dim", self.adapter_dim)
        if self.num_labels is not None:
            check_integer("num_labels", self.num_labels)
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            check_boolean(name, getattr(self, name))
        check_number("rope_theta", self.rope_theta, 1)  # smaller bases overflow the fast angles
        check_number("norm_eps", self.norm_eps, 0)
        check_number("dropout", self.dropout)
        scaling: object = self.rope_scaling
        if isinstance(scaling, dict):  # what JSON makes of it
            names = [field.name for field in fields(RopeScaling)]
            if sorted(scaling) != sorted(names):
                raise EaseError(f"rope_scaling must have the keys {', '.join(names)}, got {reprlib.repr(scaling)}")
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        elif not isinstance(scaling, RopeScaling | None):
            raise EaseError(f"rope_scaling must be an object, got {reprlib.repr(scaling)}")
        for name in ("adapter_exits", "classifier_exits"):
            object.__setattr__(self, name, check_layers(name, getattr(self, name)))
        if any(not 1 <= exit < self.num_layers for exit in self.adapter_exits) or (
            bool(self.adapter_exits) != (self.adapter_dim > 0)
        ):
            raise EaseError(
                f"adapter_exits {list(self.adapter_exits)} with adapter_dim {self.adapter_dim}: "
                "name exits below the last layer, and a width above 0"
            )
        if any(not 1 <= exit < self.num_layers for exit in self.classifier_exits):
            raise EaseError(
                f"classifier_exits {list(self.classifier_exits)}: name exits below layer {self.num_layers}, the last"
            )
        if self.num_labels is not None and (self.num_labels < 2 or self.tie_embeddings):
            raise EaseError(
                f"num_labels {self.num_labels} with tie_embeddings {self.tie_embeddings}: "
                "a classifier needs at least 2 labels and a head of its own"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise EaseError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads}), or set head_dim")
        if self.head_size % 2:
            raise EaseError(
                f"the width of a head must be even for rotary positions, got {self.head_size}: change dim or num_heads"
            )
        if self.num_heads % self.kv_heads:
            raise EaseError(f"num_kv_heads ({self.kv_heads}) must divide num_heads ({self.num_heads})")
        if not 0 <= self.dropout < 1:
            raise EaseError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def outputs(self) -> int:
        """V, the rows of the head: tokens, or labels."""
        return self.num_labels or self.vocab_size

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.hidden_dim or 8 * math.ceil(self.dim / 3)


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches rotary positions to a longer context (`rope_type` "llama3" of a config.json).

    A pair of dimensions that turns more than `high_freq_factor` times within `original_max_position` tokens keeps
    its frequency, one that turns less than `low_freq_factor` times turns `factor` times slower, and between the two
    the frequency moves linearly in the number of turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        check_number("factor of rope_scaling", self.factor, 1)
        check_number("low_freq_factor of rope_scaling", self.low_freq_factor, 0)
        check_number("high_freq_factor of rope_scaling", self.high_freq_factor, 0)
        check_integer("original_max_position of rope_scaling", self.original_max_position, 1)
        if not self.low_freq_factor < self.high_freq_factor:
            raise EaseError(
                f"low_freq_factor of rope_scaling ({self.low_freq_factor}) must lie below high_freq_factor "
                f"({self.high_freq_factor})"
            )

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_max_position / (2 * math.pi / frequencies)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies
