"""The loss of a configuration, and the loop that runs phases.

- A `Trainer` turns a `TrainingConfig` into a loss, an optimizer, epochs and figures. There is one training loop, `fit`.
- `train` runs the phases that a strategy hands out. The trainer knows no strategy.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.evaluation.scoring import Scores, score
from ease.flops import classifier_flops, exit_flops, full_depth_flops, run_flops
from ease.interface import IGNORE, Batch, Batches, ExitModel, Layout, re_iterable, train_mode
from ease.policy import Policy
from ease.progress import PrintProgress, Progress
from ease.storage import digest
from ease.training.checkpoint import Checkpoint
from ease.training.config import (
    PhaseOptions,
    TrainingConfig,
)
from ease.training.losses import CrossEntropy, Term, exit_loss
from ease.training.phases import Data, History, Phase, Step, Strategy
from ease.training.selection import classifier_loss, classifier_sample_size, least_confident

GRAD_CLIP = 1.0  # largest norm of a step's gradient


class Trainer:
    """Trains and evaluates models under one `TrainingConfig`.

    Args:
        config: the two core options.
        vocab_size: of the models to come, or the labels of a classifier; another number is refused.
        device: where training happens; models are moved there. By default the CPU.
    """

    def __init__(self, config: TrainingConfig, vocab_size: int, device: str | torch.device | None = None) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.device = torch.device(device or "cpu")
        self._warned = False
        # glibc hands large blocks back to the system when they are freed, and gets them again page by page in the
        # next step. Freeing one of just under 32 MiB raises that threshold for good: 8% of a step's time at dim 256.
        torch.empty(2**23 - 2**14)

    def create_optimizer(self, model: ExitModel, base_lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
        """AdamW over the parameters that learn; norms and other vectors are not decayed.

        The rate of a layer's parameters is `base_lr` times the layer's scale in the configuration. The first group has
        the highest rate among what is decayed.
        """
        self.config.check(model.num_layers)
        if model.config.outputs != self.vocab_size:
            raise EaseError(
                f"this trainer is for {self.vocab_size} tokens and the model knows {model.config.outputs}: "
                "give both the vocabulary of your tokenizer"
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
        # Fused: one pass over each parameter's memory instead of a dozen.
        return torch.optim.AdamW(parts, lr=base_lr, betas=(0.9, 0.95), fused=True)

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
        went: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The weighted loss: one pass as deep as the deepest weighted layer, a head only where there is a weight.

        Args:
            x, y: (B, T) integers; targets of -100 are not scored.
            active: (B, T) tokens that run from layer `first` on and are scored; all by default.
            state: (B, T, D) entering layer `first`; by default the layers below make it from x, without gradients.
            layout: positions and segments; padding is never scored.
            step: loss weights and layer dropout of this step, instead of the configuration's.
            went: is told, for each exit that lets only a share go on, the tokens (B, T) that did.
        """
        if x.shape != y.shape:
            raise EaseError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        self.config.check(model.num_layers, first)
        batch = Batch(x, y.long(), active, state, layout=layout).to(self.device)
        model.check_ids(batch.y[batch.y != IGNORE], model.config.outputs)
        weights, skip = step or Step(self.config.weights)
        last, objective = model.num_layers, self.config.objective
        deepest = last if objective.teacher else max(weights)
        choices = {exit: share for exit, share in self.config.going_on.items() if exit < deepest and share < 1}
        pick, learns = scored_selector(batch.scored), torch.is_grad_enabled()
        at = 0 if batch.state is None else first - 1
        with torch.set_grad_enabled(learns and first == 1):
            state = model.embed(batch.x) if batch.state is None else batch.state
        terms: list[tuple[Term, Tensor]] = []  # each with its scored tokens
        chooser, lessons = self.config.classifier_weight, list[Tensor]()
        scored = max(1, len(pick(batch.y))) if chooser else 0
        for stop in pause_layers(at, first, [*weights, *choices, deepest], skip):
            running = batch.active if stop >= first else None  # in the trunk everyone runs
            if stop in skip:
                stays = (torch.rand(len(batch.x)) >= skip[stop]).to(batch.x.device)[:, None]
                running = stays.expand_as(batch.x) if running is None else running & stays
            with torch.set_grad_enabled(learns and stop >= first):
                state = model.run(state, at + 1, stop, layout=batch.layout, active=running)
            at, here, going = stop, batch.scored, None
            if stop in choices:
                going = least_confident(model, state, stop, batch.running, choices[stop], headless=bool(chooser))
                if chooser:
                    lessons.append(classifier_loss(model, pick(state), stop, pick(batch.y)))
                    here = here & ~going
            if stop in weights:
                pick = scored_selector(here)
                aim = objective if stop < last else CrossEntropy()
                targets = pick(batch.y)
                # Where a token is scored once, every token counts alike, however many leave at which exit.
                weight = weights[stop] * (len(targets) / scored if chooser else 1)
                terms.append((Term(model.exit_norm(pick(state), stop), targets, weight, aim), here))
            if going is not None:
                batch = batch._replace(active=going)
                pick = scored_selector(batch.scored)
                if went is not None:
                    went[stop] = going
        if learns:
            model.trained_exits |= set(weights)
        parts = [term for term, _ in terms]
        if objective.teacher:
            with torch.no_grad():
                teacher = model.exit_norm(pick(state), last)
            parts = [part for term, scored in terms for part in term.taught(batch.scored[scored], teacher)]
        return exit_loss(model.output_head.weight, parts) + chooser * sum(lessons)

    def train_epoch(self, model: ExitModel, train_batches: Batches, optimizer: torch.optim.Optimizer) -> float:
        """One pass over the batches; the mean loss over scored tokens."""
        total, tokens = 0.0, 0
        for loss, scored, _ in self._steps(model, train_batches, optimizer):
            total, tokens = total + loss * scored, tokens + scored
        return total / tokens

    def scores(
        self, model: ExitModel, batches: Batches, last: int | None = None, policy: Policy | None = None
    ) -> Scores:
        """Per-token scores under a policy, this configuration's by default, up to layer `last`; routing really runs."""
        policy = policy or self.config.policy
        untrained = set(policy.exits) - set(self.config.weights) - model.trained_exits
        if untrained and not self._warned:
            self._warned = True
            warnings.warn(
                f"routing at exit {sorted(untrained)}, which no loss has trained: give its layer a loss weight",
                stacklevel=3,
            )
        return score(model.to(self.device), re_iterable(batches), policy, last=last, device=self.device)

    def evaluate(self, model: ExitModel, val_batches: Batches) -> dict[str, Any]:
        """ppl, acc, loss, shallow_ratio, compute_cost, exit_shares, flops_per_token, seconds and tokens."""
        return self.scores(model, val_batches).figures()

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
        """Trains until `patience` epochs bring no better validation loss; the best weights are restored.

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

    def run(
        self, model: ExitModel, phase: Phase, progress: Progress | None = None, checkpoint: Path | None = None
    ) -> History:
        """Executes a phase: freezes the trunk, trains, restores the best weights, and frees the trunk again.

        Args:
            checkpoint: the file that the phase is kept in while it goes on, and goes on from if it is there.
        """
        classified = phase.config.going_on if phase.config.classifier_weight else ()
        model.freeze_below(phase.first, head=phase.freeze_head, exits=phase.exits, classifiers=tuple(classified))
        try:
            optimizer = self.create_optimizer(model.to(self.device), phase.options.lr, phase.options.weight_decay)
            return self.fit(model, phase, optimizer, progress or Progress(), checkpoint)
        finally:
            model.freeze_below(1)

    def fit(
        self,
        model: ExitModel,
        phase: Phase,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        checkpoint: Path | None = None,
    ) -> History:
        """The one training loop. Raises `EaseError` at a loss that is not finite, after restoring the best weights.

        Begun again from its checkpoint, it tells the watch the epochs from before once more.
        """
        train, val, options = re_iterable(phase.train), re_iterable(phase.val), phase.options
        history = History(flops=dict(phase.spent))
        base_lrs = [group["lr"] for group in optimizer.param_groups]
        best_loss, best, start, failed = math.inf, snapshot(model), time.perf_counter(), True
        begin, total, tokens, loss = 1, 0.0, 0, math.nan
        total_steps = options.max_epochs * max(1, len(train))
        # Of the validation pass that is yet to come: the last one's, and before the first an estimate.
        x = next(iter(val), (None,))[0]
        if x is None or not len(train):
            raise EaseError("there is no batch to train or to validate on: use more text, or smaller batches")
        validation = len(val) * x.numel() * full_depth_flops(model.config, x.shape[1]) if options.max_flops else 0.0

        def fraction_done() -> float:
            # The validation that ends the epoch belongs to the budget too.
            spent = sum(history.flops.values()) + validation
            by_flops = spent / options.max_flops if options.max_flops else 0.0
            return min(1.0, max(history.steps / total_steps, by_flops))

        def step() -> Step | None:
            return phase.step and phase.step(history.steps, fraction_done())

        def set_lr() -> None:
            for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * options.lr_factor(fraction_done())

        identity = phase_identity(model, phase, x) if checkpoint else ""
        kept = Checkpoint(checkpoint, model, optimizer, train, val, self.device, identity)

        def standing(epoch: int) -> dict[str, Any]:
            told = {"history": asdict(history), "best_loss": best_loss, "validation": validation}
            return {**told, "epoch": epoch, "total": total, "tokens": tokens}

        def save(epoch: int) -> None:
            history.seconds = time.perf_counter() - start
            kept.save(**standing(epoch), best=best)

        if found := kept.load():
            history, best_loss, validation = History(**found["history"]), found["best_loss"], found["validation"]
            begin, total, tokens, best = found["epoch"], found["total"], found["tokens"], found["best"]
            start -= history.seconds
        else:
            set_lr()
        over = begin > options.max_epochs
        try:
            for row in history.rows:
                progress.epoch(row)
            if found:
                progress.step(1.0 if over else fraction_done())
                train_mode(model)
                kept.replay()
            for epoch in range(begin, options.max_epochs + 1):
                for loss, scored, flops in self._steps(model, kept, optimizer, phase.first, step, learned=tokens):
                    total, tokens = total + loss * scored, tokens + scored
                    for kind, count in flops.items():
                        history.flops[kind] = history.flops.get(kind, 0.0) + count
                    history.steps += 1
                    set_lr()
                    progress.step(fraction_done(), loss)
                    if fraction_done() >= 1:
                        break
                    if kept.due():
                        save(epoch)
                # As deep as the loss: where only exits learn, the layers above them would say the same every time.
                policy, finding = phase.route(model) if phase.route else (None, 0.0)
                scores = self.scores(model, val, last=max(phase.config.weights), policy=policy)
                validation = scores.flops + finding
                history.flops["validation"] = history.flops.get("validation", 0.0) + validation
                figures = scores.figures()
                history.seconds = time.perf_counter() - start
                history.rows.append(
                    {
                        "epoch": epoch,
                        "step": history.steps,
                        "train_loss": total / tokens,
                        "val_loss": figures["loss"],
                        "val_ppl": figures["ppl"],
                        "val_acc": figures["acc"],
                        "flops": sum(history.flops.values()),
                        "seconds": history.seconds,
                        "lr": optimizer.param_groups[0]["lr"],
                    }
                )
                progress.epoch(history.rows[-1])
                if not math.isfinite(figures["loss"]):
                    raise EaseError(f"the validation loss is {figures['loss']}: {LOWER_LR}")
                if figures["loss"] < best_loss:
                    best_loss, history.best_epoch = figures["loss"], epoch
                    best = snapshot(model)
                elif options.patience is not None and epoch - history.best_epoch >= options.patience:
                    history.stopped_early = True
                    progress.step(1.0, loss)  # it is done, however many epochs were allowed
                    break
                if fraction_done() >= 1:
                    break
                total, tokens = 0.0, 0
                kept.turn()
                if kept.due():
                    save(epoch + 1)
            failed = False
        finally:
            # On the way out of an error or an interrupt, too: the last good weights are what is kept.
            if failed or phase.restore_best:
                model.load_state_dict(best, strict=False)  # what is frozen is as it was
        if not over:
            kept.finish(**standing(options.max_epochs + 1), best={})
        return history

    def _steps(
        self,
        model: ExitModel,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        first: int = 1,
        next_step: Callable[[], Step | None] = lambda: None,
        learned: int = 0,
    ) -> Iterator[tuple[float, int, dict[str, float]]]:
        """Takes one optimizer step per batch; yields its loss, its scored tokens and its FLOPs by kind."""
        model.to(self.device)
        train_mode(model)
        for item in re_iterable(batches):
            batch = Batch(*item)
            scored = int(batch.scored.sum())
            if not scored:
                continue
            learned += scored
            step = next_step()
            went: dict[int, Tensor] = {}
            loss = self.compute_loss(
                model, *batch[:3], state=batch.state, layout=batch.layout, first=first, step=step, went=went
            )
            if not bool(loss.isfinite()):
                raise EaseError(f"the loss is {loss.item()}: {LOWER_LR}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # The optimizer's own: what is frozen now may still hold a gradient of the phase before.
            learning = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(learning, GRAD_CLIP)
            if not bool(norm.isfinite()):
                raise EaseError(f"the gradient's norm is {norm.item()}: {LOWER_LR}")
            optimizer.step()
            yield loss.item(), scored, self.step_flops(model, batch, scored, first, step, went)
        if not learned:
            raise EaseError("the epoch has no token to learn from: use more text, or targets that are not all -100")

    def step_flops(
        self,
        model: ExitModel,
        batch: Batch,
        scored: int,
        first: int = 1,
        step: Step | None = None,
        went: Mapping[int, Tensor] = {},
    ) -> dict[str, float]:
        """FLOPs of one training step by kind: what learns costs three times its forward, the trunk once.

        Args:
            scored: tokens of the batch that are scored.
            went: exit -> (B, T) tokens that went on there, where that was a choice; it took the exit's head.
        """
        weights, skip = step or Step(self.config.weights)
        config, last, teacher = model.config, model.num_layers, self.config.objective.teacher
        deepest = last if teacher else max(weights)
        trunk = run_flops(config, min(first - 1, deepest), batch._replace(active=None).running, batch.layout)
        # A frozen head hands a gradient through but needs none of its own.
        factor = 3 if model.output_head.weight.requires_grad else 2
        training: float = 0
        below = 0
        for exit in [*went, deepest]:
            layers = sum(1 - skip.get(layer, 0.0) for layer in range(max(first, below + 1), exit + 1))
            training += 3 * layers * run_flops(config, 1, batch.running, batch.layout)
            arrived, before = int(batch.running.sum()), scored
            if exit in went:
                batch = batch._replace(active=went[exit].to(batch.x.device))
                scored = int(batch.scored.sum())
            if exit in went and self.config.classifier_weight:  # asked of all, learned from some, by their head
                training += classifier_flops(config, arrived) + 3 * classifier_flops(
                    config, classifier_sample_size(before)
                )
                training += exit_flops(config, classifier_sample_size(before), exit)
                before -= scored
            elif exit in went:
                training += exit_flops(config, arrived, exit)
            training += factor * sum(exit_flops(config, before, layer) for layer in weights if below < layer <= exit)
            below = exit
        # A teacher is asked beside each exit, for the tokens that came to it.
        training += teacher * sum(exit_flops(config, scored, layer) for layer in weights if layer < last)
        return {"training": training, "trunk": trunk if batch.state is None else batch.flops}


LOWER_LR = "training stopped, and a model in memory has its last good weights again; lower the learning rate"


def snapshot(model: ExitModel) -> dict[str, Tensor]:
    """A copy of the weights that learn."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def phase_identity(model: ExitModel, phase: Phase, x: Tensor) -> str:
    """Tells a phase from others: its plan, the model's shape and what is frozen of it, x of a validation batch."""
    # A mined threshold is found again, and on another machine not to the bit.
    config = replace(phase.config, routing_threshold=0.0)
    plan = (phase.name, config, phase.options, phase.first, phase.exits, phase.freeze_head, phase.restore_best)
    frozen = [part for part in (*model.parameters(), *model.buffers()) if not part.requires_grad]
    return digest(plan, model.config, len(phase.train), len(phase.val), x, *frozen)


def pause_layers(at: int, first: int, exits: Iterable[int], skip: Iterable[int]) -> list[int]:
    """The layers above `at` after which a forward pauses, the deepest exit the last of them.

    It pauses at exits, at the end of the trunk below layer `first`, and before and after layers that may be skipped.
    """
    exits, skip = set(exits), set(skip)
    pauses = exits | skip | {layer - 1 for layer in skip} | {first - 1}
    return sorted(layer for layer in pauses if at < layer <= max(exits))


def scored_selector(scored: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes the scored tokens (B, T) out of (B, T, ...): a view where that is all, since indexing copies."""
    return (lambda t: t.flatten(0, 1)) if bool(scored.all()) else lambda t: t[scored]


def train(
    model: ExitModel,
    strategy: Strategy,
    data: Data,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[Phase], Progress] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[Phase, History]]:
    """Runs a strategy's phases one by one; yields each with its history when it is done.

    Args:
        checkpoints: a folder to keep training in, one training a folder. The same call after a kill, with a strategy
            and batches made anew, goes on from there and ends the same to the bit (on a CPU); phases that were
            finished are yielded again. Left out, nothing is kept.

    Raises:
        EaseError: the folder holds checkpoints of another training, or cannot be written.
    """
    start, number = time.perf_counter(), 0
    while (phase := strategy.next_phase(model, data)) is not None:
        preparing = time.perf_counter() - start  # mining belongs to a phase's wall-clock as to its FLOPs
        trainer = Trainer(phase.config, model.output_head.weight.shape[0], device)
        number += 1
        checkpoint = None if checkpoints is None else Path(checkpoints) / f"phase-{number}.safetensors"
        history = trainer.run(model, phase, progress(phase) if progress else None, checkpoint)
        history.seconds += preparing
        for row in history.rows:
            row["seconds"] += preparing
        yield phase, history
        start = time.perf_counter()
