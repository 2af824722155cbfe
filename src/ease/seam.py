"""The one seam: what every model keeps and everything else stands on.

Training, mining, evaluation and routing see a model only through `embed`, `run` and `logits`. A model that
keeps these three gets all of them; nothing outside `models.py` and `modules/` reaches into a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ease.errors import EaseError

if TYPE_CHECKING:
    from ease.models import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Where each token stands: the one mechanism behind padding, packed documents and offsets.

    Args:
        positions: (B, T) integers, the position of each token in its own segment.
        segments: (B, T) integers, -1 for padding. A token attends to the tokens of its segment whose
            position is not after its own.
    """

    positions: Tensor
    segments: Tensor

    @classmethod
    def from_attention_mask(cls, mask: Tensor) -> Layout:
        """One document per row; `mask` (B, T) is true (or 1) for real tokens, on either side of the padding."""
        real = mask.bool()
        return cls((real.long().cumsum(1) - 1).clamp(min=0), real.long() - 1)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.positions.to(device), self.segments.to(device))

    @property
    def real(self) -> Tensor:
        """(B, T) true where a token is no padding."""
        return self.segments >= 0

    def visible(self, rows: Tensor, cols: Tensor) -> Tensor:
        """(N, T): which tokens of its row the token at (rows[i], cols[i]) attends to."""
        segment, position = self.segments[rows, cols], self.positions[rows, cols]
        same = self.segments[rows] == segment[:, None]
        return same & (self.positions[rows] <= position[:, None])


IGNORE = -100
"""A target that is not scored."""


class Batch(NamedTuple):
    """x and y (B, T) integers; y is -100 where a token is not scored.

    `active` (B, T) marks the tokens that still run in the layers that learn; only they are scored. `state`
    (B, T, D) is what the frozen trunk made of x; `flops` is what making it cost just now. `layout` tells padding and
    packed documents; padding is never scored.
    """

    x: Tensor
    y: Tensor
    active: Tensor | None = None
    state: Tensor | None = None
    flops: float = 0.0
    layout: Layout | None = None

    def to(self, device: torch.device | str) -> Batch:
        moved = (part.to(device) if isinstance(part, Tensor | Layout) else part for part in self)
        return Batch._make(moved)

    @property
    def running(self) -> Tensor:
        """(B, T) true for tokens that run in the layers that learn."""
        running = torch.ones_like(self.x, dtype=torch.bool) if self.layout is None else self.layout.real
        return running if self.active is None else running & self.active

    @property
    def scored(self) -> Tensor:
        """(B, T) true for tokens that count: those that run and have a target."""
        return (self.y != IGNORE) & self.running


class ExitModel(nn.Module, ABC):
    """A decoder whose every layer can be an exit.

    Shapes: ids (B, T) integers; a state (B, T, D) is what flows between layers; logits (..., V). Layers are
    numbered from 1 and ranges include both ends.
    """

    config: ModelConfig
    num_layers: int
    output_head: nn.Linear
    # The model's own policy, which `ease.route` uses unless told otherwise. A threshold of 0 means no routing.
    exit_layer: int | Sequence[int] = 1
    routing_threshold: float | Sequence[float] = 0.0
    policy_options: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.trained_exits: set[int] = set()  # exits that a loss has trained; the trainer keeps it

    @property
    def early_exits(self) -> tuple[int, ...]:
        """The exits below the last layer that a loss has trained, from shallow to deep."""
        return tuple(sorted(exit for exit in self.trained_exits if exit < self.num_layers))

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> state (B, T, D)."""

    @abstractmethod
    def run(
        self,
        state: Tensor,
        first: int,
        last: int,
        *,
        layout: Layout | None = None,
        active: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Applies layers first..last to the active tokens; the others keep their state.

        Args:
            state: (B, T, D).
            layout: positions and segments; by default positions count up and there is one segment.
            active: (B, T), true for tokens still on their way; by default all. Padding is never active.
                Every token gives keys and values; only active ones ask, mix and pass the feed-forward.
            cache: what the rows have read before, from `new_cache`; positions then follow from it. The run that
                starts at layer 1 gives the tokens their places in it.
        """

    @abstractmethod
    def exit_norm(self, state: Tensor, exit: int) -> Tensor:
        """The state (..., D) as exit `exit` hands it to the shared head."""

    def agreement(self, state: Tensor, exit: int) -> Tensor:
        """State (..., D) -> how sure the exit's classifier is (...), in [0, 1].

        What it foretells is what it was taught: that the exit agrees with the last one (`learn_agreement`), or the
        probability that it gives what comes (`TrainingConfig.classifier_weight`).
        """
        raise EaseError("this model has no classifier at its exits: use another measure of confidence")

    def parameters_of(self, layer: int) -> Iterator[nn.Parameter]:
        """The parameters that belong to layer `layer`: its own, its exit's, and for layer 1 the embedding's.

        The shared head belongs to none, and neither does an embedding that is tied to it.
        """
        raise EaseError("this model does not say which parameters are a layer's: leave out layer_lr_scales")

    @abstractmethod
    def freeze_below(
        self, first: int, *, head: bool = True, exits: Sequence[int] = (), classifiers: Sequence[int] = ()
    ) -> None:
        """Freezes everything below layer `first` (embedding, layers, exits) and, by default, the shared head.

        `exits` names exits below `first` that learn all the same; the classifiers of exits learn only where they are
        named.
        """

    def logits(self, state: Tensor, exit: int) -> Tensor:
        """State (..., D) -> logits (..., V) of the exit after layer `exit`: its own norm, then the shared head."""
        logits: Tensor = self.output_head(self.exit_norm(state, exit))
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V) of the last layer, always at full depth."""
        return self.logits(self.forward_to_layer(ids, self.num_layers), self.num_layers)

    def forward_to_layer(self, ids: Tensor, layer: int) -> Tensor:
        """ids (B, T) -> state (B, T, D) after layer `layer`."""
        return self.run(self.embed(ids), 1, layer)

    def forward_all_layers(self, ids: Tensor) -> list[Tensor]:
        """ids (B, T) -> logits (B, T, V) of every exit, the first layer's first."""
        state, logits = self.embed(ids), []
        for layer in range(1, self.num_layers + 1):
            state = self.run(state, layer, layer)
            logits.append(self.logits(state, layer))
        return logits

    def check_ids(self, ids: Tensor, vocab_size: int) -> None:
        """Refuses token ids that the model has no embedding for."""
        if not ids.numel():
            return
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise EaseError(
                f"token ids must lie in 0..{vocab_size - 1}, got {low}..{high}: "
                "use the tokenizer that the model was made with, or a larger vocab_size"
            )


def learnable(module: nn.Module) -> bool:
    """True if any parameter of `module` learns."""
    return any(p.requires_grad for p in module.parameters())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_mode(model: nn.Module) -> None:
    """Training mode where something learns, evaluation mode (no dropout) in what is frozen."""
    for module in model.modules():
        module.training = learnable(module)
