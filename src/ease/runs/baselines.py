"""Baselines of a run: what the same training FLOPs buy without the strategy.

All baselines share data, batch order, random seed and optimizer settings with the strategy's first phase. They train
until they have used the training FLOPs of the strategy's last line, validation included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ease.evaluation.scoring import score
from ease.evaluation.shares import matched_thresholds
from ease.interface import Batches
from ease.policy import Policy
from ease.report.formats import plural
from ease.report.verdict import UNROUTED
from ease.runs.context import RunContext
from ease.runs.lines import StrategyLines, TrainedLine
from ease.storage import CHECKPOINTS
from ease.strategies.growth import GrowthConfig
from ease.trainer import Trainer, train
from ease.training.config import PhaseOptions, TrainingConfig, create_deep_supervision_config, create_standard_config
from ease.training.phases import Data, Phase


def train_baselines(context: RunContext, trained: StrategyLines) -> Iterator[TrainedLine]:
    """Train the baselines that the run's `compare` names.

    Args:
        context: the run.
        trained: the lines of the strategy.

    Returns:
        The baselines one by one, in the order full-depth, continued, standard (from shallow to deep),
        deep-supervision, growth. A baseline that equals the strategy itself is left out.
    """
    compare, final = context.config.compare, trained.final
    depth, budget = final.model.num_layers, final.total_flops
    if "full-depth" in compare and final.policy.exits:
        yield final._replace(name=f"{final.name}{UNROUTED}", policy=Policy())
    if "continued" in compare and len(trained.lines) > 1:
        yield _train_continued(context, trained)
    if "standard" in compare:
        for layers in context.config.compare_layers or (depth,):
            config = create_standard_config(layers)
            if not _is_strategy(trained, config, layers):
                name = f"standard, {plural(layers, 'layer')}"
                yield _train_new(context, f"standard-{layers}", name, layers, config, trained.options, budget)
    if "deep-supervision" in compare and depth:
        config = create_deep_supervision_config(depth)
        if not _is_strategy(trained, config, depth):
            name = f"deep-supervision, {plural(depth, 'layer')}"
            line = _train_new(context, "deep-supervision", name, depth, config, trained.options, budget)
            if final.policy.exits:
                # The same exits, and the same share of tokens continuing past each (on validation).
                val = context.batches("val")
                scores = score(final.model, val, final.policy)
                thresholds = matched_thresholds(line.model, val, final.policy.exits, scores)
                line = line._replace(policy=Policy(final.policy.exits, thresholds))
            yield line
    if "growth" in compare and depth > 1 and not isinstance(context.config.strategy, GrowthConfig):
        yield _train_growth(context, trained)


def continued_options(trained: StrategyLines) -> PhaseOptions:
    """Options under which the base line trains further, without a jump of its learning rate.

    A schedule that several phases share continues where the base's phase ended. A schedule of its own has ended with
    that phase, so the learning rate stays at its last value. For an initial model, whose last learning rate is unknown,
    the options are those of the strategy's first phase.
    """
    phase = trained.base_phase
    if phase is None:
        return replace(trained.options, span=(0.0, 1.0))
    if phase.options.span[1] < 1:
        return replace(phase.options, span=(phase.options.span[1], 1.0))
    # The curve has the rate of the first parameter group, which is the highest of all.
    highest = max(1.0, *phase.config.layer_lr_scales.values(), 0.0)
    lr = trained.base.curve[-1]["lr"] / highest
    return replace(phase.options, lr=lr, schedule="constant", warmup=0.0)


def _train_continued(context: RunContext, trained: StrategyLines) -> TrainedLine:
    base, batches = trained.base, context.train_batches()
    batches.pass_over(len(base.curve))
    return _train_further(
        context,
        "continued",
        f"{base.name} continued",
        base._replace(model=copy.deepcopy(base.model)),
        trained.base_training,
        continued_options(trained),
        trained.final.total_flops,
        batches,
    )


def _train_new(
    context: RunContext,
    key: str,
    name: str,
    layers: int,
    config: TrainingConfig,
    options: PhaseOptions,
    budget: float,
) -> TrainedLine:
    start, batches = TrainedLine("start", context.new_model(layers)), context.train_batches()
    return _train_further(context, key, name, start, config, replace(options, span=(0.0, 1.0)), budget, batches)


def _train_further(
    context: RunContext,
    key: str,
    name: str,
    line: TrainedLine,
    config: TrainingConfig,
    options: PhaseOptions,
    budget: float,
    batches: Batches,
) -> TrainedLine:
    """One more phase on all tokens, until the line has used `budget` training FLOPs in all."""
    options = replace(options, patience=None, max_epochs=10**6, max_flops=budget - line.total_flops)
    phase = Phase(name, config, batches, context.batches("val"), options)
    torch.manual_seed(context.config.seed)
    trainer = Trainer(config, line.model.config.outputs, context.device, context.config.execution)
    checkpoint = context.folder / CHECKPOINTS / f"{key}.safetensors"
    history = trainer.run(line.model, phase, context.progress_of(name), checkpoint)
    return line.after_phase(name, phase, history, line.model)


def _train_growth(context: RunContext, trained: StrategyLines) -> TrainedLine:
    """Progressive growth from the depth of the base line (or half the final depth) to the final depth."""
    final, options = trained.final, trained.options
    depth, shallow = final.model.num_layers, trained.base.model.num_layers
    layers = (shallow if shallow < depth else depth // 2, depth)
    config = GrowthConfig(
        layers=layers,
        lr=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        patience=None,
        max_epochs=10**6,
        max_flops=final.total_flops,
    )
    model = context.new_model(layers[0])
    name = f"growth, {layers[0]} to {plural(layers[1], 'layer')}"
    data = Data(context.train_batches(), context.batches("val"), context.progress)
    progress = lambda phase: context.progress_of(name, f"{name}, {phase.name}")  # noqa: E731
    folder = context.folder / CHECKPOINTS / "growth"
    torch.manual_seed(context.config.seed)
    line, strategy = TrainedLine(name, model), config.strategy()
    how: Any = {"device": context.device, "checkpoints": folder, "execution": context.config.execution}
    for phase, history in train(model, strategy, data, progress=progress, **how):
        line = line.after_phase(name, phase, history, model)
    return line


def _is_strategy(trained: StrategyLines, config: TrainingConfig, layers: int) -> bool:
    """Whether the baseline would repeat the strategy: one phase of the same depth with the same training loss."""
    if len(trained.lines) != 1 or layers != trained.final.model.num_layers:
        return False
    own = trained.phases[0].config
    return _without_routing(own) == _without_routing(config)


def _without_routing(config: TrainingConfig) -> TrainingConfig:
    return replace(config, stages=None, layer_weights=config.weights, routing_threshold=0.0, exit_layer=1)
