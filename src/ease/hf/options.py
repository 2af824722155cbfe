"""The options of `from_pretrained`, under the names that transformers gives them: each is used, or refused by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ease.devices import choose_device, choose_dtype
from ease.errors import EaseError
from ease.hf.folder import checkpoint_folder

HUB = tuple(inspect.signature(checkpoint_folder).parameters)[1:]  # revision, token, ...

PLACING = ("dtype", "torch_dtype", "device", "device_map")

# Values that change nothing here: no code is run, no pickle is opened, and memory holds the weights once.
GIVEN = {
    "attn_implementation": (None, "sdpa"),
    "low_cpu_mem_usage": (None, True, False),
    "trust_remote_code": (None, True, False),
    "use_safetensors": (None, True),
}


class Loading(NamedTuple):
    """What to load: a local folder, and dtype (None: as stored) and device of the weights."""

    folder: Path
    dtype: torch.dtype | None
    device: str


def read_options(
    name_or_path: str | os.PathLike[str], options: Mapping[str, Any], *, also: Collection[str] = ()
) -> Loading:
    """Checks the options of `from_pretrained` and fetches what they name.

    Args:
        name_or_path: a folder, or a name on the Hugging Face hub.
        options: options by name; None stands for a default.
        also: names of further options, which the caller reads.

    Raises:
        EaseError: an option is unknown or cannot be followed, or there is no such checkpoint.
    """
    for name, value in options.items():
        if name in GIVEN and not any(value is given or value == given for given in GIVEN[name]):
            named = " or ".join(repr(given) for given in GIVEN[name] if given is not None)
            raise EaseError(f"{name}={value!r} is not supported: use {named}, or leave it out")
        known = name in (*HUB, *PLACING, *GIVEN, *also) or name.startswith("_")  # transformers passes notes of its own
        if not known and value is not None and value is not False:
            raise EaseError(f"{name} is not an option that ease supports: leave it out")
    given = {name: options[name] for name in (*HUB, *PLACING) if options.get(name) is not None}
    dtype = _agreed({name: choose_dtype(given[name]) for name in ("dtype", "torch_dtype") if name in given})
    device = _agreed({name: _one_device(name, given[name]) for name in ("device", "device_map") if name in given})
    folder = checkpoint_folder(name_or_path, **{name: given[name] for name in HUB if name in given})
    return Loading(folder, dtype, choose_device(device or "cpu"))


def _agreed(values: Mapping[str, Any]) -> Any:
    """The value of options that mean the same, by name; None if there is none."""
    if len(set(values.values())) > 1:
        named = " and ".join(f"{name} {value}" for name, value in values.items())
        raise EaseError(f"{named} contradict each other: give one of them")
    return next(iter(values.values()), None)


def _one_device(name: str, value: Any) -> str:
    """The one device that `device` or `device_map` stands for."""
    places = set(map(str, value.values())) if isinstance(value, Mapping) else {str(value)}
    if len(places) != 1:
        raise EaseError(f"{name} {value!r} spreads the model, and ease keeps a model on one device: name one")
    place = places.pop()
    if place.isdigit():
        place = f"cuda:{place}"
    if name == "device_map" and place in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.cuda.device_count() > 1:
            raise EaseError(
                f'device_map "{place}" spreads the model over {torch.cuda.device_count()} devices, and ease keeps a '
                'model on one: name it, as in device_map="cuda:0"'
            )
        place = "auto"
    return place
