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


def forward_tiles(capability, dtype: torch.dtype, width: int) -> Tiles:
    """width: the larger of the blocks of D and Dv."""
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return Tiles(64, 32, 8, 2) if width <= 64 else Tiles(32, 32, 8, 2)
    if capability >= (9, 0):
        if width <= 64:
            return Tiles(128, 128, 8, 3)
        if width <= 128:
            return Tiles(128, 128, 8, 2)
        return Tiles(128, 64, 8, 2)
    if width <= 64:
        return Tiles(128, 64, 4, 3)
    if width <= 128:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 4, 2)


def dq_tiles(capability, dtype: torch.dtype, width: int) -> Tiles:
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1)
    if capability >= (9, 0):
        if width <= 64:
            return Tiles(128, 128, 8, 2)
        if width <= 128:
            return Tiles(128, 64, 8, 2)
        return Tiles(128, 32, 8, 2)
    if width <= 64:
        return Tiles(128, 64, 8, 2)
    if width <= 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(64, 32, 8, 1)


def dkv_tiles(capability, dtype: torch.dtype, width: int) -> Tiles:
    if capability is None:
        return Tiles(queries=16, keys=32, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1)
    if capability >= (9, 0):
        if width <= 64:
            return Tiles(64, 128, 8, 2)
        if width <= 128:
            return Tiles(64, 128, 8, 2)
        return Tiles(32, 128, 8, 2)
    if width <= 64:
        return Tiles(32, 128, 8, 2)
    if width <= 128:
        return Tiles(32, 64, 8, 2)
    return Tiles(32, 64, 8, 1)


def dkv_passes(dtype: torch.dtype, width: int) -> tuple[tuple[bool, bool], ...]:
    """(wants dK, wants dV) of each launch: past 128 columns two accumulators do not fit registers."""
    return ((True, False), (False, True)) if width > 128 else ((True, True),)
