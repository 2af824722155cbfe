"""The families of Llama whose checkpoints are read and written: `FAMILIES`, from model type to what it implies.

A family is data: the fields of `ModelConfig` that its architecture implies, and the keys of its config.json that set
others. `ease.hf.config` translates by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ease.errors import check_list

# ---------------------------------------------------------------------------------------------------------
# Which layers have windows and rotary positions, from the values of config.json


def every_layer(values: Mapping[str, Any], layer: int) -> bool:
    return True


def _if_used(values: Mapping[str, Any], layer: int) -> bool:
    """Qwen's: the upper layers, if the checkpoint uses windows at all."""
    return bool(values.get("use_sliding_window")) and layer > (values.get("max_window_layers") or 0)


def all_but_every(values: Mapping[str, Any], layer: int) -> bool:
    """Gemma's and EXAONE's: all but every n-th layer."""
    period = values["sliding_window_pattern"]
    return bool(period and layer % period)


def three_of_four(values: Mapping[str, Any], layer: int) -> bool:
    """OLMo 3's: all but every fourth layer."""
    return bool(layer % 4)


def unrotated(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers without rotary positions."""
    num_layers = values["num_hidden_layers"]
    rotary = check_list("no_rope_layers in config.json", values.get("no_rope_layers") or ())
    if rotary:
        return tuple(layer for layer, rotated in enumerate(rotary[:num_layers], 1) if not rotated)
    interval = values.get("no_rope_layer_interval")
    return tuple(range(interval, num_layers + 1, interval)) if interval else ()


# ---------------------------------------------------------------------------------------------------------
# Families


@dataclass(frozen=True)
class Family:
    """What a model type implies.

    Args:
        defaults: values of keys that config.json leaves out, as the family's class in transformers sets them.
        implied: fields of `ModelConfig` that the architecture sets.
        keys: key of config.json -> the field of `ModelConfig` that it sets, for keys that not every family has.
        biases: key of config.json -> the fields of `ModelConfig` that it sets together.
        windowed: whether a layer has the window, where config.json has no `layer_types`.
        any_head_dim: stock transformers accepts heads whose widths do not add up to the model's.
        partial_rotary: `partial_rotary_factor` applies.
        rotary_windows: where there are windows, layers without one have no rotary positions.
        token_ids: ids of special tokens that config.json leaves out.
        scaled_embedding: the embedding is multiplied by the root of its width.
        architecture: what the names of its classes in transformers begin with; by default the model type, capitalized.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    windowed: Callable[[Mapping[str, Any], int], bool] | None = None
    any_head_dim: bool = True
    partial_rotary: bool = False
    rotary_windows: bool = False
    scaled_embedding: bool = False
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None


ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "output_bias")}
BIASES = {**ATTENTION_BIAS, "mlp_bias": ("ffn_bias",)}

LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
OLMO_TOKENS = {"eos_token_id": 50_279, "pad_token_id": 1}
GEMMA_TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

GEMMA = {"norm_offset": True, "post_norms": True}
GEMMA_KEYS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
OLMO = {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True}
GEMMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}

# A model is exported as the first family that fits it.
FAMILIES = {
    "llama": Family({"max_position_embeddings": 2048}, biases=BIASES, any_head_dim=False, token_ids=LLAMA_TOKENS),
    "mistral": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        windowed=every_layer,
        token_ids=LLAMA_TOKENS,
    ),
    "qwen2": Family(
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32_768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        {"qkv_bias": True},
        windowed=_if_used,
    ),
    "qwen3": Family(
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32_768,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        {"qk_norm": True},
        biases=ATTENTION_BIAS,
        windowed=_if_used,
    ),
    "smollm3": Family(
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
        },
        biases=BIASES,
        windowed=lambda values, layer: bool(values.get("use_sliding_window")) and layer in unrotated(values),
        token_ids={"bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 128_004},
        architecture="SmolLM3",
    ),
    "phi3": Family(
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        windowed=every_layer,
        partial_rotary=True,
        token_ids={"bos_token_id": 1, "eos_token_id": 32_000, "pad_token_id": 32_000},
    ),
    "olmo2": Family(
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        OLMO,
        biases=ATTENTION_BIAS,
        token_ids=OLMO_TOKENS,
    ),
    "olmo3": Family(
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
        {**OLMO, "local_rope_theta": 500_000.0},
        biases=ATTENTION_BIAS,
        windowed=three_of_four,
        token_ids=OLMO_TOKENS,
    ),
    "exaone4": Family(
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        {"pre_norms": False, "post_norms": True, "qk_norm": True},
        windowed=all_but_every,
        rotary_windows=True,
        token_ids={"bos_token_id": 0, "eos_token_id": 2},
    ),
    "granite": Family(
        {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        keys={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention_scale",
            "logits_scaling": "logit_divisor",
        },
        biases=BIASES,
        any_head_dim=False,
        token_ids=LLAMA_TOKENS,
    ),
    "gemma": Family(
        {
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
        {"norm_offset": True},
        biases=ATTENTION_BIAS,
        scaled_embedding=True,
        token_ids=GEMMA_TOKENS,
    ),
    "gemma2": Family(
        {
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        GEMMA,
        GEMMA_KEYS,
        ATTENTION_BIAS,
        all_but_every,
        scaled_embedding=True,
        token_ids=GEMMA_TOKENS,
    ),
    "gemma3_text": Family(
        {
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        {**GEMMA, "qk_norm": True},
        {**GEMMA_KEYS, "rope_local_base_freq": "local_rope_theta"},
        ATTENTION_BIAS,
        all_but_every,
        scaled_embedding=True,
        token_ids=GEMMA_TOKENS,
        architecture="Gemma3",
    ),
}
