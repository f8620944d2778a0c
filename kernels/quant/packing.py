"""From a weight matrix to a PackedWeight and back, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tilewright.ops.common.packed import (
    ROWS,
    PackedWeight,
    group_scales,
    inputs_of_a_line,
    pack_codes,
    pack_rows,
    unpack_rows,
)
from tilewright.ops.quant import blockwise, solve
from tilewright.ops.quant.formats import BLOCK, FP4, FP8, MXFP4, NF4, Int4, QuantFormat

CHUNK = 1 << 19  # weights worked on at a time: ten or twenty float32 temporaries of 2 MiB


def chunks(n_out: int, n_in: int) -> Iterator[slice]:
    """Slices of rows, whole blocks of ROWS, of about CHUNK weights."""
    step = max(CHUNK // max(n_in, 1) // ROWS, 1) * ROWS
    for start in range(0, n_out, step):
        yield slice(start, min(start + step, n_out))


def grouped(rows: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """(R, I) as its whole groups (R, G, g) and, if the last is short, that one (R, 1, rest)."""
    whole = rows.shape[1] // group_size * group_size
    yield rows[:, :whole].reshape(rows.shape[0], whole // group_size, group_size)
    if whole < rows.shape[1]:
        yield rows[:, None, whole:]


def row_parts(packed: PackedWeight) -> Iterator[tuple[slice, PackedWeight]]:
    """Some rows at a time: a slice, and a PackedWeight of them, its scales no longer nested."""
    if packed.nested is not None:
        packed = replace(packed, scales=pack_rows(group_scales(packed)), nested=None)
    for rows in chunks(*packed.shape):
        blocks = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        part = replace(
            packed,
            out_features=rows.stop - rows.start,
            codes=packed.codes[blocks],
            scales=packed.scales[blocks],
            offsets=None if packed.offsets is None else packed.offsets[blocks],
        )
        yield rows, part


def group_absmax(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """(O, ceil(I / group_size)) float32, NaN for a group that is not finite."""
    n_out, n_in = weight.shape
    sizes = torch.empty(n_out, -(-n_in // group_size), device=weight.device)
    for rows in chunks(n_out, n_in):
        of_rows = []
        for groups in grouped(weight[rows].float(), group_size):
            finite = solve.finite_groups(groups)
            of_rows.append(torch.where(finite, solve.absmax(groups), float("nan")))
        sizes[rows] = torch.cat(of_rows, 1)
    return sizes


def fp8_scales(weight: torch.Tensor, format: FP8, group_size: int) -> torch.Tensor:
    """(O, G) float32 absmax / 448; a shared absmax is that of the rows that are finite there."""
    sizes = group_absmax(weight, group_size)
    known = torch.nan_to_num(sizes, nan=0.0)
    shared = {"row": 1, "block": BLOCK, "tensor": max(len(known), 1)}[format.scaling]
    for rows in known.split(shared) if known.numel() else ():
        rows.copy_(rows.amax(0, keepdim=True).expand_as(rows))
    return torch.where(sizes.isnan(), sizes, known / solve.FP8_LARGEST)


def scale_dtype(weight: torch.Tensor, format: QuantFormat, group_size: int) -> torch.dtype:
    """float32, but for small groups two bytes: float16 where no scale leaves its normal range."""
    if isinstance(format, MXFP4):
        return torch.bfloat16  # powers of two: exact
    if not isinstance(format, Int4) or group_size >= 64:
        return torch.float32
    half = torch.finfo(torch.float16)
    sizes = group_absmax(weight, group_size)
    sizes = sizes[sizes > 0]
    # an offset may be as large as the largest weight; a scale is a fifteenth of it at least
    inside = (sizes < half.max / 2) & (sizes > 16 * half.tiny)
    return torch.float16 if bool(inside.all()) else torch.bfloat16


def pack(weight: torch.Tensor, format: QuantFormat) -> PackedWeight:
    n_out, n_in = weight.shape
    group_size = getattr(format, "group_size", None) or n_in or 8
    if isinstance(format, FP8) and format.scaling == "block":
        group_size = BLOCK
    fixed = fp8_scales(weight, format, group_size) if isinstance(format, FP8) else None
    dtype = scale_dtype(weight, format, group_size)
    code = solve.code_of(format)

    blocks, groups = -(-n_out // ROWS), -(-n_in // group_size)
    lines = -(-n_in // inputs_of_a_line(code))
    codes = torch.empty(blocks, lines, 64, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(blocks, groups, ROWS, dtype=dtype, device=weight.device)
    has_offsets = isinstance(format, Int4) and not format.symmetric
    offsets = torch.empty_like(scales) if has_offsets else None
    for rows in chunks(n_out, n_in):
        some = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        row_codes, row_scales, row_offsets = _rows(
            weight[rows].float(), format, group_size, dtype, None if fixed is None else fixed[rows]
        )
        codes[some] = pack_codes(row_codes, code)
        scales[some] = pack_rows(row_scales)
        if offsets is not None and row_offsets is not None:
            offsets[some] = pack_rows(row_offsets)
    packed = PackedWeight(code, n_out, n_in, group_size, codes, scales, offsets, dtype=weight.dtype)
    return nest(packed) if isinstance(format, NF4 | FP4) and format.double_quant else packed


def _rows(
    rows: torch.Tensor,
    format: QuantFormat,
    group_size: int,
    dtype: torch.dtype,
    fixed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (R, I), scales (R, G) and offsets (R, G) or None of float32 rows."""
    codes, scales, offsets = [], [], []
    first = 0
    for groups in grouped(rows, group_size):
        finite = solve.finite_groups(groups)
        groups = torch.where(finite[..., None], groups, 0.0)
        if isinstance(format, FP8):
            assert fixed is not None
            scale, offset = fixed[:, first : first + groups.shape[1]], None
            first += groups.shape[1]
        else:
            scale, offset = solve.fit(groups, format, dtype)
        usable = torch.where(finite, scale, 1.0)
        code = solve.nearest_codes(groups, usable, offset, solve.code_of(format))
        code = torch.where(finite[..., None], code.view(torch.uint8), 0)
        codes.append(code.flatten(1))
        scales.append(torch.where(finite, scale, float("nan")))
        if offset is not None:
            offsets.append(offset)
    return torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(offsets, 1) if offsets else None


def nest(packed: PackedWeight) -> PackedWeight:
    """The same weight with its float32 scales in 8 bits, as bitsandbytes stores them.

    ValueError: a scale is not finite. It would spoil those that share its second level.
    """
    scales = unpack_rows(packed.scales, packed.out_features).contiguous()
    finite = scales.isfinite().all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"quantize_weight: weight has an infinity or NaN in row {row}, and double_quant shares "
            "scales between rows; need a finite weight, or double_quant=False"
        )
    codes, nested = blockwise.quantize_scales(scales)
    return replace(packed, scales=pack_rows(codes), nested=nested)
