"""The folder of a checkpoint: on disk, or fetched from the Hugging Face hub, with its JSON files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ease.errors import EaseError, first_line, require
from ease.files import read_json as read_json_file
from ease.hf.gguf import dequantized

CONFIG, GENERATION = "config.json", "generation_config.json"

NATIVE = "ease"  # the model type of a folder that `EaseForCausalLM.save_pretrained` writes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

OWN, EXITS, POLICY = "ease", "exits.safetensors", "policy.json"  # the subfolder that ease adds, and its files

TOKENIZER_FILES = (  # patterns; a tokenizer's code (.py) is never copied
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "sentencepiece*.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

# What a checkpoint is read from, shards excepted. A repository may hold its weights a second time under other names
# (consolidated.safetensors, variants, original/, onnx/), pickles and code; none of these are fetched.
FILES = (CONFIG, GENERATION, WEIGHTS, INDEX, *TOKENIZER_FILES, f"{OWN}/{EXITS}", f"{OWN}/{POLICY}")

FIX = "fetch the checkpoint again"


def checkpoint_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder of a checkpoint.

    A name such as `org/model` is fetched from the Hugging Face hub first, and a GGUF file is dequantized once.

    Args:
        name_or_path: a folder, a name on the hub, or a GGUF file.
        revision: branch, tag or commit of a name on the hub (its main branch by default).
        subfolder: the folder below it that holds the checkpoint.
        token: the hub's access token; True for the one stored by `hf auth login`.
        cache_dir: where fetched files are kept (the hub's own cache by default).
        local_files_only: take a name from the cache alone, without a network.
        force_download: fetch files that are in the cache once more.

    Raises:
        EaseError: there is no such folder, and the hub does not give one of that name.
    """
    given: object = name_or_path
    if not isinstance(given, str | os.PathLike):
        kind = type(given).__name__
        raise EaseError(
            f"a checkpoint must be a folder, or a name on the Hugging Face hub, got {kind}: give one of them"
        )
    path, below = Path(name_or_path), os.fspath(subfolder or "")
    if Path(below).is_absolute() or ".." in Path(below).parts:
        raise EaseError(f"subfolder must lie in the checkpoint, got {below!r}: give it as a relative path")
    if path.is_dir():
        if revision not in (None, "main"):
            raise EaseError(
                f"revision {str(revision)!r} is for a name on the Hugging Face hub, and {path} is a folder, which has "
                "no revisions: leave it out"
            )
        if not (path / below).is_dir():
            raise EaseError(f"{path} has no folder {below}: leave subfolder out, or name one that it has")
        return path / below
    if path.suffix == ".gguf" and path.is_file():
        return dequantized(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name := os.fspath(name_or_path)) or name.startswith("."):
        raise EaseError(f"there is no folder {path}: pass a checkpoint's folder, or its name on the Hugging Face hub")
    hub = require("huggingface_hub", "hf")

    def fetch(names: Iterable[str]) -> Path:
        fetched = hub.snapshot_download(
            name,
            allow_patterns=[(Path(below) / each).as_posix() for each in names],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return Path(fetched) / below

    try:
        folder = fetch(FILES)
        if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
            folder = fetch(shard_names(folder))
    except EaseError:
        raise
    except Exception as error:  # the library's own, its HTTP client's or the system's
        raise EaseError(
            f"there is no folder {name}, and the Hugging Face hub could not provide it ({first_line(error)}): check "
            "the name and the network, or pass a folder"
        ) from error
    if not folder.is_dir():
        raise EaseError(f"{name} on the Hugging Face hub has no folder {below}: leave subfolder out, or name another")
    return folder


def shard_names(folder: Path) -> list[str]:
    """The shards that the index of a checkpoint names.

    Raises:
        EaseError: the index is damaged.
    """
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise EaseError(f"{folder / INDEX} does not name shards in its own folder (weight_map): fetch it again")
    return sorted(set(shards.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint that holds an object.

    Raises:
        EaseError: the file is missing or damaged.
    """
    if not os.path.lexists(path):
        raise EaseError(f"{path.parent} has no {path.name}: pass the folder of a Hugging Face checkpoint")
    return read_json_file(path, FIX)
