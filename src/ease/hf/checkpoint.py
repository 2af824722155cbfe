"""Checkpoints of the Llama family: read into the native model, and written as stock transformers loads them.

- What the native model cannot hold exactly is refused by name: every key of config.json is known or refused, and so
  is every tensor. No code of a checkpoint is run, and no pickle is opened.
- A folder that ease writes is a stock checkpoint. What only ease uses (parameters of the exits below the last, the
  draft brick, the memory, and the policy) is in its subfolder `ease/`, which stock tools ignore.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ease.data.tokenizers import EOS, PAD, save_tokenizer
from ease.errors import EaseError, check_layers, checked, first_line, require
from ease.files import set_usual_mode
from ease.hf.config import STOCK_FIELDS, read_config, write_config
from ease.hf.folder import CONFIG, EXITS, FIX, GENERATION, NATIVE, OWN, POLICY, checkpoint_folder, read_json
from ease.hf.options import read_options
from ease.hf.prompting import copy_prompting, token_ids
from ease.hf.prompting import end_of_text as end_of_text
from ease.hf.prompting import load_tokenizer as load_tokenizer
from ease.hf.weights import (
    NORM,
    check_tensors,
    fill,
    joined,
    locate_tensors,
    shapes_of,
    split_parameters,
    stock_name,
    stored_dtype,
    tensors_of,
    weight_files,
    without_copies,
    without_prefix,
)
from ease.model_config import ModelConfig, check_sizes
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.storage import check_fingerprint, output_folder, write_json

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------
# Reading


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> DeepSupervisionTransformer:
    """Loads a checkpoint of the Llama family into the native model; `ease.hf.families.FAMILIES` lists the model types.

    Every exit's norm starts as a copy of the final norm, and `trained_exits` holds the last exit alone. From a folder
    that ease wrote, exits and policy come back as they were saved.

    Args:
        name_or_path: a folder with config.json and safetensors, in one file or in shards, a name on the hub, or a GGUF
            file, which is dequantized to float32.
        dtype: dtype of the weights, as a torch dtype or its name; by default (and with "auto") as they are stored.
        device: device of the weights; the CPU by default.
        options: options of transformers' `from_pretrained`. `revision`, `subfolder`, `token`, `cache_dir`,
            `local_files_only` and `force_download` say what is fetched; `torch_dtype` stands for `dtype`, and a
            `device_map` with one device for `device`; "sdpa" is the one `attn_implementation`. `low_cpu_mem_usage` and
            `trust_remote_code` change nothing: memory holds the weights once, and no code of a checkpoint is run.

    Returns:
        The model, in evaluation mode.

    Raises:
        EaseError: the folder is missing or damaged, a weight is NaN or infinite, an option is not supported, or the
            native model cannot hold its model exactly.

    Example:
        >>> model = ease.from_pretrained("HuggingFaceTB/SmolLM2-135M", dtype="bfloat16", device="cuda")
        >>> routed = ease.route(model, ids, exit_layer=15, routing_threshold=0.9)
    """
    folder, dtype, device = read_options(name_or_path, {"dtype": dtype, "device": device, **options})
    config, saved, family = read_configuration(folder)
    native = family == NATIVE
    try:
        with torch.device("meta"):
            model = DeepSupervisionTransformer(**{f.name: getattr(config, f.name) for f in fields(config)})
        model.trained_exits = set(saved["trained_exits"]) if saved else {model.num_layers}
        if saved:
            model.policy, model.stale_classifiers = saved["policy"], set(saved["stale_classifiers"])
    except RuntimeError as error:  # sizes that overflow
        raise EaseError(f"{folder / CONFIG} is damaged ({first_line(error)}): {FIX}") from error

    stored = without_copies(locate_tensors(weight_files(folder)), config.tie_embeddings)
    if dtype is None and stored:
        name, file = next(iter(stored.items()))
        dtype = stored_dtype(file, name)
    stock, exits = _parts(model, family)
    check_tensors(without_prefix(stock, stored), stored, folder)
    if saved and not native:
        stored_exits = locate_tensors([folder / OWN / EXITS])
        check_tensors(exits, stored_exits, folder / OWN)
    model = model.to(dtype).to_empty(device=device).eval()
    if config.tie_embeddings:  # `to_empty` allocates the two separately
        model.output_head.weight = model.embedding.weight
    with torch.no_grad():
        stock, exits = _parts(model, family)
        fill(without_prefix(stock, stored), stored)
        if saved and not native:
            fill(exits, stored_exits)
        for (norm,) in {} if saved else exits.values():
            norm.copy_(stock[NORM][0])
    if saved and saved["calibration"]:
        check_fingerprint(model, saved["calibration"], folder / OWN / POLICY)
    return model


def _parts(model: DeepSupervisionTransformer, family: str) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The parameters in the weights of a checkpoint, by their names there, and those in its subfolder `ease/`."""
    if family == NATIVE:
        return {f"model.{name}": [tensor] for name, tensor in tensors_of(model).items()}, {}
    return split_parameters(model, family)


def read_configuration(folder: Path) -> tuple[ModelConfig, dict[str, Any] | None, str]:
    """The shape of a checkpoint, which fits its weights, what ease saved of it (or None), and its model type."""
    raw = read_json(folder / CONFIG)
    native = raw.get("model_type") == NATIVE
    saved = raw if native else _read_own(folder)
    options = {}
    if not native:
        stock = read_config(raw)
        _check_sizes(folder / CONFIG, stock, shapes_of(weight_files(folder)), STOCK_FIELDS)
        options = asdict(stock)
    if not saved:
        return ModelConfig(**options), None, raw["model_type"]
    file = folder / CONFIG if native else folder / OWN / POLICY
    try:
        config = ModelConfig(**(options | saved["model"]))
        exits = check_layers("trained_exits", saved["trained_exits"], config.num_layers)
        stale = check_layers("stale_classifiers", saved.get("stale_classifiers", ()), config.num_layers)
        # The two formats name the remaining fields of the policy differently.
        policy_options = (saved.get("policy_options") if native else saved.get("options")) or {}
        policy = Policy.of(saved["exits"], saved["thresholds"], **policy_options)
        policy.check(config.num_layers, config.first_exit)
        calibration = dict(saved.get("calibration") or {})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise EaseError(f"{file} is damaged ({first_line(error)}): {FIX}") from error
    if native:
        shapes = shapes_of(weight_files(folder))
        check_sizes(config, shapes, file, FIX, stored_name=lambda name: f"model.{name}")
    else:  # ease may have saved fields that replace those of config.json
        _check_sizes(file, config, shapes_of([*weight_files(folder), folder / OWN / EXITS]), {})
    own = {"trained_exits": exits, "stale_classifiers": stale, "policy": policy, "calibration": calibration}
    return config, own, raw["model_type"]


def _check_sizes(
    file: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, str]
) -> None:
    """Compares sizes with the headers of stock weights and those of the exits, before a module is made."""

    def stored_name(name: str) -> str:
        return stock_name(name, config) or name

    check_sizes(config, shapes, file, FIX, stored_name=stored_name, fields=fields)


def _read_own(folder: Path) -> dict[str, Any] | None:
    """The policy.json that ease wrote next to a stock checkpoint; None if the folder has none."""
    if not (folder / OWN).is_dir():
        return None
    saved = read_json(folder / OWN / POLICY)
    if saved.get("format") != FORMAT:
        raise EaseError(f"{folder / OWN} has format {saved.get('format')} and this ease reads {FORMAT}: update ease")
    return saved


# ---------------------------------------------------------------------------------------------------------
# Writing


@checked
def save_pretrained(
    model: StandardTransformer,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    eos: int | None = None,
    calibration: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    reads: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Saves a model so that stock `AutoModelForCausalLM.from_pretrained` loads it with the same final-exit logits.

    No stock model has a memory (`memory_orders`): there the logits are those without it, and a warning says so.

    The folder appears whole or not at all. Weights above 5 GB are sharded. What a stock checkpoint has no place for
    (exits, memory, policy, dropout) is in its subfolder `ease/`, from which `from_pretrained` restores it.

    Args:
        model: the model.
        folder: the folder to create.
        tokenizer: a `tokenizers.Tokenizer`, or the folder of a checkpoint whose tokenizer, generation settings and
            special tokens are copied.
        eos: the id that ends a text, for a `Tokenizer` in which it is not `<eos>`.
        calibration: the record of `ease calibrate`, which ties the policy to these weights.
        overwrite: replace the folder if it is a checkpoint or a run.
        reads: files and folders that the model comes from; a folder that holds one of them is not overwritten.

    Raises:
        EaseError: the folder exists or cannot be written, or no stock model has this shape.

    Example:
        >>> ease.save_pretrained(model, "exported", tokenizer=corpus.tokenizer)
        >>> stock = transformers.AutoModelForCausalLM.from_pretrained("exported")
    """
    from safetensors.torch import save_file

    hub = require("huggingface_hub", "hf")
    if not model.num_layers:
        raise EaseError("the model has no layers, and a stock model needs one: grow it first, or save its run folder")
    if model.config.memory_orders:
        warnings.warn(
            "no stock model has a memory: it is in the subfolder ease/, and the exported model gives other logits in "
            "stock transformers than in ease",
            stacklevel=2,
        )
    policy = model.policy
    reads = [*reads, *([tokenizer] if isinstance(tokenizer, str | os.PathLike) else [])]
    with output_folder(Path(folder), overwrite, reads=reads) as partial:
        special = _write_tokenizer(partial, tokenizer, eos, model.config.max_positions)
        config = write_config(model.config, special, next(model.parameters()).dtype)
        # Fields that config.json cannot express, so that the same shape comes back.
        expressed, shape = asdict(read_config(config)), asdict(model.config)
        own = {
            "format": FORMAT,
            "exits": policy.exits,
            "thresholds": policy.thresholds,
            "options": policy.options,
            "trained_exits": sorted(model.trained_exits),
            "stale_classifiers": sorted(model.stale_classifiers),
            **({"calibration": calibration} if calibration else {}),
            "model": {key: value for key, value in shape.items() if value != expressed[key]},
        }
        write_json(partial / CONFIG, config)
        stock, exits = split_parameters(model, config["model_type"])
        hub.save_torch_state_dict({name: joined(parts) for name, parts in stock.items()}, partial)
        (partial / OWN).mkdir()
        write_json(partial / OWN / POLICY, own)
        save_file({name: part for name, (part,) in exits.items()}, partial / OWN / EXITS)
        set_usual_mode(*partial.rglob("*.safetensors"))


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer | str | os.PathLike[str] | None, eos: int | None, max_positions: int | None
) -> dict[str, Any]:
    """Writes the tokenizer's files and generation_config.json; returns the ids of its special tokens."""
    if isinstance(tokenizer, str | os.PathLike):
        source = checkpoint_folder(tokenizer)
        copy_prompting(source, folder, config=False)
        return token_ids(read_json(source / CONFIG))

    own_ids: dict[str, Any] = {}
    if tokenizer is not None:
        special = {"eos": (None if eos is None else tokenizer.id_to_token(eos)) or EOS, "pad": PAD}
        ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
        own_ids = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
        save_tokenizer(tokenizer, folder / "tokenizer.json")
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": bool(tokenizer.encode_special_tokens),
                **{f"{name}_token": token for name, token in special.items() if f"{name}_token_id" in own_ids},
                **({} if max_positions is None else {"model_max_length": max_positions}),
            },
        )
    write_json(folder / GENERATION, own_ids)
    return own_ids
