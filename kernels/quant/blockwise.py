"""Blocks along a flattened tensor, the way bitsandbytes stores NF4, FP4 and nested scales.

Bit for bit what bitsandbytes 0.50 computes on a CPU, its guards against division by 0 included.
"""

from __future__ import annotations

from functools import cache

import torch

from tilewright.ops.common.packed import FORMATS, NestedScales
from tilewright.ops.quant import solve

NESTED_BLOCK = 256  # scales that share an absmax under double quantization
BINS = 1 << 16  # of [-1, 1], in which a value is looked up among the 256 of the dynamic map


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of nested scales, ascending, float32.

    For i = 0 to 6, plus and minus 10^(i - 6) times the middles of 2^i equal cells of [0.1, 1];
    then 0 and 1. The cells are float32, the power a double, as in the original.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _code_of_bin() -> torch.Tensor:
    table = dynamic_map()
    bins = torch.arange(BINS, dtype=torch.float32)
    return torch.bucketize(-1 + 2 * bins / (BINS - 1), (table[:-1] + table[1:]) / 2).to(torch.uint8)


def quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, NestedScales]:
    """(O, G) float32 scales -> uint8 codes (O, G) and the second level."""
    flat = scales.flatten()
    offset = flat.mean().item() if flat.numel() else 0.0
    padded = torch.zeros(-(-flat.numel() // NESTED_BLOCK) * NESTED_BLOCK, device=flat.device)
    padded[: flat.numel()] = flat - offset
    blocks = padded.view(len(padded) // NESTED_BLOCK, NESTED_BLOCK)
    largest = solve.absmax(blocks)
    unit = (blocks * (1 / largest)[:, None]).clamp_(-1, 1)
    # one rounding for product and sum, as a fused multiply-add has it: double holds both
    place = ((unit + 1) * 0.5).double() * (BINS - 1) + 0.5
    codes = _code_of_bin().to(flat.device)[torch.where(unit.isnan(), 0, place.float()).long()]
    codes = torch.where(largest[:, None] == 0, 0, codes)
    table = dynamic_map().to(flat.device, copy=True)  # each weight owns its tensors
    nested = NestedScales(table, largest, offset, NESTED_BLOCK)
    return codes.flatten()[: flat.numel()].view(scales.shape), nested


def quantize(values: torch.Tensor, format: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a flattened tensor, two a byte, the first one high, and the absmax of each block."""
    flat = values.flatten().float()
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(whole // block, block)
    absmax = solve.absmax(blocks)
    scaled = blocks * (1 / absmax.clamp(min=solve.LEAST_DIVISOR))[:, None]
    scaled = scaled.flatten()
    if whole < flat.numel():
        rest = flat[whole:].abs().amax().clamp(min=solve.LEAST_DIVISOR)
        absmax = torch.cat([absmax, rest[None]])
        scaled = torch.cat([scaled, flat[whole:] / rest])
    if len(scaled) % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    codes = solve.table_codes(scaled.clamp_(-1, 1), format)
    return codes[0::2] << 4 | codes[1::2], absmax


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The codes of `quantize` one a byte: (numel,) uint8"""
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel]


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, format: str, block: int, numel: int
) -> torch.Tensor:
    """(numel,) float32"""
    table = torch.tensor(FORMATS[format].table, dtype=torch.float32, device=packed.device)
    values = table[unpack(packed, numel).long()]
    return values * absmax.float().repeat_interleave(block)[:numel]
