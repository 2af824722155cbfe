"""A run folder on disk, written completely or not at all.

    config.json         configuration of the run, shape of the model, its policy
    run.json            configuration of the run; versions, git commit and machine of each start
    metrics.jsonl       metrics of training, a row every few steps and one per epoch
    tensorboard/        event files, with --track tensorboard
    summary.json        metrics of all lines
    model.safetensors   weights
    tokenizer.json      tokenizer
    start/              everything but the weights of the checkpoint that the run started from
    explorer.json       routed runs over a held-out text, token by token
    report.html         report
    policy.json         policy chosen by `ease calibrate`, with its classifiers; it replaces that in config.json
    SHA256SUMS          checksums of the other files, which `sha256sum -c` can check too

No file is a pickle. A run in progress is in `.NAME.partial` in the same parent folder, with the checkpoints needed to
resume it in `checkpoints/`.
"""

from __future__ import annotations

import json
import reprlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ease.devices import choose_dtype
from ease.errors import EaseError, check_boolean, check_integer, check_layers, check_string, first_line
from ease.files import check_checksums, set_usual_mode, write_checksums
from ease.model_config import ModelConfig, check_sizes
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.runs.log import METRICS
from ease.runs.record import RECORD
from ease.storage import (
    CHECKPOINTS,
    CONFIG,
    check_fingerprint,
    check_finite,
    fingerprint,
    has_checkpoints,
    read_json,
    read_shapes,
    stable_repr,
    write_json,
)
from ease.version import __version__

FORMAT = 1

WEIGHTS, POLICY, TOKENIZER, START = "model.safetensors", "policy.json", "tokenizer.json", "start"

# The files of a finished run, without its report.
FILES = (CONFIG, WEIGHTS, TOKENIZER, RECORD, METRICS, "summary.json", "explorer.json")

FIX, RECALIBRATE = "run again, or restore it", "remove it and calibrate again"

PLAN = "plan.json"  # in the folder of checkpoints: the identity of the run that they belong to


def can_resume(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a partial run folder holds checkpoints of the run with this identity.

    If not, the folder is prepared for a new run.

    Args:
        folder: the partial run folder.
        identity: everything that determines the results of the run.
        overwrite: discard checkpoints of another run.

    Raises:
        EaseError: `overwrite` is not set, and the folder holds checkpoints of another run, or their plan is damaged.
    """
    checkpoints, identity = folder / CHECKPOINTS, json.loads(json.dumps(identity, default=stable_repr))
    expected, resumable = _flat(identity), has_checkpoints(folder)
    if resumable:
        try:
            found = _flat(read_json(checkpoints / PLAN, "restore it, or discard the unfinished run (--overwrite)"))
        except EaseError:
            if not overwrite:
                raise
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
    set_usual_mode(folder / WEIGHTS)
    model_config = {"model": asdict(model.config), "trained_exits": sorted(model.trained_exits)}
    if model.stale_classifiers:
        model_config["stale_classifiers"] = sorted(model.stale_classifiers)
    model_config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {"format": FORMAT, **model_config, "policy": asdict(policy), **config})


def load_model(folder: Path, *, calibrated: bool = True) -> tuple[DeepSupervisionTransformer, dict[str, Any]]:
    """Load the model of a run, with the run's policy as `model.policy`.

    Args:
        folder: a run folder.
        calibrated: whether policy.json is read; without it the model is as the run has written it.

    Returns:
        The model in eval mode and the content of config.json, in which "calibration" is the content of policy.json or
        None, and "run" and "data" are present, perhaps empty.

    Raises:
        EaseError: the folder is missing, damaged or written in another format version, a weight is NaN or infinite, a
            file has another checksum than SHA256SUMS lists, or policy.json was calibrated on other weights.
    """
    from safetensors.torch import load_model as load

    file, weights = folder / CONFIG, folder / WEIGHTS
    if not file.is_file():
        raise EaseError(f"{folder} is not a run folder (it has no {CONFIG}): pass a folder that `ease run` wrote")
    config = read_json(file, FIX)
    if "model_type" in config:
        raise EaseError(
            f"{folder} is a checkpoint, not a run: `ease tune` makes a run of it, and `ease generate` accepts it"
        )
    _check_format(file, config, FIX)
    config["calibration"] = calibration = _read_calibration(folder / POLICY) if calibrated else None
    try:
        shape = ModelConfig(**config["model"])
        policy = Policy(**(calibration["policy"] if calibration else config["policy"]))
        policy.check(shape.num_layers)
        dtype = choose_dtype(config.get("dtype", "float32")) or torch.float32
        trained_exits = set(check_layers("trained_exits", config["trained_exits"], shape.num_layers))
        stale = set(check_layers("stale_classifiers", config.get("stale_classifiers", ()), shape.num_layers))
        config |= {name: dict(config.get(name, {})) for name in ("run", "data")}
        _check_data(config["data"], shape)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        version = config.get("ease_version", __version__)
        written = "" if version == __version__ else f"; ease {version} wrote it and this is {__version__}"
        raise EaseError(f"{file} is damaged ({first_line(error)}{written}): {FIX}") from error
    stored = read_shapes(weights, FIX)
    check_sizes(shape, stored, file, f"they belong to different runs, so {FIX}")
    options = {field.name: getattr(shape, field.name) for field in fields(shape)}
    try:
        with torch.device("meta"):  # names and shapes of all tensors, before memory is allocated for any
            for name, tensor in DeepSupervisionTransformer(**options).state_dict().items():
                if stored.get(_stored(name, stored, shape)) != tuple(tensor.shape):
                    raise EaseError(f"{name} is missing or has another shape than {CONFIG} requires")
        model = DeepSupervisionTransformer(**options).to(dtype)
        load(model, str(weights))
    except Exception as error:  # libraries raise many kinds of errors on damaged files
        raise EaseError(f"{weights} is damaged ({first_line(error)}): {FIX}") from error
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, weights, FIX)
    model.policy, model.trained_exits, model.stale_classifiers = policy, trained_exits, stale
    if calibration:
        try:
            model.set_classifiers({int(e): torch.tensor(w) for e, w in calibration.get("classifiers", {}).items()})
        except Exception as error:  # torch raises many kinds of errors for a shape that does not fit
            raise EaseError(f"{folder / POLICY} is damaged ({first_line(error)}): {RECALIBRATE}") from error
        check_fingerprint(model, calibration, folder / POLICY)
    check_checksums(folder, (CONFIG, WEIGHTS, TOKENIZER), FIX)
    check_checksums(folder, (POLICY,) if calibrated else (), RECALIBRATE)
    return model.eval(), config


def start_files(folder: Path) -> list[str]:
    """The names of the files in the subfolder START of a run, relative to the run's folder."""
    return sorted(file.relative_to(folder).as_posix() for file in (folder / START).rglob("*") if file.is_file())


def start_folder(folder: Path) -> Path | None:
    """What a run keeps of the checkpoint that it started from: everything but the weights. None without one.

    Raises:
        EaseError: a file in it is damaged.
    """
    check_checksums(folder, start_files(folder), FIX)
    return folder / START if (folder / START).is_dir() else None


def _stored(name: str, stored: Mapping[str, Any], shape: ModelConfig) -> str:
    """The name under which a parameter is stored; safetensors keeps one name of a tied embedding."""
    tied = {"embedding.weight", "output_head.weight"} if shape.tie_embeddings else set()
    return next(iter(tied & stored.keys()), name) if name in tied else name


def _check_data(data: Mapping[str, Any], shape: ModelConfig) -> None:
    """Checks what config.json records about the data of a run."""
    if data.get("eos") is not None:
        check_integer("data.eos", data["eos"], 0, shape.vocab_size - 1)
    for name in ("given", "split_special_tokens", "add_special_tokens"):
        if name in data:
            check_boolean(f"data.{name}", data[name])
    if data.get("given") and "eos" not in data:
        raise EaseError("data.eos is missing")
    for name in ("source", "hash"):
        if name in data:
            check_string(f"data.{name}", data[name])


def _check_format(file: Path, record: Mapping[str, Any], fix: str) -> None:
    if "format" not in record:
        raise EaseError(f"{file} is damaged (it has no format): {fix}")
    if record["format"] != FORMAT:
        version = record.get("ease_version")
        raise EaseError(
            f"{file} has format {reprlib.repr(record['format'])} and this version of ease reads {FORMAT}: use the "
            f"version that wrote it{f', {version}' if isinstance(version, str) else ''}"
        )


def save_calibration(folder: Path, model: StandardTransformer, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write policy.json, completely or not at all.

    Args:
        folder: the run folder.
        model: the calibrated model; the file holds the fingerprint of its weights, classifiers included.
        record: target, policy and metrics of the calibration, and the classifiers that the policy adds.

    Returns:
        The content of the file.

    Raises:
        EaseError: the file cannot be written.
    """
    sizes = {"parameters": sum(p.numel() for p in model.parameters()), **asdict(model.config)}
    written = {"format": FORMAT, "fingerprint": fingerprint(model), **record, "model": sizes}
    try:
        write_checksums(folder, (), without=(POLICY,))  # a kill in between leaves a file without checksum
        write_json(folder / POLICY, written)
        write_checksums(folder, (POLICY,))
    except OSError as error:
        raise EaseError(
            f"{folder / POLICY} could not be written ({error}): make room, or make the folder writable"
        ) from error
    return written


def _read_calibration(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    record = read_json(file, RECALIBRATE)
    _check_format(file, record, RECALIBRATE)
    try:
        policy = Policy(**record["policy"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EaseError(f"{file} is damaged ({first_line(error)}): {RECALIBRATE}") from error
    return record | {"policy": asdict(policy)}
