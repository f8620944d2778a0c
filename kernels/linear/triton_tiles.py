"""What the linear kernels share: tiles of a dense or packed weight, and of a matrix with any
strides; the order in which programs take tiles.
"""

import triton
import triton.language as tl

from tilewright.ops.common.triton_packed import load_packed

# Triton compiles a kernel anew where an integer is 1 or a multiple of 16. The features of a layer
# stay the same from call to call; these would only multiply the kernels.
SIZES = (
    "n_tokens", "n_rows", "n_k", "n_splits", "split_steps", "threshold",
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
def load_weight(
    weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
    stride_o, stride_i, nested_block, nested_offset, n_groups, group_size, n_lines,
    o_start, n_out, i_start, n_in,
    FORMAT: tl.constexpr, ONE_GROUP: tl.constexpr, IS_SCALED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(weights (BLOCK_O, BLOCK_I) in KIND, scales, offsets) of a tile.

    weight_ptr   (O, I) of any strides, or the words of a packed weight
    ONE_GROUP    all inputs of a tile share a scale
    IS_SCALED    False: the codes' values; scales and offsets (BLOCK_O, 1) are still to be applied
    KIND         a float type, or int8 for whole numbers
    """
    if FORMAT == "dense":
        weights = load_tile(
            weight_ptr, o_start, n_out, i_start, n_in, stride_o, stride_i, BLOCK_O, BLOCK_I
        )
        return weights, 0, 0
    else:
        return load_packed(
            weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
            nested_block, nested_offset, n_groups, group_size, n_lines, o_start, n_out, i_start,
            FORMAT, ONE_GROUP, IS_SCALED, BLOCK_O, BLOCK_I, KIND,
        )  # fmt: skip
