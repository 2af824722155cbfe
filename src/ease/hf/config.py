"""Translation of config.json between the families of Llama and the native `ModelConfig`.

Every key of a config.json is translated, has the one value that the native model computes, does not affect a forward
pass, or is refused: a key that is ignored silently would make a model that computes something else than the original.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from ease.errors import EaseError, check_boolean, check_integer, check_list, check_number
from ease.hf.families import FAMILIES, GEMMA_KEYS, Family, every_layer, unrotated
from ease.model_config import ModelConfig, RopeScaling

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
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "hidden_act",
    "no_rope_layers",
    "no_rope_layer_interval",
}

MAX_LAYERS = 10_000  # of a checkpoint that is not damaged

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # in config.json -> of the native model

# Keys that change what is computed, with the one value that the native model computes.
REQUIRED_VALUES: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "quantization_config": None,
}

# Keys that do not affect a forward pass in evaluation mode.
HARMLESS = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_model_name_or_path",
    "_name_or_path",
    "_sliding_window_pattern",
    "activation",
    "architectures",
    "attention_dropout",
    "auto_map",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "eos_token_id",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_activation",  # where a family does not have it, as in Gemma 1
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "num_beams",
    "num_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "seq_length",
    "sliding_window_size",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
}

ROPE_KEYS = {  # rope_type -> key of its parameters -> field of `RopeScaling`
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_position_embeddings": "original_max_position"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "attention_factor": "attention_factor",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
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
    known = TRANSLATED | HARMLESS | REQUIRED_VALUES.keys() | family.keys.keys() | family.biases.keys()
    if unknown := sorted(raw.keys() - known - family.defaults.keys()):
        raise EaseError(
            f"config.json has unknown keys ({', '.join(unknown)}): use a checkpoint without them, or remove them if "
            "they do not change what the model computes"
        )
    values = {**DEFAULTS, **family.defaults, **raw}
    for key in REQUIRED_VALUES.keys() - family.biases.keys():
        if raw.get(key) not in (None, REQUIRED_VALUES[key]):
            raise _unsupported(f"{key} {raw[key]!r}")
    for key in SHAPE:
        check_integer(f"{key} in config.json", values.get(key), 1)
    num_layers = values["num_hidden_layers"]
    if num_layers > MAX_LAYERS:  # before anything is made of each of them
        raise EaseError(f"num_hidden_layers in config.json is {num_layers}, above {MAX_LAYERS}: fetch it again")
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"):
        if values.get(key) is not None:
            check_integer(f"{key} in config.json", values[key], 1)
    for key in ("sliding_window", "no_rope_layer_interval", "max_window_layers", "sliding_window_pattern"):
        # EXAONE states its pattern in letters, beside the `layer_types` that count.
        if values.get(key) is not None and not (key == "sliding_window_pattern" and values.get("layer_types")):
            check_integer(f"{key} in config.json", values[key])
    for key in ("tie_word_embeddings", "use_sliding_window", *family.biases):
        if values.get(key) is not None:
            check_boolean(f"{key} in config.json", values[key])
    for key in ("query_pre_attn_scalar", "rms_norm_eps"):
        if values.get(key) is not None:
            check_number(f"{key} in config.json", values[key], 0)
    if unrotated(values) and "no_rope_layer_interval" not in family.defaults:
        raise _unsupported("layers without rotary positions (no_rope_layers)")
    num_heads, dim = values["num_attention_heads"], values["hidden_size"]
    set_by_key = {field: values[key] for key, field in family.keys.items() if values.get(key) is not None}
    biases = {field: bool(values.get(key)) for key, fields in family.biases.items() for field in fields}
    if values.get("query_pre_attn_scalar"):
        set_by_key["attention_scale"] = values["query_pre_attn_scalar"] ** -0.5
    if family.scaled_embedding:
        set_by_key["embedding_scale"] = dim**0.5
    windows, rope = _read_windows(family, values), _read_rope(values)
    without_rope = unrotated(values)
    if family.rotary_windows and values.get("sliding_window") is not None and "window" not in windows:
        raise _unsupported("a sliding_window that no layer uses")  # stock then rotates no layer
    if family.rotary_windows and windows.get("windowed_layers"):
        without_rope = tuple(sorted({*range(1, num_layers + 1)} - {*windows["windowed_layers"]}))
    config = ModelConfig(
        vocab_size=values["vocab_size"],
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or dim // num_heads,
        hidden_dim=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=bool(values.get("tie_word_embeddings")),
        max_positions=values["max_position_embeddings"],
        unrotated_layers=without_rope,
        activation=_activation(values, family),  # type: ignore[arg-type]
        **{**biases, **family.implied, **set_by_key, **rope, **windows},
    )
    limit = config.rope_scaling.limit if config.rope_scaling is not None else None
    return config if limit is None else replace(config, max_positions=limit)


def _activation(values: Mapping[str, Any], family: Family) -> str:
    """The native name of the gate's activation."""
    key = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    name = values.get(key) or "silu"
    if values["model_type"] == "gemma" and name == "gelu":  # the name of the approximation in the first checkpoints
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise _unsupported(f"{key} {reprlib.repr(name)}")
    return ACTIVATIONS[name]


def _read_windows(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """The native `window` and `windowed_layers`."""
    num_layers, window = values["num_hidden_layers"], values.get("sliding_window")
    types = check_list("layer_types in config.json", values.get("layer_types") or ())
    if others := sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"}):
        raise _unsupported(f"layer_types {', '.join(others)}")
    if types and len(types) != num_layers:
        raise EaseError(f"layer_types in config.json names {len(types)} layers of {num_layers}: fetch it again")
    by_family = []
    if family.windowed is not None and (not types or family.windowed is every_layer):
        by_family = [layer for layer in range(1, num_layers + 1) if family.windowed(values, layer)]
    windowed = [layer for layer, kind in enumerate(types, 1) if kind == "sliding_attention"] if types else by_family
    if types and family.windowed in (None, every_layer) and windowed != (by_family if window else []):
        raise _unsupported("layer_types that its family does not have")
    if "max_window_layers" in family.defaults and not values.get("use_sliding_window"):
        window = None
    if types and windowed and not window:
        raise _unsupported("layer_types sliding_attention without a sliding_window in use")
    if not windowed or not window:
        return {"local_rope_theta": None}
    every = len(windowed) == num_layers
    return {"window": window, "windowed_layers": None if every else tuple(windowed)}


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The native rotary fields.

    transformers 5 writes all of them into `rope_parameters`, of Gemma 3 one for each type of layers; earlier versions
    write `rope_theta` and `rope_scaling`.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise EaseError(f"rope_scaling in config.json must be an object, got {reprlib.repr(rope)}")
    found: dict[str, Any] = {}
    if rope.keys() & {"full_attention", "sliding_attention"}:
        local = rope.get("sliding_attention") or {}
        rope = rope.get("full_attention") or {}
        if not isinstance(local, dict) or not isinstance(rope, dict):
            raise EaseError("rope_parameters in config.json must hold an object for each type of layers")
        if local.get("rope_type", "default") != "default" or local.keys() - {"rope_type", "rope_theta"}:
            raise _unsupported(f"rope_parameters of sliding_attention {reprlib.repr(local)}")
        if local.get("rope_theta") is not None:
            check_number("rope_theta in config.json", local["rope_theta"], 1)
            found["local_rope_theta"] = float(local["rope_theta"])
    elif values["model_type"] == "olmo3" and rope is values.get("rope_parameters"):  # which stock transformers ignores
        raise _unsupported("rope_parameters without an object for each type of layers")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if values["model_type"] == "phi3" and rope_type in ("su", "yarn"):  # names of longrope in its first checkpoints
        rope_type = "longrope"
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise _unsupported(f"rope_type {rope_type!r}")
    keys = ROPE_KEYS[rope_type]
    known = keys.keys() | {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"}
    if rope_type != "yarn":
        known -= {"mscale", "mscale_all_dim"}
    if rope_type == "default":  # some checkpoints state the context of a stretching that they do not use
        known |= {"original_max_position_embeddings"}
    if unknown := sorted(rope.keys() - known):
        raise _unsupported(f"{', '.join(unknown)} in the parameters of rope_type {rope_type!r}")
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope["mscale"] != rope["mscale_all_dim"]:
        raise _unsupported(f"mscale {rope['mscale']} beside mscale_all_dim {rope['mscale_all_dim']}")
    stated = rope.get("rope_theta") or values["rope_theta"]
    check_number("rope_theta in config.json", stated, 1)
    found["rope_theta"] = float(stated)
    part = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    check_number("partial_rotary_factor in config.json", part, 0)
    if part != 1 and not FAMILIES[values["model_type"]].partial_rotary:
        raise _unsupported(f"partial_rotary_factor {part!r}")
    if part != 1:
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        found["rotary_dim"] = int(head_dim * part)
    if rope_type == "default":
        return found
    longest = values["max_position_embeddings"]
    original = values.get("original_max_position_embeddings") or longest
    rope = {"original_max_position_embeddings": longest if rope_type == "dynamic" else original} | rope
    if rope_type == "longrope" and rope.get("factor") is None and longest and rope["original_max_position_embeddings"]:
        rope["factor"] = max(1.0, longest / rope["original_max_position_embeddings"])
    if rope_type == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        rope.setdefault("attention_factor", 1.0)
    needed = {"factor"} | {key for key in keys if key in ("low_freq_factor", "high_freq_factor", "short_factor")}
    if missing := sorted(key for key in needed if rope.get(key) is None):
        raise EaseError(f"config.json lacks {', '.join(missing)} of rope_type {rope_type!r}: add the missing keys")
    fields = {keys[key]: value for key, value in rope.items() if key in keys and value is not None}
    found["rope_scaling"] = RopeScaling(rope_type=rope_type, **fields)  # type: ignore[arg-type]
    return found


def _unsupported(feature: str) -> EaseError:
    return EaseError(f"the model of config.json has {feature}, which ease cannot hold exactly: use another checkpoint")


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_config(config: ModelConfig, token_ids: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Translates a native shape into the config.json with which stock transformers, 4 or 5, computes the same.

    It is the first family whose config.json reads back as the same shape.

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
    differences: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if not family.any_head_dim and config.head_size * config.num_heads != config.dim:
            continue
        raw = _write_as(name, family, config)
        try:
            read = asdict(_explicit(read_config(raw)))
        except EaseError:  # the family's config.json cannot say what the model does
            continue
        shape = asdict(_explicit(config))
        differences[name] = [field for field in shape if shape[field] != read[field]]
        if not differences[name]:
            return {**raw, "torch_dtype": str(dtype).removeprefix("torch."), **token_ids}
    closest = min(differences, key=lambda name: len(differences[name]))
    raise EaseError(
        f"no stock family computes what this model does; {closest}, the closest, differs in "
        f"{', '.join(differences[closest])}: change that in its ModelConfig"
    )


def _explicit(config: ModelConfig) -> ModelConfig:
    """The shape with every derived value in place, without what a stock model does not have."""
    c = config
    windowed = tuple(k for k in range(1, c.num_layers + 1) if c.attention_kind(k).window is not None)
    return replace(
        c,
        num_kv_heads=c.kv_heads,
        head_dim=c.head_size,
        hidden_dim=c.ffn_size,
        rotary_dim=c.rotary_size,
        attention_scale=c.head_size**-0.5 if c.attention_scale is None else c.attention_scale,
        window=c.window if windowed else None,
        windowed_layers=windowed or None,
        local_rope_theta=c.local_rope_theta if windowed else None,
        dropout=0.0,
        adapter_exits=(),
        adapter_dim=0,
        classifier_exits=(),
        draft_brick=False,
        draft_vocabulary=None,
        memory_orders=(),
        memory_rows=ModelConfig.memory_rows,
        max_positions=None,
    )


def _write_as(name: str, family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of a family, as far as the family can express the shape."""
    c, scaling = config, config.rope_scaling
    layers = range(1, c.num_layers + 1)
    windowed = [c.attention_kind(layer).window is not None for layer in layers]
    longest = c.max_positions
    raw: dict[str, Any] = {
        "architectures": [f"{family.architecture or name.capitalize()}ForCausalLM"],
        "model_type": name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "hidden_act": next(stock for stock, native in ACTIVATIONS.items() if native == c.activation),
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "sliding_window": c.window,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": None,  # a key left out would mean the family's default
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if scaling is not None:
        names = {field: key for key, field in ROPE_KEYS[scaling.rope_type].items()}
        parameters = {key: getattr(scaling, field) for field, key in names.items()}
        raw["rope_scaling"] = {"rope_type": scaling.rope_type} | {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in parameters.items()
            if value is not None
        }
        if scaling.rope_type == "longrope" and longest is not None:
            longest = round(longest * scaling.factor)
            if name == "phi3":  # its class in transformers takes the factor from the two lengths
                del raw["rope_scaling"]["factor"], raw["rope_scaling"]["original_max_position_embeddings"]
                raw["original_max_position_embeddings"] = scaling.original_max_position
    if longest is not None:
        raw["max_position_embeddings"] = longest
    if c.rotary_size != c.head_size:
        raw["partial_rotary_factor"] = c.rotary_size / c.head_size
    # Stock EXAONE 4 fails without `layer_types` if there is no window.
    if (any(windowed) or family.rotary_windows) and family.windowed is not every_layer:
        raw["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windowed]
    if "use_sliding_window" in family.defaults:
        raw["use_sliding_window"] = any(windowed)
    if "no_rope_layer_interval" in family.defaults:
        raw["no_rope_layers"] = [int(layer not in c.unrotated_layers) for layer in layers]
    raw |= {key: all(getattr(c, field) for field in fields) for key, fields in family.biases.items()}
    raw |= {key: getattr(c, field) for key, field in family.keys.items() if getattr(c, field) is not None}
    if "query_pre_attn_scalar" in family.defaults:
        scale = c.head_size**-0.5 if c.attention_scale is None else c.attention_scale
        raw["query_pre_attn_scalar"] = round(scale**-2)
    if "hidden_activation" in family.defaults:
        raw["hidden_activation"] = raw["hidden_act"]
        raw |= {key: getattr(c, field) for key, field in GEMMA_KEYS.items()}
    return raw
