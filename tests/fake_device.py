"""A device that is the CPU under another name, to count on any machine what would wait for an accelerator.

A `DeviceTensor` holds a CPU tensor and says that it is elsewhere. Operations run on the CPU. As on CUDA, an operation
that mixes it with a tensor of the host is an error (unless that is a single number), and an operation waits for the
device if the host needs its result, such as `item`, `nonzero` and indexing with a mask, or if it copies and does not
say `non_blocking`.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("lazy", 0)  # a type whose name torch knows and that needs no driver

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceTensor(Tensor):
    """A CPU tensor `inner` that says that it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        shape, strides, offset = inner.shape, inner.stride(), inner.storage_offset()
        options = {"strides": strides, "storage_offset": offset, "dtype": inner.dtype, "device": DEVICE}
        wrapper: DeviceTensor = Tensor._make_wrapper_subclass(cls, shape, **options)  # type: ignore[attr-defined]
        return wrapper

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a FakeDevice")


def there(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


class FakeDevice(TorchDispatchMode):
    """Inside, `DEVICE` exists, and `waits` counts the operations that wait for it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name == "_fused_sdp_choice":
            return 0  # the kernel that is plain mathematics
        kwargs = dict(kwargs or {})
        values, spec = tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        on_device = any(map(there, tensors))
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
            values, spec = tree_flatten((args, kwargs))
        self._count(name, func, args, kwargs, tensors, on_device)
        plain_args, plain_kwargs = tree_unflatten([value.inner if there(value) else value for value in values], spec)
        result = func(*plain_args, **plain_kwargs)
        if name.endswith("_") and not name.endswith("__"):  # in place: the argument itself is the result
            return args[0] if func._schema.returns else None
        return tree_map(lambda t: DeviceTensor(t) if isinstance(t, Tensor) and on_device else t, result)

    def _count(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], on_device: bool
    ) -> None:
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], there(args[0])) if name == "copy_" else (args[0], on_device)
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if there(source) and not target:
                self.waits["copy to the host"] += 1
            elif target and not there(source) and source.ndim and blocking:
                self.waits["copy to the device that blocks"] += 1
            return
        if not any(map(there, tensors)):
            return
        if any(not there(t) and t.ndim for t in tensors):
            raise RuntimeError(f"{name} mixes a tensor of the device with one of the host")
        masked = name in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masked or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self.waits[name] += 1


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """The device; AdamW's fused kernel, which CUDA has, exists there too."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type])
    with FakeDevice() as device:
        yield device
