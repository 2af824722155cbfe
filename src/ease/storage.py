"""ease.storage."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.interface import ExitModel


def digest(*parts: object) -> str:
    """SHA-256 of tensors by their bytes and of all else by its `repr`."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            sha.update(stable_repr(part).encode())
    return sha.hexdigest()


def stable_repr(value: object) -> str:
    """Its `repr` without addresses, which are others in the next process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


FORMAT = 1

CONFIG, WEIGHTS, POLICY = "config.json", "model.safetensors", "policy.json"

CHECKPOINTS, PLAN = "checkpoints", "plan.json"


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuses to write over what is there, unless it is a run or a checkpoint and `overwrite` is set."""
    if not out.exists():
        return
    if not overwrite:
        raise EaseError(f"{out} exists already: choose another folder, or overwrite it (--overwrite)")
    if not holds_model(out) and (not out.is_dir() or any(out.iterdir())):
        raise EaseError(f"{out} is no run folder and no checkpoint, so it is not overwritten: choose another")


def holds_model(folder: Path) -> bool:
    """Whether the folder is a run or a checkpoint, by what its config.json says; many things have a config.json."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ({"format", "model"} <= config.keys() or "model_type" in config)


@contextmanager
def run_folder(out: Path, overwrite: bool = False, *, resumable: bool = False) -> Iterator[Path]:
    """A folder to write into; it becomes `out` when the block ends well and is gone when it does not.

    Args:
        resumable: the folder has the same name every time, is held against other processes, and stays if the block
            does not end well and left checkpoints in its CHECKPOINTS; they are removed when it does.

    Raises:
        EaseError: `out` may not be overwritten or cannot be written, for want of room or right; another process is at
            work in the folder.
    """
    from safetensors import SafetensorError

    check_folder(out, overwrite)
    partial = out.with_name(f".{out.name}.partial" + ("" if resumable else f"-{os.getpid()}"))
    alone = not out.parent.exists()
    try:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=resumable)
    except OSError as error:
        raise EaseError(f"cannot write to {out.parent} ({error.strerror}): choose another folder") from error
    with _held(partial):
        try:
            check_folder(out, overwrite)  # another process may have ended just now
            yield partial
            check_folder(out, overwrite)
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # not before, or a kill in between would cost the run
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise EaseError(f"{out} could not be written ({error}): make room, or choose another folder") from error
        except KeyboardInterrupt:
            if _has_checkpoints(partial):
                raise KeyboardInterrupt(f"the same command goes on ({partial})") from None
            raise
        finally:
            if not _has_checkpoints(partial):
                shutil.rmtree(partial, ignore_errors=True)
            if alone and not out.exists():
                with suppress(OSError):
                    out.parent.rmdir()


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).rglob("*.safetensors"))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process holds. The system lets go of it when a process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks on folders
        yield
        return
    try:
        held = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise EaseError(f"another process has just ended its work in {folder}: run again") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EaseError(
                    f"another process is at work in {folder}: wait until it has ended, or choose another --out"
                ) from None
        yield
    finally:
        os.close(held)


def write_json(path: Path, value: Any) -> None:
    """What is not a number is null: JSON has no NaN."""
    path.write_text(json.dumps(_told(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _told(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---------------------------------------------------------------------------------------------------------
# A calibrated policy belongs to the weights it was chosen on


def fingerprint(model: ExitModel) -> str:
    """SHA-256 over the model's tensors in the order of their names: name, shape, and values as 32-bit floats."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().float().contiguous().flatten().numpy())
    return sha.hexdigest()


def check_fingerprint(model: ExitModel, calibration: Mapping[str, Any], file: Path) -> None:
    """Refuses thresholds that were calibrated on other weights than the model's."""
    ours, theirs = fingerprint(model), calibration.get("fingerprint")
    if ours != theirs:
        raise EaseError(
            f"the thresholds in {file} were calibrated on other weights (fingerprint {str(theirs)[:12]}, and the model "
            f"has {ours[:12]}): load the weights as they were stored, or remove the file and calibrate again"
        )
