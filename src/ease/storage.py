"""Output folders that appear whole or not at all, JSON files, and fingerprints of what they hold.

A folder is written under a hidden name in the same parent folder and renamed at the end. A run or checkpoint that
exists is therefore complete, and one that is overwritten stays until its replacement is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError, first_line
from ease.files import read_json as read_json
from ease.files import write_json as write_json
from ease.interface import ExitModel

CONFIG = "config.json"  # what a run folder and a checkpoint are recognized by

CHECKPOINTS = "checkpoints"  # subfolder of an unfinished output folder, with what resuming it takes

MADE = "self"  # subfolder of a run, with the text that a model made for its training

# ---------------------------------------------------------------------------------------------------------
# Output folders


@contextmanager
def output_folder(
    out: Path, overwrite: bool = False, *, resumable: bool = False, reads: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Gives a partial folder to write into, which becomes `out` if the block succeeds and is removed if it fails.

    Args:
        out: the folder to create.
        overwrite: replace `out` if it is a run or a checkpoint.
        resumable: give the partial folder a fixed name, lock it against other processes, and keep it after a failure
            if it has checkpoints in its subfolder CHECKPOINTS, or text in MADE. Success removes the checkpoints.
        reads: files and folders that are read to write this one; a folder that holds one of them, or is in one of
            them, is not overwritten.

    Yields:
        The partial folder, `.NAME.partial` (with the process id, unless resumable) in the same parent folder.

    Raises:
        EaseError: `out` may not be overwritten, it or the partial folder is a symbolic link, the disk is full, or
            another process uses the partial folder.

    Example:
        >>> with output_folder(Path("runs/demo")) as folder:
        ...     write_json(folder / "summary.json", summary)
    """
    from safetensors import SafetensorError

    if out.is_symlink():  # renaming would replace the link, and a dangling one would fail at the end
        raise EaseError(f"{out} is a symbolic link: give the folder itself")
    out = out.resolve()  # `.` has no name
    check_overwrite(out, overwrite, reads)
    partial = partial_folder(out) if resumable else out.with_name(f"{partial_folder(out).name}-{os.getpid()}")
    if partial.is_symlink():  # its target would be emptied and written
        raise EaseError(f"{partial} is a symbolic link: remove it, or choose another folder")
    parent_is_new = not out.parent.exists()
    try:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=resumable)
    except OSError as error:
        raise EaseError(f"cannot write to {out.parent} ({error.strerror}): choose another folder") from error
    with _locked(partial):
        try:
            check_overwrite(out, overwrite, reads)  # another process may have finished since
            yield partial
            check_overwrite(out, overwrite, reads)
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # not before, or a kill in between would cost the run
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise EaseError(
                f"{out} could not be written ({error}): free disk space, or choose another folder"
            ) from error
        except KeyboardInterrupt:
            if is_begun(partial):
                raise KeyboardInterrupt(f"run the same command again to resume ({partial})") from None
            raise
        finally:
            if not is_begun(partial):
                shutil.rmtree(partial, ignore_errors=True)
            if parent_is_new and not out.exists():
                with suppress(OSError):
                    out.parent.rmdir()


def partial_folder(out: Path) -> Path:
    """The folder that a resumable `output_folder` gives."""
    out = out.resolve()
    return out.with_name(f".{out.name}.partial")


def check_overwrite(out: Path, overwrite: bool, reads: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raises EaseError if `out` exists, unless `overwrite` is set and it is a run, a checkpoint or an empty folder.

    It must not hold, or be in, anything that `reads` names, nor hold the current folder.
    """
    if not out.exists():
        return
    if not overwrite:
        raise EaseError(f"{out} exists already: choose another folder, or overwrite it (--overwrite)")
    for path in (Path(name).resolve() for name in reads if Path(name).exists()):
        if out == path or out in path.parents or path in out.parents:
            raise EaseError(f"{out} is not overwritten, since {path} is read: choose another folder")
    if out == Path.cwd() or out in Path.cwd().parents:
        raise EaseError(f"{out} is not overwritten, since it holds the current folder: choose another folder")
    if not is_run_or_checkpoint(out) and (not out.is_dir() or any(out.iterdir())):
        raise EaseError(f"{out} is not a run folder or a checkpoint and is not overwritten: choose another folder")


def is_run_or_checkpoint(folder: Path) -> bool:
    """Whether a folder is a run or a checkpoint.

    The keys of its config.json decide, since files of that name belong to many other programs.
    """
    try:
        config = read_json(folder / CONFIG)
    except EaseError:
        return False
    return ({"format", "model"} <= config.keys()) or "model_type" in config


def has_checkpoints(partial: Path) -> bool:
    """Whether a partial folder has checkpoints to resume from."""
    files = (partial / CHECKPOINTS).rglob("*.safetensors")
    return any(".parts-" not in file.parent.name for file in files)  # parts are of use with the file that names them


def is_begun(partial: Path) -> bool:
    """Whether a partial folder has anything that resuming it saves: checkpoints, or text that a model made."""
    return has_checkpoints(partial) or any((partial / MADE).glob("*.jsonl"))


def is_locked(folder: Path) -> bool | None:
    """Whether a process works on a partial folder; None where the system has no such locks.

    A process that starts its work during the call is refused, so it is not to be called often.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on a folder. The system releases it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks on folders
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise EaseError(f"another process has just finished its work in {folder}: run the command again") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EaseError(
                    f"another process is at work in {folder}: wait until it ends, or choose another --out"
                ) from None
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------
# Weights


def read_shapes(file: Path, fix: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, from its header alone.

    Args:
        file: the file.
        fix: what the message of an error recommends.

    Raises:
        EaseError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise EaseError(f"{file} is missing: {fix}") from error
    except (SafetensorError, OSError) as error:
        raise EaseError(f"{file} is damaged ({first_line(error)}): {fix}") from error


def check_finite(name: str, tensor: Tensor, file: Path, fix: str) -> None:
    """Raises EaseError if a tensor that was read from `file` holds NaN or infinity.

    One such weight makes every output NaN, of which sampling and argmax still choose tokens. The extremes show it in
    one pass without a copy, at 0.4 s per GB in float32 and 0.5 s in bfloat16 on one core; `isfinite` takes 8 to 11 s.
    """
    if tensor.numel() and not all(bool(bound.isfinite()) for bound in tensor.detach().aminmax()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise EaseError(f"{name} in {file} holds values that are NaN or infinite in {dtype}: {fix}")


# ---------------------------------------------------------------------------------------------------------
# Fingerprints


def digest(*parts: object) -> str:
    """SHA-256 over the parts: tensors by their bytes, everything else by its `stable_repr`."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            sha.update(stable_repr(part).encode())
    return sha.hexdigest()


def stable_repr(value: object) -> str:
    """The `repr` of a value without memory addresses, which differ between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def fingerprint(model: ExitModel) -> str:
    """SHA-256 over a model's tensors in the order of their names: name, shape, and values as 32-bit floats."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().float().contiguous().flatten().numpy())
    return sha.hexdigest()


def check_fingerprint(model: ExitModel, calibration: Mapping[str, Any], file: Path) -> None:
    """Raises EaseError if a calibration belongs to other weights than the model's.

    Thresholds chosen on one set of weights promise nothing on another.

    Args:
        model: the model.
        calibration: its record, with the "fingerprint" of the weights it was chosen on.
        file: where the record was read, for the message.
    """
    actual = fingerprint(model)
    calibrated = calibration.get("fingerprint")
    if actual != calibrated:
        raise EaseError(
            f"the thresholds in {file} were calibrated on other weights (fingerprint {str(calibrated)[:12]}, and the "
            f"model has {actual[:12]}): load the weights as they were stored, or remove the file and calibrate again"
        )
