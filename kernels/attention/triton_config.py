"""Tile sizes of the attention kernels: pure functions of dtype, widths, features and GPU.

Triton has no name for "the interpreter" among its targets; here capability None stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of one tile, and the launch options that go with them."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# several tiles at the shapes that the interpreter can afford
_INTERPRETED = Tiles(queries=32, keys=16, num_warps=4, num_stages=1)


def block_width(width: int) -> int:
    """The power of two that holds a row; 16 is the least a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def forward_tiles(capability, dtype: torch.dtype, width: int, is_crowded: bool = False) -> Tiles:
    """width: the larger of the blocks of D and Dv. is_crowded: softcap or dropout hold registers
    beside the scores."""
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return Tiles(32, 64, 8, 2) if width <= 128 else Tiles(16, 64, 8, 1)
    if capability >= (9, 0):
        if width <= 64:
            return Tiles(128, 128, 8, 3)
        if width <= 128:
            return Tiles(128, 64, 8, 2) if is_crowded else Tiles(128, 128, 8, 2)
        return Tiles(128, 64, 8, 2)
    if width <= 64:
        return Tiles(128, 64, 8, 3)
    if width <= 128:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 8, 2)


def dq_tiles(capability, dtype: torch.dtype, width: int) -> Tiles:
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return Tiles(32, 64, 8, 1) if width <= 128 else Tiles(16, 32, 8, 1)
    if capability >= (9, 0):
        if width <= 64:
            return Tiles(128, 128, 8, 2)
        if width <= 128:
            return Tiles(128, 64, 8, 2)
        return Tiles(64, 32, 8, 2)
    if width <= 64:
        return Tiles(128, 64, 8, 2)
    if width <= 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(64, 32, 8, 1)


def dkv_tiles(capability, dtype: torch.dtype, width: int, is_crowded: bool = False) -> Tiles:
    """is_crowded: documents, segments, softcap or dropout hold registers beside the sums."""
    if capability is None:
        return Tiles(queries=16, keys=32, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= 128 else Tiles(16, 32, 8, 1)
    if capability >= (9, 0):
        if width <= 128:
            return Tiles(32 if is_crowded and width > 64 else 64, 128, 8, 2)
        return Tiles(32, 64, 8, 2)
    if width <= 64:
        return Tiles(32, 128, 8, 2)
    if width <= 128:
        return Tiles(32, 64, 8, 2)
    return Tiles(32, 64, 8, 1)


def dkv_passes(width: int, has_dropout: bool = False) -> tuple[tuple[bool, bool], ...]:
    """(wants dK, wants dV) of each launch. Wide rows leave registers for one accumulator only, and
    so does dropout beside rows of 128."""
    if width > 128 or (has_dropout and width > 64):
        return ((True, False), (False, True))
    return ((True, True),)


@dataclass(frozen=True)
class DecodeTiles(Tiles):
    """chunk: how many keys one partial result covers; results depend on it, so it is fixed."""

    chunk: int = 256


def decode_tiles(capability, dtype: torch.dtype, width: int, n_rows: int) -> DecodeTiles:
    """n_rows: queries times the query heads of one kv head, which share each tile of keys."""
    if capability is None:
        return DecodeTiles(queries=16, keys=16, num_warps=4, num_stages=1, chunk=32)
    queries = 16 if n_rows <= 16 else 32 if n_rows <= 32 else 64
    if dtype == torch.float32:
        return DecodeTiles(16, 32, 4, 2)
    keys = 64 if width <= 128 else 32
    return DecodeTiles(queries, keys, 4 if queries == 16 else 8, 3)
