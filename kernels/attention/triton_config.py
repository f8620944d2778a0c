"""Tile sizes of the attention kernels: pure functions of the problem and of how tiles are read.

Triton has no name for "the interpreter" among its targets; here capability None stands for it.

Two families. Where tiles come by the bulk copy engine (`by_descriptor`: 16-bit types on Hopper),
products are wgmma and a tile may fill 227 KiB of shared memory. All others stay within the 99 KiB
that every GPU from compute capability 8.0 on has. Sizes are the largest whose registers fit;
`tests/test_triton_compile.py` counts spills, README.md has the clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewright.ops.attention.problem import Problem


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


def width_of(p: Problem) -> int:
    """The larger of the blocks of D and Dv."""
    return block_width(max(p.head_dim, p.value_dim))


def forward_tiles(capability, p: Problem, by_descriptor: bool) -> Tiles:
    if capability is None:
        return _INTERPRETED
    width = width_of(p)
    if p.dtype == torch.float32:
        return Tiles(32, 64, 8, 2) if width <= 128 else Tiles(16, 64, 8, 1)
    if by_descriptor:
        if width <= 64:
            return Tiles(128, 128, 8, 3)
        if width <= 128:
            # softcap and dropout hold registers beside the scores
            return Tiles(128, 64 if p.softcap > 0 or p.dropout_p > 0 else 128, 8, 2)
        return Tiles(128, 32 if p.dropout_p > 0 else 64, 8, 2)
    if width <= 64:
        return Tiles(128, 32 if p.dropout_p > 0 else 64, 8, 3)
    if width <= 128:
        return Tiles(128, 32, 8, 3)
    return Tiles(64, 32, 8, 2)


def dq_tiles(capability, p: Problem, by_descriptor: bool) -> Tiles:
    if capability is None:
        return _INTERPRETED
    width = width_of(p)
    if p.dtype == torch.float32:
        return Tiles(32, 64, 8, 1) if width <= 128 else Tiles(16, 32, 8, 1)
    if by_descriptor:
        if width <= 64:
            return Tiles(128, 64 if p.dropout_p > 0 else 128, 8, 2)
        return Tiles(128, 64 if width <= 128 else 32, 8, 2)
    if width <= 64:
        return Tiles(128, 32 if p.dropout_p > 0 else 64, 8, 2)
    if width <= 128:
        return Tiles(64, 64, 8, 2)
    is_crowded = p.dropout_p > 0 or p.key_mask is not None
    return Tiles(32, 32, 4, 1) if is_crowded else Tiles(64, 32, 8, 1)


def dkv_tiles(capability, p: Problem, by_descriptor: bool, wants_dk: bool) -> Tiles:
    if capability is None:
        return Tiles(queries=16, keys=32, num_warps=4, num_stages=1)
    width = width_of(p)
    if p.dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= 128 else Tiles(16, 32, 8, 1)
    has_dropout, has_documents = p.dropout_p > 0, p.cu_seqlens_q is not None
    if by_descriptor:
        if width <= 64:
            return Tiles(32 if has_dropout else 64, 128, 8, 2)
        if width <= 128:
            is_crowded = p.softcap > 0 or has_dropout or p.group_size > 0 or p.key_mask is not None
            if has_documents:
                return Tiles(32, 128, 8, 3)
            return Tiles(32 if is_crowded else 64, 128, 8, 2)
        if has_dropout:
            return Tiles(32, 64, 8, 2) if wants_dk else Tiles(16, 128, 8, 2)
        return Tiles(16 if wants_dk and has_documents and p.group_size > 0 else 32, 128, 8, 2)
    if width <= 64:
        return Tiles(16 if p.softcap > 0 else 32, 128, 8, 1 if has_dropout else 2)
    if width <= 128:
        return Tiles(32, 64, 8, 1 if has_dropout else 2)
    return Tiles(32, 32 if wants_dk and has_dropout else 64, 8, 1)


def dkv_passes(p: Problem) -> tuple[tuple[bool, bool], ...]:
    """(wants dK, wants dV) of each launch. Wide rows leave registers for one accumulator only, and
    so does dropout beside rows of 128."""
    width = width_of(p)
    if width > 128 or (p.dropout_p > 0 and width > 64):
        return ((True, False), (False, True))
    return ((True, True),)


@dataclass(frozen=True)
class DecodeTiles(Tiles):
    """Results depend on both of these, so they do not depend on lengths or processors.

    chunk      how many keys one partial result covers
    combined   how many partial results are read at once when they are combined
    """

    chunk: int = 256
    combined: int = 32


def decode_tiles(capability, p: Problem) -> DecodeTiles:
    if capability is None:
        return DecodeTiles(16, 16, 4, 1, chunk=32, combined=4)
    n_rows = p.n_queries * p.queries_per_kv_head  # they share each tile of keys
    queries = 16 if n_rows <= 16 else 32 if n_rows <= 32 else 64
    if p.dtype == torch.float32:
        return DecodeTiles(16, 32, 4, 2)
    keys = 64 if width_of(p) <= 128 else 32
    return DecodeTiles(queries, keys, 4 if queries == 16 else 8, 3)
