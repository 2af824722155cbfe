"""The state of a phase in training: what changes from step to step, and is saved in its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ease.flops import full_depth_flops
from ease.interface import ExitModel
from ease.progress import StepMetrics
from ease.storage import digest
from ease.training.checkpoint import Checkpoint
from ease.training.config import check_budget
from ease.training.engine import Engine, TakenStep
from ease.training.execution import Execution
from ease.training.phases import History, Phase, Step

CHECKPOINT_FORMAT = 2  # raised when older checkpoints can no longer be read


class PhaseState:
    """The state of the loop over one phase.

    Args:
        engine: takes its steps.
        num_batches: batches of a training epoch.
        val_tokens, seq_len: tokens of validation and of a sequence, for the first estimate of its FLOPs.
    """

    def __init__(
        self,
        phase: Phase,
        engine: Engine,
        num_batches: int,
        val_tokens: int,
        seq_len: int,
    ) -> None:
        self.phase, self.engine, self.model, self.optimizer = phase, engine, engine.model, engine.optimizer
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.total_batches = phase.options.max_epochs * max(1, num_batches)
        self.history = History(flops=dict(phase.spent))
        self.best_loss, self.best = math.inf, snapshot(self.model)
        self.start = time.perf_counter()
        self.epoch, self.total, self.tokens = 1, 0.0, 0  # the epoch, and its summed loss over so many tokens so far
        self.batches = 0  # used up in all epochs
        self.over = False
        # FLOPs of the next validation pass: those of the last one, and before the first an estimate.
        limited = phase.options.max_flops is not None
        self.validation = val_tokens * full_depth_flops(self.model.config, seq_len) if limited else 0.0
        if spent := sum(phase.spent.values()):
            work = f"{' and '.join(phase.spent)} and one validation of {phase.name}"
            check_budget(work, spent + self.validation, phase.options.max_flops)

    def restore(self, saved: Mapping[str, Any] | None) -> bool:
        """Continues from what `as_dict` gave; without it, sets the first learning rate and returns False."""
        if saved is None:
            self._set_lr()
            return False
        self.history = History(**saved["history"])
        self.best_loss, self.best, self.validation = saved["best_loss"], saved["best"], saved["validation"]
        self.epoch, self.total, self.tokens = saved["epoch"], saved["total"], saved["tokens"]
        self.batches = saved["batches"]
        self.engine.load_state_dict(saved["engine"])
        self.start -= self.history.seconds
        return True

    def as_dict(self, epoch: int) -> dict[str, Any]:
        """All but the best weights."""
        return {
            "history": asdict(self.history),
            "best_loss": self.best_loss,
            "validation": self.validation,
            "epoch": epoch,
            "total": self.total,
            "tokens": self.tokens,
            "batches": self.batches,
            "engine": self.engine.state_dict(),
        }

    def save(self, saved: Checkpoint, epoch: int) -> None:
        if saved.path is None:
            return
        self.history.seconds = time.perf_counter() - self.start
        saved.save(**self.as_dict(epoch), best=self.best)

    def fraction_done(self) -> float:
        """The share of the phase that is done, in [0, 1], by batches or by FLOPs, whichever is larger."""
        limit = self.phase.options.max_flops
        # The validation pass that ends the epoch is part of the budget.
        spent = sum(self.history.flops.values()) + self.validation
        return min(1.0, max(self.batches / self.total_batches, spent / limit if limit else 0.0))

    def step(self) -> Step | None:
        """Loss weights and layer dropout of the next step, if the phase has a curriculum."""
        return self.phase.curriculum and self.phase.curriculum(self.history.steps, self.fraction_done())

    def took_step(self, step: TakenStep) -> StepMetrics:
        history, lr = self.history, self.optimizer.param_groups[0]["lr"]
        self.batches += step.batches
        for kind, count in step.flops.items():
            history.flops[kind] = history.flops.get(kind, 0.0) + count
        if step.finite:
            self.total, self.tokens = self.total + step.loss * step.scored, self.tokens + step.scored
            history.steps += 1
        else:
            history.skipped += 1
        self._set_lr()
        flops = sum(history.flops.values())
        told = (step.loss, step.exit_losses, lr, step.grad_norm, step.scored, flops, history.skipped)
        return StepMetrics(self.epoch, history.steps, *told)

    def add_row(self, metrics: Mapping[str, Any], flops: float) -> dict[str, Any]:
        """The row of the epoch that ended, with the metrics and FLOPs of its validation pass."""
        history, self.validation = self.history, flops
        history.flops["validation"] = history.flops.get("validation", 0.0) + flops
        history.seconds = time.perf_counter() - self.start
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "step": history.steps,
            "skipped": history.skipped,
            "train_loss": self.total / self.tokens if self.tokens else math.nan,
            "val_loss": metrics["loss"],
            "val_ppl": metrics["ppl"],
            "val_acc": metrics["acc"],
            "flops": sum(history.flops.values()),
            "seconds": history.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"val_{name}": value for name, value in metrics.items() if name.startswith("agreement")},
        }
        if len(shares := metrics.get("exit_shares", ())) > 1:
            row["exit_shares"] = {str(exit): share for exit, share in shares.items()}  # as in the checkpoint's JSON
        history.rows.append(row)
        return row

    def end_epoch(self, val_loss: float) -> None:
        """Keeps the weights if they are the best so far, stops if patience has run out, or begins the next epoch."""
        history, patience = self.history, self.phase.options.patience
        if val_loss < self.best_loss:
            self.best_loss, history.best_epoch = val_loss, self.epoch
            self.best = snapshot(self.model)
        elif patience is not None and self.epoch - history.best_epoch >= patience:
            history.stopped_early = True
        self.over = history.stopped_early or self.fraction_done() >= 1
        if not self.over:
            self.epoch, self.total, self.tokens = self.epoch + 1, 0.0, 0

    def _set_lr(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * self.phase.options.lr_factor(self.fraction_done())


def snapshot(model: ExitModel) -> dict[str, Tensor]:
    """A copy of the weights that learn."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def phase_identity(model: ExitModel, phase: Phase, x: Tensor, execution: Execution) -> str:
    """A hash of what distinguishes a phase: its plan and execution, the model's shape, the frozen weights, and a
    validation batch."""
    # A mined threshold is computed again on resuming, and on another machine not to the last bit.
    config = replace(phase.config, routing_threshold=0.0)
    plan = (phase.name, config, phase.options, phase.first, phase.exits, phase.freeze_head, phase.restore_best)
    execution_plan = (CHECKPOINT_FORMAT, *execution.identity().values())
    frozen = [part for part in (*model.parameters(), *model.buffers()) if not part.requires_grad]
    return digest(plan, execution_plan, model.config, len(phase.train), len(phase.val), x, *frozen)
