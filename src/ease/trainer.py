"""The training loop.

- A `Trainer` computes the loss of a `TrainingConfig`, creates the optimizer, and runs epochs. `fit` is the only loop.
- `train` runs the phases that a strategy yields. Neither depends on any particular strategy.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.devices import as_device
from ease.errors import EaseError, check_integer, check_number, checked
from ease.evaluation.scoring import Scores, score
from ease.interface import IGNORE, Batch, Batches, ExitModel, Layout, re_iterable, train_mode
from ease.policy import Policy
from ease.progress import PrintProgress, Progress
from ease.training.checkpoint import (
    Checkpoint,
    Interrupts,
    deferred_interrupts,
    random_state,
    set_random_state,
)
from ease.training.config import PhaseOptions, TrainingConfig

# Names that the original has here.
from ease.training.config import StageConfig as StageConfig
from ease.training.config import create_deep_supervision_config as create_deep_supervision_config
from ease.training.config import create_standard_config as create_standard_config
from ease.training.distributed import (
    any_of,
    in_all,
    part_of,
    processes,
    share_random_state,
    share_weights,
    total,
)
from ease.training.engine import LOWER_LR, Engine, MicroBatch, TakenStep
from ease.training.execution import Execution
from ease.training.optimizer import MasterAdamW, parameter_groups
from ease.training.phases import Data, History, Phase, Step, Strategy, Training
from ease.training.sharding import gathered, sharded
from ease.training.state import PhaseState, phase_identity
from ease.training.step import step_flops, step_loss


class Trainer:
    """Trains and evaluates models under one `TrainingConfig`.

    Args:
        config: losses, routing, and token selection.
        vocab_size: vocabulary of the models, or the number of labels of a classifier; other models are refused.
        device: device of training, to which models are moved (by default each model stays where it is).
        execution: precision, accumulation and what else changes speed and memory.

    Example:
        >>> trainer = Trainer(ease.create_standard_config(num_layers=2), vocab_size=256)
        >>> optimizer = trainer.create_optimizer(model, base_lr=1e-3)
        >>> trainer.train_with_early_stopping(model, train, val, optimizer)
    """

    @checked
    def __init__(
        self,
        config: TrainingConfig,
        vocab_size: int,
        device: str | torch.device | None = None,
        execution: Execution = Execution(),  # noqa: B008  # never changed
    ) -> None:
        check_integer("vocab_size", vocab_size, 1)
        self.config, self.vocab_size, self.execution = config, vocab_size, execution
        self.device = None if device is None else as_device(device)
        self._warned = False
        # glibc returns large freed blocks to the system and gets them back page by page in the next step. Freeing a
        # block of just under 32 MiB raises that threshold permanently: 8% of a step's time at dim 256.
        torch.empty(2**23 - 2**14)

    def device_of(self, model: ExitModel) -> torch.device:
        """The device of training: the trainer's, or the model's if the trainer has none."""
        return self.device or next(model.parameters()).device

    @checked
    def create_optimizer(self, model: ExitModel, base_lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
        """AdamW, or Muon with it, over the trainable parameters, in float32; norms and other vectors are not decayed.

        The rate of a layer's parameters is `base_lr` times the layer's scale in the configuration. The first group is
        the decayed one with the highest rate.

        Raises:
            EaseError: the model has another vocabulary or too few layers for the configuration.
        """
        check_number("base_lr", base_lr, 0)
        check_number("weight_decay", weight_decay, 0)
        self.config.check(model.num_layers, first_exit=model.first_exit)
        if model.config.outputs != self.vocab_size:
            raise EaseError(
                f"the trainer is for {self.vocab_size} tokens and the model has {model.config.outputs}: "
                "give both the vocabulary size of the tokenizer"
            )
        scales, muon = self.config.layer_lr_scales, self.execution.optimizer == "muon"
        return MasterAdamW(parameter_groups(model, base_lr, weight_decay, scales, muon=muon), base_lr)

    @checked
    def compute_loss(
        self,
        model: ExitModel,
        x: Tensor,
        y: Tensor,
        active: Tensor | None = None,
        *,
        state: Tensor | None = None,
        layout: Layout | None = None,
        first: int = 0,
        step: Step | None = None,
        continued: dict[int, Tensor] | None = None,
        exit_losses: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The weighted loss over exits: one pass up to the deepest weighted layer, a head only where there is a weight.

        Args:
            x, y: (B, T) integers; targets of -100 are not scored.
            active: (B, T) tokens that run from layer `first` on and are scored; all by default.
            state: (B, T, D) entering layer `first`; by default the layers below compute it from x, without gradients.
            layout: positions and segments; padding is never scored.
            first: the first layer that learns.
            step: loss weights and layer dropout of this step, instead of the configuration's.
            continued, exit_losses: filled as `step_loss` describes.

        Returns:
            A scalar, in nats.

        Raises:
            EaseError: x and y differ in shape, ids lie outside the vocabulary, or the model is too shallow.
        """
        self.config.check(model.num_layers, first, model.first_exit)
        batch = Batch.of(Batch(x, y, active, state, layout=layout))
        model.check_ids(batch.x, model.config.vocab_size)
        model.check_ids(batch.y[batch.y != IGNORE], model.config.outputs)
        return step_loss(model, self.config, batch, first, step, continued, exit_losses)

    def step_flops(
        self,
        model: ExitModel,
        batch: Batch,
        scored: int,
        first: int = 0,
        step: Step | None = None,
        continued: Mapping[int, Tensor] = {},
    ) -> dict[str, float]:
        """FLOPs of one training step under this configuration, as `ease.training.step.step_flops` counts them."""
        return step_flops(model, self.config, batch, scored, first, step, continued)

    @checked
    def train_epoch(self, model: ExitModel, train_batches: Batches, optimizer: torch.optim.Optimizer) -> float:
        """One pass over the batches; returns the mean loss over the scored tokens of all steps taken, in nats."""
        total, tokens = 0.0, 0
        for step in self._steps(self._engine(model, optimizer), train_batches):
            if step.finite:
                total, tokens = total + step.loss * step.scored, tokens + step.scored
        return total / tokens if tokens else math.nan

    @checked
    def scores(
        self, model: ExitModel, batches: Batches, last: int | None = None, policy: Policy | None = None
    ) -> Scores:
        """Per-token scores of a routed run, by default under the configuration's policy, up to layer `last`."""
        policy = policy or self.config.policy
        untrained = set(policy.exits) - set(self.config.weights) - model.trained_exits
        if untrained and not self._warned:
            self._warned = True
            warnings.warn(
                f"routing at exit {sorted(untrained)}, which no loss has trained: give its layer a loss weight",
                stacklevel=3,
            )
        device = self.device_of(model)
        if next(model.parameters()).device != device:  # a move divides sharded layers again
            model.to(device)
        return score(model, re_iterable(batches), policy, last=last, device=device)

    @checked
    def evaluate(self, model: ExitModel, val_batches: Batches) -> dict[str, Any]:
        """Metrics of a routed run under the configuration's policy, as `Scores.metrics` gives them."""
        return self.scores(model, val_batches).metrics()

    @checked
    def train_with_early_stopping(
        self,
        model: ExitModel,
        train_batches: Batches,
        val_batches: Batches,
        optimizer: torch.optim.Optimizer,
        max_epochs: int = 100,
        patience: int = 1,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Trains until the validation loss has not improved for `patience` epochs, then restores the best weights.

        Returns:
            train_losses, val_losses, val_accs (one per epoch), best_epoch (from 1), total_epochs, stopped_early.
        """
        history = self.fit(
            model,
            Phase(
                "training",
                self.config,
                train_batches,
                val_batches,
                PhaseOptions(max_epochs=max_epochs, patience=patience),
            ),
            optimizer,
            PrintProgress() if verbose else Progress(),
        )
        return {
            "train_losses": history.column("train_loss"),
            "val_losses": history.column("val_loss"),
            "val_accs": history.column("val_acc"),
            "best_epoch": history.best_epoch,
            "total_epochs": len(history.rows),
            "stopped_early": history.stopped_early,
        }

    @checked
    def run(
        self, model: ExitModel, phase: Phase, progress: Progress | None = None, checkpoint: Path | None = None
    ) -> History:
        """Executes a phase: freezes the trunk, trains, restores the best weights, and unfreezes the trunk.

        In a process group, all processes train the model together: each takes its rows of the same batches.

        Args:
            checkpoint: file for the checkpoints of the phase; if it exists, the phase resumes from it.
        """
        self.freeze(model, phase)
        share_weights(model)
        try:
            with sharded(model.to(self.device_of(model)), self.execution.parallel == "fsdp"):
                optimizer = self.create_optimizer(model, phase.options.lr, phase.options.weight_decay)
                return self.fit(model, phase, optimizer, progress or Progress(), checkpoint)
        finally:
            model.freeze_below(0)

    def freeze(self, model: ExitModel, phase: Phase) -> None:
        """Freezes what a phase does not train."""
        classifiers = phase.config.selection.classifiers
        model.freeze_below(phase.first, head=phase.freeze_head, exits=phase.exits, classifiers=classifiers)

    @checked
    def fit(
        self,
        model: ExitModel,
        phase: Phase,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        checkpoint: Path | None = None,
    ) -> History:
        """The training loop.

        When it resumes from a checkpoint, the rows of past epochs are reported to `progress` again. An interrupt
        (Ctrl-C) with a checkpoint takes effect after the current step, whose state is saved first.

        Args:
            model: trained in place; afterwards it has the weights of the best epoch, unless the phase keeps the last.
            phase: losses, batches, and limits.
            optimizer: from `create_optimizer`.
            progress: callback.
            checkpoint: file for the checkpoints of the phase; if it exists, the phase resumes from it.

        Returns:
            The record of the phase.

        Raises:
            EaseError: there is no batch, preparing the phase exceeded its FLOPs, the checkpoint belongs to another
                phase, or the loss or gradient of several steps in a row, or the validation loss, is not finite (the
                best weights are restored first).
        """
        train, val = re_iterable(phase.train), re_iterable(phase.val)
        item = next(iter(val), None)
        if item is None or not len(train):
            raise EaseError("there is no batch to train or to validate on: use more text, or smaller batches")
        x = Batch.of(item).x
        state = PhaseState(phase, self._engine(model, optimizer), len(train), len(val) * x.numel(), x.shape[1])
        identity = phase_identity(model, phase, x, self.execution) if checkpoint else ""
        saved = Checkpoint(checkpoint, model, optimizer, train, val, self.device_of(model), identity)
        resumed = state.restore(saved.load())
        finished = state.epoch > phase.options.max_epochs
        failed = True
        with deferred_interrupts(checkpoint is not None) as interrupts:
            try:
                for row in state.history.rows:
                    progress.epoch(row)
                if resumed:
                    progress.step(1.0 if finished else state.fraction_done())
                    if not finished:
                        progress.resumed(state.epoch, state.history.steps)
                    train_mode(model)
                    saved.replay()
                with state.engine.profiled(phase.name):
                    while state.epoch <= phase.options.max_epochs and not state.over:
                        self._train_epoch(state, saved, progress, interrupts)
                        self._validate(state, saved, val, progress, interrupts)
                failed = False
            finally:
                # After an error or an interrupt, too, the model has its best weights.
                if failed or phase.restore_best:
                    model.load_state_dict(state.best, strict=False)  # frozen weights have not changed
            if not finished:
                saved.finish(**state.as_dict(phase.options.max_epochs + 1), best={})
        return state.history

    def _train_epoch(self, state: PhaseState, saved: Checkpoint, progress: Progress, interrupts: Interrupts) -> None:
        """The rest of an epoch's steps, up to the budget."""
        if saved.skip and state.fraction_done() >= 1:  # interrupted in the validation that ends the phase
            saved.pass_over()
            return
        steps = self._steps(state.engine, saved, state.phase.first, state.step, learned=state.tokens)
        place = saved.skip
        try:
            for step in steps:
                place = saved.place
                metrics = state.took_step(step)
                progress.step(state.fraction_done(), metrics)
                if state.fraction_done() >= 1:
                    break
                self._save_if_due(state, saved, interrupts)
        except EaseError:
            if saved.stopped:  # training resumes here, after the last step, when the data has been corrected
                saved.place = place
                state.save(saved, state.epoch)
            raise

    def _validate(
        self, state: PhaseState, saved: Checkpoint, val: Batches, progress: Progress, interrupts: Interrupts
    ) -> None:
        """Scores the model after an epoch, keeps the best weights, and decides whether the phase is over."""
        phase, model = state.phase, state.model
        before = random_state(self.device_of(model))  # batches may draw from torch's generator
        try:
            # Scoring changes nothing else, so that an interrupt needs no wait, except for other processes.
            with interrupts.allowed() if processes() == 1 else gathered(model):
                policy, route_flops = phase.route(model) if phase.route else (None, 0.0)
                # Up to the deepest loss: where only exits learn, the layers above them give the same every time.
                scores = self.scores(model, val, last=max(phase.config.weights), policy=policy)
        except KeyboardInterrupt:
            set_random_state(before)
            state.save(saved, state.epoch)
            raise
        metrics = scores.metrics()
        progress.epoch(state.add_row(metrics, scores.flops + route_flops))
        if not math.isfinite(metrics["loss"]):
            raise EaseError(f"the validation loss is {metrics['loss']}: {LOWER_LR}")
        state.end_epoch(metrics["loss"])
        if state.history.stopped_early:
            progress.step(1.0)  # done, whatever number of epochs was allowed
        if state.over:
            return
        saved.turn()
        self._save_if_due(state, saved, interrupts)

    def _save_if_due(self, state: PhaseState, saved: Checkpoint, interrupts: Interrupts) -> None:
        """Saves in all processes if any of them is due to or is interrupted, and then ends all."""
        if any_of(saved.due() or interrupts.pending):
            state.save(saved, state.epoch)
            interrupts.pending = any_of(interrupts.pending)
            interrupts.raise_pending()

    def _engine(self, model: ExitModel, optimizer: torch.optim.Optimizer) -> Engine:
        device = self.device_of(model)
        return Engine(model.to(device), optimizer, self.execution, device)

    def _steps(
        self,
        engine: Engine,
        batches: Batches,
        first: int = 0,
        next_step: Callable[[], Step | None] = lambda: None,
        learned: int = 0,
    ) -> Iterator[TakenStep]:
        """Takes the optimizer steps of an epoch."""
        model = engine.model
        train_mode(model)
        gated = self.config.selection.classifiers
        model.mark_stale_classifiers((), gated)
        share_random_state()  # batches may draw from it
        for group in self.execution.micro_batches(re_iterable(batches)):
            counted = [MicroBatch(part_of(whole), in_all(whole, int(whole.scored.sum())), {}) for whole in group]
            parts = [part for part in counted if part.scored]
            if not parts:
                continue
            step = next_step()
            taken = engine.step(parts, partial(self.compute_loss, model, first=first, step=step))
            learned += taken.scored
            if taken.finite and model.config.classifier_exits:
                model.mark_stale_classifiers(engine.learning(), gated)
            flops = Counter[str]()
            for batch, _, continued in parts:
                flops.update(self.step_flops(model, batch, int(batch.scored.sum()), first, step, continued))
            yield taken._replace(batches=len(group), flops=dict(zip(flops, total(*flops.values()), strict=True)))
        if not learned:
            raise EaseError("the epoch has no token to learn from: use more text, or targets that are not all -100")


@checked
def train(
    model: ExitModel,
    strategy: Strategy,
    data: Data,
    *,
    device: str | torch.device | None = None,
    execution: Execution = Execution(),  # noqa: B008  # never changed
    progress: Callable[[Phase], Progress] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
) -> Training:
    """Runs the phases of a strategy; gives each phase with its history when it is done.

    Training happens while the result is iterated over; `list(ease.train(...))` runs all phases.

    Args:
        model: trained in place.
        strategy: yields the phases.
        data: training and validation batches.
        device: device of training (the model's by default).
        execution: precision, accumulation and what else changes speed and memory.
        progress: creates the progress callback of a phase.
        checkpoints: folder for checkpoints, one training per folder. After a kill the same call, with a new strategy
            and new batches, resumes and ends with the same bits (on a CPU); finished phases are yielded again. By
            default nothing is saved.

    Returns:
        An iterable of (phase, history).

    Warns:
        RuntimeWarning: the result was never iterated over, so that nothing was trained.

    Raises:
        EaseError: the folder holds checkpoints of another training, or cannot be written; the strategy was used before
            and has no phase left; or for what `Trainer.fit` and the strategy refuse.

    Example:
        >>> for phase, history in ease.train(model, ease.ASHEMConfig().strategy(), ease.Data(train, val)):
        ...     print(phase.name, history.rows[-1]["val_ppl"])
    """
    if not hasattr(strategy, "next_phase"):
        raise EaseError(
            f"strategy must have next_phase, got {type(strategy).__name__}: of a configuration, pass its strategy()"
        )
    return Training(_phases(model, strategy, data, device, execution, progress, checkpoints))


def _phases(
    model: ExitModel,
    strategy: Strategy,
    data: Data,
    device: str | torch.device | None,
    execution: Execution,
    progress: Callable[[Phase], Progress] | None,
    checkpoints: str | os.PathLike[str] | None,
) -> Generator[tuple[Phase, History]]:
    start, number = time.perf_counter(), 0
    while (phase := strategy.next_phase(model, data)) is not None:
        preparing = time.perf_counter() - start  # mining is part of a phase's wall-clock time, as of its FLOPs
        trainer = (phase.trainer or Trainer)(phase.config, model.output_head.weight.shape[0], device, execution)
        number += 1
        checkpoint = None if checkpoints is None else Path(checkpoints) / f"phase-{number}.safetensors"
        history = trainer.run(model, phase, progress(phase) if progress else None, checkpoint)
        history.seconds += preparing
        for row in history.rows:
            row["seconds"] += preparing
        if hasattr(phase.train, "release"):
            phase.train.release()
        yield phase, history
        start = time.perf_counter()
    if not number:
        raise EaseError("the strategy has no phase left: create a new one for every training (config.strategy())")
