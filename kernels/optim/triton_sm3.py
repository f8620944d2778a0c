"""SM3 on a GPU. The largest of each row and column meet by atomics, exact in any order."""

import triton
import triton.language as tl


@triton.jit
def moved(p, g, s, lr, eps, kept):
    """p (1 - lr decay) - lr g / sqrt(s + eps), without the second term where the root is 0."""
    below = tl.sqrt_rn(s + eps)
    return p * kept - tl.where(
        below == 0.0, 0.0, tl.div_rn(lr * g, tl.where(below == 0.0, 1.0, below))
    )


@triton.jit(do_not_specialize=("n_rows",))
def sm3_matrix_kernel(
    p_ptr, g_ptr, row_ptr, column_ptr, new_row_ptr, new_column_ptr, scale_ptr, n_rows, n_columns,
    lr, eps, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a whole matrix a program

    p, g (R, C)   row, new_row (R)   column, new_column (C); the new ones begin as the old
    """
    n_tiles = tl.cdiv(n_columns, COLUMNS)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        n_rows = tl.where(scale - scale == 0.0, n_rows, 0)
    is_row, is_column = rows < n_rows, columns < n_columns
    inside = is_row[:, None] & is_column[None, :]
    at = rows[:, None] * n_columns + columns[None, :]
    row = tl.load(row_ptr + rows, mask=is_row, other=0.0)
    column = tl.load(column_ptr + columns, mask=is_column, other=0.0)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)

    s = tl.minimum(row[:, None], column[None, :]) + g * g
    p = moved(p, g, s, lr, eps, kept)

    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
    s = tl.where(inside, s, 0.0)
    tl.atomic_max(new_row_ptr + rows, tl.max(s, 1), mask=is_row, sem="relaxed")
    tl.atomic_max(new_column_ptr + columns, tl.max(s, 0), mask=is_column, sem="relaxed")


@triton.jit(do_not_specialize=("n",))
def sm3_cells_kernel(
    p_ptr, g_ptr, row_ptr, column_ptr, new_row_ptr, new_column_ptr, rows_ptr, columns_ptr,
    scale_ptr, n, n_columns, lr, eps, kept, COMPACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK named cells a program      rows (N) int32   columns (N) int16 modulo 2**16, or int32"""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        n = tl.where(scale - scale == 0.0, n, 0)
    inside = entries < n
    rows = tl.load(rows_ptr + entries, mask=inside, other=0).to(tl.int64)
    columns = tl.load(columns_ptr + entries, mask=inside, other=0).to(tl.int32)
    if columns_ptr.dtype.element_ty == tl.int16:
        columns = columns & 0xFFFF
    at = entries if COMPACT else rows * n_columns + columns
    row = tl.load(row_ptr + rows, mask=inside, other=0.0)
    column = tl.load(column_ptr + columns, mask=inside, other=0.0)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)

    s = tl.minimum(row, column) + g * g
    p = moved(p, g, s, lr, eps, kept)

    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
    tl.atomic_max(new_row_ptr + rows, s, mask=inside, sem="relaxed")
    tl.atomic_max(new_column_ptr + columns, s, mask=inside, sem="relaxed")
