"""config.json of the Llama family and the native shape, translated both ways.

Every key is read, has a value that it must have, changes nothing in a forward pass, or is refused: a key that is
passed over in silence is a model that computes something else than its makers meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ease.errors import EaseError
from ease.interface import ModelConfig

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": None}

# What a config.json of the family means by leaving a key out, as its class in transformers has it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
}

HANDLED = {
    *SHAPE,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
}

# Keys that change what is computed, and the one value under which it is what the native model computes.
MUST_BE: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}

# Keys that change nothing in a forward pass.
HARMLESS = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

ROPE_KEYS = {
    "default": set[str](),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The native shape that a checkpoint's config.json describes.

    Raises:
        EaseError: naming the family, key or value that the native model cannot hold exactly.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise EaseError(
            f"model_type {family!r} in config.json is none of {', '.join(FAMILIES)}: use a checkpoint of these "
            "families (`ease export` makes one of a run)"
        )
    if unknown := sorted(raw.keys() - HANDLED - HARMLESS - MUST_BE.keys()):
        raise EaseError(
            f"config.json has keys whose meaning ease does not know: {', '.join(unknown)}; use a checkpoint without "
            "them, or take them out if they do not change what the model computes"
        )
    for key, value in MUST_BE.items():
        if raw.get(key) not in (None, value):
            raise _unfit(f"{key} {raw[key]!r}")
    for key in SHAPE:
        if not isinstance(raw.get(key), int):
            raise EaseError(f"config.json must give {key} as a whole number, got {raw.get(key)!r}")

    c = {**DEFAULTS, **FAMILIES[family], **raw}
    layers, heads, positions = c["num_hidden_layers"], c["num_attention_heads"], c["max_position_embeddings"]
    windowed = family == "mistral" or c.get("use_sliding_window")
    window = c.get("sliding_window") if windowed else None
    if window is not None and window < positions:
        raise _unfit(f"a sliding_window of {window} below max_position_embeddings ({positions})")
    if others := sorted(set(c.get("layer_types") or ()) - {"full_attention"}):
        raise _unfit(f"layer_types {', '.join(others)}")
    interval = c.get("no_rope_layer_interval") or layers + 1
    rotary = c.get("no_rope_layers") or [int(k % interval != 0) for k in range(1, layers + 1)]
    if not all(rotary):
        raise _unfit("layers without rotary positions (no_rope_layers)")

    return ModelConfig(
        vocab_size=c["vocab_size"],
        dim=c["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        hidden_dim=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        tie_embeddings=bool(c.get("tie_word_embeddings")),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_positions=positions,
        **_read_rope(c),
    )


def _read_rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of the native shape, from `rope_parameters` (transformers 5)
    or `rope_theta` and `rope_scaling` (before)."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise _unfit(f"rope_type {kind!r}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _unfit(f"partial_rotary_factor {rope['partial_rotary_factor']!r}")
    known = ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(rope.keys() - known):
        raise _unfit(f"{', '.join(unknown)} in the parameters of rope_type {kind!r}")
    theta = float(rope.get("rope_theta") or c["rope_theta"])
    if kind == "default":
        return {"rope_theta": theta}
    rope = {"original_max_position_embeddings": c["max_position_embeddings"]} | rope
    if missing := sorted(ROPE_KEYS[kind] - rope.keys()):
        raise EaseError(f"config.json leaves out {', '.join(missing)} of rope_type {kind!r}: add what is missing")
    scaling = {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_position": rope["original_max_position_embeddings"],
    }
    return {"rope_theta": theta, "rope_scaling": scaling}


def _unfit(what: str) -> EaseError:
    return EaseError(f"the model of config.json has {what}, which ease cannot hold exactly: use a checkpoint without")


def write_config(config: ModelConfig, token_ids: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json under which stock transformers, 4 or 5, computes what a model of this shape does."""
    if config.num_labels is not None:
        raise EaseError("no stock model has a classification head at every exit: export a model that predicts tokens")
    if config.qkv_bias and config.qk_norm:
        raise EaseError("no stock model has both biases and norms on q and k: set qkv_bias or qk_norm to False")
    # Stock Llama is alone in refusing heads whose widths do not add up to the model's.
    plain = "mistral" if config.dim % config.num_heads else "llama"
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else plain
    scaling = config.rope_scaling
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({} if config.max_positions is None else {"max_position_embeddings": config.max_positions}),
        "bos_token_id": None,  # a key left out would mean Llama 2's
        "eos_token_id": None,
        "pad_token_id": None,
        **token_ids,
    }
