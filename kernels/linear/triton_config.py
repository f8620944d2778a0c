"""Tile sizes of the linear kernels: pure functions of the problem.

Triton has no name for "the interpreter" among its targets; here capability None stands for it.
Sizes stay within the 99 KiB of shared memory that every GPU from compute capability 8.0 on has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewright.ops.linear.problem import DENSE, Problem

FEW_TOKENS = 64  # up to here reading the weight takes longer than multiplying by it
PROCESSORS = 132  # of an H100 or H200; results depend on the splits, so not those of this GPU


@dataclass(frozen=True)
class Tiles:
    """Extents of one tile, and the launch options that go with them."""

    out: int
    tokens: int
    inputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NarrowTiles:
    """Rows and contraction of a tile of a narrow product."""

    rows: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DeltaTiles:
    """Rows of a sparse delta, entries of each taken at once, and tokens."""

    rows: int
    entries: int
    tokens: int


def block(n: int, least: int, most: int) -> int:
    """The power of two that holds n, between least and most."""
    return min(max(least, 1 << max(n - 1, 0).bit_length()), most)


def rank_block(rank: int) -> int:
    return block(rank, 16, 32)


def groups_of(p: Problem) -> int:
    return -(-p.in_features // p.group_size) if p.group_size else 1


def has_one_group(p: Problem, inputs: int) -> bool:
    """Whether all inputs of any tile share a scale."""
    return p.format == DENSE or groups_of(p) == 1 or p.group_size % inputs == 0


def has_late_scales(capability, p: Problem, tiles: Tiles) -> bool:
    """Whether to multiply a tile's sums by its scales instead of its weights: fewer operations as
    long as there are fewer tokens than inputs. Not in float32, where an offset would cancel what
    the sums have lost."""
    if p.int8_activations:
        return True
    most = 16 if capability is None else 32
    is_few = p.tokens <= most and p.format != DENSE and p.dtype != torch.float32
    return is_few and has_one_group(p, tiles.inputs)


def forward_tiles(capability, p: Problem) -> Tiles:
    tiles = _forward_tiles(capability, p)
    if not p.int8_activations:
        return tiles
    # a product of whole numbers must not mix scales; why_not refuses groups not divisible by 32
    inputs = tiles.inputs
    while not has_one_group(p, inputs):
        inputs //= 2
    return Tiles(tiles.out, tiles.tokens, inputs, tiles.num_warps, tiles.num_stages)


def _forward_tiles(capability, p: Problem) -> Tiles:
    if capability is None:
        return Tiles(32, 16, 32, 4, 1)
    if p.dtype == torch.float32:
        return Tiles(64, 16, 64, 4, 2) if p.tokens <= 16 else Tiles(64, 64, 32, 8, 2)
    if p.tokens <= 32:
        tokens = block(p.tokens, 16, 32)
        if p.format in ("int8", "fp8", DENSE) or not has_one_group(p, 64):
            return Tiles(64, tokens, 128, 4, 3)
        # with late scales, a thread's share of a tile can be twice as large
        return Tiles(128, tokens, 128 if tokens == 16 and has_one_group(p, 128) else 64, 4, 3)
    if p.tokens <= FEW_TOKENS:
        return Tiles(64, 64, 128, 4, 3)
    if capability < (9, 0) and p.format in ("int8", "fp8"):
        # every warp along the tokens decodes its own copy of the weight
        return Tiles(128, 64, 64, 8, 3)
    return Tiles(128, 128, 64, 8, 3)


def dx_tiles(capability, p: Problem, has_order: bool) -> Tiles:
    if capability is None:
        return Tiles(32, 16, 32, 4, 1)
    if p.dtype == torch.float32:
        return Tiles(32, 64, 64, 8, 2)
    if p.tokens <= FEW_TOKENS:
        return Tiles(64, block(p.tokens, 16, 64), 64, 4, 3)
    if has_order and p.dropout_p:  # four words of Philox for each element
        return Tiles(64, 64, 64, 8, 3)
    return Tiles(64, 128, 128, 8, 3)


def narrow_tiles(capability, n_rows: int) -> NarrowTiles:
    if capability is None:
        return NarrowTiles(32, 32, 4, 1)
    if n_rows <= 16:
        return NarrowTiles(16, 128, 4, 4)
    return NarrowTiles(64, 64, 4, 4)


def split(capability, n_tiles: int, extent: int, step: int, is_narrow: bool) -> tuple[int, int]:
    """(number of splits of a contraction, steps of each): enough programs to hide latency.

    is_narrow   the time is that of memory; else one program a processor is enough
    """
    n_steps = max(-(-extent // step), 1)
    if capability is None:
        wanted = 3 if is_narrow else 1
    elif is_narrow:
        wanted = min(-(-4 * PROCESSORS // max(n_tiles, 1)), n_steps // 4)
    else:
        wanted = min(PROCESSORS // max(n_tiles, 1), n_steps // 8)
    steps = -(-n_steps // max(min(wanted, n_steps), 1))
    return -(-n_steps // steps), steps


def turned_pad(n_tokens: int) -> int:
    """What the tokens of a turned line are rounded up to, so that loads are whole: 32 bytes."""
    return block(n_tokens, 1, 16)


def delta_tiles(capability, n_tokens: int) -> DeltaTiles:
    if capability is None:
        return DeltaTiles(16, 4, block(n_tokens, 1, 16))
    tokens = block(n_tokens, 1, 64)
    # 2048 to 4096 products at once, whatever the tokens are
    return DeltaTiles(16, min(max(128 // tokens, 4), 32), tokens)


def samples_tiles(capability, dtype: torch.dtype, n: int, n_tokens: int, size: int) -> bool:
    """Whether whole tiles of the gradient are cheaper than a dot product for each entry.

    A tile costs 2 T operations an entry of the weight, a dot product 4 T bytes out of the
    second-level cache (8 T in float32); the densities are where both take as long at 700 (float32:
    60) TFLOP/s and 5.5 TB/s. Predicted, not measured.
    """
    if capability is None:
        return 8 * n >= size
    # few tokens do not fill a tile's products
    return n * (256 if dtype != torch.float32 and n_tokens >= 64 else 32) >= size


def entry_tiles(capability, n_tokens: int) -> tuple[int, int]:
    """Entries and tokens of a program of dot products."""
    if capability is None:
        return 32, block(n_tokens, 1, 16)
    return 32, block(n_tokens, 1, 64)


def sampled_tiles(capability, dtype: torch.dtype) -> Tiles:
    if capability is None:
        return Tiles(32, 16, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 16, 64, 8, 2)
    return Tiles(128, 64, 128, 8, 3)
