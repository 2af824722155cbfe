"""Data parallelism: what the processes of a training do together, through `torch.distributed`.

- Every process reads the same batches and takes its own rows of each (`part_of`), so that a batch is a function of the
  seed and the step, whatever the number of processes.
- A mean is a sum over all processes divided by a count over all processes, never a mean of means: processes have
  different numbers of active and scored tokens.
- Every process takes part in every collective, also one without a token to learn from.

Without a process group, each function is that of a single process and communicates nothing.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ease.devices import choose_device
from ease.errors import EaseError
from ease.interface import IGNORE, Batch, Layout
from ease.launcher import launched, num_launched

BUCKET = 25 * 2**20  # bytes of gradients that are summed in one collective, as in DistributedDataParallel

TIMEOUT = timedelta(hours=2)  # one process may prepare text for that long; a process that ends is noticed at once


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process() -> int:
    """The number of this process, from 0. The first one writes files and reports progress."""
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------------------------------------------------
# Batches


def part_of(batch: Batch) -> Batch:
    """The rows of a batch that this process takes: contiguous, and as many as every other process takes, or one less.

    A process without a row takes one that neither runs nor is scored. What is a part already is returned as it is.
    """
    size, rows = processes(), len(batch.x)
    if size == 1 or batch.part:
        return batch
    first, end = (rows * n // size for n in (process(), process() + 1))
    taken = slice(first, end) if first < end else slice(0, 1)

    def rows_of(part: object) -> object:
        if isinstance(part, Layout):
            return Layout(part.positions[taken], part.segments[taken])
        return part[taken] if isinstance(part, Tensor) else part

    batch = Batch._make(map(rows_of, batch))._replace(part=True)
    if first < end:
        return batch
    return batch._replace(y=torch.full_like(batch.y, IGNORE), active=torch.zeros_like(batch.x, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------
# Numbers and tensors of all processes


def total(*counts: float) -> list[float]:
    """The sum over all processes of each count."""
    if processes() == 1:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def total_count(count: int) -> int:
    """The sum of a count over all processes."""
    return int(total(count)[0])


def in_all(batch: Batch, count: int) -> int:
    """A count of tokens in the rows of a batch, as the number in the rows that all processes take."""
    return total_count(count) if batch.part else count


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return total(flag)[0] > 0


def place(count: int) -> tuple[int, int]:
    """Where this process's items stand among those of all processes: the number before them, and that of all."""
    counts = [count] if processes() == 1 else _sizes(count)
    return sum(counts[: process()]), sum(counts)


def gather(values: Tensor) -> Tensor:
    """(n, ...) with another n in each process -> (N, ...), those of all processes, in their order."""
    if processes() == 1:
        return values
    sizes = _sizes(len(values))
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_batches(parts: Sequence[Tensor]) -> Tensor:
    """Values (n, ...) of the parts of successive batches -> (N, ...), in the order of one process over whole batches.

    Every process has as many parts as the others, one at least.
    """
    joined = torch.cat(list(parts))
    if processes() == 1:
        return joined
    lengths = gather(torch.tensor([list(map(len, parts))])).tolist()  # by process and batch
    pieces = gather(joined).split([length for row in lengths for length in row])
    number = len(parts)
    return torch.cat([pieces[p * number + batch] for batch in range(number) for p in range(len(lengths))])


def shared_map(function: Callable[[Any], Tensor], items: Sequence[Any]) -> list[Tensor]:
    """Applies `function` to all items, of which every process computes a share; all receive all results.

    Args:
        function: returns a 1-D tensor, of one dtype for all items.
        items: the same in every process.
    """
    number = processes()
    found = [function(item) for item in items[process() :: number]]
    if number == 1 or not items:
        return found
    if len(items) % number and process() >= len(items) % number:
        found.append(function(items[0])[:0])  # every process has as many as the others
    lengths = gather_batches([torch.tensor([len(values)]) for values in found]).tolist()
    return list(gather_batches(found).split(lengths)[: len(items)])


def first_process(tensor: Tensor) -> Tensor:
    """The tensor that the first process has, which has the same shape in all."""
    if processes() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def _sizes(count: int) -> list[int]:
    counts = torch.zeros(processes(), dtype=torch.long)
    counts[process()] = count
    dist.all_reduce(counts)
    return counts.tolist()


# ---------------------------------------------------------------------------------------------------------
# Weights and gradients


def is_sharded(value: object) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`, of which a process has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return module is not None and isinstance(value, module.DTensor)


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Gives every process the weights, the buffers, and the state of torch's generator that the first one has."""
    if processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)
    share_random_state()


def share_random_state() -> None:
    """Gives every process the state of torch's generator that the first one has."""
    if processes() > 1:
        torch.set_rng_state(first_process(torch.get_rng_state()))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sums the gradients of all processes; a parameter has one afterwards if it had one in any process.

    Those of sharded parameters are summed in the backward pass.
    """
    if processes() == 1:
        return
    learning = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    kinds = torch.tensor([0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in learning], dtype=torch.uint8)
    dist.all_reduce(kinds, dist.ReduceOp.MAX)
    dense: dict[torch.dtype, list[Tensor]] = {}
    for p, kind in zip(learning, kinds.tolist(), strict=True):
        if kind == 2:
            p.grad = _sum_sparse(p)
        elif kind == 1:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dense.setdefault(p.dtype, []).append(p.grad)
    buckets = [bucket for grads in dense.values() for bucket in _buckets(grads)]
    flats = [torch.cat([grad.flatten() for grad in bucket]) for bucket in buckets]
    for work in [dist.all_reduce(flat, async_op=True) for flat in flats]:
        work.wait()
    for bucket, flat in zip(buckets, flats, strict=True):
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and sum(g.nbytes for g in bucket) + grad.nbytes > BUCKET:
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def _sum_sparse(p: Tensor) -> Tensor:
    """The gradients of the rows of a table that any process has looked up, a row once for each of these processes."""
    none = (torch.zeros(1, 0, dtype=torch.long, device=p.device), p.new_zeros(0, *p.shape[1:]))
    grad = (torch.sparse_coo_tensor(*none, p.shape) if p.grad is None else p.grad).coalesce()
    rows, values = gather(grad.indices().T.contiguous()), gather(grad.values())
    return torch.sparse_coo_tensor(rows.T, values, p.shape, check_invariants=False)


# ---------------------------------------------------------------------------------------------------------
# The group


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun has started, and leaves them at the end; gives the device of this process.

    Numbers on the host are exchanged through gloo, tensors on a GPU through NCCL, one GPU per process.

    Args:
        device: a device as `choose_device` takes it; "auto" and "cuda" give each process of a machine its own GPU.

    Raises:
        EaseError: there is no such device, or another process has ended.
    """
    if num_launched() == 1 or dist.is_initialized():
        yield choose_device(device)
        return
    device = choose_device(device)
    if device.startswith("cuda"):
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise EaseError(f"several processes train on cpu or cuda, not on {device}: set --device")
    backend, store = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", _launchers_store()
    dist.init_process_group(backend, store=store, rank=launched(), world_size=num_launched(), timeout=TIMEOUT)
    try:
        yield device
    except EaseError:
        first_to_report()  # before the others notice that this process leaves
        raise
    except (RuntimeError, dist.DistError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise EaseError("another process of the training has ended: run the same command again to resume") from error
    finally:
        leave_group()


def leave_group() -> None:
    """Ends the group, after which each process is on its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every process is here."""
    any_of(False)


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process runs the block before the others do, which then find its files."""
    if process():
        barrier()
    yield
    if not process():
        barrier()


@functools.cache
def first_to_report() -> bool:
    """Whether this process is the first of its launch that reports an error; the others do not report theirs."""
    try:
        return bool(_launchers_store().add("errors", 1) == 1)
    except Exception:  # the store ended with its process; an error may then be reported twice
        return True


@functools.cache
def _launchers_store() -> Any:
    """The key-value store of the launcher, through which the processes find each other."""
    store, *_ = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    # On one machine torchrun keeps its store after a restart, in which the addresses of ended processes remain.
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return c10d.PrefixStore(f"ease/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else ''}", store)
