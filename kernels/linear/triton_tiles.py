"""What the linear kernels share: tiles of a dense or packed weight, decoded in registers; tiles of
a matrix with any strides; the order in which programs take tiles.

A packed weight is read as 32-bit words (kernels/common/packed.py): (ceil(O / 16), lines, 16), eight
inputs of a row in a word of a 4-bit format, four in one of an 8-bit format.
"""

import triton
import triton.language as tl

# Triton compiles a kernel anew where an integer is 1 or a multiple of 16. The features of a layer
# stay the same from call to call; these would only multiply the kernels.
SIZES = (
    "n_tokens", "n_rows", "n_k", "n_splits", "split_inputs", "split_k", "split_tokens", "threshold",
    "group_size", "nested_block", "n_groups", "n_lines", "rank",
)  # fmt: skip


@triton.jit
def tile_of_program(pid, n_first, n_second, GROUP: tl.constexpr):
    """(first, second) tile of a program: GROUP tiles of the second axis go together, so that what
    they read of the first is still in the cache."""
    in_group = GROUP * n_first
    group = pid // in_group
    size = tl.minimum(n_second - group * GROUP, GROUP)
    return pid % in_group // size, group * GROUP + pid % in_group % size


@triton.jit
def load_tile(
    ptr, row_start, n_rows, column_start, n_columns, stride_row, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of a matrix of any strides, zero outside."""
    rows = row_start + tl.arange(0, ROWS)
    columns = column_start + tl.arange(0, COLUMNS)
    # int64 before any product: tokens * features passes 2**31
    pointers = (
        ptr
        + rows.to(tl.int64)[:, None] * stride_row
        + columns.to(tl.int64)[None, :] * stride_column
    )
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_gathered(
    ptr, row_start, n_rows, columns, inside, stride_row, stride_column, ROWS: tl.constexpr
):  # fmt: skip
    """(ROWS, columns) of a matrix of any strides; columns may be in any order."""
    rows = row_start + tl.arange(0, ROWS)
    pointers = (
        ptr
        + rows.to(tl.int64)[:, None] * stride_row
        + columns.to(tl.int64)[None, :] * stride_column
    )
    return tl.load(pointers, mask=(rows < n_rows)[:, None] & inside[None, :], other=0.0)


@triton.jit
def table_values(TABLE: tl.constexpr, KIND: tl.constexpr):
    """The values of the 16 codes in registers, (16,); 0 for formats that have no table."""
    if TABLE is None:
        values = 0
    else:
        places = tl.arange(0, 16)
        values = tl.zeros((16,), dtype=KIND)
        for n in tl.static_range(16):
            values = tl.where(places == n, tl.full((16,), TABLE[n], dtype=KIND), values)
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
def value_at(
    words, scales, offsets, table, PLACE: tl.constexpr, FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The weights in nibble or byte number PLACE of each word; whole numbers if KIND is int8."""
    if FORMAT == "fp8":
        # e4m3: 4 exponent bits of bias 7 become float32's 8 of bias 127, subnormals included
        bits = (words >> (8 * PLACE)) & 255
        spread = ((bits & 128) << 24) | ((bits & 127) << 20)
        value = spread.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        value = tl.where((bits & 127) == 127, float("nan"), value)
    elif FORMAT == "int8":
        value = (words << (24 - 8 * PLACE)) >> 24
    else:
        value = (words >> (4 * PLACE)) & 15
        if FORMAT == "int4":
            value = value - 8
        elif FORMAT != "uint4":
            flat = value.reshape(words.shape[0] * words.shape[1])
            value = tl.gather(table, flat, 0).reshape(words.shape[0], words.shape[1])
    if KIND != tl.int8:
        value = value.to(tl.float32) * scales
        if HAS_OFFSETS:
            value = value + offsets
    return value.to(KIND)


@triton.jit
def decoded(
    words, scales, offsets, table, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """(O, lines) words -> the weights (O, inputs) in KIND."""
    w0 = value_at(words, scales, offsets, table, 0, FORMAT, HAS_OFFSETS, KIND)
    w1 = value_at(words, scales, offsets, table, 1, FORMAT, HAS_OFFSETS, KIND)
    w2 = value_at(words, scales, offsets, table, 2, FORMAT, HAS_OFFSETS, KIND)
    w3 = value_at(words, scales, offsets, table, 3, FORMAT, HAS_OFFSETS, KIND)
    weights = quad(w0, w1, w2, w3)
    if FORMAT != "int8" and FORMAT != "fp8":
        w4 = value_at(words, scales, offsets, table, 4, FORMAT, HAS_OFFSETS, KIND)
        w5 = value_at(words, scales, offsets, table, 5, FORMAT, HAS_OFFSETS, KIND)
        w6 = value_at(words, scales, offsets, table, 6, FORMAT, HAS_OFFSETS, KIND)
        w7 = value_at(words, scales, offsets, table, 7, FORMAT, HAS_OFFSETS, KIND)
        # nibble n holds input 2 n, nibble 4 + n input 2 n + 1
        weights = tl.interleave(weights, quad(w4, w5, w6, w7))
    return weights


@triton.jit
def quad(a, b, c, d):
    """Four tensors side by side: a0, b0, c0, d0, a1, ... along the last axis."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def load_weight(
    weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
    stride_o, stride_i, nested_block, nested_offset, n_groups, group_size, n_lines,
    o_start, n_out, i_start, n_in,
    FORMAT: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """(weights (BLOCK_O, BLOCK_I) in KIND, scales, offsets) of a tile.

    weight_ptr   (O, I) of any strides, or the words of a packed weight
    ONE_GROUP    all inputs of a tile share a scale
    KIND         int8: whole numbers, still to be multiplied by the scales (BLOCK_O, 1)
    """
    if FORMAT == "dense":
        weights = load_tile(
            weight_ptr, o_start, n_out, i_start, n_in, stride_o, stride_i, BLOCK_O, BLOCK_I
        )
        return weights, 0, 0
    else:
        width: tl.constexpr = 4 if FORMAT == "int8" or FORMAT == "fp8" else 8
        line = i_start // width
        words = load_words(weight_ptr, o_start, n_out, line, n_lines, BLOCK_O, BLOCK_I // width)
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
        weights = decoded(words, scales, offsets, table, FORMAT, offsets_ptr is not None, KIND)
        return weights, scales, offsets
