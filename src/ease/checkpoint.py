"""A run on disk: a folder that appears whole or not at all, and is read back with clear words if it is not.

    config.json         what was asked for, the model's shape, its policy
    metrics.jsonl       a line per epoch
    summary.json        the figures
    model.safetensors   the weights
    tokenizer.json      the tokenizer
    explorer.json       routed runs over a held-out text, token by token
    report.html         the page
    policy.json         thresholds that `ease calibrate` chose; they take the place of those in config.json

No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
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
from ease.seam import ExitModel

FORMAT = 1
CONFIG, WEIGHTS, POLICY = "config.json", "model.safetensors", "policy.json"


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
def run_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into; it becomes `out` when the block ends well and is gone when it does not.

    Raises:
        EaseError: `out` may not be overwritten or cannot be written, for want of room or right.
    """
    from safetensors import SafetensorError

    check_folder(out, overwrite)
    partial, alone = out.with_name(f".{out.name}.partial-{os.getpid()}"), not out.parent.exists()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise EaseError(f"cannot write to {out.parent} ({error.strerror}): choose another folder") from error
    try:
        yield partial
        check_folder(out, overwrite)
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise EaseError(f"{out} could not be written ({error}): make room, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if alone and not out.exists():
            with suppress(OSError):
                out.parent.rmdir()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
