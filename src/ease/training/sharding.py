"""Sharded training (FSDP2, `torch.distributed.fsdp.fully_shard`): each process keeps a part of every layer that learns.

The weights of a layer are gathered while it runs; its gradient and its optimizer state exist only in parts. Embedding,
head, exits, and frozen layers stay whole in every process. Sharding lasts for a phase, so that mining, growth, and
strategies meet whole models; layers that a phase adds are sharded when its training starts.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ease.errors import EaseError, first_line
from ease.files import checksum
from ease.interface import ExitModel, learnable
from ease.models import StandardTransformer
from ease.training.distributed import gather, is_sharded, process, processes


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


class StoredTensor(NamedTuple):
    """A tensor that `write_parts` has written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def loaded_like(value: Tensor | StoredTensor, like: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """A tensor of a checkpoint, in parts if the tensor `like` of the same shape is.

    A stored one is returned without its values and added to `stored`, for `read_parts`.
    """
    whole: Any = like
    in_parts = is_sharded(like) and value.shape == like.shape
    if isinstance(value, StoredTensor):
        target = torch.empty_like(whole, dtype=value.dtype) if in_parts else torch.empty(value.shape, dtype=value.dtype)
        return stored.setdefault(value.name, target)
    if not in_parts:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(whole.device), whole.device_mesh, whole.placements)


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Writes sharded tensors into a folder, every process its parts (`torch.distributed.checkpoint`, as safetensors).

    Returns:
        The SHA-256 of every file.

    Raises:
        EaseError: a process cannot write; the folder is then removed.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _storage_errors(f"{folder} could not be written", "make room, or choose another folder"):
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except BaseException:
        if not process():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    files = [folder / f"shard-{number + 1:05}-model-00001-of-00001.safetensors" for number in range(processes())]
    own = files[process()]  # a process without a part has none
    found = gather(torch.tensor([list(bytes.fromhex(checksum(own))) if own.exists() else [0] * 32], dtype=torch.uint8))
    sums = {file.name: bytes(row).hex() for file, row in zip(files, found.tolist(), strict=True)}
    return {name: value for name, value in sums.items() if int(value, 16)}


def read_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, sharded over any number of processes or whole, with what `write_parts` wrote.

    Raises:
        EaseError: a process cannot read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote
        with _storage_errors(f"{folder} could not be read", "see that every process can read it"):
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _storage_errors(failure: str, fix: str) -> Iterator[None]:
    """A context that turns the errors that processes had in storage into one sentence; an interrupt stays one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
        raise EaseError(f"{failure} ({first_line(cause)}): {fix}") from error


def local_part(tensor: Any) -> Tensor:
    """The part of a sharded tensor that is in this process."""
    local: Tensor = tensor.to_local()
    return local


def norm_of_parts(parts: list[Tensor]) -> Tensor:
    """The norm of sharded tensors, of which each process has its part."""
    squared: Tensor = torch.nn.utils.get_total_norm(parts) ** 2
    dist.all_reduce(squared)
    return squared.sqrt()
