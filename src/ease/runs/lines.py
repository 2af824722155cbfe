"""Trained lines: a model with its policy and its training cost, and the lines that a strategy trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ease.models import StandardTransformer
from ease.policy import Policy
from ease.runs.context import RunContext
from ease.storage import CHECKPOINTS
from ease.trainer import train
from ease.training.config import PhaseOptions, TrainingConfig, create_standard_config
from ease.training.phases import Data, History, Phase, Strategy


class TrainedLine(NamedTuple):
    """One trained model with its policy, and everything that its training cost.

    Args:
        name: name in tables and curves.
        model: the trained model.
        policy: exits and thresholds under which the line is scored.
        curve: one row of metrics per epoch, over all phases so far.
        flops: training FLOPs by kind, over all phases so far.
        seconds: training time, over all phases so far.
    """

    name: str
    model: StandardTransformer
    policy: Policy = Policy()
    curve: list[dict[str, Any]] = []  # noqa: RUF012  # never changed in place
    flops: Mapping[str, float] = {}
    seconds: float = 0.0

    @property
    def total_flops(self) -> float:
        """Training FLOPs of all kinds."""
        return sum(self.flops.values())

    def after_phase(self, name: str, phase: Phase, history: History, model: StandardTransformer) -> TrainedLine:
        """The line that follows from this one by one more phase."""
        rows = [
            {
                **row,
                "phase": phase.name,
                "flops": row["flops"] + self.total_flops,
                "seconds": row["seconds"] + self.seconds,
            }
            for row in history.rows
        ]
        flops = {k: self.flops.get(k, 0.0) + history.flops.get(k, 0.0) for k in {**self.flops, **history.flops}}
        return TrainedLine(name, model, phase.config.policy, self.curve + rows, flops, self.seconds + history.seconds)


class StrategyLines(NamedTuple):
    """The lines that a strategy trained: one per phase, preceded by the initial model if the run started from one."""

    lines: list[TrainedLine]
    phases: list[Phase]
    strategy: Strategy

    @property
    def final(self) -> TrainedLine:
        """The line that the strategy ended with."""
        return self.lines[-1]

    @property
    def base_index(self) -> int:
        """Position of the line that the first later phase was built on: phase 1, or the initial model."""
        initial = len(self.lines) - len(self.phases)
        later = next((i for i, phase in enumerate(self.phases) if phase.first > 1), 1 - initial)
        return later - 1 + initial

    @property
    def base(self) -> TrainedLine:
        """The line that the first later phase was built on."""
        return self.lines[self.base_index]

    @property
    def base_phase(self) -> Phase | None:
        """The phase that trained `base`; None if `base` is the initial model."""
        index = self.base_index - (len(self.lines) - len(self.phases))
        return self.phases[index] if index >= 0 else None

    @property
    def base_training(self) -> TrainingConfig:
        """The loss that `base` was trained with; for an initial model, that of a standard model."""
        phase = self.base_phase
        return phase.config if phase else create_standard_config(self.base.model.num_layers)

    @property
    def options(self) -> PhaseOptions:
        """Optimizer settings of the strategy's first phase, which the baselines share."""
        return self.phases[0].options


def train_strategy(context: RunContext) -> StrategyLines:
    """Train all phases of the run's strategy.

    Args:
        context: the run.

    Returns:
        The trained lines. The policy of the last one is the strategy's, which may be determined only after training.
    """
    config, depth = context.config, context.config.strategy.num_layers
    model = context.start.to(context.device) if context.start is not None else context.new_model(depth or 0)
    torch.manual_seed(config.seed)
    strategy = config.strategy.strategy()
    data = Data(context.train_batches(), context.batches("val"), context.progress)
    line, lines, phases = TrainedLine("initial model", model), [], []
    if context.start is not None:
        lines.append(line._replace(model=copy.deepcopy(model)))
    suffix = ", in-sample" if context.in_sample else ""
    progress = lambda phase: context.progress_of(phase.name, phase.name + suffix)  # noqa: E731
    folder = context.folder / CHECKPOINTS / "strategy"
    options: Any = {"device": context.device, "checkpoints": folder, "execution": context.config.execution}
    for phase, history in train(model, strategy, data, progress=progress, **options):
        line = line.after_phase(phase.name, phase, history, copy.deepcopy(model))
        lines.append(line)
        phases.append(phase)
    lines[-1] = line._replace(policy=strategy.policy())
    return StrategyLines(lines, phases, strategy)
