"""ASHEM: selective layer expansion in two phases, the two-phase case of `staged.py`.

Phase 1 trains the shallow brick on all tokens. The tokens with the lowest confidence there are hard; phase 2 adds new
layers and trains them on the hard tokens only. `protocol="original"` runs the originally published recipe, which mines,
trains, and scores on the same validation tokens; its metrics are in-sample and are labelled so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ease.errors import EaseError, check_choice, check_fields
from ease.flops import head_flops, run_flops
from ease.interface import Batch, ExitModel
from ease.models import StandardTransformer
from ease.progress import ProgressBatches
from ease.strategies.staged import PhaseConfig, Staged, StagedConfig
from ease.training.mining import check_ratio, collect_hard_examples, compute_confidence_threshold
from ease.training.phases import Data, Phase


@dataclass(frozen=True)
class ASHEMConfig:
    """Settings of both phases."""

    name: ClassVar = "ashem"

    phase1_layers: int = 2
    """Layers of the shallow brick."""
    phase1_lr: float = 1e-3
    """Learning rate of phase 1."""
    phase1_patience: int | None = 1
    """Epochs without a better validation loss before phase 1 ends."""
    hard_example_ratio: float = 0.5
    """Hard tokens as a share of all training tokens, in (0, 1]."""
    phase2_layers: int = 4
    """Layers after growth."""
    phase2_lr: float = 1e-4
    """Learning rate of phase 2."""
    phase2_patience: int | None = 3
    """Epochs without a better routed validation loss before phase 2 ends."""
    phase1_max_epochs: int = 100
    """Maximum number of epochs of phase 1."""
    phase2_max_epochs: int = 100
    """Maximum number of epochs of phase 2."""
    phase1_max_flops: float | None = None
    """Maximum FLOPs of phase 1."""
    phase2_max_flops: float | None = None
    """Maximum FLOPs of phase 2, including mining and validation."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over a phase: constant, or falling to a twentieth."""
    warmup: float = 0.0
    """Share of a phase in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, for matrices only."""
    mine_epochs: int = 1
    """Epochs of training batches to mine; if an epoch is a slice of the text, more epochs cover more of it."""
    grow_init: Literal["identity", "copy"] = "identity"
    """New layers start as the identity or as copies of trained layers."""
    supervise: Literal["last", "every"] = "last"
    """The loss at the last layer of a phase's brick, or at every layer of it."""
    protocol: Literal["held-out", "original", "seed"] = "held-out"
    """Mine and train on training data, or, as in the original recipe, on the validation batches (in-sample). "seed" is
    a deprecated name of "original"."""
    trunk_budget: float = 2e9
    """Maximum bytes of the frozen trunk's states to keep in memory."""
    seed: int = 0
    """Random seed of the order of mined batches."""
    pretrained: bool = False
    """The model passed to training has finished phase 1; training starts with phase 2."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.phase2_layers <= self.phase1_layers:
            raise EaseError(
                f"phase2_layers ({self.phase2_layers}) must be more than phase1_layers ({self.phase1_layers})"
            )
        check_ratio(self.hard_example_ratio)
        if self.protocol == "seed":
            warnings.warn('protocol="seed" is now called "original"', DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "protocol", "original")
        check_choice("protocol", self.protocol, ("held-out", "original"))
        if self.pretrained and self.protocol == "original":
            raise EaseError("the original recipe trains its own phase 1: use protocol held-out with a pretrained model")
        self.staged()  # checks both phases

    @property
    def num_layers(self) -> int:
        """Depth of the model when training starts."""
        return self.phase1_layers

    def staged(self) -> StagedConfig:
        """The same plan as a configuration of N-stage training."""
        shallow = PhaseConfig(
            layers=self.phase1_layers,
            lr=self.phase1_lr,
            patience=self.phase1_patience,
            max_epochs=self.phase1_max_epochs,
            max_flops=self.phase1_max_flops,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            supervise=self.supervise,
        )
        deep = replace(
            shallow,
            layers=self.phase2_layers,
            ratio=self.hard_example_ratio,
            lr=self.phase2_lr,
            patience=self.phase2_patience,
            max_epochs=self.phase2_max_epochs,
            max_flops=self.phase2_max_flops,
            mine_epochs=self.mine_epochs,
            grow_init=self.grow_init,
        )
        return StagedConfig((shallow, deep), self.trunk_budget, self.seed, self.pretrained)

    def strategy(self) -> Staged:
        return self.staged().strategy() if self.protocol == "held-out" else OriginalRecipe(self)


class HardBatches(list[Batch]):
    """Batches of hard tokens with their states, which nothing can compute again."""

    def release(self) -> None:
        """Frees the states; the ids and targets stay as the record of what was mined."""
        self[:] = [batch._replace(state=None) for batch in self]


class OriginalRecipe(Staged):
    """The original recipe: all training on the validation batches, hard tokens as sequences of length one."""

    batch_size = 64

    def __init__(self, config: ASHEMConfig) -> None:
        super().__init__(config.staged())

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if not self.done and model.config.tie_embeddings:
            raise EaseError("the original recipe trains the shared head on a frozen trunk: use tie_embeddings=False")
        if self.done != 1:
            return super().next_phase(model, data)
        assert isinstance(model, StandardTransformer)
        device = next(model.parameters()).device
        plan = self.config.phases[1]
        val = ProgressBatches(data.val, data.progress("mining"), epochs=2)
        threshold = compute_confidence_threshold(model, val, plan.ratio, device)
        hard = collect_hard_examples(model, val, threshold, device)
        columns = (hard["inputs"][:, None], hard["targets"][:, None], hard["hidden_states"][:, None])
        batches = HardBatches(
            Batch(x, y, state=state) for x, y, state in zip(*(c.split(self.batch_size) for c in columns), strict=True)
        )
        self.exits.append(model.num_layers)
        self.thresholds.append(threshold)
        of = sum(int((y >= 0).sum()) for _, y, *_ in data.val)
        self.mined.append({"threshold": threshold, "count": len(hard["inputs"]), "of": of})
        first = model.num_layers + 1
        model.grow(plan.layers, plan.grow_init)
        # Mining took two passes, one for the threshold and one for the tokens, each through phase 1's layers and head.
        one = sum(
            run_flops(model.config, first - 1, torch.ones_like(x, dtype=torch.bool))
            + head_flops(model.config, x.numel())
            for x, *_ in data.val
        )
        # The metrics are those of the last epoch, not of the best one, and the head learns.
        return self._phase(
            plan, first, batches, data, freeze_head=False, restore_best=False, spent={"mining": 2.0 * one}
        )
