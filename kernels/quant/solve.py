"""Scales, offsets and codes of groups of weights. All take and return (..., G, g) or (..., G).

A group with an infinity or NaN gets the scale NaN and codes 0, so that it decodes to NaN and no
other group notices.
"""

from __future__ import annotations

from functools import cache

import torch

from tilewright.ops.common.packed import FORMATS
from tilewright.ops.quant.formats import FP4, FP8, MXFP4, NF4, Int4, Int8

FP8_LARGEST = 448.0
E2M1_LARGEST_EXPONENT = 2  # of 6 = 1.5 * 2**2
LEAST_DIVISOR = 1e-38  # bitsandbytes' guard of 1 / absmax
# int4: the largest weight becomes -8 times a scale of largest / divisor; above 8 it is clipped
DIVISORS = (7.5, 8.0, 8.5, 9.0, 9.75, 10.75, 12.0)
DIVISORS_OF_LONG_GROUPS = (14.0, 17.0, 21.0, 26.0)  # their largest of many weights lies farther out
LONG_GROUP = 128
REFINEMENTS = 2
HQQ_STEPS, HQQ_P, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01
LEAST_RANGE = 2.0**-120  # below, 15 / range would overflow: the group is taken as constant


def finite_groups(groups: torch.Tensor) -> torch.Tensor:
    """Which groups hold finite weights only; an empty group does."""
    return groups.isfinite().all(-1)


def absmax(groups: torch.Tensor) -> torch.Tensor:
    if groups.shape[-1] == 0:
        return groups.new_zeros(groups.shape[:-1])
    return groups.abs().amax(-1)


def fit(
    groups: torch.Tensor, format: Int8 | Int4 | NF4 | FP4 | MXFP4, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and offsets or None, of finite float32 groups, in the dtype they are stored in."""
    if isinstance(format, Int8):
        return (absmax(groups) / 127).to(dtype), None
    if isinstance(format, NF4 | FP4):
        return absmax(groups).to(dtype), None
    if isinstance(format, MXFP4):
        return power_of_two_scales(absmax(groups)).to(dtype), None
    if format.symmetric:
        if format.solver == "minmax":
            return (absmax(groups) / 7.5).to(dtype), None
        return least_squares_scales(groups).to(dtype), None
    solve = minmax_offsets if format.solver == "minmax" else hqq_offsets
    scales, offsets = solve(groups)
    return scales.to(dtype), offsets.to(dtype)


def power_of_two_scales(largest: torch.Tensor) -> torch.Tensor:
    """2 ** (floor(log2(absmax)) - 2), so that absmax falls into the last binade of e2m1."""
    _, exponent = torch.frexp(largest)  # largest = m 2**exponent, 0.5 <= m < 1
    exponent = (exponent - 1 - E2M1_LARGEST_EXPONENT).clamp(-126, 127)
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest == 0, 0.0, scales)


def least_squares_scales(groups: torch.Tensor) -> torch.Tensor:
    """Scales for codes -8 to 7 with little squared error.

    Of several clippings, each with its codes q, the one whose best scale <w, q> / <q, q> leaves
    least: the one with the largest <w, q>**2 / <q, q>. Scales are negative where the largest
    weight is positive, since -8 reaches farther than 7.
    """
    size = absmax(groups)
    unit = groups / torch.where(size == 0, 1.0, size)[..., None]
    largest = unit.gather(-1, unit.abs().argmax(-1, keepdim=True)) if unit.shape[-1] else unit
    best_gain, best_scale = torch.full_like(size, -1.0), torch.zeros_like(size)
    divisors = DIVISORS + DIVISORS_OF_LONG_GROUPS * (unit.shape[-1] > LONG_GROUP)
    for divisor in (*divisors, *[None] * REFINEMENTS):
        # the last ones start from the best scale so far, which was not among the divisors
        scale = best_scale[..., None] if divisor is None else -largest / divisor
        codes = (unit / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        along, length = (unit * codes).sum(-1), codes.square().sum(-1).clamp(min=1.0)
        gain = along.square() / length
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, along / length, best_scale)
    return best_scale * size


def minmax_offsets(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = (max - min) / 15 over the range that includes 0, offset = -scale * whole zero."""
    if groups.shape[-1] == 0:
        nothing = groups.new_zeros(groups.shape[:-1])
        return nothing, nothing
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = high / 15 - low / 15  # the difference itself may overflow
    zero = torch.where(scale == 0, 0.0, (-low / scale).round_().clamp_(0, 15))
    return scale, -scale * zero


def hqq_offsets(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = (max - min) / 15 and the zero point that half-quadratic splitting finds.

    Minimizes sum |w - (q - zero) scale|**p; each group stops for itself, so that no result
    depends on what else is quantized.
    """
    if groups.shape[-1] == 0:
        nothing = groups.new_zeros(groups.shape[:-1])
        return nothing, nothing
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = high / 15 - low / 15
    constant = step < LEAST_RANGE
    inverse = torch.where(constant, 0.0, 1 / step)
    zero = -low * inverse
    best, least = zero, torch.full_like(zero, float("inf"))
    going = ~constant
    beta = HQQ_BETA
    for _ in range(HQQ_STEPS):
        codes = (groups * inverse + zero).round_().clamp_(0, 15)
        error = groups - (codes - zero) * step
        size = error.abs()
        mean = size.mean(-1, keepdim=True)
        going = going & (mean < least)
        if not going.any():
            break
        least, best = torch.where(going, mean, least), torch.where(going, zero, best)
        # the shrunk error |d| - |d|**(p - 1) / beta is positive only beyond beta**(-1 / (2 - p)),
        # which most weights never reach: then no powers are needed
        target = groups
        if bool((size > 0.99 * beta ** (-1 / (2 - HQQ_P))).any()):
            kept = (size - size.pow(HQQ_P - 1) / beta).relu_().copysign_(error)
            target = groups - torch.where(size == 0, 0.0, kept)
        zero = (codes - target * inverse).mean(-1, keepdim=True)
        beta *= HQQ_GROWTH
    scale = torch.where(constant, 0.0, step)
    offset = torch.where(constant, low, -best * step)
    return scale[..., 0], offset[..., 0]


@cache
def _boundaries(format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Middles between the ascending levels of a table, and the code of each level."""
    table = torch.tensor(FORMATS[format].table, dtype=torch.float32)
    order = table.argsort(stable=True)
    middles = (table[order[:-1]] + table[order[1:]]) / 2
    return middles, order.to(torch.uint8)


def table_codes(scaled: torch.Tensor, format: str) -> torch.Tensor:
    """Nearest level of values divided by their absmax; a tie goes down, as in bitsandbytes."""
    middles, order = (t.to(scaled.device) for t in _boundaries(format))
    return order[torch.bucketize(scaled.contiguous(), middles)]


def e2m1_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Round to e2m1, ties to the even code, beyond 6 to 6; bit 3 is the sign."""
    magnitudes = torch.tensor(FORMATS["e2m1"].table, device=scaled.device)[:8]
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    # bucketize sends a tie down: past an odd code the boundary is a hair lower, so it goes up
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))
    codes = torch.bucketize(scaled.abs().contiguous(), middles).to(torch.uint8)
    return torch.where((scaled < 0) & (codes > 0), codes + 8, codes)


def nearest_codes(
    groups: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, code: str
) -> torch.Tensor:
    """Codes of finite groups: uint8 for the 4-bit formats, int8, or float8_e4m3fn."""
    scale = scales.float()[..., None]
    if code in ("nf4", "fp4"):
        scaled = groups * (1 / scale.clamp(min=LEAST_DIVISOR))
        return table_codes(scaled.clamp_(-1, 1), code)
    shifted = groups if offsets is None else groups - offsets.float()[..., None]
    scaled = torch.where(scale == 0, 0.0, shifted / scale)
    if code == "e2m1":
        return e2m1_codes(scaled)
    if code == "fp8":
        return scaled.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    if code == "int8":
        return scaled.round_().clamp_(-127, 127).to(torch.int8)
    if code == "int4":
        return scaled.round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    return scaled.round_().clamp_(0, 15).to(torch.uint8)


def code_of(format: Int8 | Int4 | NF4 | FP4 | FP8 | MXFP4) -> str:
    """The key of FORMATS."""
    if isinstance(format, Int8):
        return "int8"
    if isinstance(format, Int4):
        return "int4" if format.symmetric else "uint4"
    if isinstance(format, FP8):
        return "fp8"
    return "e2m1" if isinstance(format, MXFP4) else format.code
