"""A run on disk: a folder that appears whole or not at all, and is read back with clear words if it is not.

    config.json         what was asked for, the model's shape, its policy
    metrics.jsonl       a line per epoch
    summary.json        the figures
    model.safetensors   the weights
    tokenizer.json      the tokenizer
    explorer.json       routed runs over a held-out text, token by token
    report.html         the page
    policy.json         thresholds that `ease calibrate` chose; they take the place of those in config.json

No file is a pickle. While it is under way a run lies in `.NAME.partial` beside its place, with what it would need to go
on after a kill in `checkpoints/`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ease.errors import EaseError
from ease.exits import Policy
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.resume import lasting
from ease.seam import ExitModel

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


def goes_on(folder: Path, plan: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a resumable folder holds checkpoints of this very plan; those of another are refused, or removed.

    Args:
        plan: everything that decides what a run does.
        overwrite: remove another plan's checkpoints.
    """
    kept, plan = folder / CHECKPOINTS, json.loads(json.dumps(plan, default=lasting))
    wanted, goes_on = _flat(plan), _has_checkpoints(folder)
    if goes_on:
        try:
            was = _flat(json.loads((kept / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            was = {}
        other = sorted(name for name in {*was, *wanted} if was.get(name) != wanted.get(name))
        if other and not overwrite:
            raise EaseError(
                f"{folder} holds an unfinished run that differs in {', '.join(other[:5])}"
                f"{' and more' if len(other) > 5 else ''}: end it with the command that began it, "
                "choose another --out, or discard it (--overwrite)"
            )
        goes_on = not other
    if not goes_on:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        write_json(kept / PLAN, plan)
    return goes_on


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names like data.seq_len."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}


def write_json(path: Path, value: Any) -> None:
    """What is not a number is null: JSON has no NaN."""
    path.write_text(json.dumps(_told(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _told(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def save_model(folder: Path, model: StandardTransformer, policy: Policy, **config: Any) -> None:
    """Writes weights and config.json; `config` is kept beside what the model needs to come back."""
    from safetensors.torch import save_model as save

    save(model, str(folder / WEIGHTS))
    model_config = {"model": asdict(model.config), "trained_exits": sorted(model.trained_exits)}
    model_config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {"format": FORMAT, **model_config, "policy": asdict(policy), **config})


def load_model(folder: Path) -> tuple[DeepSupervisionTransformer, dict[str, Any]]:
    """The model of a run, with its policy as its own, and config.json.

    Of what that says, "calibration" holds policy.json or None, and "run" and "data" are there, if empty.

    Raises:
        EaseError: the folder is missing, damaged or written by another version of the format, or its policy.json was
            calibrated on other weights.
    """
    from safetensors.torch import load_model as load

    if not (folder / CONFIG).is_file():
        raise EaseError(f"{folder} is no run folder (it has no {CONFIG}): pass a folder that `ease run` wrote")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        written = FORMAT if "model_type" in config else config["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EaseError(f"{folder / CONFIG} is damaged ({error}): run again, or restore it") from error
    if "model_type" in config:
        raise EaseError(f"{folder} is a checkpoint and no run: `ease tune` makes a run of it, `ease generate` takes it")
    if written != FORMAT:
        raise EaseError(f"{folder} has format {written} and this ease reads {FORMAT}: use the ease that wrote it")
    config["calibration"] = calibration = _read_calibration(folder / POLICY)
    try:
        shape = dict(config["model"])
        policy = calibration["policy"] if calibration else config["policy"]
        model = DeepSupervisionTransformer(
            shape.pop("vocab_size"),
            exit_layer=policy["exits"] or 1,
            routing_threshold=policy["thresholds"] or 0.0,
            **shape,
        )
        model.to(getattr(torch, config.get("dtype", "float32")))
        model.trained_exits = set(config["trained_exits"])
        model.policy_options = {k: v for k, v in policy.items() if k not in ("exits", "thresholds")}
        Policy.own(model)
        config |= {name: dict(config.get(name, {})) for name in ("run", "data")}
        if not isinstance(eos := config["data"].get("eos"), int | None):
            raise TypeError(f"data.eos is {eos!r}")
        load(model, str(folder / WEIGHTS))
    except Exception as error:  # whatever a damaged file makes the libraries raise, the sentence is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EaseError(f"the model in {folder} is damaged ({reason}): run again, or restore it") from error
    if calibration:
        check_fingerprint(model, calibration, folder / POLICY)
    return model.eval(), config


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


def save_calibration(folder: Path, model: StandardTransformer, record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes policy.json, whole or not at all, and returns what is in it."""
    sizes = {"parameters": sum(p.numel() for p in model.parameters()), **asdict(model.config)}
    written = {"format": FORMAT, "fingerprint": fingerprint(model), **record, "model": sizes}
    partial = folder / f".{POLICY}.partial-{os.getpid()}"
    try:
        write_json(partial, written)
        partial.replace(folder / POLICY)
    except OSError as error:
        raise EaseError(
            f"{folder / POLICY} could not be written ({error}): make room, or make the folder writable"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return written


def _read_calibration(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        written, policy = record["format"], Policy(**{k: _value(v) for k, v in record["policy"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EaseError(f"{file} is damaged ({error}): remove it, and calibrate again") from error
    if written != FORMAT:
        raise EaseError(f"{file} has format {written} and this ease reads {FORMAT}: use the ease that wrote it")
    return record | {"policy": asdict(policy)}


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
