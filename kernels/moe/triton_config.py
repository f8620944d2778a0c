"""Tile sizes of the Triton kernels of the room: pure functions of the problem.

Capability None stands for Triton's interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.ops.moe.problem import DENSE, Problem

PROCESSORS = 132  # of an H100 or H200, where the GPU is not here to be asked
HAS_228_KIB = (9, 10)  # major compute capabilities; others may have 99 KiB of shared memory


class Tiles(NamedTuple):
    """rows of an expert, lanes (outputs of its weight) and depth of a tile, and launch options.

    of_processor   programs that fit on a processor at once
    """

    rows: int
    lanes: int
    depth: int
    num_warps: int
    num_stages: int
    of_processor: int


def block(n: int, least: int, most: int) -> int:
    """The power of two that holds n, between least and most."""
    return min(max(least, 1 << max(n - 1, 0).bit_length()), most)


def is_packed(p: Problem) -> bool:
    """Both weights are or neither is."""
    return p.up.format != DENSE


def row_tile(capability, p: Problem) -> int:
    """As many rows as an expert has on average; few experts or none have fewer than 16."""
    if capability is None:
        return 16
    average = -(-p.tokens * p.slots // max(p.experts, 1))
    return block(average, 16, 64 if p.dtype == torch.float32 else 128)


def up_tiles(capability, p: Problem) -> Tiles:
    """Of the product with two sums: gate and up."""
    rows = row_tile(capability, p)
    if capability is None:
        return Tiles(rows, 16, 32, 4, 1, 1)
    if p.dtype == torch.float32:
        return Tiles(rows, 32, 32, 8, 2, 1)
    is_plain = not (p.interleaved or is_packed(p))  # decoding and taking apart cost registers
    if rows == 128 and capability[0] in HAS_228_KIB and is_plain:
        return Tiles(rows, 128, 64, 8, 3, 1)
    return Tiles(rows, 64, 64, 8 if rows == 128 else 4, 3, 2)


def product_tiles(capability, p: Problem, n_out: int) -> Tiles:
    """Of a product with one sum; n_out is small for low-rank updates."""
    rows = row_tile(capability, p)
    if capability is None:
        return Tiles(rows, 32, 32, 4, 1, 1)
    lanes = block(n_out, 16, 128)
    if p.dtype == torch.float32:
        return Tiles(rows, min(lanes, 64), 32, 8 if lanes >= 64 else 4, 2, 1)
    is_large = rows == 128 and lanes == 128 and n_out >= 256 and not is_packed(p)
    if is_large and capability[0] in HAS_228_KIB:
        return Tiles(rows, 256, 64, 8, 3, 1)
    return Tiles(rows, lanes, 64, 8 if rows * lanes >= 16384 else 4, 3, 2)


def gated_backward_tiles(capability, p: Problem) -> Tiles:
    """Of the product whose end makes dz: one sum, but as much to do at its end as with two."""
    rows = row_tile(capability, p)
    if capability is None:
        return Tiles(rows, 32, 32, 4, 1, 1)
    if p.dtype == torch.float32:
        return Tiles(rows, 64, 32, 8, 2, 1)
    if rows == 128 and (p.interleaved or is_packed(p)):
        return Tiles(rows, 64, 64, 16, 3, 1)
    return Tiles(rows, 64, 64, 8 if rows == 128 else 4, 3, 1)


def outer_tiles(capability, p: Problem, n_left: int, n_right: int) -> tuple[int, int, Tiles]:
    """(left, right) extents of a tile of a weight's gradient; depth is rows."""
    if capability is None:
        return 32, 32, Tiles(0, 0, 16, 4, 1, 1)
    depth = max(16, min(64, row_tile(capability, p)))
    most = 64 if p.dtype == torch.float32 else 128
    left, right = block(n_left, 16, most), block(n_right, 16, most)
    if p.dtype == torch.float32:
        return left, right, Tiles(0, 0, min(depth, 32), 8, 2, 1)
    return left, right, Tiles(0, 0, depth, 8 if left * right >= 8192 else 4, 3, 2)
