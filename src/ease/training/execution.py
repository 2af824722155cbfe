"""How training is executed: the settings that change its speed and memory, whatever the strategy is.

Everything here is PyTorch's own: autocast and its gradient scaler, activation checkpointing, `torch.compile`, and the
profiler.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ease.errors import EaseError, check_counts, check_fields, first_line
from ease.interface import Batch, ExitModel, call_layer
from ease.training.distributed import in_all

Call = Callable[[nn.Module, Tensor, Any], Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

TRACED = {"wait": 2, "warmup": 1, "active": 3}  # steps of a phase before the profile, of its warmup, and in its trace


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How training is executed; no strategy depends on it.

    Raises:
        EaseError: a setting has the wrong type, or a number of tokens is below 1.

    Example:
        >>> ease.train(model, strategy, data, execution=ease.Execution(precision="bf16", batch_tokens=65_536))
    """

    batch_tokens: int | None = None
    """Tokens of an optimizer step, padding included: gradients are accumulated over as many batches as hold that many,
    and the loss is the mean over all their scored tokens. By default every batch is a step."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of training steps. bf16 and fp16 are autocast: weights, optimizer, mining and validation stay in the
    dtype of the model. The loss of fp16 is scaled."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of layers take the updates of torch.optim.Muon, and everything else those of AdamW."""
    activation_checkpointing: bool = False
    """Keep only the states between layers and compute the rest of a layer again in the backward pass: less memory, the
    same results."""
    compile: bool = False
    """Compile the layers with torch.compile; layers of one shape share a compilation."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each of several processes holds of the layers that learn: all (data parallelism), or a part of their
    weights, gradients, and optimizer state (`ease.training.sharding`)."""
    profile: str | None = None
    """Folder for a trace of three steps of every phase, which Perfetto and chrome://tracing open."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(1, batch_tokens=self.batch_tokens)
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise EaseError("optimizer muon needs whole matrices: choose parallel ddp, or optimizer adamw")

    def identity(self) -> dict[str, Any]:
        """What a training must have in common with the checkpoint that it resumes from."""
        return {name: getattr(self, name) for name in ("batch_tokens", "precision", "optimizer")}

    def micro_batches(self, batches: Iterable[Any]) -> Iterator[list[Batch]]:
        """The batches of one optimizer step after the other; the last step of an epoch may have fewer tokens."""
        group: list[Batch] = []
        for item in batches:
            group.append(Batch.of(item))
            if self.batch_tokens is None or sum(in_all(b, b.x.numel()) for b in group) >= self.batch_tokens:
                yield group
                group = []
        if group:
            yield group

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which matrix products run in the chosen precision."""
        dtype = DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """The scaler of the loss, without effect unless the precision is fp16."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    @contextmanager
    def applied(self, model: ExitModel) -> Iterator[None]:
        """A context in which the layers of a model in training run compiled and checkpointed, if so chosen."""
        before, model.call_layer = model.call_layer, layer_call(self.activation_checkpointing, self.compile)
        try:
            yield
        finally:
            model.call_layer = before

    def profiler(self, name: str) -> AbstractContextManager[Any]:
        """A context that writes the trace of the phase `name`; its value has `step`, or is None without a profile."""
        if self.profile is None:
            return nullcontext()
        path = Path(self.profile) / f"{re.sub(r'[^0-9A-Za-z]+', '-', name).strip('-')}.json"

        def save(profiler: torch.profiler.profile) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:
                raise EaseError(
                    f"the trace {path} could not be written ({first_line(error)}): choose another folder"
                ) from error

        return torch.profiler.profile(schedule=torch.profiler.schedule(**TRACED, repeat=1), on_trace_ready=save)


@functools.cache
def layer_call(checkpointed: bool, compiled: bool) -> Call:
    """How a layer is called: `call_layer`, or with only its input kept for the backward pass, or compiled.

    A layer is an argument of what is compiled, so that layers of one shape share a compilation.
    """
    call = keep_input if checkpointed else call_layer
    if not compiled:
        return call
    compilation = torch.compile(call)

    def call_compiled(layer: nn.Module, state: Tensor, plan: Any) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return compilation(layer, state, plan)
        except TorchDynamoException as error:
            raise EaseError(f"torch.compile failed ({first_line(error)}): leave out compile") from error

    return call_compiled


def keep_input(layer: nn.Module, state: Tensor, plan: Any) -> Tensor:
    """As `call_layer`, computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return call_layer(layer, state, plan)
    if not torch.compiler.is_compiling():
        plan = copy.copy(plan)  # as it is now, since it counts the layers
    out: Tensor = checkpoint(call_layer, layer, state, plan, use_reentrant=False)
    return out
