"""A key/value cache that grows by doubling instead of by copying itself for every token."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, Hkv, length, D), as views of a buffer with room to grow.

    Appending writes the new tokens only; a full buffer is replaced by one twice as long. Cropping,
    reordering and choosing rows are the parent's: what no longer is a view of the buffer gets a new
    one at the next append.
    """

    ROOM = 256  # smallest number of tokens in a buffer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers: dict[str, torch.Tensor] = {}

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (B, Hkv, n, D) and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def room(self) -> int:
        """How many tokens can be written behind the present ones where they are."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return 0
        held = {"keys": self.keys, "values": self.values}
        spare = [
            buffer.shape[-2] - held[name].shape[-2] if _begins(buffer, held[name]) else 0
            for name, buffer in self.buffers.items()
        ]
        return min(spare, default=0)

    def take_in(self, n: int) -> None:
        """Count `n` tokens in that somebody else has written to the buffers."""
        end = self.get_seq_length() + n
        self.keys = self.buffers["keys"][:, :, :end]
        self.values = self.buffers["values"][:, :, :end]

    def _append(self, name: str, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if old is None or not old.numel():
            old = new[:, :, :0]
        length = old.shape[-2]
        total = length + new.shape[-2]
        buffer = self.buffers.get(name)
        if buffer is None or total > buffer.shape[-2] or not _begins(buffer, old):
            batch, heads, _, width = new.shape
            buffer = new.new_empty(batch, heads, max(self.ROOM, 2 * total), width)
            buffer[:, :, :length] = old
            self.buffers[name] = buffer
        buffer[:, :, length:total] = new
        return buffer[:, :, :total]


def _begins(buffer: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether `old` is a view of the buffer's first tokens."""
    return (
        old.numel() > 0
        and old.data_ptr() == buffer.data_ptr()
        and old.shape[:2] == buffer.shape[:2]
    )


def new_cache(config) -> DynamicCache:
    """transformers' cache for a model of this config, its full-attention layers growing ones."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(c) is DynamicLayer else c for c in cache.layers]
    return cache
