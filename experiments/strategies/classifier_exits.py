"""Classifier exits: exit classifiers added to a finished model, so that its confidence needs no output head.

At these sizes a head costs a third of a layer or more, and a token that continues past an exit has paid for a head
whose logits are not used. The strategy has no phase: `ease.learn_agreement` fits a linear classifier for each exit
on a small amount of text, in the order of the training text, that predicts agreement with the last exit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ease
from ease.flops import exit_flops, run_flops
from experiments.harness.line import Trial

SHARE = 0.01  # of the budget, in addition to it


@dataclass(frozen=True)
class ClassifierExitsConfig:
    """A classifier for each exit of a finished model."""

    flops: float
    """FLOPs for reading the text that the classifiers are fitted on, which follows all text of the training."""

    @property
    def num_layers(self) -> None:
        """None: the finished model has its own depth."""

    def strategy(self) -> ClassifierExits:
        return ClassifierExits(self)


def classifier_exits(trial: Trial) -> ClassifierExitsConfig:
    """The strategy of a line, with a share of its lab's budget."""
    return ClassifierExitsConfig(SHARE * trial.lab.budget)


@dataclass
class ClassifierExits:
    """The strategy, which has no phase."""

    config: ClassifierExitsConfig
    spent: dict[str, float] = field(default_factory=dict)

    def policy(self) -> ease.Policy:
        return ease.Policy(confidence="classifier")

    def apply(self, model: ease.ExitModel, data: ease.Data) -> None:
        """Fit the classifiers of all exits of a trained model."""
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
