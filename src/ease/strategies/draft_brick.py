"""Training of a draft brick, whose backbone stays bit for bit the same.

The brick learns from the full model's own distributions over the draft vocabulary, and to give states that stand for
those of the last layer, for the 1st and later drafts of a round. Validation measures its agreement with the full model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ease.errors import EaseError, check_counts, check_number
from ease.evaluation.drafts import DraftScores, score_drafts
from ease.interface import Batch, Batches, ExitModel, Layout, evaluation_view, running_batches
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import ProgressBatches
from ease.trainer import Trainer
from ease.training.config import PhaseOptions, create_standard_config
from ease.training.drafts import draft_loss, draft_step_flops
from ease.training.phases import Data, Phase


@dataclass(frozen=True, kw_only=True)
class BrickConfig(PhaseOptions):
    """What a draft brick can draft, and its loss."""

    name: ClassVar = "brick"

    vocabulary: int | None = None
    """Tokens that the brick can draft, the most frequent of the training text (all, and 16,384 of more than 32,768)."""
    drafts: int = 2
    """Drafts of a round that are trained: those after the first read what the one before gave in place of a state."""
    regression: float = 0.1
    """Weight of the distance between the brick's states and those of the last layer, beside the divergence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(1, vocabulary=self.vocabulary, drafts=self.drafts)
        check_number("regression", self.regression, 0)

    @property
    def num_layers(self) -> None:
        """None: the strategy needs a finished model."""

    def strategy(self) -> Brick:
        return Brick(self)

    def phase(self, model: ExitModel, data: Data) -> Phase:
        assert isinstance(model, StandardTransformer)
        if model.draft_brick is None:
            shape = replace(model.config, draft_brick=True, draft_vocabulary=self.vocabulary)
            batches = ProgressBatches(data.train, data.progress("counting tokens"), 1)
            frequent = most_frequent(batches, shape.vocab_size)
            batch = next(running_batches(data.val, next(model.parameters()).device))
            with torch.no_grad():
                view = evaluation_view(model)
                states = view.run(view.embed(batch.x, layout=batch.layout), 1, model.num_layers, layout=batch.layout)
            model.add_draft_brick(frequent[: shape.draft_vocabulary], states[batch.running])
        elif self.vocabulary not in (None, model.config.draft_vocabulary):
            raise EaseError(
                f"the model's draft brick has {model.config.draft_vocabulary} tokens and is trained further: leave out "
                "vocabulary"
            )
        last = model.num_layers
        config = create_standard_config(last)
        trainer = partial(BrickTrainer, self)
        return Phase("draft brick", config, data.train, data.val, self, first=last + 1, trainer=trainer)


@dataclass
class Brick:
    """The strategy: one phase, after which the model's policy is what it was."""

    config: BrickConfig
    kept: Policy | None = None

    def policy(self) -> Policy:
        return self.kept or Policy()

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if self.kept is not None:
            return None
        self.kept = model.policy
        return self.config.phase(model, data)


class BrickTrainer(Trainer):
    """A trainer whose loss and validation are those of the draft brick.

    Args:
        plan: the loss.
        args: as for `Trainer`.
    """

    def __init__(self, plan: BrickConfig, *args: Any) -> None:
        super().__init__(*args)
        self.plan = plan

    def freeze(self, model: ExitModel, phase: Phase) -> None:
        model.requires_grad_(False)
        _native(model).draft_brick.requires_grad_(True)  # type: ignore[union-attr]

    def compute_loss(
        self,
        model: ExitModel,
        x: Tensor,
        y: Tensor,
        active: Tensor | None = None,
        *,
        layout: Layout | None = None,
        **_: Any,
    ) -> Tensor:
        batch = Batch.of(Batch(x, y, active, layout=layout))
        return draft_loss(_native(model), batch, self.plan.drafts, self.plan.regression)

    def step_flops(self, model: ExitModel, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, float]:
        return draft_step_flops(_native(model), batch, self.plan.drafts)

    def scores(
        self, model: ExitModel, batches: Batches, last: int | None = None, policy: Policy | None = None
    ) -> DraftScores:
        return score_drafts(_native(model).to(self.device_of(model)), batches)


def _native(model: ExitModel) -> StandardTransformer:
    assert isinstance(model, StandardTransformer)
    return model


def most_frequent(batches: Iterable[Any], vocab_size: int) -> Tensor:
    """All ids (V,) below `vocab_size`, from the most to the least frequent in the batches, and then by their value."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for item in batches:
        batch = Batch.of(item)
        counts += batch.x[batch.running].flatten().cpu().bincount(minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices
