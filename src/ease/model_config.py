"""The shape of a model, as data: every field of a checkpoint's configuration that changes what its layers compute."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ease.errors import (
    EaseError,
    check_boolean,
    check_choice,
    check_counts,
    check_fields,
    check_integer,
    check_layers,
    check_list,
    check_number,
)

MEMORY_HASHES = 2  # parts that a row of a memory is looked up in

DRAFT_VOCABULARY = 16_384  # tokens that a draft brick can draft by default, of a vocabulary of more than twice as many


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Fields that are None follow from the other fields."""

    vocab_size: int
    """Size of the vocabulary."""
    dim: int = 64
    """Width D of the state."""
    num_layers: int = 3
    """Layers, numbered from 1; 0 for a memory alone."""
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
    """Rotary positions stretched to a longer context (None: plain ones)."""
    memory_orders: tuple[int, ...] = ()
    """Lengths n of the n-grams that have rows in the memory, brick 0 (none by default: no memory and no exit 0)."""
    memory_rows: int = 32_768
    """Rows of the memory for each order."""
    adapter_exits: tuple[int, ...] = ()
    """Exits below the last one that have an adapter between their norm and the head."""
    adapter_dim: int = 0
    """Units of an adapter."""
    classifier_exits: tuple[int, ...] = ()
    """Exits below the last one that have a classifier, which gives a confidence without the head."""
    draft_brick: bool = False
    """A layer above the last that drafts for exact decoding."""
    draft_vocabulary: int | None = None
    """Number of tokens that the draft brick can draft (all by default, and 16,384 of more than 32,768)."""
    num_labels: int | None = None
    """Number of classes of a sequence classifier, which makes one decision per sequence (None: a language model)."""
    max_positions: int | None = None
    """Number of positions that the model was trained for (None: unknown). It limits requests, not computation."""

    # What other families do than Llama.
    window: int | None = None
    """Tokens that a token attends to, itself included (None: all before it)."""
    windowed_layers: tuple[int, ...] | None = None
    """Layers with the window (None: all, if there is one)."""
    local_rope_theta: float | None = None
    """Base of the rotary angles in layers with the window, where they are not stretched (None: as in the others)."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without rotary positions, as in SmolLM3."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that are rotated (None: all)."""
    attention_scale: float | None = None
    """Factor on the products of queries and keys (1 / sqrt(head_dim) by default)."""
    attention_softcap: float | None = None
    """c: scores s become c tanh(s / c), as in Gemma 2 (None: they stay)."""
    logit_softcap: float | None = None
    """c: logits z become c tanh(z / c), as in Gemma 2 (None: they stay)."""
    logit_divisor: float = 1.0
    """Logits are divided by it, as in Granite."""
    embedding_scale: float = 1.0
    """Factor on the embedding, as in Gemma and Granite."""
    residual_scale: float = 1.0
    """Factor on what a branch adds to the state, as in Granite."""
    pre_norms: bool = True
    """Norms before attention and feed-forward."""
    post_norms: bool = False
    """Norms on the results of attention and feed-forward, as in Gemma and OLMo 2."""
    norm_offset: bool = False
    """A norm's weight w is stored for a factor of 1 + w, as in Gemma."""
    wide_qk_norm: bool = False
    """The norms on queries and keys span all heads, as in OLMo 2; needs qk_norm."""
    output_bias: bool = False
    """A bias on the output projection of attention."""
    ffn_bias: bool = False
    """Biases on the three projections of the feed-forward."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """The gate's activation: SiLU, or the tanh approximation of GELU."""

    def __post_init__(self) -> None:
        scaling: object = self.rope_scaling
        if isinstance(scaling, dict):  # what JSON makes of it
            names = [field.name for field in fields(RopeScaling)]
            if "factor" not in scaling or not scaling.keys() <= set(names):
                raise EaseError(
                    f"rope_scaling must have a factor and no keys but {', '.join(names)}, got {reprlib.repr(scaling)}"
                )
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        elif not isinstance(scaling, RopeScaling | None):
            raise EaseError(f"rope_scaling must be an object, got {reprlib.repr(scaling)}")
        check_fields(self)
        positive = (
            *("vocab_size", "dim", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "memory_rows"),
            *("max_positions", "window", "rotary_dim", "draft_vocabulary"),
        )
        check_counts(1, **{name: getattr(self, name) for name in positive})
        check_counts(0 if self.memory_orders else 1, num_layers=self.num_layers)
        check_counts(0, adapter_dim=self.adapter_dim, num_labels=self.num_labels)
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        for name in ("embedding_scale", "residual_scale", "logit_divisor"):
            check_number(name, getattr(self, name))
        if self.local_rope_theta is not None:
            check_number("local_rope_theta", self.local_rope_theta, 1)
        check_number("rope_theta", self.rope_theta, 1)  # smaller bases overflow the fast angles
        check_number("norm_eps", self.norm_eps, 0)
        check_number("dropout", self.dropout)
        for name in ("memory_orders", "adapter_exits", "classifier_exits", "unrotated_layers", "windowed_layers"):
            layers = getattr(self, name)
            if layers is not None or name != "windowed_layers":
                # One order for the same layers, so that equal models have equal configurations.
                object.__setattr__(self, name, tuple(sorted({*check_layers(name, layers)})))
        for name in ("windowed_layers", "unrotated_layers"):
            if any(not 1 <= layer <= self.num_layers for layer in getattr(self, name) or ()):
                raise EaseError(f"{name} {list(getattr(self, name))}: name layers in 1..{self.num_layers}")
        if self.window is None and (self.windowed_layers or self.local_rope_theta is not None):
            raise EaseError("windowed_layers and local_rope_theta need a window: set window as well")
        if self.wide_qk_norm and not self.qk_norm:
            raise EaseError("wide_qk_norm needs norms on queries and keys: set qk_norm as well")
        if not (self.pre_norms or self.post_norms):
            raise EaseError("a layer needs pre_norms, post_norms or both")
        if self.memory_orders and (self.memory_orders[0] < 1 or self.dim % MEMORY_HASHES):
            raise EaseError(
                f"memory_orders {list(self.memory_orders)} at dim {self.dim}: name lengths of n-grams from 1 on, and "
                f"make dim a multiple of {MEMORY_HASHES}"
            )
        if any(not self.first_exit <= exit < self.num_layers for exit in self.adapter_exits) or (
            bool(self.adapter_exits) != (self.adapter_dim > 0)
        ):
            raise EaseError(
                f"adapter_exits {list(self.adapter_exits)} with adapter_dim {self.adapter_dim}: "
                "name exits below the last layer, and a width above 0"
            )
        if any(not self.first_exit <= exit < self.num_layers for exit in self.classifier_exits):
            raise EaseError(
                f"classifier_exits {list(self.classifier_exits)}: name exits below layer {self.num_layers}, the last"
            )
        if self.num_labels is not None and (self.num_labels < 2 or self.tie_embeddings):
            raise EaseError(
                f"num_labels {self.num_labels} with tie_embeddings {self.tie_embeddings}: "
                "a classifier needs at least 2 labels and a head of its own"
            )
        if self.draft_brick and not self.num_layers:
            raise EaseError("a draft brick reads the last layer, and the model has none: grow it first")
        if self.draft_brick and self.num_labels is not None:
            raise EaseError("a classifier generates no text: leave out draft_brick, or num_labels")
        if self.draft_vocabulary is not None and not self.draft_brick:
            raise EaseError(
                f"draft_vocabulary {self.draft_vocabulary} is that of a draft brick: set draft_brick as well"
            )
        if self.draft_vocabulary is not None and self.draft_vocabulary > self.vocab_size:
            raise EaseError(
                f"draft_vocabulary is {self.draft_vocabulary} and the model has {self.vocab_size} tokens: give no more "
                "than that"
            )
        if self.draft_brick and self.draft_vocabulary is None:
            tokens = self.vocab_size if self.vocab_size <= 2 * DRAFT_VOCABULARY else DRAFT_VOCABULARY
            object.__setattr__(self, "draft_vocabulary", tokens)
        if self.head_dim is None and self.dim % self.num_heads:
            raise EaseError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads}), or set head_dim")
        if self.head_size % 2:
            raise EaseError(
                f"the width of a head must be even for rotary positions, got {self.head_size}: change dim or num_heads"
            )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_size):
            raise EaseError(
                f"rotary_dim must be even and at most the width of a head ({self.head_size}), got {self.rotary_dim}"
            )
        if self.num_heads % self.kv_heads:
            raise EaseError(f"num_kv_heads ({self.kv_heads}) must divide num_heads ({self.num_heads})")
        if not 0 <= self.dropout < 1:
            raise EaseError(f"dropout must lie in [0, 1), got {self.dropout}")

    def attention_kind(self, layer: int) -> AttentionKind:
        """How layer `layer` attends."""
        windowed = self.window is not None and (self.windowed_layers is None or layer in self.windowed_layers)
        theta, scaling = self.rope_theta, self.rope_scaling
        if windowed and self.local_rope_theta is not None:
            theta, scaling = self.local_rope_theta, None
        kind = AttentionKind(
            window=self.window if windowed else None,
            theta=None if layer in self.unrotated_layers else theta,
            rope_scaling=None if layer in self.unrotated_layers else scaling,
            scale=self.attention_scale,
            softcap=self.attention_softcap,
        )
        return KINDS.setdefault(kind, kind)

    @property
    def first_exit(self) -> int:
        """The lowest exit: 0, the head on embedding and memory, in a model with a memory; otherwise 1."""
        return 0 if self.memory_orders else 1

    @property
    def memory_size(self) -> int:
        """Parameters of the memory."""
        return len(self.memory_orders) * self.memory_rows * self.dim

    @property
    def outputs(self) -> int:
        """V, the rows of the head: tokens, or labels."""
        return self.num_labels or self.vocab_size

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_size(self) -> int:
        return self.rotary_dim or self.head_size

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.hidden_dim or 8 * math.ceil(self.dim / 3)


class AttentionKind(NamedTuple):
    """How a layer attends; layers of one kind share masks and rotary factors."""

    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    theta: float | None = 10_000.0
    """Base of the rotary angles; None: no rotary positions."""
    rope_scaling: RopeScaling | None = None
    scale: float | None = None
    """Factor on the products of queries and keys; None: 1 / sqrt(head_dim)."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c); None: they stay."""


KINDS: dict[AttentionKind, AttentionKind] = {}  # torch.compile compares keys of dictionaries by identity

ROPE_NEEDS = {  # rope_type -> the fields that it needs besides `factor`
    "linear": (),
    "dynamic": ("original_max_position",),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("original_max_position",),
    "longrope": ("original_max_position", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched to a longer context (`rope_type` of a config.json).

    - linear: all frequencies are divided by `factor`.
    - dynamic: frequencies change beyond `original_max_position` only; longer sequences are refused.
    - llama3: a pair of dimensions that turns more than `high_freq_factor` times within `original_max_position` tokens
      keeps its frequency, one that turns less than `low_freq_factor` times turns `factor` times slower, and between
      the two the frequency moves linearly in the number of turns.
    - yarn (Peng et al. 2023, arXiv:2309.00071): the same between `beta_slow` and `beta_fast` turns, linearly in the
      index of the pair; queries and keys are multiplied by `attention_factor`.
    - longrope (Ding et al. 2024, arXiv:2402.13753): the frequency of each pair is divided by its `short_factor`.
      `long_factor` would apply beyond `original_max_position`; longer sequences are refused.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None
    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = "llama3"
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("rope_type of rope_scaling", self.rope_type, tuple(ROPE_NEEDS))
        check_number("factor of rope_scaling", self.factor, 1)
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor"):
            if getattr(self, name) is not None:
                check_number(f"{name} of rope_scaling", getattr(self, name), 0)
        for name in ("beta_fast", "beta_slow"):
            check_number(f"{name} of rope_scaling", getattr(self, name), 0)
        if self.original_max_position is not None:
            check_integer("original_max_position of rope_scaling", self.original_max_position, 1)
        check_boolean("truncate of rope_scaling", self.truncate)
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                factors = tuple(check_list(f"{name} of rope_scaling", getattr(self, name)))
                for number in factors:
                    check_number(f"{name} of rope_scaling", number, 0)
                object.__setattr__(self, name, factors)
        if missing := [name for name in ROPE_NEEDS[self.rope_type] if getattr(self, name) is None]:
            raise EaseError(f"rope_scaling of type {self.rope_type} needs {', '.join(missing)}: add the missing keys")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise EaseError(
                f"low_freq_factor of rope_scaling ({self.low_freq_factor}) must lie below high_freq_factor "
                f"({self.high_freq_factor})"
            )

    @property
    def limit(self) -> int | None:
        """Tokens of a sequence beyond which the frequencies would depend on its length; None: they never do."""
        return self.original_max_position if self.rope_type in ("dynamic", "longrope") else None

    @property
    def amplitude(self) -> float:
        """Factor on the rotated queries and keys."""
        if self.attention_factor is not None or self.rope_type not in ("yarn", "longrope") or self.factor <= 1:
            return 1.0 if self.attention_factor is None else self.attention_factor
        if self.rope_type == "yarn":
            return 0.1 * math.log(self.factor) + 1
        assert self.original_max_position is not None
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))

    def __call__(self, frequencies: Tensor, theta: float) -> Tensor:
        """The stretched frequencies of pairs of dimensions (d / 2,), whose base is `theta`."""
        f, kept = frequencies, frequencies.new_zeros(())
        if self.rope_type == "dynamic":
            return f
        if self.rope_type == "longrope":
            return f / f.new_tensor(self.short_factor)
        if self.rope_type == "llama3":
            assert self.original_max_position is not None
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            turns = self.original_max_position / (2 * math.pi / f)
            kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        if self.rope_type == "yarn":
            low, high = (self._pair(turns, 2 * len(f), theta) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * len(f) - 1)
            pairs = torch.arange(len(f), device=f.device, dtype=f.dtype)
            kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return (1 - kept) * f / self.factor + kept * f

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The index of the pair, of dim / 2, that turns `turns` times within the original context."""
        assert self.original_max_position is not None
        return dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))


# ---------------------------------------------------------------------------------------------------------
# Sizes of stored weights


def check_sizes(
    config: ModelConfig,
    shapes: Mapping[str, Sequence[int]],
    file: object,
    fix: str,
    *,
    stored_name: Callable[[str], str] = lambda name: name,
    fields: Mapping[str, str] = {},
) -> None:
    """Compares a configuration with the shapes of stored weights, before a module of that size is made.

    A number in a JSON file costs nothing to write and may ask for more layers or memory than any machine has; the
    header of a weights file cannot, since its shapes have to add up to the size of the file.

    Args:
        config: the configuration.
        shapes: name of a stored tensor -> its shape.
        file: the file of the configuration, for messages.
        fix: what the message of an error recommends.
        stored_name: native name of a parameter -> its name in `shapes`.
        fields: name of a field of `ModelConfig` -> its name in `file`, where that differs.

    Raises:
        EaseError: a field does not fit the weights; the message names file, field and fix.
    """
    c = config
    names = {field: fields.get(field, field) for field in ("num_layers", "vocab_size", "dim", "hidden_dim")}
    heads, kv_heads = (f"{fields.get(n, n)} x head_dim" for n in ("num_heads", "num_kv_heads"))
    layers = {int(hit[1]) for name in shapes if (hit := re.search(r"(?:^|\.)layers\.([0-9]{1,18})\.", name))}
    if layers and c.num_layers != max(layers) + 1:
        raise EaseError(
            f"{file} has {names['num_layers']} {c.num_layers}, but the weights have {max(layers) + 1} layers: {fix}"
        )
    adapters = [(f"exit_adapters.{exit}.up_proj.weight", 0, "adapter_dim", c.adapter_dim) for exit in c.adapter_exits]
    for native, axis, field, size in [
        ("embedding.weight", 0, names["vocab_size"], c.vocab_size),
        ("embedding.weight", 1, names["dim"], c.dim),
        ("output_head.weight", 0, names["vocab_size"] if c.num_labels is None else "num_labels", c.outputs),
        ("layers.0.attention.q_proj.weight", 0, heads, c.num_heads * c.head_size),
        ("layers.0.attention.k_proj.weight", 0, kv_heads, c.kv_heads * c.head_size),
        ("layers.0.ffn.gate_proj.weight", 0, names["hidden_dim"], c.ffn_size),
        *adapters,
        ("draft_brick.vocabulary", 0, "draft_vocabulary", c.draft_vocabulary),
        ("memory.table", 0, "memory_rows", len(c.memory_orders) * c.memory_rows * MEMORY_HASHES),
    ]:
        shape = shapes.get(stored_name(native), ())
        if axis < len(shape) and shape[axis] != size:
            raise EaseError(f"{file} has {field} {size}, but the weights have {shape[axis]}: {fix}")
    # Fields whose tensor is absent are caught by the comparison of all tensors, which makes the layers without memory.
    if not layers and c.num_layers:
        raise EaseError(f"{file} has {names['num_layers']} {c.num_layers}, but the weights have no layers: {fix}")
