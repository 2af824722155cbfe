"""Token ids and masks as users have them: tensors of any integer type, NumPy arrays, lists, and dictionaries.

Dictionaries are those that the tokenizers and data collators of transformers give.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ease.errors import EaseError

IGNORE = -100
"""Target of a token that is not scored."""


def as_ids(name: str, value: Any) -> Tensor:
    """Token ids (B, T) as an int64 tensor, on the device that they are on.

    Args:
        name: what a message calls the value.
        value: a tensor or array of integers, or lists of one length.

    Raises:
        EaseError: the value is something else.
    """
    return as_integers(name, value, dims=2).long()


def as_integers(name: str, value: Any, dims: int) -> Tensor:
    """Integers (B, T), or (T,) for `dims=1`, as a tensor of whatever integer type."""
    shape = "(B, T)" if dims == 2 else "(T,)"
    if isinstance(value, Mapping):
        raise EaseError(
            f"{name} must be integers of shape {shape}, got a dictionary with {_names(value)}: pass its ids"
        )
    ids = as_tensor(value)
    if ids is None:
        raise EaseError(
            f"{name} must be integers of shape {shape}, got {reprlib.repr(value)}: encode texts with a tokenizer, and "
            "pad rows to one length"
        )
    if ids.ndim != dims or (ids.numel() and not is_integral(ids)):
        raise EaseError(f"{name} must be integers of shape {shape}, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids


def as_mask(name: str, value: Any, ids: Tensor) -> Tensor:
    """A mask as a boolean tensor of the shape and on the device of `ids`.

    Args:
        name: what a message calls the value.
        value: a tensor, array or lists of true and false, or of 1 and 0.
        ids: (B, T) the tokens that it masks.

    Raises:
        EaseError: the value is something else, or has another shape.
    """
    mask = as_flags(name, value)
    if mask.shape != ids.shape:
        raise EaseError(
            f"{name} must have the shape of the ids, {tuple(ids.shape)}, got {tuple(mask.shape)}: give one value "
            "per token"
        )
    return mask.to(ids.device)


def as_flags(name: str, value: Any) -> Tensor:
    """True and false, or 1 and 0, as a boolean tensor of any shape."""
    flags = as_tensor(value)
    if flags is None or (flags.dtype != torch.bool and not bool(((flags == 0) | (flags == 1)).all())):
        got = reprlib.repr(value) if flags is None else "other values"
        raise EaseError(f"{name} must hold 1 for tokens and 0 for padding, got {got}: give one value per token")
    return flags.bool()


def check_states(name: str, value: object, dim: int) -> None:
    """Raises EaseError unless `value` is a floating-point tensor (..., D) of D = `dim`."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and value.shape[-1] == dim):
        got = tuple(value.shape) if isinstance(value, Tensor) else reprlib.repr(value)
        raise EaseError(f"{name} must be a floating-point tensor (..., {dim}), got {got}")


def read_prompt(ids: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) and their mask (B, T), from the two or from the dictionary that a tokenizer of transformers gives.

    Raises:
        EaseError: they are not integers of one shape, or the dictionary holds something else.
    """
    if isinstance(ids, Mapping):
        _check_keys(ids, "input_ids", "attention_mask")
        if attention_mask is not None and "attention_mask" in ids:
            raise EaseError("attention_mask is given twice, in the dictionary and by itself: leave one out")
        ids, attention_mask = ids["input_ids"], ids.get("attention_mask", attention_mask)
    ids = as_ids("ids", ids)
    return ids, None if attention_mask is None else as_mask("attention_mask", attention_mask, ids)


def read_labelled(item: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, targets and mask (B, T) from a dictionary of transformers' data collators.

    Its labels stand at the token itself and are moved to the token before, which predicts it. Without labels, they are
    the ids.

    Raises:
        EaseError: they are not integers of one shape, or the dictionary holds something else.
    """
    _check_keys(item, "input_ids", "attention_mask", "labels")
    ids, mask = read_prompt({name: item[name] for name in ("input_ids", "attention_mask") if name in item})
    labels = as_ids("labels", item["labels"]) if "labels" in item else ids
    if labels.shape != ids.shape:
        raise EaseError(f"labels must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORE)
    return ids, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE), mask


def _check_keys(item: Mapping[str, Any], *known: str) -> None:
    if "input_ids" not in item:
        raise EaseError(f"a dictionary must hold input_ids, got {_names(item)}: use the output of a tokenizer")
    if unknown := unused(item, known):
        raise EaseError(f"a dictionary of ids must hold {', '.join(known)}, got {', '.join(unknown)}: leave it out")


def unused(item: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The names in a dictionary that are not known and hold something.

    Tokenizers of some families add token_type_ids, which mean nothing if they are all 0.
    """

    def nothing(name: str, value: Any) -> bool:
        types = as_tensor(value) if name == "token_type_ids" else None
        return value is None or value is False or (types is not None and not bool(types.any()))

    return [name for name, value in item.items() if name not in known and not nothing(name, value)]


def _names(item: Mapping[str, Any]) -> str:
    return ", ".join(map(str, item)) or "nothing in it"


def is_integral(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def as_tensor(value: Any) -> Tensor | None:
    """The value as a tensor; None if it is no array of numbers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str | bytes | dict | set):
        return None
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(row, Tensor) for row in value):
            return torch.stack(list(value))
        array = np.asarray(value)
        if array.dtype.kind not in "iufb":
            return None
        if array.dtype.kind in "iu":
            array = array.astype(np.int32 if array.dtype.itemsize < 4 else np.int64)  # torch lacks some types
        return torch.tensor(array)  # a copy: arrays may be read-only
    except (TypeError, ValueError, RuntimeError, OverflowError):  # rows of different lengths, among others
        return None
