"""The folder of a checkpoint: on disk, or fetched from the Hugging Face hub, with its JSON files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ease.errors import EaseError, require

CONFIG = "config.json"


def checkpoint_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a name such as `org/model` is fetched from the Hugging Face hub first.

    Raises:
        EaseError: there is no such folder, and the hub does not give one of that name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name := os.fspath(name_or_path)) or name.startswith("."):
        raise EaseError(f"there is no folder {path}: pass a checkpoint's folder, or its name on the Hugging Face hub")
    hub = require("huggingface_hub", "hf")
    try:
        # Only these files: no pickle, no code.
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the library's own, its HTTP client's or the system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EaseError(
            f"there is no folder {name}, and the Hugging Face hub could not provide it ({reason}): check the name and "
            "the network, or pass a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint that holds an object.

    Raises:
        EaseError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EaseError(f"{path.parent} has no {path.name}: pass the folder of a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise EaseError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise EaseError(f"{path} is damaged (it must hold a JSON object): fetch it again")
    return value
