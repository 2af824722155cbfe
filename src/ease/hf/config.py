"""Translation of config.json between the Llama family and the native `ModelConfig`.

`FAMILIES` lists the model types. To add one that differs only in what its fields state, give it a line there; anything
more needs a field of `ModelConfig` first. Every key of a config.json is translated, has the one value that the native
model computes, does not affect a forward pass, or is refused: a key that is ignored silently would make a model that
computes something else than the original.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ease.errors import EaseError, check_boolean, check_integer, check_list, check_number
from ease.model_config import ModelConfig

# ---------------------------------------------------------------------------------------------------------
# Families


@dataclass(frozen=True)
class Family:
    """What a model type implies.

    Args:
        defaults: values of keys that config.json leaves out, as the family's class in transformers sets them.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys have a norm per head.
        always_windowed: `sliding_window` applies without `use_sliding_window`.
        any_head_dim: stock transformers accepts heads whose widths do not add up to the model's.
        token_ids: ids of special tokens that config.json leaves out.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    always_windowed: bool = False
    any_head_dim: bool = True
    token_ids: Mapping[str, Any] = field(default_factory=dict)


# A model is exported as the first family that fits it.
FAMILIES = {
    "llama": Family(
        {"max_position_embeddings": 2048}, any_head_dim=False, token_ids={"bos_token_id": 1, "eos_token_id": 2}
    ),
    "mistral": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        always_windowed=True,
        token_ids={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": Family(
        {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}, qkv_bias=True
    ),
    "qwen3": Family(
        {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "head_dim": 128, "sliding_window": 4096},
        qk_norm=True,
    ),
    "smollm3": Family(
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        token_ids={"bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 128_004},
    ),
}

# ---------------------------------------------------------------------------------------------------------
# Keys

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

STOCK_FIELDS = {  # field of `ModelConfig` -> its key in config.json, where that differs
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
}

DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": None}  # of every family

TRANSLATED = {
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

# Keys that change what is computed, with the one value that the native model computes.
REQUIRED_VALUES: dict[str, Any] = {
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

# Keys that do not affect a forward pass.
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

ROPE_KEYS = {  # rope_type -> the keys of its parameters
    "default": set[str](),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}

# ---------------------------------------------------------------------------------------------------------
# Reading


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Translates a checkpoint's config.json into the native shape.

    Args:
        raw: the content of config.json.

    Raises:
        EaseError: the native model cannot hold the checkpoint exactly; the message names the family, key or value.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise EaseError(
            f"model_type {model_type!r} in config.json is not supported: use a checkpoint of {', '.join(FAMILIES)} "
            "(`ease export` writes one from a run)"
        )
    family = FAMILIES[model_type]
    if unknown := sorted(raw.keys() - TRANSLATED - HARMLESS - REQUIRED_VALUES.keys()):
        raise EaseError(
            f"config.json has unknown keys ({', '.join(unknown)}): use a checkpoint without them, or remove them if "
            "they do not change what the model computes"
        )
    for key, value in REQUIRED_VALUES.items():
        if raw.get(key) not in (None, value):
            raise _unsupported(f"{key} {raw[key]!r}")
    values = {**DEFAULTS, **family.defaults, **raw}
    for key in SHAPE:
        check_integer(f"{key} in config.json", values.get(key), 1)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        if values.get(key) is not None:
            check_integer(f"{key} in config.json", values[key], 1)
    for key in ("sliding_window", "no_rope_layer_interval"):
        if values.get(key) is not None:
            check_integer(f"{key} in config.json", values[key])
    for key in ("tie_word_embeddings", "use_sliding_window"):
        if values.get(key) is not None:
            check_boolean(f"{key} in config.json", values[key])
    check_number("rms_norm_eps in config.json", values["rms_norm_eps"], 0)
    num_layers = values["num_hidden_layers"]
    num_heads = values["num_attention_heads"]
    max_positions = values["max_position_embeddings"]
    windowed = family.always_windowed or values.get("use_sliding_window")
    window = values.get("sliding_window") if windowed else None
    if window is not None and (max_positions is None or window < max_positions):
        raise _unsupported(f"a sliding_window of {window} below max_position_embeddings ({max_positions})")
    layer_types = {str(kind) for kind in check_list("layer_types in config.json", values.get("layer_types") or ())}
    if others := sorted(layer_types - {"full_attention"}):
        raise _unsupported(f"layer_types {', '.join(others)}")
    interval = values.get("no_rope_layer_interval") or num_layers + 1
    rotary = check_list("no_rope_layers in config.json", values.get("no_rope_layers") or ())
    if not all(rotary) or (not rotary and num_layers >= interval):
        raise _unsupported("layers without rotary positions (no_rope_layers)")

    return ModelConfig(
        vocab_size=values["vocab_size"],
        dim=values["hidden_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
        hidden_dim=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=bool(values.get("tie_word_embeddings")),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=max_positions,
        **_read_rope(values),
    )


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The native `rope_theta` and `rope_scaling`.

    transformers 5 writes both into `rope_parameters`, earlier versions write `rope_theta` and `rope_scaling`.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise EaseError(f"rope_scaling in config.json must be an object, got {reprlib.repr(rope)}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise _unsupported(f"rope_type {rope_type!r}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _unsupported(f"partial_rotary_factor {rope['partial_rotary_factor']!r}")
    known = ROPE_KEYS[rope_type] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(rope.keys() - known):
        raise _unsupported(f"{', '.join(unknown)} in the parameters of rope_type {rope_type!r}")
    stated = rope.get("rope_theta") or values["rope_theta"]
    check_number("rope_theta in config.json", stated, 1)
    theta = float(stated)
    if rope_type == "default":
        return {"rope_theta": theta}
    rope = {"original_max_position_embeddings": values["max_position_embeddings"]} | rope
    if missing := sorted(ROPE_KEYS[rope_type] - rope.keys()):
        raise EaseError(f"config.json lacks {', '.join(missing)} of rope_type {rope_type!r}: add the missing keys")
    scaling = {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_position": rope["original_max_position_embeddings"],
    }
    return {"rope_theta": theta, "rope_scaling": scaling}


def _unsupported(feature: str) -> EaseError:
    return EaseError(f"the model of config.json has {feature}, which ease cannot hold exactly: use another checkpoint")


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_config(config: ModelConfig, token_ids: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Translates a native shape into the config.json with which stock transformers, 4 or 5, computes the same.

    Args:
        config: the shape of the model.
        token_ids: "bos_token_id", "eos_token_id" and "pad_token_id", as far as they are known.
        dtype: dtype of the weights.

    Returns:
        The content of config.json.

    Raises:
        EaseError: no stock family has this shape.
    """
    if config.num_labels is not None:
        raise EaseError("no stock model has a classification head at every exit: export a model that predicts tokens")
    family = _stock_family(config)
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


def _stock_family(config: ModelConfig) -> str:
    """The first family whose stock model can have this shape."""
    for name, family in FAMILIES.items():
        fits = (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm)
        if fits and (family.any_head_dim or config.dim % config.num_heads == 0):
            return name
    raise EaseError("no stock model has both biases and norms on q and k: set qkv_bias or qk_norm to False")
