"""A tile of a linear layer's weight gradient, for kernels that keep none of it."""

import triton
import triton.language as tl


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, dy_stride_t, dy_stride_o, x_stride_t, x_stride_i,
    o_start, n_out, i_start, n_in, n_tokens,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(BLOCK_O, BLOCK_I) float32: sum_t dy[t, o] x[t, i], zero outside; any strides."""
    # int64 before any product: tokens * features passes 2**31
    rows = o_start + tl.arange(0, BLOCK_O)
    columns = i_start + tl.arange(0, BLOCK_I)
    dy_row_ptr = dy_ptr + rows.to(tl.int64)[None, :] * dy_stride_o
    x_column_ptr = x_ptr + columns.to(tl.int64)[None, :] * x_stride_i
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for t in tl.range(0, n_tokens, BLOCK_T):
        tokens = t + tl.arange(0, BLOCK_T)
        is_token = (tokens < n_tokens)[:, None]
        at = tokens.to(tl.int64)[:, None]
        dy = tl.load(dy_row_ptr + at * dy_stride_t, mask=is_token & (rows < n_out)[None, :],
                     other=0.0)  # fmt: skip
        x = tl.load(x_column_ptr + at * x_stride_t, mask=is_token & (columns < n_in)[None, :],
                    other=0.0)  # fmt: skip
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    return acc
