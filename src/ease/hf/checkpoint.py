"""Checkpoints of the Llama family: read into the native model, and handed back as stock transformers loads them.

- What the native model cannot hold exactly is refused by name: every key of config.json is known or refused, and so
  is every tensor. No code of a checkpoint is run, and no pickle is opened.
- Tensors come one at a time, the largest first, and no file stays mapped behind them: at its peak a load holds the
  weights once, in the asked dtype, and one tensor.
- A folder that ease writes is a stock checkpoint. What only ease knows (the norms of the exits below the last,
  whatever else belongs to an exit, the policy) lies in its subfolder `ease/`, which stock tools do not see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ease.data.tokenizers import EOS, PAD
from ease.data.tokenizers import load_tokenizer as read_tokenizer
from ease.devices import choose_device, choose_dtype
from ease.errors import EaseError, require
from ease.hf.config import read_config, write_config
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.storage import check_fingerprint, output_folder, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1

NATIVE = "ease"  # the model type under which `hf_model.py` writes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

OWN, EXITS, POLICY = "ease", "exits.safetensors", "policy.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------
# Tensors

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

NAMES = {
    "embedding.": "model.embed_tokens.",
    "output_head.": "lm_head.",
    "layers.": "model.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.": ".self_attn.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".ffn.": ".mlp.",
}


def stock_name(name: str, num_layers: int) -> str | None:
    """What a stock checkpoint calls the parameter `name`; None for one that belongs to an exit below the last."""
    if name == f"exit_norms.{num_layers - 1}.weight":
        return NORM
    if name.startswith("exit_"):
        return None
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _split(model: StandardTransformer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that stock transformers knows, under its names, and those of exits, under ours."""
    stock: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        theirs = stock_name(name, model.num_layers)
        (own if theirs is None else stock)[theirs or name] = parameter.detach()
    return stock, own


def _stored(files: Iterable[Path]) -> dict[str, Path]:
    """Where each tensor lies. Files are opened anew for every tensor, since what is mapped counts as memory."""
    return {name: file for file in files for name in _read(file, lambda opened: list(opened.keys()))}


def _read(file: Path, get: Any) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return get(opened)
    except FileNotFoundError as error:
        raise EaseError(f"{file} is missing: fetch the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise EaseError(f"{file} is damaged ({error}): fetch the checkpoint again") from error


def _needed(stored: dict[str, Path], tied: bool) -> dict[str, Path]:
    """Without what is only a copy: rotary frequencies (of some Llama 2 checkpoints), and a tied head."""
    if tied and HEAD in stored and EMBEDDING in stored:
        both = [_read(stored[name], lambda opened, name=name: opened.get_tensor(name)) for name in (EMBEDDING, HEAD)]
        if torch.equal(*both):
            del stored[HEAD]
        else:
            raise EaseError(
                f"config.json ties the head to the embedding, and {stored[HEAD]} has another: set tie_word_embeddings "
                "to false"
            )
    return {name: file for name, file in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def _fill(targets: Mapping[str, Tensor], stored: Mapping[str, Path], folder: Path) -> None:
    """Copies every stored tensor (name -> file) into its target, converting on the way."""
    if missing := sorted(targets.keys() - stored.keys()):
        raise EaseError(f"{folder} lacks {_some(missing)}, which its configuration asks for: fetch it again")
    if unknown := sorted(stored.keys() - targets.keys()):
        raise EaseError(f"{folder} holds {_some(unknown)}, which ease does not know: use a checkpoint without")

    # The largest first: what is read stands beside what is filled, and at the end it is only a norm.
    for name in sorted(targets, key=lambda n: -targets[n].numel()):
        target = targets[name]

        def copy(opened: Any, name: str = name, target: Tensor = target) -> None:
            view = opened.get_slice(name)
            if (shape := tuple(view.get_shape())) != tuple(target.shape):
                raise EaseError(
                    f"{name} in {stored[name]} has shape {shape}, and config.json asks for {(*target.shape,)}"
                )
            if view.get_dtype() not in DTYPES:
                raise EaseError(f"{name} in {stored[name]} is stored as {view.get_dtype()}: use a checkpoint in floats")
            target.copy_(opened.get_tensor(name))

        _read(stored[name], copy)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------
# Reading


def checkpoint_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a name such as `org/model` is fetched from the Hugging Face hub first."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name := os.fspath(name_or_path)) or name.startswith("."):
        raise EaseError(f"there is no folder {path}: pass a checkpoint's folder, or its name on the Hugging Face hub")
    hub = require("huggingface_hub", "hf")
    try:
        # Never more than this: no pickle, no code.
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the library's own, its HTTP client's or the system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EaseError(
            f"there is no folder {name}, and the Hugging Face hub did not give it ({reason}): check the name and the "
            "network, or pass a folder"
        ) from error


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> DeepSupervisionTransformer:
    """Reads a checkpoint of the Llama family (Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM) into the native model.

    Every exit's norm starts as a copy of the final norm, and `trained_exits` holds the last exit alone; from a folder
    that ease wrote, exits and policy come back as they were.

    Args:
        name_or_path: a folder with config.json and safetensors, in one file or in shards, or a name on the hub.
        dtype: of the weights, in torch or by its name; as they are stored by default (and by "auto").
        device: where the weights go; the CPU by default.

    Returns:
        The model, in evaluation mode.

    Raises:
        EaseError: for a folder that is missing or damaged, and for anything that the model cannot hold exactly.
    """
    dtype, device = choose_dtype(dtype), choose_device(str(device or "cpu"))
    folder = checkpoint_folder(name_or_path)
    raw = read_json(folder / CONFIG)
    native = raw.get("model_type") == NATIVE
    own = raw if native else _read_own(folder)
    try:
        options = {} if native else asdict(read_config(raw))
        if own:
            options |= own["model"]
        with torch.device("meta"):
            model = DeepSupervisionTransformer(**options)
        model.trained_exits = set(own["trained_exits"]) if own else {model.num_layers}
        if own:
            model.policy = Policy.of(own["exits"], own["thresholds"], **own.get("options", {}))
            model.policy.check(model.num_layers)
        calibration = dict(own.get("calibration", {})) if own else {}
    except EaseError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise EaseError(f"the configuration in {folder} is damaged ({error}): fetch the checkpoint again") from error

    stored = _needed(_stored(_weight_files(folder)), model.config.tie_embeddings)
    if dtype is None and stored:
        name, file = next(iter(stored.items()))
        dtype = DTYPES.get(_read(file, lambda opened: opened.get_slice(name).get_dtype()))
    model = model.to(dtype).to_empty(device=device).eval()
    if model.config.tie_embeddings:  # allotting memory has parted them
        model.output_head.weight = model.embedding.weight
    with torch.no_grad():
        stock, exits = _split(model)
        if native:
            _fill({f"model.{name}": parameter for name, parameter in model.named_parameters()}, stored, folder)
            return model
        _fill(stock, stored, folder)
        if own:
            _fill(exits, _stored([folder / OWN / EXITS]), folder / OWN)
        else:
            for norm in exits.values():
                norm.copy_(stock[NORM])
    if calibration:
        check_fingerprint(model, calibration, folder / OWN / POLICY)
    return model


def _read_own(folder: Path) -> dict[str, Any] | None:
    """What ease wrote about exits beside a stock checkpoint, if it did."""
    if not (folder / OWN).is_dir():
        return None
    own = read_json(folder / OWN / POLICY)
    if own.get("format") != FORMAT:
        raise EaseError(f"{folder / OWN} has format {own.get('format')} and this ease reads {FORMAT}: update ease")
    return own


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise EaseError(f"{folder / INDEX} names no shards beside it (weight_map): fetch it again")
        return sorted({folder / shard for shard in shards.values()})
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise EaseError(
            f"{folder} has pickled weights only ({_some(pickled)}), which ease never opens: use safetensors"
        )
    raise EaseError(f"{folder} has no weights: it needs {WEIGHTS}, or {INDEX} and the shards it names")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EaseError(f"{path.parent} has no {path.name}: pass the folder of a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise EaseError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise EaseError(f"{path} is damaged (no object in it): fetch it again")
    return value


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, as `ease.data` uses it.

    Raises:
        EaseError: it has no tokenizer.json, or one with ids that the model has no embedding for.
    """
    folder = checkpoint_folder(name_or_path)
    if not (folder / "tokenizer.json").is_file():
        raise EaseError(
            f"{folder} has no tokenizer.json: transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "makes one of what there is"
        )
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    raw = read_json(folder / CONFIG)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    vocab_size = raw.get("vocab_size") or raw.get("model", {}).get("vocab_size", 0)  # stock, or of EaseForCausalLM
    if needed > vocab_size:
        raise EaseError(
            f"the tokenizer in {folder} has ids up to {needed - 1} and the model's embedding {vocab_size} rows: use "
            "the tokenizer that the model was made with"
        )
    return tokenizer


def end_of_text(name_or_path: str | os.PathLike[str]) -> int | None:
    """The id that ends a text for a checkpoint, if it has one."""
    ids = read_json(checkpoint_folder(name_or_path) / CONFIG).get("eos_token_id")
    return ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None


# ---------------------------------------------------------------------------------------------------------
# Writing


def save_pretrained(
    model: StandardTransformer,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    eos: int | None = None,
    calibration: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that stock `AutoModelForCausalLM.from_pretrained` loads with the same final-exit logits.

    It appears whole or not at all. Weights above 5 GB are sharded; dropout, which transformers has no place for, and
    exits and policy lie in its subfolder `ease/`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or the folder of a checkpoint whose tokenizer, generation settings and
            special tokens are carried over.
        eos: the id that ends a text, for a `Tokenizer` in which it is not `<eos>`.
        calibration: what `ease calibrate` found out about the model's policy; it binds the policy to these weights.
        overwrite: replace the folder if it holds a checkpoint or a run.

    Raises:
        EaseError: the folder exists or cannot be written, or no stock model has this shape.
    """
    from safetensors.torch import save_file

    hub = require("huggingface_hub", "hf")
    stock, exits = _split(model)
    policy = model.policy
    with output_folder(Path(folder), overwrite) as partial:
        token_ids = _write_tokenizer(partial, tokenizer, eos, model.config.max_positions)
        config = write_config(model.config, token_ids, next(model.parameters()).dtype)
        # What config.json has no word for, so that the very same shape comes back.
        carried, shape = asdict(read_config(config)), asdict(model.config)
        own = {
            "format": FORMAT,
            "exits": policy.exits,
            "thresholds": policy.thresholds,
            "options": policy.options,
            "trained_exits": sorted(model.trained_exits),
            **({"calibration": calibration} if calibration else {}),
            "model": {key: value for key, value in shape.items() if value != carried[key]},
        }
        write_json(partial / CONFIG, config)
        hub.save_torch_state_dict(stock, partial)
        (partial / OWN).mkdir()
        write_json(partial / OWN / POLICY, own)
        save_file(exits, partial / OWN / EXITS)


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer | str | os.PathLike[str] | None, eos: int | None, max_positions: int | None
) -> dict[str, Any]:
    """Writes the tokenizer's files and generation_config.json; returns the ids of its special tokens."""
    if isinstance(tokenizer, str | os.PathLike):
        source = checkpoint_folder(tokenizer)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
        raw = read_json(source / CONFIG)
        return {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}

    token_ids: dict[str, Any] = {}
    if tokenizer is not None:
        special = {"eos": (None if eos is None else tokenizer.id_to_token(eos)) or EOS, "pad": PAD}
        ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
        token_ids = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": True,  # as in ease, a text that says "<eos>" does not end
                **{f"{name}_token": token for name, token in special.items() if f"{name}_token_id" in token_ids},
                **({} if max_positions is None else {"model_max_length": max_positions}),
            },
        )
    write_json(folder / "generation_config.json", token_ids)
    return token_ids
