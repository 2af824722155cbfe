"""Sharded training (FSDP2, `torch.distributed.fsdp.fully_shard`): each process keeps a part of every layer that learns.

The weights of a layer are gathered while it runs; its gradient and its optimizer state exist only in parts. Embedding,
head, exits, and frozen layers stay whole in every process. Sharding lasts for a phase, so that mining, growth, and
strategies meet whole models; layers that a phase adds are sharded when its training starts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ease.errors import EaseError
from ease.interface import ExitModel, learnable
from ease.models import StandardTransformer
from ease.training.distributed import is_sharded, processes


@contextmanager
def sharded(model: ExitModel, enabled: bool) -> Iterator[None]:
    """A context in which the layers that learn are sharded over all processes; afterwards they are whole again.

    After an error inside they stay sharded.

    Raises:
        EaseError: the model is not a `StandardTransformer`.
    """
    if not enabled or processes() == 1:
        yield
        return
    # Here, since importing it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not isinstance(model, StandardTransformer):
        raise EaseError(f"{type(model).__name__} cannot be sharded: leave out parallel")
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (processes(),))
    whole: dict[int, nn.Module] = {}
    for number, layer in enumerate(model.layers):
        if learnable(layer):
            part: Any = fully_shard(copy.deepcopy(layer), mesh=mesh, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes
            part.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
            whole[number] = layer.to("meta")  # keeps the module without its memory
            model.layers[number] = part
    yield
    for number, layer in whole.items():
        weights = unsharded(dict(model.layers[number].named_parameters()))
        model.layers[number] = layer.to_empty(device=device)
        layer.load_state_dict(weights)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which every layer is whole in every process, for passes in which processes run different layers."""
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True)
            part.reshard()


def unsharded(value: Any) -> Any:
    """Nested dictionaries and lists, in which every sharded tensor is whole; all processes take part."""
    if is_sharded(value):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: unsharded(part) for key, part in value.items()}
    return [unsharded(part) for part in value] if isinstance(value, list | tuple) else value


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in parts if that of the same shape is."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole: Any = like
    return distribute_tensor(value.to(whole.device), whole.device_mesh, whole.placements)


def local_part(tensor: Any) -> Tensor:
    """The part of a sharded tensor that is in this process."""
    local: Tensor = tensor.to_local()
    return local


def norm_of_parts(parts: list[Tensor]) -> Tensor:
    """The norm of sharded tensors, of which each process has its part."""
    squared: Tensor = torch.nn.utils.get_total_norm(parts) ** 2
    dist.all_reduce(squared)
    return squared.sqrt()
