"""The training loop.

- A `Trainer` computes the loss of a `TrainingConfig`, creates the optimizer, and runs epochs. `fit` is the only loop.
- `train` runs the phases that a strategy yields. Neither depends on any particular strategy.
"""

from __future__ import annotations

import math
import os
import time
import warnings
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
from ease.training.optimizer import MasterAdamW, parameters_of
from ease.training.phases import Data, History, Phase, Step, Strategy
from ease.training.state import PhaseState, TakenStep, phase_identity
from ease.training.step import step_flops, step_loss

GRAD_CLIP = 1.0  # largest norm of a step's gradient


class Trainer:
    """Trains and evaluates models under one `TrainingConfig`.

    Args:
        config: losses, routing, and token selection.
        vocab_size: vocabulary of the models, or the number of labels of a classifier; other models are refused.
        device: device of training, to which models are moved (by default each model stays where it is).

    Example:
        >>> trainer = Trainer(ease.create_standard_config(num_layers=2), vocab_size=256)
        >>> optimizer = trainer.create_optimizer(model, base_lr=1e-3)
        >>> trainer.train_with_early_stopping(model, train, val, optimizer)
    """

    @checked
    def __init__(self, config: TrainingConfig, vocab_size: int, device: str | torch.device | None = None) -> None:
        check_integer("vocab_size", vocab_size, 1)
        self.config, self.vocab_size = config, vocab_size
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
        """AdamW over the trainable parameters; norms and other vectors are not decayed. What learns is float32.

        The rate of a layer's parameters is `base_lr` times the layer's scale in the configuration. The first group is
        the decayed one with the highest rate.

        Raises:
            EaseError: the model has another vocabulary or too few layers for the configuration.
        """
        check_number("base_lr", base_lr, 0)
        check_number("weight_decay", weight_decay, 0)
        self.config.check(model.num_layers)
        if model.config.outputs != self.vocab_size:
            raise EaseError(
                f"the trainer is for {self.vocab_size} tokens and the model has {model.config.outputs}: "
                "give both the vocabulary size of the tokenizer"
            )
        scales = {p: scale for k, scale in self.config.layer_lr_scales.items() for p in model.parameters_of(k)}
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for p in model.parameters():
            if p.requires_grad:
                groups.setdefault((p.ndim >= 2, scales.get(p, 1.0)), []).append(p)
        parts = [
            {"params": params, "lr": base_lr * scale, "weight_decay": weight_decay if decayed else 0.0}
            for (decayed, scale), params in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ]
        return MasterAdamW(parts, base_lr)

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
        first: int = 1,
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
        self.config.check(model.num_layers, first)
        batch = Batch.of(Batch(x, y, active, state, layout=layout))
        model.check_ids(batch.x, model.config.vocab_size)
        model.check_ids(batch.y[batch.y != IGNORE], model.config.outputs)
        return step_loss(model, self.config, batch, first, step, continued, exit_losses)

    def step_flops(
        self,
        model: ExitModel,
        batch: Batch,
        scored: int,
        first: int = 1,
        step: Step | None = None,
        continued: Mapping[int, Tensor] = {},
    ) -> dict[str, float]:
        """FLOPs of one training step under this configuration, as `ease.training.step.step_flops` counts them."""
        return step_flops(model, self.config, batch, scored, first, step, continued)

    @checked
    def train_epoch(self, model: ExitModel, train_batches: Batches, optimizer: torch.optim.Optimizer) -> float:
        """One pass over the batches; returns the mean loss over scored tokens, in nats."""
        total, tokens = 0.0, 0
        for step in self._steps(model, train_batches, optimizer):
            total, tokens = total + step.loss * step.scored, tokens + step.scored
        return total / tokens

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
        return score(model.to(device), re_iterable(batches), policy, last=last, device=device)

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

        Args:
            checkpoint: file for the checkpoints of the phase; if it exists, the phase resumes from it.
        """
        self.freeze(model, phase)
        try:
            optimizer = self.create_optimizer(
                model.to(self.device_of(model)), phase.options.lr, phase.options.weight_decay
            )
            return self.fit(model, phase, optimizer, progress or Progress(), checkpoint)
        finally:
            model.freeze_below(1)

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
                phase, or a loss is not finite (the best weights are restored first).
        """
        train, val = re_iterable(phase.train), re_iterable(phase.val)
        item = next(iter(val), None)
        if item is None or not len(train):
            raise EaseError("there is no batch to train or to validate on: use more text, or smaller batches")
        x = Batch.of(item).x
        state = PhaseState(phase, model, optimizer, len(train), len(val) * x.numel(), x.shape[1])
        identity = phase_identity(model, phase, x) if checkpoint else ""
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
        steps = self._steps(state.model, saved, state.optimizer, state.phase.first, state.step, learned=state.tokens)
        try:
            for step in steps:
                metrics = state.took_step(step)
                progress.step(state.fraction_done(), metrics)
                if state.fraction_done() >= 1:
                    break
                if saved.due() or interrupts.pending:
                    state.save(saved, state.epoch)
                    interrupts.raise_pending()
        except EaseError:
            if saved.stopped:  # training resumes here after the data has been corrected
                state.save(saved, state.epoch)
            raise

    def _validate(
        self, state: PhaseState, saved: Checkpoint, val: Batches, progress: Progress, interrupts: Interrupts
    ) -> None:
        """Scores the model after an epoch, keeps the best weights, and decides whether the phase is over."""
        phase, model = state.phase, state.model
        before = random_state(self.device_of(model))  # batches may draw from torch's generator
        try:
            with interrupts.allowed():  # scoring changes nothing else, so that an interrupt needs no wait
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
        if saved.due() or interrupts.pending:
            state.save(saved, state.epoch)
            interrupts.raise_pending()

    def _steps(
        self,
        model: ExitModel,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        first: int = 1,
        next_step: Callable[[], Step | None] = lambda: None,
        learned: int = 0,
    ) -> Iterator[TakenStep]:
        """Takes one optimizer step per batch."""
        model.to(self.device_of(model))
        train_mode(model)
        gated = self.config.selection.classifiers
        model.mark_stale_classifiers((), gated)
        compute_loss = partial(self.compute_loss, model, first=first)
        for item in re_iterable(batches):
            batch = Batch.of(item)
            scored = int(batch.scored.sum())
            if not scored:
                continue
            learned += scored
            step = next_step()
            continued, losses = dict[int, Tensor](), dict[int, Tensor]()
            loss = compute_loss(
                *batch[:3], state=batch.state, layout=batch.layout, step=step, continued=continued, exit_losses=losses
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # Only the optimizer's parameters: frozen ones may still hold a gradient of the previous phase.
            learning = [p for p in parameters_of(optimizer) if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(learning, GRAD_CLIP)
            # The only wait for the device in a step.
            read = [loss.detach(), norm, *losses.values()]
            value, length, *parts = torch.stack([part.to(loss) for part in read]).tolist()
            for name, number in (("loss", value), ("gradient's norm", length)):
                if not math.isfinite(number):
                    raise EaseError(f"the {name} is {number}: {LOWER_LR}")
            optimizer.step()
            if model.config.classifier_exits:
                model.mark_stale_classifiers(learning, gated)
            flops = self.step_flops(model, batch, scored, first, step, continued)
            yield TakenStep(value, scored, flops, length, dict(zip(losses, parts, strict=True)))
        if not learned:
            raise EaseError("the epoch has no token to learn from: use more text, or targets that are not all -100")


LOWER_LR = "training stopped, and a model in memory has its last good weights again; lower the learning rate"


@checked
def train(
    model: ExitModel,
    strategy: Strategy,
    data: Data,
    *,
    device: str | torch.device | None = None,
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
    return Training(_phases(model, strategy, data, device, progress, checkpoints))


class Training:
    """The phases of a training with their histories; iterating over it trains."""

    def __init__(self, phases: Generator[tuple[Phase, History]]) -> None:
        self._phases, self._started = phases, False

    def __iter__(self) -> Iterator[tuple[Phase, History]]:
        return self

    def __next__(self) -> tuple[Phase, History]:
        self._started = True
        return next(self._phases)

    def close(self) -> None:
        """Ends the training where it stands, or without a start."""
        self._started = True
        self._phases.close()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:  # bound, since modules vanish at exit
        if not self._started:
            warn("ease.train was not iterated over, so nothing was trained: loop over it", RuntimeWarning, 2)


def _phases(
    model: ExitModel,
    strategy: Strategy,
    data: Data,
    device: str | torch.device | None,
    progress: Callable[[Phase], Progress] | None,
    checkpoints: str | os.PathLike[str] | None,
) -> Generator[tuple[Phase, History]]:
    start, number = time.perf_counter(), 0
    while (phase := strategy.next_phase(model, data)) is not None:
        preparing = time.perf_counter() - start  # mining is part of a phase's wall-clock time, as of its FLOPs
        trainer = (phase.trainer or Trainer)(phase.config, model.output_head.weight.shape[0], device)
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
