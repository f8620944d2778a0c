"""A packed weight in Triton: tiles of it, decoded in registers.

Read as 32-bit words (packed.py): (ceil(O / 16), lines, 16), eight inputs of a row in a word of a
4-bit format, four in one of an 8-bit format.
"""

import triton
import triton.language as tl


@triton.jit
def table_values(TABLE: tl.constexpr, KIND: tl.constexpr):
    """The values of the 16 codes in registers, (16,); 0 for formats that have no table."""
    if TABLE is None:
        values = 0
    else:
        places = tl.arange(0, 16)
        values = tl.zeros((16,), dtype=KIND)
        for n in tl.static_range(16):
            values = tl.where(places == n, TABLE[n], values)
    return values


@triton.jit
def load_words(
    codes_ptr, o_start, n_out, line_start, n_lines, BLOCK_O: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """(BLOCK_O, LINES) words of codes; o_start is a multiple of 16."""
    rows = tl.arange(0, BLOCK_O)
    lines = line_start + tl.arange(0, LINES)
    base = codes_ptr + o_start // 16 * n_lines.to(tl.int64) * 16
    # int32 within a tile: 256 rows of 2**23 lines
    offsets = (rows // 16 * n_lines * 16 + rows % 16)[:, None] + (lines * 16)[None, :]
    inside = (o_start + rows < n_out)[:, None] & (lines < n_lines)[None, :]
    return tl.load(base + offsets, mask=inside, other=0)


@triton.jit
def load_scales(
    scales_ptr, table_ptr, absmax_ptr, nested_block, nested_offset, o_start, n_out, groups,
    n_groups, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """(BLOCK_O, groups) scales in float32, the second level resolved; 0 beyond O and G.

    scales, offsets (ceil(O / 16), G, 16); offsets are read in the same way, with table_ptr None
    """
    rows = tl.arange(0, BLOCK_O)
    base = scales_ptr + o_start // 16 * n_groups.to(tl.int64) * 16
    offsets = (rows // 16 * n_groups * 16 + rows % 16)[:, None] + (groups * 16)[None, :]
    inside = (o_start + rows < n_out)[:, None] & (groups < n_groups)[None, :]
    scales = tl.load(base + offsets, mask=inside, other=0)
    if table_ptr is None:
        return scales.to(tl.float32)
    else:
        number = (o_start + rows)[:, None] * n_groups.to(tl.int64) + groups[None, :]
        absmax = tl.load(absmax_ptr + number // nested_block, mask=inside, other=0.0)
        values = tl.load(table_ptr + scales.to(tl.int32), mask=inside, other=0.0)
        return tl.where(inside, values * absmax + nested_offset, 0.0)


@triton.jit
def side_by_side(n0, n1, n2, n3, n4, n5, n6, n7):
    """The eight nibbles of each word -> (O, inputs).

    Nibble 2 x + y + 4 z, which is input 4 x + 2 y + z, is at [..., x, y, z] before the reshape.
    """
    low = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    high = tl.join(tl.join(n4, n6), tl.join(n5, n7))
    return tl.join(low, high).reshape(n0.shape[0], 8 * n0.shape[1])


@triton.jit
def codes_of(words, FORMAT: tl.constexpr):
    """(O, lines) words -> the codes (O, inputs), int32."""
    if FORMAT == "int8" or FORMAT == "fp8":
        # byte 2 x + y at [..., x, y]
        even = tl.join(words & 255, (words >> 16) & 255)
        odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
        return tl.join(even, odd).reshape(words.shape[0], 4 * words.shape[1])
    else:
        upper = words >> 16
        return side_by_side(
            words & 15, (words >> 4) & 15, (words >> 8) & 15, (words >> 12) & 15,
            upper & 15, (upper >> 4) & 15, (upper >> 8) & 15, (upper >> 12) & 15,
        )  # fmt: skip


@triton.jit
def nibble_as_float(words, PLACE: tl.constexpr, ZERO: tl.constexpr):
    """Nibble number PLACE, 0 to 4, minus ZERO in float32, in two instructions.

    In the mantissa of 2**23 the nibble is 16**PLACE times its value; all steps are exact.
    """
    bits = (words & (15 << (4 * PLACE))) | 0x4B000000
    unit: tl.constexpr = 1.0 / (1 << (4 * PLACE))
    return bits.to(tl.float32, bitcast=True) * unit - (8388608.0 * unit + ZERO)


@triton.jit
def whole_numbers(words, ZERO: tl.constexpr):
    """(O, lines) words -> the codes minus ZERO (O, inputs), float32."""
    upper = words >> 12
    return side_by_side(
        nibble_as_float(words, 0, ZERO), nibble_as_float(words, 1, ZERO),
        nibble_as_float(words, 2, ZERO), nibble_as_float(words, 3, ZERO),
        nibble_as_float(words, 4, ZERO), nibble_as_float(upper, 2, ZERO),
        nibble_as_float(upper, 3, ZERO), nibble_as_float(upper, 4, ZERO),
    )  # fmt: skip


@triton.jit
def values_of(words, table, FORMAT: tl.constexpr, KIND: tl.constexpr):
    """(O, lines) words -> the values of the codes (O, inputs) without scale: float32, or int32 if
    KIND is int8."""
    if (FORMAT == "int4" or FORMAT == "uint4") and KIND != tl.int8:
        return whole_numbers(words, 8 if FORMAT == "int4" else 0)
    else:
        codes = codes_of(words, FORMAT)
        if FORMAT == "fp8":
            # e4m3: 4 exponent bits of bias 7 become float32's 8 of bias 127, subnormals included
            spread = ((codes & 128) << 24) | ((codes & 127) << 20)
            value = spread.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
            return tl.where((codes & 127) == 127, float("nan"), value)
        elif FORMAT == "int8":
            return (codes << 24) >> 24
        elif FORMAT == "int4":
            return codes - 8
        elif FORMAT == "uint4":
            return codes
        else:  # one look-up for the whole tile: each costs two barriers
            flat = codes.reshape(codes.shape[0] * codes.shape[1])
            return tl.gather(table, flat, 0).reshape(codes.shape[0], codes.shape[1])


@triton.jit
def of_each_input(scales, INPUTS: tl.constexpr):
    """(O, lines) or (O, 1) scales -> what can be multiplied by (O, INPUTS) values."""
    if scales.shape[1] == 1:
        return scales
    else:
        width: tl.constexpr = INPUTS // scales.shape[1]
        wide = tl.broadcast_to(scales[:, :, None], (scales.shape[0], scales.shape[1], width))
        return wide.reshape(scales.shape[0], INPUTS)


@triton.jit
def load_packed(
    words_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
    nested_block, nested_offset, n_groups, group_size, n_lines, o_start, n_out, i_start,
    FORMAT: tl.constexpr, ONE_GROUP: tl.constexpr, IS_SCALED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(weights (BLOCK_O, BLOCK_I) in KIND, scales, offsets) of a tile; o_start a multiple of 16.

    table        table_values of the format
    ONE_GROUP    all inputs of a tile share a scale
    IS_SCALED    False: the codes' values; scales and offsets (BLOCK_O, 1) are still to be applied
    KIND         a float type, or int8 for whole numbers
    """
    width: tl.constexpr = 4 if FORMAT == "int8" or FORMAT == "fp8" else 8
    line = i_start // width
    words = load_words(words_ptr, o_start, n_out, line, n_lines, BLOCK_O, BLOCK_I // width)
    if ONE_GROUP:
        groups = i_start // group_size + tl.zeros((1,), dtype=tl.int32)
    else:
        groups = (line + tl.arange(0, BLOCK_I // width)) * width // group_size
    scales = load_scales(
        scales_ptr, nested_table_ptr, absmax_ptr, nested_block, nested_offset,
        o_start, n_out, groups, n_groups, BLOCK_O,
    )  # fmt: skip
    offsets = scales
    if offsets_ptr is not None:
        offsets = load_scales(
            offsets_ptr, None, None, 1, 0.0, o_start, n_out, groups, n_groups, BLOCK_O
        )
    weights = values_of(words, table, FORMAT, KIND)
    if IS_SCALED:
        weights = weights.to(tl.float32) * of_each_input(scales, BLOCK_I)
        if offsets_ptr is not None:
            weights += of_each_input(offsets, BLOCK_I)
    return weights.to(KIND), scales, offsets
