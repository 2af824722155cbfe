"""The interface between models and everything else: `embed`, `run`, and `logits`.

Training, mining, evaluation, and routing use a model through these three methods only. A model that implements them
supports all of it; nothing outside `models.py` and `modules/` depends on the inside of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MethodType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ease.errors import EaseError
from ease.inputs import IGNORE as IGNORE
from ease.inputs import as_flags, as_ids, as_mask, read_labelled
from ease.model_config import ModelConfig
from ease.policy import Policy


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; a copy from the host to CUDA does not wait for what the device is doing."""
    from_host, kind = tensor.device.type == "cpu", torch.device(device).type
    if from_host and kind == "cuda":
        tensor = tensor.pin_memory()  # from other memory the copy itself would wait
    return tensor.to(device, non_blocking=from_host and kind != "mps")


def call_layer(layer: nn.Module, state: Tensor, plan: Any) -> Tensor:
    """Runs one layer, given what all layers of a run share."""
    out: Tensor = layer(state, plan)
    return out


@dataclass(frozen=True)
class Layout:
    """Position and segment of each token: the mechanism for padding, packed documents, and offsets.

    Args:
        positions: (B, T) integers, the position of each token in its own segment.
        segments: (B, T) integers, -1 for padding. A token attends to the tokens of its own segment up to its own
            position.
    """

    positions: Tensor
    segments: Tensor

    @classmethod
    def from_attention_mask(cls, mask: Any) -> Layout:
        """One document per row; `mask` (B, T) is true (or 1) for real tokens, on either side of the padding."""
        real = as_flags("attention_mask", mask)
        return cls((real.long().cumsum(1) - 1).clamp(min=0), real.long() - 1)

    @classmethod
    def of_padding(cls, mask: Any) -> Layout | None:
        """As `from_attention_mask`, or None if no token is padding, which runs fastest without a layout."""
        real = as_flags("attention_mask", mask)
        return None if bool(real.all()) else cls.from_attention_mask(real)

    def to(self, device: torch.device | str) -> Layout:
        moved = Layout(to_device(self.positions, device), to_device(self.segments, device))
        vars(moved)["host"] = self.host
        return moved

    @cached_property
    def host(self) -> Layout:
        """The layout on the host, where masks are evaluated without waiting for the device."""
        return self if self.segments.device.type == "cpu" else Layout(self.positions.cpu(), self.segments.cpu())

    @property
    def real(self) -> Tensor:
        """(B, T) true where a token is not padding."""
        return self.segments >= 0

    def visible(self, rows: Tensor | None = None, cols: Tensor | None = None, window: int | None = None) -> Tensor:
        """(B, T, T) true for the tokens of its row that a token attends to; (N, T) for tokens at (rows[i], cols[i]).

        Args:
            window: tokens that a token attends to, itself included; None: all before it.
        """
        keys, queries = self.positions[:, None], self.positions[:, :, None]
        seen = (self.segments[:, :, None] == self.segments[:, None]).logical_and_(keys <= queries)
        if window is not None:
            seen.logical_and_(keys > queries - window)
        return seen if rows is None else seen[rows, cols]


class Batch(NamedTuple):
    """A batch of token ids and targets.

    Attributes:
        x: (B, T) token ids.
        y: (B, T) targets; -100 where a token is not scored.
        active: (B, T) true for the tokens that run in the layers that learn; only they are scored.
        state: (B, T, D) output of the frozen trunk for x.
        flops: FLOPs of computing `state` for this batch.
        layout: padding and packed documents; padding is never scored.
        part: whether these are the rows that one of several processes takes of a batch.
    """

    x: Tensor
    y: Tensor
    active: Tensor | None = None
    state: Tensor | None = None
    flops: float = 0.0
    layout: Layout | None = None
    part: bool = False

    @classmethod
    def of(cls, item: Any) -> Batch:
        """The batch that an item of `Batches` stands for.

        Args:
            item: a `Batch`; (x, y) or (x, y, active), as tensors, arrays or lists; or a dictionary of transformers'
                data collators, with input_ids and perhaps attention_mask and labels, which stand at the token itself.

        Raises:
            EaseError: the item is something else, or its parts differ in shape.
        """
        if isinstance(item, Mapping):
            x, y, mask = read_labelled(item)
            return cls(x, y, layout=None if mask is None else Layout.of_padding(mask))
        if not isinstance(item, tuple | list) or not 2 <= len(item) <= len(cls._fields):
            size = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
            raise EaseError(
                f"a batch must be (x, y), an ease.Batch or a dictionary with input_ids, got {type(item).__name__}{size}"
            )
        batch = cls(*item)
        x, y = as_ids("x", batch.x), as_ids("y", batch.y)
        if x.shape != y.shape:
            raise EaseError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        active = None if batch.active is None else as_mask("active", batch.active, x)
        return batch._replace(x=x, y=y, active=active)

    def to(self, device: torch.device | str) -> Batch:
        def moved(part: Any) -> Any:
            return part.to(device) if isinstance(part, Layout) else to_device(part, device)

        return Batch._make(moved(part) if isinstance(part, Tensor | Layout) else part for part in self)

    @property
    def running(self) -> Tensor:
        """(B, T) true for tokens that run in the layers that learn."""
        running = torch.ones_like(self.x, dtype=torch.bool) if self.layout is None else self.layout.real
        return running if self.active is None else running & self.active

    @property
    def scored(self) -> Tensor:
        """(B, T) true for tokens that are scored: those that run and have a target."""
        return (self.y != IGNORE) & self.running


class ExitModel(nn.Module, ABC):
    """A decoder in which every layer can be an exit.

    Shapes: ids (B, T) integers; states between layers (B, T, D); logits (..., V). Layers are numbered from 1, and
    ranges include both ends.

    Attributes:
        config: shape of the model.
        num_layers: number of layers.
        output_head: the head that all exits share.
        policy: where `ease.route` and routed generation let tokens leave.
        trained_exits: exits that a loss has trained.
        stale_classifiers: exits whose classifier was trained before what lies below it; it is refused when it is used.
        call_layer: runs a layer of the model in training; replaced to compile or checkpoint layers.
    """

    config: ModelConfig
    num_layers: int
    output_head: nn.Linear
    policy: Policy

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()
        self.trained_exits: set[int] = set()
        self.stale_classifiers: set[int] = set()
        self.call_layer: Callable[[nn.Module, Tensor, Any], Tensor] = call_layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("exit_layer", "routing_threshold", "policy_options"):  # until version 0.1 these held the policy
            raise EaseError(f"a model has no {name}: set model.policy = ease.Policy(exits=(2,), thresholds=(0.9,))")
        super().__setattr__(name, value)

    @property
    def early_exits(self) -> tuple[int, ...]:
        """The exits below the last layer that a loss has trained, from shallow to deep."""
        return tuple(sorted(exit for exit in self.trained_exits if exit < self.num_layers))

    @property
    def first_exit(self) -> int:
        """The lowest exit: 0, the head on embedding and memory, in a model with a memory; otherwise 1."""
        return self.config.first_exit

    def check_policy(self, policy: Policy) -> None:
        """Raises `EaseError` if the model lacks an exit of the policy below its last layer."""
        policy.check(self.num_layers, self.first_exit)

    @abstractmethod
    def embed(self, ids: Tensor, *, layout: Layout | None = None, cache: Any = None) -> Tensor:
        """ids (B, T) -> state (B, T, D) before layer 1.

        Args:
            layout: positions and segments; by default positions count up and there is one segment.
            cache: from `new_cache`; the tokens are appended to it, for the runs that follow.
        """

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
        """Applies layers first..last to the active tokens; inactive tokens keep their state. The range 1..0 is empty.

        Args:
            state: (B, T, D).
            layout: positions and segments; by default positions count up and there is one segment.
            active: (B, T), true for tokens that have not left; by default all. Padding is never active. Every token has
                keys and values; queries, attention output, and feed-forward are computed for active tokens only.
            cache: keys and values of earlier tokens, from `new_cache`, which also determines positions. Unless `embed`
                has appended the tokens, the run that starts at layer 1 does. A `Prefix` is only read.
        """

    @abstractmethod
    def exit_norm(self, state: Tensor, exit: int) -> Tensor:
        """The state (..., D) normalized by exit `exit`, as input of the shared head."""

    def exit_confidence(self, state: Tensor, exit: int) -> Tensor:
        """State (..., D) -> output (...) of the exit's classifier, in [0, 1].

        It estimates what the classifier was trained on: whether the exit agrees with the last one
        (`ease.learn_agreement`), or the probability that the exit gives to the target
        (`ease.training.selection.LearnedGate`).
        """
        raise EaseError("this model has no classifiers at its exits: use another measure of confidence")

    def mark_stale_classifiers(self, trained: Iterable[Tensor], learned: Sequence[int]) -> None:
        """Marks the exit classifiers whose input changes when `trained` parameters do, but for those in `learned`."""

    def parameters_of(self, layer: int) -> Iterator[nn.Parameter]:
        """The parameters of layer `layer` and its exit; for layer 1, those of the embedding too.

        The memory, the shared head, and an embedding tied to it, belong to no layer.
        """
        raise EaseError("this model does not implement parameters_of: leave out layer_lr_scales")

    def memory_tables(self) -> list[nn.Parameter]:
        """Parameters of which a step reads few rows."""
        return []

    def set_sparse_gradients(self, on: bool) -> None:
        """Whether the gradients of `memory_tables` are sparse. They are dense by default, as most optimizers need."""

    @abstractmethod
    def freeze_below(
        self, first: int, *, head: bool = True, exits: Sequence[int] = (), classifiers: Sequence[int] = ()
    ) -> None:
        """Freezes everything below layer `first` (embedding, memory, layers, exits) and, by default, the shared head.

        Args:
            first: the first layer that learns. The embedding belongs to layer 1 or, in a model with a memory, to layer
                0; if that layer learns, only classifiers are frozen.
            head: whether the shared head is frozen if anything below `first` is.
            exits: exits below `first` that learn nevertheless.
            classifiers: exits whose classifier learns.
        """

    def logits(self, state: Tensor, exit: int) -> Tensor:
        """State (..., D) -> logits (..., V) of the exit after layer `exit`: its own norm, then the shared head."""
        return self.head_logits(self.exit_norm(state, exit))

    def head_logits(self, normed: Tensor) -> Tensor:
        """Normalized state (..., D), as from `exit_norm`, -> logits (..., V) of the shared head with its soft cap."""
        logits: Tensor = self.output_head(normed)
        return capped(logits, self.config.logit_softcap)

    def new_logits(self, *shape: int) -> Tensor:
        """Zeros (*shape, V) of the dtype and device of the head's output."""
        weight = self.output_head.weight
        like = weight if isinstance(weight, Tensor) else next(self.parameters())  # a quantized head has no such tensor
        check_in_memory(like)
        return like.new_zeros(*shape, self.output_head.out_features)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V) of the last layer, always at full depth."""
        return self.logits(self.forward_to_layer(ids, self.num_layers), self.num_layers)

    def forward_to_layer(self, ids: Tensor, layer: int) -> Tensor:
        """ids (B, T) -> state (B, T, D) after layer `layer`."""
        return self.run(self.embed(ids), 1, layer)

    def forward_all_layers(self, ids: Tensor) -> list[Tensor]:
        """ids (B, T) -> logits (B, T, V) of the exits 1 to L, from shallow to deep."""
        state, logits = self.embed(ids), []
        for layer in range(1, self.num_layers + 1):
            state = self.run(state, layer, layer)
            logits.append(self.logits(state, layer))
        return logits

    def check_ids(self, ids: Tensor, vocab_size: int) -> None:
        """Raises `EaseError` for ids outside 0..vocab_size - 1.

        For ids on a device this waits for the device; ids on the host, before they are moved, cost nothing.
        """
        if not ids.numel():
            return
        low, high = torch.stack(ids.aminmax()).cpu().tolist()
        if low < 0 or high >= vocab_size:
            raise EaseError(
                f"token ids must lie in 0..{vocab_size - 1}, got {low}..{high}: "
                "use the tokenizer that the model was trained with, or a larger vocab_size"
            )


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits z as c tanh(z / c) with the soft cap c; None leaves them as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_in_memory(weight: Tensor) -> None:
    """Raises EaseError for a weight without values, as accelerate's offloading leaves them between calls."""
    if weight.is_meta:
        raise EaseError(
            "the weights of the model are not on a device, as after accelerate.cpu_offload: route, score and decode "
            "with a model that is on one device as a whole"
        )


def learnable(module: nn.Module) -> bool:
    """Whether any parameter of `module` is trained."""
    return any(p.requires_grad for p in module.parameters())


Module = TypeVar("Module", bound=nn.Module)


def evaluation_view(model: Module) -> Module:
    """A copy of the model in evaluation mode that shares its weights and hooks; the model itself is not changed.

    A switch of the model's own mode would also reach other threads that train or evaluate it.

    Raises:
        EaseError: the weights have no values.
    """
    check_in_memory(next(model.parameters()))
    views: dict[int, Any] = {
        id(module): module if isinstance(module, torch.jit.ScriptModule) else object.__new__(type(module))
        for module in model.modules()
    }

    def bound_to_view(value: Any) -> Any:
        # A forward that was replaced on an instance (by accelerate's hooks, for example) holds the module itself.
        if isinstance(value, MethodType):
            return MethodType(value.__func__, views.get(id(value.__self__), value.__self__))
        if isinstance(value, partial):
            args = (views.get(id(arg), arg) for arg in value.args)
            return partial(bound_to_view(value.func), *args, **value.keywords)
        return value

    for module in model.modules():
        view = views[id(module)]
        if view is module:
            continue
        attributes = vars(module).copy()
        attributes |= {name: bound_to_view(v) for name, v in attributes.items() if isinstance(v, (MethodType, partial))}
        if module.training:  # a compiled call would run the module itself
            attributes["_compiled_call_impl"] = None
        attributes["_modules"] = {name: views.get(id(part)) for name, part in module._modules.items()}
        attributes["_parameters"], attributes["_buffers"] = module._parameters.copy(), module._buffers.copy()
        vars(view).update(attributes, training=False)
    copied: Module = views[id(model)]
    return copied


def train_mode(model: nn.Module) -> None:
    """Training mode for modules with trainable parameters, evaluation mode (no dropout) for frozen ones."""

    def switch(module: nn.Module, training: bool) -> None:
        # A module without parameters, such as a Dropout, follows the module that it is in.
        if next(module.parameters(), None) is not None:
            training = learnable(module)
        module.training = training
        for child in module.children():
            switch(child, training)

    switch(model, True)


class Batches(Protocol):
    """A re-iterable of what `Batch.of` reads: (x, y), (x, y, active), `Batch`, or dictionaries.

    One iteration is one epoch. If epochs differ and training is to be resumable, it also has `state_dict` and
    `load_state_dict`. If it holds memory that only its phase needs, it also has `release`, which `ease.train` calls at
    the end of the phase.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def re_iterable(batches: Any) -> Any:
    """Returns `batches`; raises `EaseError` for an iterator, which would be empty in the second epoch."""
    if hasattr(batches, "__next__"):  # and not `iter(batches)`, which would begin an epoch
        raise EaseError("batches are a one-shot iterator: pass a list, or an object whose __iter__ starts anew")
    return check_batches(batches)


def check_batches(batches: Any) -> Any:
    """Returns `batches`; raises `EaseError` for what cannot be iterated over."""
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping):
        raise EaseError(f"batches must be an iterable of batches, got {type(batches).__name__}: pass a list of (x, y)")
    return batches


def running_batches(batches: Iterable[Any], device: torch.device | str) -> Iterator[Batch]:
    """The batches as `Batch` on a device, without those in which no token runs."""
    for item in batches:
        batch = Batch.of(item).to(device)
        if bool(batch.running.any()):
            yield batch
