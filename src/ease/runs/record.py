"""run.json: the configuration of a run, and the versions, git commit and machine of each of its starts."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from ease.devices import machine
from ease.files import read_json, write_json
from ease.training.distributed import processes
from ease.version import __version__

RECORD = "run.json"


def record_start(folder: Path, name: str, settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Write run.json at the start of a run; when the run resumes, add a start to it.

    Args:
        folder: the partial run folder.
        name: name of the run.
        settings: configuration of the run.
        device: device of training.

    Returns:
        The content of the file: "format", "id", "name", "config", and "starts", each with "time", "ease_version",
        "git" and "machine".
    """
    file = folder / RECORD
    new = {"format": 1, "id": uuid4().hex[:8], "name": name, "starts": []}
    record: dict[str, Any] = read_json(file) if file.exists() else new
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ease_version": __version__,
        "git": git_commit(),
        "machine": machine(device) | {"processes": processes()},
    }
    record["starts"].append(start)
    record["config"] = settings
    write_json(file, record)
    return record


def git_commit(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of a folder (the current one by default), and whether tracked files differ; None outside git."""

    def git(command: str) -> str:
        words = ["git", *command.split()]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse HEAD"), "changed": bool(git("status --porcelain -uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
