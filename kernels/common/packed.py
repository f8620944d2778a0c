"""Quantized weights as all rooms and kernels see them: one layout for every device and CPU level.

    W[o, i] = value(code[o, i]) * scale[o, i // group_size] + offset[o, i // group_size]

Codes lie in lines of 64 bytes: sixteen output rows, four bytes each. One vector load brings a line
into a register whose lane r is a row, so sums need no shuffles.

    4-bit format   a line is 8 inputs; the four bytes of a row are one little-endian word:
                   bits   31-28  27-24  23-20  19-16 | 15-12  11-8   7-4    3-0
                   input    7      5      3      1   |   6      4     2      0
                   (word >> 4 p) & 0x000f000f are the neighbours 2 p and 2 p + 1
    8-bit format   a line is 4 inputs, one byte each
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

ROWS = 16  # output rows of a line
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # input of a word -> its nibble, counted from the lowest bits

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Format(NamedTuple):
    """How one code becomes a number.

    bits     of a code
    table    values of the 16 codes of a 4-bit format, else None: int8 and float8_e4m3fn are types
    """

    bits: int
    table: tuple[float, ...] | None


FORMATS = {
    "int4": Format(4, tuple(float(v) for v in range(-8, 8))),
    "uint4": Format(4, tuple(float(v) for v in range(16))),
    "nf4": Format(4, _NF4),
    "fp4": Format(4, (*_FP4, *(-v for v in _FP4))),
    "e2m1": Format(4, (*_E2M1, *(-v for v in _E2M1))),
    "int8": Format(8, None),
    "fp8": Format(8, None),
}


def inputs_of_a_line(format: str) -> int:
    return 64 // ROWS * 8 // FORMATS[format].bits


class NestedScales(NamedTuple):
    """The second level of doubly quantized scales (QLoRA, arXiv 2305.14314, section 3).

        scale[o, g] = table[code[o, g]] * absmax[(o * G + g) // block] + offset

    table    (256,) float32
    absmax   (ceil(O * G / block),) float32
    offset   a number
    block    scales that share an absmax
    """

    table: torch.Tensor
    absmax: torch.Tensor
    offset: float
    block: int


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix (O, I) in a quantized format.

    format        a key of FORMATS
    out_features  O
    in_features   I
    group_size    inputs that share a scale: a multiple of 8, or I for one scale a row
    codes         (ceil(O / 16), lines, 64) uint8, as above; code 0 beyond O and I
    scales        (ceil(O / 16), G, 16) float32, float16 or bfloat16, 0 beyond O; uint8 with
                  `nested`; G = ceil(I / group_size)
    offsets       like scales, or None for 0
    input_order   (I,) int32, or None for 0, 1, ...: column j holds the weights of this input
    nested        the second level of the scales, or None
    dtype         of the weight before; what dequantize returns if nothing else is asked for
    """

    format: str
    out_features: int
    in_features: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    input_order: torch.Tensor | None = None
    nested: NestedScales | None = None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def empty(
        cls, format: str, out_features: int, in_features: int, group_size: int,
        scales: torch.dtype, *, offsets: torch.dtype | None = None, has_input_order: bool = False,
        nested_block: int = 0, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> PackedWeight:  # fmt: skip
        """One whose tensors have yet to be filled, as by a reader.

        scales         dtype of the scales; uint8 with nested_block
        offsets        dtype of the offsets; None for no offsets
        nested_block   scales that share an absmax; 0 for none
        """

        def new(*shape: int, dtype: torch.dtype = scales) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        blocks, lines = -(-out_features // ROWS), -(-in_features // inputs_of_a_line(format))
        groups = -(-in_features // group_size)
        nested = None
        if nested_block:
            absmax = new(-(-out_features * groups // nested_block), dtype=torch.float32)
            nested = NestedScales(new(256, dtype=torch.float32), absmax, 0.0, nested_block)
        return cls(
            format, out_features, in_features, group_size,
            new(blocks, lines, 64, dtype=torch.uint8), new(blocks, groups, ROWS),
            None if offsets is None else new(blocks, groups, ROWS, dtype=offsets),
            new(in_features, dtype=torch.int32) if has_input_order else None, nested, dtype,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, for state dicts."""
        found = {
            "codes": self.codes,
            "scales": self.scales,
            "offsets": self.offsets,
            "input_order": self.input_order,
            "nested_table": self.nested and self.nested.table,
            "nested_absmax": self.nested and self.nested.absmax,
        }
        return {name: t for name, t in found.items() if t is not None}

    def map(self, change) -> PackedWeight:
        """The same weight with `change` applied to each tensor, such as a move to a device."""
        changed = {
            f.name: change(getattr(self, f.name))
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        if self.nested is not None:
            changed["nested"] = self.nested._replace(
                table=change(self.nested.table), absmax=change(self.nested.absmax)
            )
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> PackedWeight:
        return self.map(lambda t: t.to(device))


def pack_codes(codes: torch.Tensor, format: str) -> torch.Tensor:
    """(O, I) codes, 0 to 15 or any 8-bit type -> (ceil(O / 16), lines, 64) uint8."""
    n_out, n_in = codes.shape
    width = inputs_of_a_line(format)
    codes = codes if FORMATS[format].bits == 4 else codes.view(torch.uint8)
    padded = codes.new_zeros(-(-n_out // ROWS) * ROWS, -(-n_in // width) * width)
    padded[:n_out, :n_in] = codes
    lines = padded.view(padded.shape[0] // ROWS, ROWS, padded.shape[1] // width, width)
    lines = lines.transpose(1, 2)
    if FORMATS[format].bits == 4:
        # byte b holds nibbles 2 b and 2 b + 1 of the word
        of_nibble = [NIBBLES.index(nibble) for nibble in range(width)]
        low, high = lines[..., of_nibble[0::2]], lines[..., of_nibble[1::2]]
        lines = (low | high << 4).to(torch.uint8)
    return lines.reshape(*lines.shape[:2], 64).contiguous()


def unpack_codes(packed: torch.Tensor, format: str, n_out: int, n_in: int) -> torch.Tensor:
    """(O, I) uint8, the inverse of pack_codes."""
    lines = packed.view(packed.shape[0], packed.shape[1], ROWS, 4)
    if FORMATS[format].bits == 4:
        nibbles = torch.stack([lines & 15, lines >> 4], dim=-1).flatten(-2)
        lines = nibbles[..., list(NIBBLES)]
    width = lines.shape[1] * lines.shape[3]
    rows = lines.transpose(1, 2).reshape(packed.shape[0] * ROWS, width)
    return rows[:n_out, :n_in].contiguous()


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """(O, G) scales or offsets -> (ceil(O / 16), G, 16), 0 beyond O."""
    n_out, groups = values.shape
    padded = values.new_zeros(-(-n_out // ROWS) * ROWS, groups)
    padded[:n_out] = values
    return padded.view(padded.shape[0] // ROWS, ROWS, groups).transpose(1, 2).contiguous()


def unpack_rows(packed: torch.Tensor, n_out: int) -> torch.Tensor:
    """(O, G), the inverse of pack_rows."""
    blocks, groups, _ = packed.shape
    return packed.transpose(1, 2).reshape(blocks * ROWS, groups)[:n_out]


def eight_bit_table(format: str) -> tuple[float, ...] | None:
    """The table that products with 8-bit activations read: whole numbers times a common unit.

    A table of whole numbers is its own; of others the unit is 1/127 of the largest entry.
    """
    table = FORMATS[format].table
    if table is None or all(v.is_integer() for v in table):
        return table
    unit = eight_bit_unit(table)
    return tuple(round(v / unit) * unit for v in table)


def eight_bit_unit(table: tuple[float, ...]) -> float:
    return max(abs(v) for v in table) / 127


def code_values(
    codes: torch.Tensor, format: str, table: tuple[float, ...] | None = None
) -> torch.Tensor:
    """uint8 codes of any shape -> their values, float32, without scale.

    table   takes the place of the format's own
    """
    table = table or FORMATS[format].table
    if table is not None:
        return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]
    kind = torch.int8 if format == "int8" else torch.float8_e4m3fn
    return codes.view(kind).float()


def group_scales(weight: PackedWeight) -> torch.Tensor:
    """(O, G) float32 scales, the second level resolved."""
    scales = unpack_rows(weight.scales, weight.out_features)
    if weight.nested is None:
        return scales.float()
    table, absmax, offset, block = weight.nested
    blocks = torch.arange(scales.numel(), device=scales.device) // block
    return table[scales.long()] * absmax[blocks].view(scales.shape) + offset


def decode(weight: PackedWeight, table: tuple[float, ...] | None = None) -> torch.Tensor:
    """The weight (O, I) in float32: what every kernel multiplies by, up to its own rounding.

    table   takes the place of the format's own
    """
    n_out, n_in = weight.shape
    codes = unpack_codes(weight.codes, weight.format, n_out, n_in)
    values = code_values(codes, weight.format, table)
    group = torch.arange(n_in, device=values.device) // weight.group_size
    values = values * group_scales(weight)[:, group]
    if weight.offsets is not None:
        values = values + unpack_rows(weight.offsets, n_out).float()[:, group]
    if weight.input_order is None:
        return values
    in_place = torch.empty_like(values)
    in_place[:, weight.input_order.long()] = values
    return in_place
