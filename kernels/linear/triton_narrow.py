"""Products with a narrow side, R columns: the hidden activations, and the gradients of down and up.

They read one wide matrix once, so their time is that of memory. The contraction is cut into splits,
so that all processors take part, and a second kernel adds the splits up in their order.
"""

import triton
import triton.language as tl

from tilewright.ops.common.triton_dropout import is_kept, is_kept_by_column
from tilewright.ops.linear.triton_tiles import SIZES, load_tile

# how dropout meets the wide matrix
NONE = tl.constexpr(0)
ROWS_ARE_TOKENS = tl.constexpr(1)
COLUMNS_ARE_TOKENS = tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def linear_narrow_kernel(
    wide_ptr, narrow_ptr, partial_ptr, seed_ptr,
    wide_stride_row, wide_stride_k, narrow_stride_k, narrow_stride_r,
    n_rows, n_k, rank, n_splits, split_steps, threshold,
    ROWS_BY_16: tl.constexpr, K_BY_16: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[s, n, r] = sum over the k of split s of wide[n, k] narrow[k, r], in float32

    wide (N, K), with DROPOUT 0 where an element is dropped   narrow (K, R)   any strides
    partial (splits, N, R)
    ..._BY_16   that extent is a multiple of 16, so that masks do not narrow the loads
    """
    if ROWS_BY_16:
        n_rows = n_rows // 16 * 16
    if K_BY_16:
        n_k = n_k // 16 * 16
    pid = tl.program_id(0)
    split = pid % n_splits
    n_tiles = tl.cdiv(rank, BLOCK_R)
    r_start = pid // n_splits % n_tiles * BLOCK_R
    row_start = pid // n_splits // n_tiles * BLOCK_ROWS
    begin = split * split_steps * BLOCK_K
    end = tl.minimum(begin + split_steps * BLOCK_K, n_k)
    seed = 0
    if DROPOUT != NONE:
        seed = tl.load(seed_ptr)
    rows = row_start + tl.arange(0, BLOCK_ROWS)

    acc = tl.zeros((BLOCK_ROWS, BLOCK_R), dtype=tl.float32)
    for k in tl.range(begin, end, BLOCK_K):
        wide = load_tile(
            wide_ptr, row_start, n_rows, k, n_k, wide_stride_row, wide_stride_k, BLOCK_ROWS, BLOCK_K
        )
        if DROPOUT == ROWS_ARE_TOKENS:
            wide = tl.where(is_kept(seed, 0, rows, k, threshold, BLOCK_K), wide, 0.0)
        elif DROPOUT == COLUMNS_ARE_TOKENS:
            tokens = k + tl.arange(0, BLOCK_K)
            kept = is_kept_by_column(seed, 0, row_start, tokens, threshold, BLOCK_ROWS)
            wide = tl.where(kept, wide, 0.0)
        narrow = load_tile(
            narrow_ptr, k, n_k, r_start, rank, narrow_stride_k, narrow_stride_r, BLOCK_K, BLOCK_R
        )
        acc = tl.dot(wide, narrow.to(wide.dtype), acc, input_precision="ieee")

    columns = r_start + tl.arange(0, BLOCK_R)
    place = (split.to(tl.int64) * n_rows + rows) * rank
    inside = (rows < n_rows)[:, None] & (columns < rank)[None, :]
    tl.store(partial_ptr + place[:, None] + columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def linear_sum_splits_kernel(
    partial_ptr, out_ptr, row_factors_ptr, column_factors_ptr, gate_ptr, row_adapters_ptr,
    column_adapters_ptr, out_stride_row, out_stride_r, n_rows, rank, n_splits, factor,
    HAS_RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[n, r] = factor row_factors[n] column_factors[r] sum_s partial[s, n, r]

    partial (splits, N, R) float32   out any strides
    gate (N, R) contiguous    where it is 0 or less, out is 0: the derivative of relu
    row_adapters (N,), column_adapters (R,)   out is 0 where they differ
    HAS_RELU                  negative results become 0
    """
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(rank, BLOCK_R)
    columns = pid % n_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = pid // n_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row, is_column = rows < n_rows, columns < rank
    inside = is_row[:, None] & is_column[None, :]
    place = rows.to(tl.int64)[:, None] * rank + columns[None, :]
    step = n_rows.to(tl.int64) * rank

    acc = tl.zeros((BLOCK_ROWS, BLOCK_R), dtype=tl.float32)
    for split in tl.range(0, n_splits):
        acc += tl.load(partial_ptr + split * step + place, mask=inside, other=0.0)

    acc *= factor
    if row_factors_ptr is not None:
        factors = tl.load(row_factors_ptr + rows, mask=is_row, other=0.0)
        acc *= factors.to(tl.float32)[:, None]
    if column_factors_ptr is not None:
        factors = tl.load(column_factors_ptr + columns, mask=is_column, other=0.0)
        acc *= factors.to(tl.float32)[None, :]
    if HAS_RELU:  # a NaN stays one
        acc = tl.where(acc < 0.0, 0.0, acc)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + place, mask=inside, other=0.0)
        acc = tl.where(gate <= 0.0, 0.0, acc)
    if row_adapters_ptr is not None:
        row_adapters = tl.load(row_adapters_ptr + rows, mask=is_row, other=-1)
        column_adapters = tl.load(column_adapters_ptr + columns, mask=is_column, other=-1)
        acc = tl.where(row_adapters[:, None] == column_adapters[None, :], acc, 0.0)
    pointers = (
        out_ptr
        + rows.to(tl.int64)[:, None] * out_stride_row
        + columns.to(tl.int64)[None, :] * out_stride_r
    )
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def linear_column_sums_kernel(
    dy_ptr, partial_ptr, dy_stride_t, dy_stride_o, n_tokens, n_out, split_steps, n_splits,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """partial[s, o] = sum over the tokens of split s of dy[t, o], float32: the gradient of bias."""
    split = tl.program_id(0) % n_splits
    o_start = tl.program_id(0) // n_splits * BLOCK_O
    end = tl.minimum((split + 1) * split_steps * BLOCK_T, n_tokens)
    acc = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for t in tl.range(split * split_steps * BLOCK_T, end, BLOCK_T):
        dy = load_tile(dy_ptr, t, end, o_start, n_out, dy_stride_t, dy_stride_o, BLOCK_T, BLOCK_O)
        acc += tl.sum(dy.to(tl.float32), 0)
    columns = o_start + tl.arange(0, BLOCK_O)
    place = split.to(tl.int64) * n_out + columns
    tl.store(partial_ptr + place, acc, mask=columns < n_out)
