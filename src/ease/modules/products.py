"""Matrix products with few rows on a CPU: oneDNN with the weight in its own blocked layout.

torch's `F.linear` reads a weight of float32 in its stored layout, through a routine made for many rows. A decoding step
has few. With the weight reordered, a product with a few rows takes little more time than reading the weight once. The
reordered weight is a copy: it is made at the first product that is large enough, kept as long as the weight exists, and
made again when the weight has changed. `benchmarks/generation.py` prints what a pass over several tokens costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ease.devices import free_memory

MIN_PRODUCT = 2**20  # rows times parameters: below, the call itself costs more than it saves

Product = Callable[[Tensor], Tensor]


class _Reordered(NamedTuple):
    weight: Tensor  # in oneDNN's layout
    probe: Tensor  # (in,) a random vector
    image: Tensor  # (out,) its product with the weight


_reordered = WeakTensorKeyDictionary()


def supported(weight: Tensor) -> bool:
    """Whether oneDNN has a blocked layout for products with `weight` (out, in)."""
    return (
        type(weight) in (Tensor, nn.Parameter)  # a quantized weight is a subclass
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def reorder(weight: Tensor) -> Tensor:
    """A copy of `weight` (out, in) in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)  # type: ignore[no-any-return]


def multiply(x: Tensor, reordered: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transposed weight, plus the bias: (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), reordered, bias, "none", [], "")  # type: ignore[no-any-return]


def inference_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """The function of a linear layer, faster for calls without gradients and autocast on a CPU."""
    if not supported(weight):
        return lambda x: F.linear(x, weight, bias)
    found: list[Tensor | None] = []

    def product(x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        small = rows * weight.numel() < MIN_PRODUCT
        if small or x.dtype != weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        if not found:
            found.append(_current(weight))
        return F.linear(x, weight, bias) if found[0] is None else multiply(x, found[0], bias)

    return product


def _current(weight: Tensor) -> Tensor | None:
    """The reordered copy of the weight as it is now; None if there is no memory for one.

    A change through `weight.data` (merged adapters, for example) leaves no trace, so that the copy is compared by its
    product with a random vector, which costs as much as one row.
    """
    known: _Reordered | None = _reordered.get(weight)
    probe = _probe(weight.shape[1]) if known is None else known.probe
    image = F.linear(probe, weight.detach())
    if known is not None and torch.equal(image, known.image):
        return known.weight
    if free_memory(weight.device) < 4 * weight.nbytes:
        return None
    _reordered[weight] = made = _Reordered(reorder(weight), probe, image)
    return made.weight


def _probe(size: int) -> Tensor:
    """A random vector (size,) that leaves torch's generators, which draw the user's samples, as they are."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")


def packed_product(*parts: nn.Linear) -> Product:
    """The products of several layers without bias and with one input, concatenated, from a copy of their weights.

    For calls without gradients and autocast.
    """
    weight = torch.cat([part.weight.detach() for part in parts])
    transposed = weight.t().contiguous()  # faster than the stored layout for a few rows
    if not supported(weight):
        return lambda x: x @ transposed
    reordered, least = reorder(weight), MIN_PRODUCT // weight.numel()
    return lambda x: x @ transposed if len(x) < least else multiply(x, reordered)
