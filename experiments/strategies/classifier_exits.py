"""Exits that say without their head whether they are sure, from the state: what `ease.learn_agreement` makes of them.

At these sizes a head costs a third of a layer and more, and a token that goes on has paid for one that nobody reads.
The strategy trains no phase: it takes a finished model with exits and learns, on a little text of the same order, how
likely each agrees with the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ease
from ease.flops import exit_flops, run_flops
from experiments.harness.scheduler import Trial

SHARE = 0.01  # of the budget, on top of it


@dataclass(frozen=True)
class HeadlessConfig:
    """A classifier for each exit of a finished model."""

    flops: float
    """For reading the text that it is learned from, which comes after all that the model was trained on."""

    @property
    def num_layers(self) -> None:
        """The model is a finished one and brings its depth."""

    def strategy(self) -> Headless:
        return Headless(self)


def headless(trial: Trial) -> HeadlessConfig:
    return HeadlessConfig(SHARE * trial.lab.budget)


@dataclass
class Headless:
    """The strategy."""

    config: HeadlessConfig
    spent: dict[str, float] = field(default_factory=dict)

    def policy(self) -> ease.Policy:
        return ease.Policy(confidence="classifier")

    def next_phase(self, model: ease.ExitModel, data: ease.Data) -> None:
        assert isinstance(model, ease.StandardTransformer)
        *exits, last = sorted(model.trained_exits)
        text, flops = [], 0.0
        for item in data.train:
            batch = ease.Batch(*item)
            text.append(batch)
            flops += run_flops(model.config, last, batch.running, batch.layout)
            flops += sum(exit_flops(model.config, int(batch.scored.sum()), exit) for exit in (*exits, last))
            if flops >= self.config.flops:
                break
        ease.learn_agreement(model, text, exits)
        self.spent["classifier"] = flops
