"""The native cache as a transformers cache.

transformers counts columns of the batch, padding included; the native cache counts the tokens of each row. This class
adds which columns hold a token, and translates the operations of `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ease.errors import EaseError
from ease.interface import Layout, to_device
from ease.model_config import ModelConfig
from ease.modules.cache import Cache as NativeCache
from ease.modules.prefix import Prefix as Prefix  # other files may not import the inside of layers


class EaseCacheLayer(CacheLayerMixin):
    """Copies of the keys and values of one layer, for tools that read them.

    They are zero where a column holds padding, or a token that left below this layer and is not computed yet.
    """

    is_initialized = True
    is_croppable = True

    def __init__(self, cache: EaseCache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._columns(self.cache.native.keys[self.index])

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._columns(self.cache.native.values[self.index])

    def _columns(self, stored: Tensor) -> Tensor:
        """(B, H_kv, capacity, head_dim) by place in the row -> (B, H_kv, columns, head_dim)."""
        real = to_device(self.cache.real, stored.device)
        places = (real.cumsum(1) - 1).clamp(min=0)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
        return stored.gather(2, places) * real[:, None, :, None]

    @property
    def batch_size(self) -> int:
        return len(self.cache.real)

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *_: Any) -> None:
        """Does nothing: the memory exists."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise EaseError("this cache is written by the model that created it: pass it as past_key_values")


class EaseCache(Cache):
    """The cache of a batch. It is valid for the policy and the weights that the model had when it was created.

    Attributes:
        native: keys, values and states.
        real: (B, T) true where a column read so far holds a token, false for padding; on the host.
    """

    def __init__(self, native: NativeCache) -> None:
        # Not `super().__init__`, which stores layers: they are made when they are read.
        self.layer_class_to_replicate, self.offloading = None, False
        self.native = native
        self.real = torch.ones(len(native.length), 0, dtype=torch.bool)

    @classmethod
    def after(cls, prefix: Prefix, native: NativeCache) -> EaseCache:
        """A cache whose rows begin with a prefix.

        Args:
            native: an empty cache with room for the prefix.
        """
        cache, P = cls(native), len(prefix)
        native.keys[:, :, :, :P], native.values[:, :, :, :P] = (
            torch.stack([*prefix.keys]),
            torch.stack([*prefix.values]),
        )
        native.length[:], native.filled[:] = P, P
        cache.real = cache.real.new_ones(len(cache.real), P)
        return cache

    @property
    def layers(self) -> list[EaseCacheLayer]:  # type: ignore[override]
        """Keys and values of each layer, to read."""
        return [EaseCacheLayer(self, index) for index in range(len(self.native.blocks))]

    @property
    def max_cache_len(self) -> int:
        """Columns for which there is memory; it grows as needed."""
        return self.native.capacity

    def admit(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout:
        """Makes room for the next tokens and returns their layout, on the host; it takes one wait for the device.

        Args:
            ids: (B, T), the tokens after those read so far.
            attention_mask: (B, columns read + T); by default all T tokens are real. The last tokens of a row may be
                padding now, as what `generate` appends to a row that has ended: they are removed.
            position_ids: (B, T), which must continue the positions of each row.

        Raises:
            EaseError: ids, mask or positions do not continue the cached rows.
        """
        (B, T), (rows, columns) = ids.shape, self.real.shape
        real = torch.ones(B, T, dtype=torch.bool)
        continues = rows == B
        if continues and attention_mask is not None:
            mask = attention_mask.cpu().bool()
            continues = mask.shape == (rows, columns + T)
            seen, real = mask[:, :columns], mask[:, columns:]
            if continues and not torch.equal(seen, self.real):
                ended = self.real & ~seen
                continues = not bool((seen & (~self.real | (ended.cumsum(1) > 0))).any())
                if continues:
                    self._keep(seen)
        if not continues:
            raise EaseError(
                f"the cache holds {columns} columns of {rows} rows: give ids of {rows} rows, and an attention_mask "
                f"({rows}, {columns + T}) whose first {columns} columns are unchanged, except that the last tokens of "
                "a row may be padding now"
            )
        places = self.native.next(real)
        if position_ids is not None and not torch.equal(position_ids.cpu().expand(B, T)[real], places[real]):
            raise EaseError(
                "position_ids must continue the cached rows, which hold one text each: leave position_ids out, or set "
                "use_cache=False"
            )
        longest = int(self.native.length.max()) + T
        if longest > self.native.capacity:
            self.native.grow(2 * longest)
        return Layout.from_attention_mask(real)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.real.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns; their number is negative, as in transformers."""
        self._keep(self.real[:, : tokens_to_remove or None])

    def reset(self) -> None:
        """Removes all columns."""
        self._keep(self.real[:, :0])

    def _keep(self, real: Tensor) -> None:
        self.real = real
        self.native.cut(real.sum(1))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces the rows by those at `indices` (N,), which may repeat."""
        indices = indices.long().cpu()
        self.native.select(indices.numpy())
        self.real = self.real[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows after a step of beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.batch_select_indices(torch.arange(len(self.real)).repeat_interleave(repeats))


def prefix_of(cache: Cache, rows: int, config: ModelConfig) -> Prefix:
    """The keys and values of a cache of stock transformers, as that of prefix tuning.

    Args:
        rows: number of rows B of the call.
        config: the shape of the model.

    Raises:
        EaseError: they do not have the shape of the model's.
    """
    layers: list[Any] = list(cache.layers)
    P, expected = cache.get_seq_length(), (rows, config.kv_heads, cache.get_seq_length(), config.head_size)
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    if len(layers) != config.num_layers or any(tensor.shape != expected for tensor in tensors):
        raise EaseError(
            f"past_key_values must have keys and values {expected} of {config.num_layers} layers for its {P} places: "
            "pass what a model of this shape returned, or a prefix trained for it"
        )
    return Prefix(tensors[::2], tensors[1::2])
