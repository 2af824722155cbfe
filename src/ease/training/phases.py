"""Phases and strategies: what a strategy yields and the trainer executes.

The trainer depends on these types only. A strategy is an object with `next_phase` and `policy`; its configuration is a
dataclass that creates it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ease.errors import EaseError, check_fields
from ease.interface import Batches, ExitModel
from ease.policy import Policy
from ease.progress import Progress
from ease.training.config import PhaseOptions, TrainingConfig


class Data(NamedTuple):
    """Training and validation batches. The test split is not part of it, so no strategy can use it."""

    train: Batches
    val: Batches
    progress: Callable[[str], Progress] = lambda name: Progress()
    """Creates the progress callback of a named piece of work between phases, such as mining."""


class Step(NamedTuple):
    """Loss weights and layer dropout of one optimizer step."""

    weights: Mapping[int, float]
    """Layer -> weight of its loss."""
    skip: Mapping[int, float] = {}
    """Layer -> probability in [0, 1] that a sequence skips it (layer dropout)."""


@dataclass(frozen=True)
class Phase:
    """One training round: which layers learn, from which tokens, and when it ends.

    Args:
        name: shown with its progress and metrics.
        config: the losses, and the routing under which validation runs.
        train, val: re-iterable batches.
        options: optimizer settings and limits.
        first: the first layer that learns, 0 for all; what is below is the frozen trunk. With the number of layers plus
            one, no layer learns.
        exits: exits in the frozen trunk that learn nevertheless.
        freeze_head: whether the shared head is frozen together with a trunk, so that no exit changes.
        restore_best: whether the weights of the best epoch are restored at the end.
        spent: FLOPs of preparing the phase, by kind.
        curriculum: the step to take, from the number of steps taken and the share of the phase that is done. By default
            every step follows `config`. Loss curricula and progressive layer dropping are written this way.
        trainer: makes the trainer of the phase from the arguments of `Trainer`, if what learns is not trained by losses
            at exits; `config` then only gives the policy.
        route: the validation policy of the model as it is now, and the FLOPs of finding it; by default the policy of
            `config`.

    Raises:
        EaseError: a loss lies in the frozen trunk, where nothing learns.
    """

    name: str
    config: TrainingConfig
    train: Batches
    val: Batches
    options: PhaseOptions = field(default_factory=PhaseOptions)
    first: int = 0
    exits: Sequence[int] = ()
    freeze_head: bool = True
    restore_best: bool = True
    spent: Mapping[str, float] = field(default_factory=dict)
    curriculum: Callable[[int, float], Step] | None = None
    route: Callable[[ExitModel], tuple[Policy, float]] | None = None
    trainer: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.trainer is not None:
            return
        dead = [layer for layer in self.config.weights if layer < self.first and layer not in self.exits]
        if dead:
            raise EaseError(
                f"the loss at layer {dead[0]} lies below layer {self.first}, where learning starts: "
                "move it up, or name the exit among those that learn"
            )


class Strategy(Protocol):
    """A plan that yields phases one by one."""

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        """The next phase, given the model as the previous phase left it; None when training is done."""

    def policy(self) -> Policy:
        """The routing policy after training."""


class StrategyConfig(Protocol):
    """The configuration of a strategy, as `ease.strategies` lists it."""

    @property
    def num_layers(self) -> int | None:
        """Depth of the model when training starts; None if the strategy needs a finished model."""

    def strategy(self) -> Strategy:
        """A new strategy with this configuration."""


class SinglePhaseConfig(Protocol):
    """The configuration of a strategy with one phase."""

    def policy(self) -> Policy:
        """The routing policy after training."""

    def phase(self, model: ExitModel, data: Data) -> Phase:
        """The phase."""


@dataclass
class SinglePhase:
    """The strategy with one phase, which its configuration describes."""

    config: SinglePhaseConfig
    done: bool = False

    def policy(self) -> Policy:
        return self.config.policy()

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if self.done:
            return None
        self.done = True
        return self.config.phase(model, data)


@dataclass
class History:
    """The record of one phase."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Per epoch: step, skipped, train_loss, val_loss, val_ppl, val_acc, flops so far, seconds so far, lr; where
    validation is routed, exit_shares (layer, as a string -> share of tokens that leave there).
    For a draft brick the loss is a divergence and val_acc is its agreement; val_agreement, val_agreement_2 and
    val_agreement_3 are those of the first 1, 2, and 3 drafts of a round."""
    flops: dict[str, float] = field(default_factory=dict)
    """FLOPs by kind: training, trunk, validation, and those of preparing the phase."""
    best_epoch: int = 0
    """The epoch with the lowest validation loss, counted from 1."""
    stopped_early: bool = False
    """Whether patience ended the phase."""
    steps: int = 0
    """Optimizer steps taken."""
    skipped: int = 0
    """Steps that were skipped, since their loss or gradient was not finite."""
    seconds: float = 0.0
    """Wall-clock time."""

    def column(self, name: str) -> list[float]:
        """One value per epoch."""
        return [row[name] for row in self.rows]


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
