"""Optimizer steps: gradients accumulated over micro-batches, their clipping, and steps that are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.interface import Batch, ExitModel
from ease.training.distributed import sum_gradients, total
from ease.training.execution import Execution
from ease.training.optimizer import MasterAdamW, clip_gradients, parameters_of

GRAD_CLIP = 1.0  # largest norm of a step's gradient

# Steps in a row that are skipped before training stops. A spike or the first steps of fp16, whose scale is still too
# large, skip a few; weights from which every gradient is NaN skip all. Single steps may be skipped without limit.
MAX_SKIPPED = 10

WEIGHTED = 0  # the weighted loss, among those of layers

LOWER_LR = "training stopped, and a model in memory has its last good weights again; lower the learning rate"


class MicroBatch(NamedTuple):
    """A batch of an optimizer step."""

    batch: Batch
    scored: int
    """Number of its scored tokens, of all processes."""
    continued: dict[int, Tensor]
    """Exit -> the tokens (B, T) that continued past it, as `Trainer.compute_loss` fills it."""


class TakenStep(NamedTuple):
    """An optimizer step. It was skipped if its loss or gradient is not finite."""

    loss: float
    """Mean over the scored tokens of the step, in nats."""
    scored: int
    """Scored tokens."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    exit_losses: Mapping[int, float]
    """Layer -> mean loss in nats."""
    batches: int = 0
    """Batches that were used up."""
    flops: Mapping[str, float] = {}
    """FLOPs by kind."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """Takes optimizer steps on a model.

    Args:
        model: on the device of training.
        optimizer: from `Trainer.create_optimizer`.
        execution: how steps are executed.
        device: the device of training.

    Raises:
        EaseError: the precision is fp16 and what learns is not float32.
    """

    def __init__(
        self, model: ExitModel, optimizer: torch.optim.Optimizer, execution: Execution, device: torch.device
    ) -> None:
        self.model, self.optimizer, self.execution, self.device = model, optimizer, execution, device
        if execution.precision == "fp16" and any(p.dtype.itemsize < 4 for p in parameters_of(optimizer)):
            raise EaseError("precision fp16 is for float32 weights: load the model in float32, or choose bf16")
        self.scaler = execution.scaler(device)
        self.skipped = 0  # steps in a row
        self.profiler: torch.profiler.profile | None = None

    @contextmanager
    def profiled(self, name: str) -> Iterator[None]:
        """A context in which the profile of the phase `name` is taken, if the execution asks for one."""
        with self.execution.profiler(name) as self.profiler:
            yield

    @contextmanager
    def _sparse_gradients(self) -> Iterator[None]:
        """A context in which the gradients of tables are sparse, if the optimizer takes them."""
        self.model.set_sparse_gradients(isinstance(self.optimizer, MasterAdamW))
        try:
            yield
        finally:
            self.model.set_sparse_gradients(False)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.scaler.load_state_dict(state["scaler"])

    def step(self, parts: Sequence[MicroBatch], compute_loss: Callable[..., Tensor]) -> TakenStep:
        """One optimizer step over micro-batches, skipped if its loss or gradient is not finite.

        Args:
            parts: one or more.
            compute_loss: `Trainer.compute_loss` of the model.

        Raises:
            EaseError: `MAX_SKIPPED` steps in a row were skipped.
        """
        self.optimizer.zero_grad(set_to_none=True)
        tokens, sums = sum(part.scored for part in parts), dict[int, Tensor]()
        for batch, scored, continued in parts:
            losses = dict[int, Tensor]()
            given = {"state": batch.state, "layout": batch.layout, "continued": continued, "exit_losses": losses}
            with self.execution.applied(self.model), self._sparse_gradients():
                with self.execution.autocast(self.device):
                    loss = compute_loss(*batch[:3], **given)
                self.scaler.scale(loss * (scored / tokens)).backward()
            for layer, value in {WEIGHTED: loss.detach(), **losses}.items():
                sums[layer] = sums.get(layer, 0) + value * (scored / tokens)
        sum_gradients(parameters_of(self.optimizer))
        self.scaler.unscale_(self.optimizer)
        # Only the optimizer's parameters: frozen ones may still hold a gradient of the previous phase.
        norm = clip_gradients(self.learning(), GRAD_CLIP)
        # The only wait for the device in a step.
        length, *means = torch.stack([part.to(loss) for part in (norm, *sums.values())]).tolist()
        exits = dict(zip(sums, total(*means), strict=True))
        taken = TakenStep(exits.pop(WEIGHTED), tokens, length, exits)
        if taken.finite:
            self.optimizer.step()
        self.skipped = 0 if taken.finite else self.skipped + 1
        if self.scaler.is_enabled():
            self.scaler.update()
        if self.profiler:
            self.profiler.step()
        if self.skipped == MAX_SKIPPED:
            name, number = ("loss", taken.loss) if math.isnan(taken.loss) else ("gradient's norm", length)
            raise EaseError(f"in {MAX_SKIPPED} steps in a row the {name} is {number}: {LOWER_LR}")
        return taken

    def learning(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [p for p in parameters_of(self.optimizer) if p.grad is not None]
