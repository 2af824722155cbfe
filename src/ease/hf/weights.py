"""Weights of a checkpoint: stock names, safetensors files, and targets filled one tensor at a time.

Tensors are read one by one, the largest first, and no file stays mapped. At its peak a load therefore holds the weights
once, in the requested dtype, and one stored tensor. No pickle is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError, first_line
from ease.hf.folder import FIX, INDEX, WEIGHTS, shard_names
from ease.model_config import ModelConfig
from ease.models import StandardTransformer
from ease.storage import check_finite, read_shapes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64}  # of the ids that a draft brick can draft

# ---------------------------------------------------------------------------------------------------------
# Names

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

STOCK_NAMES = {  # part of a native parameter's name -> the same part in a stock checkpoint
    "embedding.": "model.embed_tokens.",
    "output_head.": "lm_head.",
    "layers.": "model.layers.",
    ".attention.": ".self_attn.",
    ".ffn.": ".mlp.",
}

# Families name norms by their order, so that a name's meaning depends on which norms there are.
NORM_NAMES = {
    ("pre_norms",): {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    ("post_norms",): {
        "attention_post_norm": "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    ("pre_norms", "post_norms"): {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
}

FUSED = {  # model type -> part of a stock name -> the name of the tensor that it is rows of, in this order
    "phi3": {
        "self_attn.q_proj": "self_attn.qkv_proj",
        "self_attn.k_proj": "self_attn.qkv_proj",
        "self_attn.v_proj": "self_attn.qkv_proj",
        "mlp.gate_proj": "mlp.gate_up_proj",
        "mlp.up_proj": "mlp.gate_up_proj",
    }
}


def stock_name(name: str, config: ModelConfig) -> str | None:
    """The name of a native parameter in a stock checkpoint; None for what only ease has."""
    if name == f"exit_norms.{config.num_layers - 1}.weight":
        return NORM
    if name.startswith(("exit_", "draft_brick.", "memory")):
        return None
    present = tuple(kind for kind in ("pre_norms", "post_norms") if getattr(config, kind))
    norms = {f".{native}.": f".{stock}." for native, stock in NORM_NAMES[present].items()}
    for native, stock in (norms | STOCK_NAMES).items():
        name = name.replace(native, stock)
    return name


def tensors_of(model: StandardTransformer) -> dict[str, Tensor]:
    """The parameters of a model, a tied one once, and its buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def stock_parts(model: StandardTransformer, model_type: str) -> tuple[dict[str, list[str]], list[str]]:
    """Where the parameters of a native model are in a stock checkpoint.

    Args:
        model_type: the family of the stock model.

    Returns:
        Name of a stored tensor -> the native parameters that are its rows, and the tensors of exits, memory and draft
        brick, which stock models do not have.
    """
    stock: dict[str, list[str]] = {}
    exits: list[str] = []
    for name in tensors_of(model):
        in_stock = stock_name(name, model.config)
        if in_stock is None:
            exits.append(name)
            continue
        for part, whole in FUSED.get(model_type, {}).items():
            in_stock = in_stock.replace(f".{part}.", f".{whole}.")
        stock.setdefault(in_stock, []).append(name)
    return stock, exits


def split_parameters(
    model: StandardTransformer, model_type: str
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The parameters of `stock_parts` by the names of stored tensors: those of a stock model, and the others."""
    own = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    stock, exits = stock_parts(model, model_type)
    return {name: [own[part] for part in parts] for name, parts in stock.items()}, {name: [own[name]] for name in exits}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensor that has the parts as rows; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# ---------------------------------------------------------------------------------------------------------
# Files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
        EaseError: the folder has no weights, has pickled weights only, or its index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / shard for shard in shard_names(folder)]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise EaseError(
            f"{folder} has pickled weights only ({_first_names(pickled)}), which ease never opens: use safetensors"
        )
    raise EaseError(f"{folder} has no weights: it needs {WEIGHTS}, or {INDEX} and the shards it names")


def shapes_of(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files, from their headers alone."""
    return {name: shape for file in files for name, shape in read_shapes(file, FIX).items()}


def without_prefix(targets: Mapping[str, Any], stored: Iterable[str]) -> dict[str, Any]:
    """The targets under the names of a checkpoint that was saved without a head, where all lack the prefix `model.`."""
    stored = set(stored)
    bare = not any(name.startswith("model.") for name in stored)
    return {name.removeprefix("model.") if bare else name: target for name, target in targets.items()}


def locate_tensors(files: Iterable[Path]) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    return {name: file for file in files for name in _read(file, lambda opened: list(opened.keys()))}


def stored_dtype(file: Path, name: str) -> torch.dtype | None:
    """The dtype that a tensor is stored in; None if it is not a floating-point type."""
    return DTYPES.get(_read(file, lambda opened: opened.get_slice(name).get_dtype()))


def without_copies(stored: dict[str, Path], tied: bool) -> dict[str, Path]:
    """The tensors that a model reads: without rotary frequencies (of some Llama 2 checkpoints) and a tied head's copy.

    Args:
        stored: tensor name -> file.
        tied: whether the model uses the embedding as its head.

    Raises:
        EaseError: `tied`, and the stored head differs from the embedding.
    """
    if tied and HEAD in stored and EMBEDDING in stored:
        both = [_read(stored[name], lambda opened, name=name: opened.get_tensor(name)) for name in (EMBEDDING, HEAD)]
        if torch.equal(*both):
            del stored[HEAD]
        else:
            raise EaseError(
                f"config.json ties the head to the embedding, and {stored[HEAD]} has a different head: set "
                "tie_word_embeddings to false"
            )
    return {name: file for name, file in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def check_tensors(targets: Mapping[str, Sequence[Tensor]], stored: Mapping[str, Path], folder: Path) -> None:
    """Compares names, shapes and dtypes of stored tensors with those of the targets, which need no memory yet.

    Args:
        targets: tensor name -> the tensors to fill with its rows, perhaps on the device "meta".
        stored: tensor name -> file.
        folder: the checkpoint, for messages.

    Raises:
        EaseError: a tensor is missing or unknown, or its shape or dtype does not fit.
    """
    check_names(targets.keys() - stored.keys(), stored.keys() - targets.keys(), folder)
    for file in sorted(set(stored.values())):
        _read(file, lambda opened, file=file: _check_file(opened, file, targets, stored))


def check_names(missing: Collection[str], unknown: Collection[str], folder: Path) -> None:
    """Raises EaseError if a checkpoint lacks tensors or holds unknown ones."""
    if missing:
        raise EaseError(
            f"{folder} lacks {_first_names(sorted(missing))}, which its configuration requires: fetch it again"
        )
    if unknown:
        raise EaseError(
            f"{folder} holds {_first_names(sorted(unknown))}, unknown to ease: use a checkpoint without them"
        )


def _check_file(opened: Any, file: Path, targets: Mapping[str, Sequence[Tensor]], stored: Mapping[str, Path]) -> None:
    for name, parts in targets.items():
        if stored[name] != file:
            continue
        view = opened.get_slice(name)
        required = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if (shape := tuple(view.get_shape())) != required:
            raise EaseError(f"{name} in {file} has shape {shape}, but config.json requires {required}: {FIX}")
        if view.get_dtype() not in (DTYPES if parts[0].is_floating_point() else INTEGERS):
            raise EaseError(f"{name} in {file} is stored as {view.get_dtype()}: use a checkpoint in floats")


def fill(targets: Mapping[str, Sequence[Tensor]], stored: Mapping[str, Path]) -> None:
    """Copies every stored tensor into its targets, converting the dtype on the way.

    Args:
        targets: tensor name -> the tensors to fill with its rows.
        stored: tensor name -> file.

    Raises:
        EaseError: a file cannot be read, or a value is NaN or infinite in the target's dtype.
    """
    # Largest first: a stored tensor adds to the memory of the targets filled so far, and the last ones are small norms.
    for name in sorted(targets, key=lambda name: -sum(part.numel() for part in targets[name])):
        parts = targets[name]

        def copy(opened: Any, name: str = name, parts: Sequence[Tensor] = parts) -> None:
            rows = opened.get_tensor(name).split([part.shape[0] for part in parts])
            for part, own in zip(parts, rows, strict=True):
                part.copy_(own)

        _read(stored[name], copy)
        for part in parts:
            check_finite(name, part, stored[name], FIX)


def _read(file: Path, get: Any) -> Any:
    """The result of `get(opened file)`. The file is opened anew for each call, since mapped pages count as memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return get(opened)
    except FileNotFoundError as error:
        raise EaseError(f"{file} is missing: {FIX}") from error
    except (SafetensorError, OSError) as error:
        raise EaseError(f"{file} is damaged ({first_line(error)}): {FIX}") from error


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
