"""A run folder on disk, written completely or not at all.

    config.json         configuration of the run, shape of the model, its policy
    metrics.jsonl       one row per line and epoch
    summary.json        metrics of all lines
    model.safetensors   weights
    tokenizer.json      tokenizer
    explorer.json       routed runs over a held-out text, token by token
    report.html         report
    policy.json         thresholds chosen by `ease calibrate`; they replace those in config.json

No file is a pickle. A run in progress is in `.NAME.partial` in the same parent folder, with the checkpoints needed to
resume it in `checkpoints/`.
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
    check_fingerprint,
    fingerprint,
    has_checkpoints,
    stable_repr,
    write_json,
)

FORMAT = 1

WEIGHTS, POLICY = "model.safetensors", "policy.json"

PLAN = "plan.json"  # in the folder of checkpoints: the identity of the run that they belong to


def can_resume(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a partial run folder holds checkpoints of the run with this identity.

    If not, the folder is prepared for a new run.

    Args:
        folder: the partial run folder.
        identity: everything that determines the results of the run.
        overwrite: discard checkpoints of another run.

    Raises:
        EaseError: the folder holds checkpoints of another run and `overwrite` is not set.
    """
    checkpoints, identity = folder / CHECKPOINTS, json.loads(json.dumps(identity, default=stable_repr))
    expected, resumable = _flat(identity), has_checkpoints(folder)
    if resumable:
        try:
            found = _flat(json.loads((checkpoints / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            found = {}
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if differing and not overwrite:
            raise EaseError(
                f"{folder} holds an unfinished run that differs in {', '.join(differing[:5])}"
                f"{' and more' if len(differing) > 5 else ''}: finish it with its own command, "
                "choose another --out, or discard it (--overwrite)"
            )
        resumable = not differing
    if not resumable:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir()
        write_json(checkpoints / PLAN, identity)
    return resumable


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to names like data.seq_len."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}


def save_model(folder: Path, model: StandardTransformer, policy: Policy, **config: Any) -> None:
    """Write the weights and config.json of a model.

    Args:
        folder: an existing folder.
        model: the model.
        policy: the model's policy.
        config: further content of config.json.
    """
    from safetensors.torch import save_model as save

    save(model, str(folder / WEIGHTS))
    model_config = {"model": asdict(model.config), "trained_exits": sorted(model.trained_exits)}
    model_config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {"format": FORMAT, **model_config, "policy": asdict(policy), **config})


def load_model(folder: Path) -> tuple[DeepSupervisionTransformer, dict[str, Any]]:
    """Load the model of a run, with the run's policy as `model.policy`.

    Args:
        folder: a run folder.

    Returns:
        The model in eval mode and the content of config.json, in which "calibration" is the content of policy.json or
        None, and "run" and "data" are present, perhaps empty.

    Raises:
        EaseError: the folder is missing, damaged or written in another format version, or its policy.json was
            calibrated on other weights.
    """
    from safetensors.torch import load_model as load

    if not (folder / CONFIG).is_file():
        raise EaseError(f"{folder} is not a run folder (it has no {CONFIG}): pass a folder that `ease run` wrote")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        written = FORMAT if "model_type" in config else config["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EaseError(f"{folder / CONFIG} is damaged ({error}): run again, or restore it") from error
    if "model_type" in config:
        raise EaseError(
            f"{folder} is a checkpoint, not a run: `ease tune` makes a run of it, and `ease generate` accepts it"
        )
    if written != FORMAT:
        raise EaseError(
            f"{folder} has format {written} and this version of ease reads {FORMAT}: use the version that wrote it"
        )
    config["calibration"] = calibration = _read_calibration(folder / POLICY)
    try:
        shape = dict(config["model"])
        policy = calibration["policy"] if calibration else config["policy"]
        model = DeepSupervisionTransformer(**shape)
        model.policy = Policy(**policy)
        model.policy.check(model.num_layers)
        model.to(getattr(torch, config.get("dtype", "float32")))
        model.trained_exits = set(config["trained_exits"])
        config |= {name: dict(config.get(name, {})) for name in ("run", "data")}
        if not isinstance(eos := config["data"].get("eos"), int | None):
            raise TypeError(f"data.eos is {eos!r}")
        load(model, str(folder / WEIGHTS))
    except Exception as error:  # libraries raise many kinds of errors on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EaseError(f"the model in {folder} is damaged ({reason}): run again, or restore it") from error
    if calibration:
        check_fingerprint(model, calibration, folder / POLICY)
    return model.eval(), config


def save_calibration(folder: Path, model: StandardTransformer, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write policy.json, completely or not at all.

    Args:
        folder: the run folder.
        model: the calibrated model; the file holds the fingerprint of its weights.
        record: target, policy and metrics of the calibration.

    Returns:
        The content of the file.

    Raises:
        EaseError: the file cannot be written.
    """
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
        raise EaseError(f"{file} is damaged ({error}): remove it and calibrate again") from error
    if written != FORMAT:
        raise EaseError(
            f"{file} has format {written} and this version of ease reads {FORMAT}: use the version that wrote it"
        )
    return record | {"policy": asdict(policy)}


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
