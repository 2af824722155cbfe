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

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ease.errors import EaseError
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.storage import (
    CHECKPOINTS,
    CONFIG,
    FORMAT,
    PLAN,
    POLICY,
    WEIGHTS,
    _has_checkpoints,
    check_fingerprint,
    fingerprint,
    stable_repr,
    write_json,
)


def can_resume(folder: Path, plan: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a resumable folder holds checkpoints of this very plan; those of another are refused, or removed.

    Args:
        plan: everything that decides what a run does.
        overwrite: remove another plan's checkpoints.
    """
    kept, plan = folder / CHECKPOINTS, json.loads(json.dumps(plan, default=stable_repr))
    wanted, can_resume = _flat(plan), _has_checkpoints(folder)
    if can_resume:
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
        can_resume = not other
    if not can_resume:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        write_json(kept / PLAN, plan)
    return can_resume


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names like data.seq_len."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}


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
