"""What a strategy hands out and a trainer executes: a phase, the batches it reads, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ease.errors import EaseError
from ease.interface import Batches, ExitModel
from ease.policy import Policy
from ease.progress import Progress
from ease.training.config import PhaseOptions, TrainingConfig

if TYPE_CHECKING:
    pass


class Data(NamedTuple):
    """What a strategy trains and validates on. The test split is not in here, so no strategy can see it."""

    train: Batches
    val: Batches
    progress: Callable[[str], Progress] = lambda name: Progress()
    """Makes, from its name, what is told of the progress of anything that takes a while between phases."""


class Step(NamedTuple):
    """What one optimizer step is made of, where a phase changes it on the way."""

    weights: Mapping[int, float]
    """Layer -> weight of its loss."""
    skip: Mapping[int, float] = {}
    """Layer -> chance in [0, 1] that a sequence skips it (layer dropout)."""


@dataclass(frozen=True)
class Phase:
    """One training round of a strategy: which layers learn, from which tokens, until when.

    Args:
        config: where the loss is, and the routing under which validation runs.
        train, val: re-iterable batches.
        options: how it learns, and when it ends.
        first: the first layer that learns; everything below is the frozen trunk. One more than the model has layers
            means that no layer learns.
        exits: exits in the frozen trunk that learn all the same.
        freeze_head: whether a phase with a trunk freezes the shared head too, so that no exit moves.
        restore_best: whether the weights of the best epoch are restored at the end.
        spent: FLOPs of what was done to prepare the phase, by kind.
        step: what a step is made of, from the steps done and the share of the phase that is done; by default always
            what `config` says.
        route: where that moves with the model, finds who leaves where in validation, and says what finding it cost in
            FLOPs; by default the policy of `config`.
    """

    name: str
    config: TrainingConfig
    train: Batches
    val: Batches
    options: PhaseOptions = field(default_factory=PhaseOptions)
    first: int = 1
    exits: Sequence[int] = ()
    freeze_head: bool = True
    restore_best: bool = True
    spent: Mapping[str, float] = field(default_factory=dict)
    step: Callable[[int, float], Step] | None = None
    route: Callable[[ExitModel], tuple[Policy, float]] | None = None

    def __post_init__(self) -> None:
        dead = [layer for layer in self.config.weights if layer < self.first and layer not in self.exits]
        if dead:
            raise EaseError(
                f"the loss at layer {dead[0]} lies below layer {self.first}, where learning starts: "
                "move it up, or name the exit among those that learn"
            )


class Strategy(Protocol):
    """The plan that yields phases."""

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        """The next phase, given the model as the phase before left it; None when done."""

    def policy(self) -> Policy:
        """Who leaves where, once training is done."""


@dataclass
class History:
    """What happened in one call of `fit`."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """Per epoch: step, train_loss, val_loss, val_ppl, val_acc, flops so far, seconds so far, lr."""
    flops: dict[str, float] = field(default_factory=dict)
    """By kind: training, trunk, validation, and what preparing the phase cost."""
    best_epoch: int = 0
    stopped_early: bool = False
    steps: int = 0
    seconds: float = 0.0

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


class StrategyConfig(Protocol):
    """What `ease.STRATEGIES` lists: a dataclass that knows the depth to start with and makes its strategy."""

    @property
    def num_layers(self) -> int | None: ...  # None: it starts from a finished model
    def strategy(self) -> Strategy: ...
