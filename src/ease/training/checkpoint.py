"""Checkpoint of a phase: a run that is killed at any moment and resumed ends with the same bits.

- One file per phase: tensors as safetensors, everything else as JSON in their header, with a checksum over both. It is
  replaced atomically, and the one before is kept: if the newest is damaged, the phase resumes from that one.
- It contains no strategy. On resuming, a strategy yields its phases again; a finished phase is loaded instead of
  trained, after which the next one starts with the same model, batches, and random state as before.
- Of several processes, the first one writes what all have in common. Every process writes its part of sharded tensors,
  into a folder of its own for every checkpoint, before the file that names it. A run may resume with another number of
  processes.
- Within an epoch the position among its batches is saved; batches that were trained on are skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError, first_line
from ease.files import checksum, parse_json, set_usual_mode
from ease.interface import ExitModel
from ease.interrupts import SIGNALS, handle
from ease.storage import digest
from ease.training.distributed import any_of, barrier, is_sharded, process, processes, total_count
from ease.training.optimizer import parameters_of
from ease.training.sharding import StoredTensor, loaded_like, read_parts, write_parts

EVERY = 60.0  # seconds between checkpoints, which is the most work that a kill can lose; 0 saves after every step

SHARE = 0.02  # maximum share of the time that saving takes; large models are saved less often


class Checkpoint:
    """The checkpoint files of one phase: the newest, and the one before it.

    Iterating over it gives the rest of the epoch: the batches of `train` from the saved position on.

    Args:
        path: the newest file; None to save nothing.
        model, optimizer: saved and restored.
        train, val: batches. If epochs differ, they have `state_dict` and `load_state_dict`, or use torch's default
            generator.
        device: where the model is.
        identity: hash of the phase; the file of another phase is refused.
    """

    def __init__(
        self,
        path: Path | None,
        model: ExitModel,
        optimizer: torch.optim.Optimizer,
        train: Any,
        val: Any,
        device: torch.device,
        identity: str,
    ) -> None:
        self.path, self.model, self.optimizer, self.identity = path, model, optimizer, identity
        self.batches, self.device = (train, val), device
        self.now: dict[str, Tensor] = {}
        self.saved, self.took = time.perf_counter(), 0.0
        self.turn()

    def turn(self) -> None:
        """Marks the beginning of an epoch."""
        self.place, self.skip = 0, 0  # batches yielded so far, and batches to skip
        self.stopped = False  # whether the next batch could not be read
        self.epoch_start = self._epoch_state() if self.path else {}

    def __len__(self) -> int:
        return len(self.batches[0])

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.batches[0]:
                self.place += 1
                if self.place > self.skip:
                    yield item
                elif self.place == self.skip:
                    set_random_state(self.now)
        except EaseError:  # of the batches, since those of a step are not raised in here
            self.stopped = self.place >= self.skip
            raise

    def pass_over(self) -> None:
        """Skips the batches of the epoch that were trained on, without reading another one."""
        for _ in self.batches[0]:
            self.place += 1
            if self.place == self.skip:
                break
        set_random_state(self.now)

    def due(self) -> bool:
        """Whether the next checkpoint is due; False in all processes but the first, for which saving takes longest."""
        wait = EVERY and max(EVERY, self.took / SHARE)
        return self.path is not None and not process() and time.perf_counter() - self.saved >= wait

    def save(self, **loop: Any) -> None:
        """Saves model, optimizer, batches, and random state, together with the state of the loop."""
        begun = time.perf_counter()
        state, names = self.optimizer.state_dict()["state"], self._learning()
        rates = [group["lr"] for group in self.optimizer.param_groups for _ in group["params"]]
        self._write(
            **loop,
            optimizer={names[i]: values for i, values in state.items()},
            lrs=dict(zip(names.values(), rates, strict=True)),
            epoch_start=self.epoch_start,
            place=self.place,
        )
        self.saved = time.perf_counter()
        self.took = self.saved - begun

    def finish(self, **loop: Any) -> None:
        """Saves the end of the phase, in place of its checkpoints."""
        if self.path:
            self._write(**loop, epoch_start=self._epoch_state(), place=0)

    def load(self) -> dict[str, Any] | None:
        """Restores what `save` or `finish` saved last and returns the state of the loop; None if there is no file.

        Warns:
            UserWarning: the newest file is damaged, and the one before was loaded.

        Raises:
            EaseError: every file is damaged, the file belongs to another phase, or not every process sees it.
        """
        state = self._read()
        if state is None:
            return None
        if state["identity"] != self.identity:
            raise EaseError(
                f"{self.path} belongs to a training with another configuration, model, or text: "
                "give another folder for checkpoints, or remove this one"
            )
        own, stored = dict(self.model.named_parameters()), dict[str, Tensor]()
        for weights in (state["weights"], state.get("best", {})):
            weights.update({name: loaded_like(value, own[name], stored) for name, value in weights.items()})
        self.model.trained_exits = set(state["trained_exits"])
        self.model.stale_classifiers = set(state["stale_classifiers"])
        if "optimizer" in state:
            now = self.optimizer.state_dict()
            names, saved = self._learning(), state["optimizer"]
            now["state"] = {
                i: {key: loaded_like(value, p, stored) for key, value in saved[names[i]].items()}
                for i, p in enumerate(parameters_of(self.optimizer))
                if names[i] in saved
            }
        if stored and self.path:
            read_parts(self.path.parent / state["parts"]["folder"], stored)
        self.model.load_state_dict(state["weights"], strict=False)  # frozen weights have not changed
        if "optimizer" in state:
            self.optimizer.load_state_dict(now)
            first = 0
            for group in self.optimizer.param_groups:
                group["lr"] = state["lrs"][names[first]]
                first += len(group["params"])
        self.epoch_start, self.skip, self.now = state["epoch_start"], state["place"], state["random"]
        for batches, where in zip(self.batches, self.epoch_start["batches"], strict=True):
            if where is not None:
                batches.load_state_dict(where)
        return state

    def replay(self) -> None:
        """Restores the random state from the beginning of the loaded epoch, or from the end of the phase."""
        set_random_state(self.epoch_start["random"])

    def _read(self) -> dict[str, Any] | None:
        """The newest state that no process finds damaged; None if there is no file."""
        if self.path is None:
            return None
        files = [file for file in (self.path, previous_path(self.path)) if file.exists()]
        if any_of(total_count(len(files)) != len(files) * processes()):
            raise EaseError(f"not every process finds {self.path}: put it on a disk that all machines share")
        damaged: EaseError | None = None
        for file in files:
            error = None
            try:
                state = read_state(file)
            except EaseError as found:
                error = found
            if any_of(error is not None):
                damaged = error or EaseError(f"{file} is damaged, as another process finds: {FIX}")
                continue
            if damaged and not process():
                reason = str(damaged).partition(f": {FIX}")[0]
                warnings.warn(f"{reason}: training resumes from the checkpoint before it", stacklevel=2)
                file.replace(self.path)  # so that the next save keeps this one and not the damaged one
            return state
        if damaged:
            raise damaged
        return None

    def _epoch_state(self) -> dict[str, Any]:
        states = [b.state_dict() if hasattr(b, "state_dict") else None for b in self.batches]
        return {"batches": states, "random": random_state(self.device)}

    def _learning(self) -> dict[int, str]:
        """The names of the parameters that the optimizer updates, by their number there."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return {i: names[p] for i, p in enumerate(parameters_of(self.optimizer))}

    def _write(self, **state: Any) -> None:
        assert self.path is not None
        weights = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        exits = {name: sorted(getattr(self.model, name)) for name in ("trained_exits", "stale_classifiers")}
        random = random_state(self.device)
        write_state(self.path, {"identity": self.identity, "weights": weights, **exits, "random": random, **state})


class Interrupts:
    """Whether an interrupt (Ctrl-C, or SIGTERM where it is handled as one) waits for a safe moment."""

    def __init__(self) -> None:
        self.pending = self._allowed = False

    def handle(self, *_: object) -> None:
        """The signal handler: raises where interrupts are allowed, and at the second signal anywhere."""
        if self._allowed or self.pending:
            raise KeyboardInterrupt
        self.pending = True
        if process():
            return
        with suppress(RuntimeError):  # the signal came while something else was printed
            print("ease: interrupted: the step ends and the state is saved", file=sys.stderr, flush=True)

    def raise_pending(self) -> None:
        """Raises `KeyboardInterrupt` if one is pending."""
        if self.pending:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside, an interrupt is raised at once."""
        self.raise_pending()
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False


@contextmanager
def deferred_interrupts(enabled: bool) -> Iterator[Interrupts]:
    """Defers interrupts inside, so that none arrives between the parts of a step; the last is raised at the end.

    Only the main thread can handle signals. In another one, if not `enabled`, or where the program handles SIGINT
    itself, interrupts are not deferred; of nested uses, only the outer one defers them.
    """
    interrupts = Interrupts()
    handled = {}
    if enabled and threading.current_thread() is threading.main_thread():
        own = (signal.default_int_handler, handle)
        handled = {sig: handler for sig in SIGNALS if (handler := signal.getsignal(sig)) in own}
    try:
        for sig in handled:
            signal.signal(sig, interrupts.handle)
        yield interrupts
        interrupts.raise_pending()
    finally:
        for sig, handler in handled.items():
            signal.signal(sig, handler)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and of the device."""
    kinds = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        kinds[str(device)] = torch.cuda.get_rng_state(device)
    elif device.type != "cpu":
        kinds[device.type] = getattr(torch, device.type).get_rng_state()
    return kinds


def set_random_state(kinds: Mapping[str, Tensor]) -> None:
    for kind, state in kinds.items():
        if kind.startswith("cuda"):
            torch.cuda.set_rng_state(state, kind)
        else:
            (torch if kind == "cpu" else getattr(torch, kind)).set_rng_state(state)


TENSOR = "tensor!"  # the only key of the dictionary that represents a tensor in JSON

PART = "part!"  # a key of the dictionary that represents a sharded tensor, with its shape and dtype

FIX = "remove it to resume from the phase before"


def previous_path(path: Path) -> Path:
    """The file of the checkpoint before the newest, which is in `path`."""
    return path.with_suffix(f".previous{path.suffix}")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dictionaries with string keys, lists, tensors, numbers, and strings atomically.

    The first process writes the file. The file that was there is kept under its `previous_path`. Sharded tensors are
    written before it into a new folder, which the file names, by every process its part; folders that neither of the
    two files names are removed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    partial = path.with_suffix(".partial")
    split = _split_tensors(state, tensors, parts)
    try:
        text = json.dumps(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        if parts:
            text = json.dumps({**split, "parts": _write_parts(path, parts)})
        if process():
            return
        save_file(tensors, partial, {"state": text, "checksum": _checksum(text, tensors)})
        set_usual_mode(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a crash of the machine may keep the name without the content
        if path.exists():
            path.replace(previous_path(path))
        partial.replace(path)
        _remove_parts(path)
    except TypeError as error:
        raise EaseError(
            f"the checkpoint {path} cannot be written ({error}): a state_dict of batches may hold tensors, "
            "numbers, and strings, under string keys"
        ) from error
    except (OSError, SafetensorError) as error:
        if not process():
            partial.unlink(missing_ok=True)
            _remove_parts(path)
        raise EaseError(f"{path} could not be written ({error}): make room, or choose another folder") from error


def _write_parts(path: Path, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes sharded tensors into a new folder beside `path`; gives its name and the SHA-256 of its files."""
    complete = [folder for folder in _part_folders(path) if folder.suffix != ".partial"]
    taken = [int(folder.name.rpartition("-")[2]) for folder in complete]
    number = total_count(0 if process() else max(taken, default=0) + 1)  # the first process decides
    folder = path.with_name(f"{path.stem}.parts-{number}")
    partial = path.with_name(f"{folder.name}.partial")
    if not process():
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    files = write_parts(partial, parts)
    if not process():
        partial.rename(folder)
    return {"folder": folder.name, "files": files}


def _part_folders(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.stem}.parts-*"))


def _remove_parts(path: Path) -> None:
    """Removes the folders of parts that neither the newest file nor the one before it names."""
    from safetensors import safe_open

    folders, named = _part_folders(path), set()
    for file in (path, previous_path(path)) if folders else ():
        if file.exists():
            with safe_open(file, "pt") as opened:
                named.add(json.loads(opened.metadata()["state"]).get("parts", {}).get("folder"))
    for folder in folders:
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote, with a `StoredTensor` for every sharded tensor; checks a share of their files.

    Raises:
        EaseError: a file is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            # Copies, since not every system can replace a file that is mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = header["state"]
        intact = header["checksum"] == _checksum(text, tensors)
    except Exception as error:  # a damaged file makes the library raise errors without a common base class
        raise EaseError(f"{path} is damaged ({first_line(error)}): {FIX}") from error
    if not intact:
        raise EaseError(f"{path} is damaged (its checksum differs): {FIX}")
    state = dict(_join_tensors(parse_json(text, path, FIX), tensors))
    if parts := state.get("parts"):
        names = sorted(parts["files"])[process() :: processes()]
        for file in (path.parent / parts["folder"] / name for name in names):
            if not file.exists() or checksum(file) != parts["files"][file.name]:
                raise EaseError(f"{path} is damaged ({file} is not as it was written): {FIX}")
    return state


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the JSON and every tensor's name, dtype, shape, and bytes."""
    parts = ((f"{name} {value.dtype} {tuple(value.shape)}", value) for name, value in sorted(tensors.items()))
    return digest(text, *itertools.chain.from_iterable(parts))


def _split_tensors(value: Any, tensors: dict[str, Tensor], parts: dict[str, Tensor], name: str = "") -> Any:
    if is_sharded(value):
        parts[name] = value.detach()
        return {PART: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Tensor):
        number = str(len(tensors))
        tensors[number] = value.detach() if process() else value.detach().cpu().contiguous()
        return {TENSOR: number}
    if isinstance(value, Mapping):
        return {key: _split_tensors(part, tensors, parts, f"{name}.{key}".strip(".")) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_split_tensors(part, tensors, parts, f"{name}.{i}") for i, part in enumerate(value)]
    return value


def _join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        if PART in value:
            return StoredTensor(value[PART], tuple(value["shape"]), getattr(torch, value["dtype"]))
        return {key: _join_tensors(part, tensors) for key, part in value.items()}
    return [_join_tensors(part, tensors) for part in value] if isinstance(value, list) else value
