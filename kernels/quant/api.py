"""Public functions of the quant room: weights and activations to codes and back, and the error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilewright.ops.common.packed import PackedWeight, decode
from tilewright.ops.quant import cpp_cpu, packing, solve
from tilewright.ops.quant.formats import (
    BLOCK,
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int4,
    Int8,
    QuantFormat,
    expect_format,
)
from tilewright.shapes import expect_dtype, expect_shapes

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_weight(weight: torch.Tensor, format: QuantFormat) -> PackedWeight:
    """Quantize a weight matrix and pack it for every kernel.

        W[o, i]  ~  value(code[o, i]) * scale[o, g] + offset[o, g],   g = i // group_size

    weight   (O, I)   float32, float16 or bfloat16, any strides; O or I may be 0; the last group of
                      a row may be short
    format            Int8(), Int4(), NF4(), FP4(), FP8() or MXFP4(), with their options

    Codes are the nearest ones under the scales as stored. An all-zero group decodes to exact 0. A
    group with an infinity or NaN decodes to NaN, and no other row is touched by it. Working memory
    is a few tens of MiB, whatever the weight.
    ValueError: weight is not (O, I) or of another dtype; format is not one of the above;
    double_quant of a weight that is not finite.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314 (NF4, double_quant); Badri and Shaji,
    Half-Quadratic Quantization, 2023 (Int4); OCP Microscaling Formats 1.0 (MXFP4).
    """
    op = "quantize_weight"
    expect_format(op, format, (Int8, Int4, NF4, FP4, FP8, MXFP4))
    expect_shapes(op, weight=(weight, "OI"))
    expect_dtype(op, FLOATS, weight=weight)
    return packing.pack(weight.detach(), format)


def dequantize_weight(packed: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight (O, I) that a packed one stands for.

        W[o, order[i]] = value(code[o, i]) * scale[o, g] + offset[o, g],   g = i // group_size

    packed   from `quantize_weight` or one of the readers
    dtype    float32, float16 or bfloat16; None: packed.dtype. Computed in float32, rounded once

    ValueError: another dtype.

    Source: the layout is that of kernels/common/packed.py.
    """
    dtype = dtype or packed.dtype
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise ValueError(f"dequantize_weight: dtype is {dtype}, need one of {names}")
    weight = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    for rows, part in packing.row_parts(packed):
        if weight.numel() and cpp_cpu.why_not(part) is None:
            cpp_cpu.decode(part, weight[rows])
        else:
            weight[rows] = decode(part).to(dtype)
    return weight


def quantize_activations(x: torch.Tensor, format: Int8 | FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations as they come, token by token.

        x[t, i]  ~  code[t, i] * scale[t, g]

    x        (T, I)   or any number of leading axes; float32, float16 or bfloat16
    format            Int8(): 8-bit whole numbers, one scale a token. FP8("row"): float8_e4m3fn, one
                      scale a token. FP8("block"): one scale for 128 neighbours of a token. With
                      Int8(group_size=...) one scale for that many neighbours

    Returns codes in the shape of x, int8 or float8_e4m3fn, and float32 scales (T, G). A group of
    zeros has codes 0 and scale 0; one with an infinity or NaN has codes 0 and scale NaN.
    ValueError: x has no axis or another dtype; format is another, FP8("tensor") included.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339; DeepSeek-V3, arXiv 2412.19437, 3.3.2.
    """
    op = "quantize_activations"
    expect_format(op, format, (Int8, FP8))
    if isinstance(format, FP8) and format.scaling == "tensor":
        raise ValueError(f'{op}: format is {format!r}, need scaling "row" or "block"')
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (), need axes (..., I)")
    expect_dtype(op, FLOATS, x=x)
    n_in = x.shape[-1]
    group_size = format.group_size if isinstance(format, Int8) else None
    if isinstance(format, FP8) and format.scaling == "block":
        group_size = BLOCK
    rows = x.detach().reshape(math.prod(x.shape[:-1]), n_in)
    code = solve.code_of(format)
    largest = 127.0 if code == "int8" else solve.FP8_LARGEST
    codes, scales = [], []
    for part in packing.grouped(rows.float(), group_size or n_in or 1):
        finite = solve.finite_groups(part)
        part = torch.where(finite[..., None], part, 0.0)
        scale = solve.absmax(part) / largest
        codes.append(solve.nearest_codes(part, scale, None, code).flatten(1))
        scales.append(torch.where(finite, scale, float("nan")))
    lead = x.shape[:-1]
    return torch.cat(codes, 1).view(x.shape), torch.cat(scales, 1).unflatten(0, lead)


@dataclass(frozen=True)
class ErrorStatistics:
    """How far a packed weight is from the weight it was made of.

    bits_per_weight      all tensors of the packed weight, padding included, over O I
    rms_relative_error   sqrt(sum (W' - W)**2 / sum W**2)
    mean_error           mean |W' - W|
    largest_error        max |W' - W|
    sqnr_db              -20 log10(rms_relative_error)
    """

    bits_per_weight: float
    rms_relative_error: float
    mean_error: float
    largest_error: float
    sqnr_db: float

    def __str__(self) -> str:
        return (
            f"{self.bits_per_weight:.3f} bits a weight, error rms {self.rms_relative_error:.3%}, "
            f"mean {self.mean_error:.3g}, largest {self.largest_error:.3g}, "
            f"SQNR {self.sqnr_db:.1f} dB"
        )


def error_statistics(weight: torch.Tensor, packed: PackedWeight) -> ErrorStatistics:
    """What quantizing has cost, in bits and in error; prints as one line.

    weight   (O, I)   what `packed` was made of
    packed            its quantized form

    Sums are float64. Of an empty weight and of exact ones the SQNR is infinite.
    ValueError: weight is not of packed's shape or on another device.

    Source: SQNR as in Lin et al., arXiv 1511.06393, section 3.
    """
    op = "error_statistics"
    expect_dtype(op, (*FLOATS, torch.float64), weight=weight)
    if tuple(weight.shape) != packed.shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, need {packed.shape} as packed has"
        )
    if weight.device != packed.device:
        raise ValueError(f"{op}: weight is on {weight.device}, need {packed.device} as packed is")
    squares = weight.new_zeros(2, dtype=torch.float64)
    total, largest = weight.new_zeros((), dtype=torch.float64), 0.0
    for rows, part in packing.row_parts(packed):
        truth = weight[rows].detach().double()
        error = (decode(part).double() - truth).abs_()
        squares += torch.stack([error.square().sum(), truth.square().sum()])
        total += error.sum()
        if error.numel():
            worst = error.max().item()
            largest = worst if math.isnan(worst) else max(largest, worst)
    n = max(weight.numel(), 1)
    of_error, of_weight = squares.tolist()
    relative = math.sqrt(of_error / of_weight) if of_weight else (math.inf if of_error else 0.0)
    return ErrorStatistics(
        bits_per_weight=8 * packed.nbytes / n,
        rms_relative_error=relative,
        mean_error=total.item() / n,
        largest_error=largest,
        sqnr_db=math.inf if relative == 0 else -20 * math.log10(relative),
    )
