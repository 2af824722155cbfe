"""The folder of a checkpoint: on disk, or fetched from the Hugging Face hub, with its JSON files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ease.errors import EaseError, first_line, require
from ease.files import read_json as read_json_file

CONFIG = "config.json"

FIX = "fetch the checkpoint again"


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
        raise EaseError(
            f"there is no folder {name}, and the Hugging Face hub could not provide it ({first_line(error)}): check "
            "the name and the network, or pass a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint that holds an object.

    Raises:
        EaseError: the file is missing or damaged.
    """
    if not os.path.lexists(path):
        raise EaseError(f"{path.parent} has no {path.name}: pass the folder of a Hugging Face checkpoint")
    return read_json_file(path, FIX)
