"""A phase under way, on disk: all that decides how it goes on, so that a run killed at any moment ends the same.

- One file a phase: tensors as safetensors, the rest as JSON in their header. It is replaced whole or not at all.
- No strategy is in it. Begun again, a strategy hands out its phases again; one that is finished is loaded and not
  trained, and the next one then finds the model, the batches and the random numbers as it found them before.
- Within an epoch the place among its batches is kept. What was trained on is passed over.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.interface import ExitModel

EVERY = 60.0  # seconds from one saving to the next: what a kill costs at most; 0 saves after every step

SHARE = 0.02  # and no more of the time than that goes into saving, however large the model


class Checkpoint:
    """The file of one phase, and the parts of it that change.

    Iterated, it is the rest of the epoch: the batches of `train` from the place that was loaded, all of them otherwise.

    Args:
        path: the file; without one nothing is kept.
        train, val: batches. Where epochs differ, they have `state_dict` and `load_state_dict`, or draw from torch's own
            generator.
        identity: of the phase; the file of another one is refused.
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
        """An epoch begins."""
        self.place, self.passed = 0, 0  # batches of it that were handed out, and those that are passed over
        self.began = self._standing() if self.path else {}

    def __len__(self) -> int:
        return len(self.batches[0])

    def __iter__(self) -> Iterator[Any]:
        for item in self.batches[0]:
            self.place += 1
            if self.place > self.passed:
                yield item
            elif self.place == self.passed:
                set_random_state(self.now)

    def due(self) -> bool:
        """Whether it is time to save."""
        wait = EVERY and max(EVERY, self.took / SHARE)
        return self.path is not None and time.perf_counter() - self.saved >= wait

    def save(self, **loop: Any) -> None:
        """Writes the parts as they are, and where the loop over them stands."""
        begun = time.perf_counter()
        state = self.optimizer.state_dict()["state"]
        self._write(
            **loop,
            optimizer={str(i): values for i, values in state.items()},
            lrs=[group["lr"] for group in self.optimizer.param_groups],
            began=self.began,
            place=self.place,
        )
        self.saved = time.perf_counter()
        self.took = self.saved - begun

    def finish(self, **loop: Any) -> None:
        """Writes how the phase ended, in place of all before."""
        if self.path:
            self._write(**loop, began=self._standing(), place=0)

    def load(self) -> dict[str, Any] | None:
        """Puts the parts back and returns where the loop stood; None where nothing was saved.

        Raises:
            EaseError: the file is damaged or another phase's.
        """
        if self.path is None or not self.path.exists():
            return None
        state = read_state(self.path)
        if state["identity"] != self.identity:
            raise EaseError(
                f"{self.path} was saved in a training with another configuration, model or text: "
                "give another folder for checkpoints, or remove this one"
            )
        self.model.load_state_dict(state["weights"], strict=False)  # what is frozen is as it was
        self.model.trained_exits = set(state["trained_exits"])
        if "optimizer" in state:
            now = self.optimizer.state_dict()
            now["state"] = {int(i): values for i, values in state["optimizer"].items()}
            self.optimizer.load_state_dict(now)
            for group, lr in zip(self.optimizer.param_groups, state["lrs"], strict=True):
                group["lr"] = lr
        self.began, self.passed, self.now = state["began"], state["place"], state["random"]
        for batches, where in zip(self.batches, self.began["batches"], strict=True):
            if where is not None:
                batches.load_state_dict(where)
        return state

    def replay(self) -> None:
        """Random numbers are again what they were when the epoch that was loaded began, or when the phase ended."""
        set_random_state(self.began["random"])

    def _standing(self) -> dict[str, Any]:
        states = [b.state_dict() if hasattr(b, "state_dict") else None for b in self.batches]
        return {"batches": states, "random": random_state(self.device)}

    def _write(self, **state: Any) -> None:
        assert self.path is not None
        weights = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        exits, random = sorted(self.model.trained_exits), random_state(self.device)
        write_state(
            self.path,
            {"identity": self.identity, "weights": weights, "trained_exits": exits, "random": random, **state},
        )


class Interrupts:
    """Whether an interrupt (Ctrl-C, or SIGTERM where it is handled as one) waits for a safe moment."""

    def __init__(self) -> None:
        self.pending = self._allowed = False

    def handle(self, *_: object) -> None:
        """The signal handler: raises where interrupts are allowed, and at the second signal anywhere."""
        if self._allowed or self.pending:
            raise KeyboardInterrupt
        self.pending = True

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

    Only the main thread can handle signals. In another one, or if not `enabled`, interrupts are raised at once.
    """
    interrupts = Interrupts()
    handled = []
    if enabled and threading.current_thread() is threading.main_thread():
        signals = (signal.SIGINT, signal.SIGTERM)
        handled = [sig for sig in signals if signal.getsignal(sig) is signal.default_int_handler]
    try:
        for sig in handled:
            signal.signal(sig, interrupts.handle)
        yield interrupts
        interrupts.raise_pending()
    finally:
        for sig in handled:
            signal.signal(sig, signal.default_int_handler)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators, the CPU's and the device's."""
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


# ---------------------------------------------------------------------------------------------------------
# A file

TENSOR = "tensor!"  # the one key of what stands for a tensor in JSON


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes dictionaries with strings as keys, lists, tensors, numbers and strings, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    partial = path.with_suffix(".partial")
    try:
        text = json.dumps(_apart(state, tensors))
    except TypeError as error:
        raise EaseError(
            f"training cannot be kept in {path} ({error}): "
            "let the state_dict of your batches hold tensors, numbers and strings, under strings"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"state": text})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or a machine that goes down keeps the name and not the content
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise EaseError(f"{path} could not be written ({error}): make room, or choose another folder") from error


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            # Copies: a mapped file could not be replaced everywhere.
            return dict(_together(state, {name: file.get_tensor(name).clone() for name in file.keys()}))  # noqa: SIM118
    except Exception as error:  # whatever a damaged file makes the library raise, the cure is the same
        raise EaseError(f"{path} is damaged ({error}): remove it, and training goes on from before it") from error


def _apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _apart(part, tensors) for key, part in value.items()}
    return [_apart(part, tensors) for part in value] if isinstance(value, list | tuple) else value


def _together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _together(part, tensors) for key, part in value.items()}
    return [_together(part, tensors) for part in value] if isinstance(value, list) else value
