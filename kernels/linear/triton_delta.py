"""A sparse delta: its product with tokens, and the gradient of its values.

D (O, I) by rows: entries n from offsets[o] to offsets[o + 1], at columns[n]. What is gathered is
turned, so that the tokens of an input or an output lie side by side; each has TURNED tokens.
"""

import triton
import triton.language as tl

from tilewright.ops.common.triton_gradient import gradient_tile
from tilewright.ops.linear.triton_tiles import tile_of_program

DELTA_SIZES = ("n_tokens", "n_rows", "n_entries", "n_tiles", "n_starts", "n_steps")


@triton.jit
def load_columns(columns_ptr, entries, inside):
    """int32 columns, of which 16 bits may be kept."""
    columns = tl.load(columns_ptr + entries, mask=inside, other=0).to(tl.int32)
    if columns_ptr.dtype.element_ty == tl.int16:
        columns = columns & 0xFFFF
    return columns


@triton.jit(do_not_specialize=DELTA_SIZES)
def linear_delta_kernel(
    turned_ptr, offsets_ptr, columns_ptr, values_ptr, sums_ptr,
    n_tokens, n_rows, turned_stride,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """sums[t, o] = sum over the entries n of row o of values[n] turned[columns[n], t], float32

    turned (I, TURNED), TURNED the tokens rounded up to a multiple of PAD, zero beyond them
    sums (T, O) contiguous

    A program takes BLOCK_N entries of each of its rows at once, until the longest row is done.
    """
    row_tiles = tl.cdiv(n_rows, BLOCK_O)
    rows = tl.program_id(0) % row_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.program_id(0) // row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    # a multiple that the compiler sees: the mask does not narrow the loads
    is_turned = tokens < tl.cdiv(n_tokens, PAD) * PAD
    is_row = rows < n_rows
    begin = tl.load(offsets_ptr + rows, mask=is_row, other=0)
    end = tl.load(offsets_ptr + rows + 1, mask=is_row, other=0)

    acc = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
    for n in tl.range(0, tl.max(end - begin, 0).to(tl.int32), BLOCK_N):
        entries = begin[:, None] + n + tl.arange(0, BLOCK_N)[None, :]
        inside = entries < end[:, None]
        columns = load_columns(columns_ptr, entries, inside)
        values = tl.load(values_ptr + entries, mask=inside, other=0.0).to(tl.float32)
        place = columns.to(tl.int64)[:, :, None] * turned_stride + tokens[None, None, :]
        x = tl.load(turned_ptr + place, mask=inside[:, :, None] & is_turned[None, None, :],
                    other=0.0)  # fmt: skip
        acc += tl.sum(values[:, :, None] * x.to(tl.float32), 1)

    place = tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
    tl.store(sums_ptr + place, acc, mask=is_row[:, None] & (tokens < n_tokens)[None, :])


@triton.jit(do_not_specialize=DELTA_SIZES)
def linear_sampled_entries_kernel(
    dy_turned_ptr, x_turned_ptr, rows_ptr, columns_ptr, products_ptr,
    n_tokens, n_entries, turned_stride,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """products[n] = sum_t dy_turned[rows[n], t] x_turned[columns[n], t]: a dot product each

    dy_turned (O, TURNED), x_turned (I, TURNED) as in linear_delta_kernel   products (N,) float32
    """
    entries = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entries < n_entries
    rows = tl.load(rows_ptr + entries, mask=inside, other=0).to(tl.int64)
    columns = load_columns(columns_ptr, entries, inside).to(tl.int64)
    n_turned = tl.cdiv(n_tokens, PAD) * PAD

    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for t in tl.range(0, n_turned, BLOCK_T):
        tokens = t + tl.arange(0, BLOCK_T)
        mask = inside[:, None] & (tokens < n_turned)[None, :]
        dy = tl.load(dy_turned_ptr + rows[:, None] * turned_stride + tokens[None, :], mask=mask,
                     other=0.0)  # fmt: skip
        x = tl.load(x_turned_ptr + columns[:, None] * turned_stride + tokens[None, :], mask=mask,
                    other=0.0)  # fmt: skip
        acc += dy.to(tl.float32) * x.to(tl.float32)

    tl.store(products_ptr + entries, tl.sum(acc, 1), mask=inside)


@triton.jit(do_not_specialize=DELTA_SIZES)
def linear_tile_starts_kernel(
    offsets_ptr, columns_ptr, starts_ptr, n_starts, n_tiles, n_steps,
    BLOCK_I: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """starts[o, j] = the first entry of row o at a column from j BLOCK_I on, 0 <= j <= n_tiles

    n_starts   O (n_tiles + 1)
    n_steps    of a bisection, enough for the longest row
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_starts
    rows = at // (n_tiles + 1)
    first = (at % (n_tiles + 1) * BLOCK_I).to(tl.int32)
    low = tl.load(offsets_ptr + rows, mask=inside, other=0)
    high = tl.load(offsets_ptr + rows + 1, mask=inside, other=0)
    for _ in tl.range(0, n_steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = load_columns(columns_ptr, middle, inside & is_open) < first
        low, high = (
            tl.where(is_open & is_before, middle + 1, low),
            tl.where(is_open & (is_before == 0), middle, high),
        )
    tl.store(starts_ptr + at, low, mask=inside)


@triton.jit(do_not_specialize=DELTA_SIZES)
def linear_sampled_tiles_kernel(
    dy_ptr, x_ptr, starts_ptr, columns_ptr, products_ptr,
    dy_stride_t, dy_stride_o, x_stride_t, x_stride_i, n_tokens, n_out, n_in, n_tiles,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """products[n] = sum_t dy[t, o] x[t, i], (o, i) the place of entry n: of a whole tile of dy^T x
    the entries at D's places are kept, BLOCK_N of each row at once.

    dy (T, O), x (T, I) any strides   starts (O, n_tiles + 1)   products (N,) float32
    """
    o_tile, i_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(n_out, BLOCK_O), tl.cdiv(n_in, BLOCK_I), GROUP
    )
    o_start, i_start = o_tile * BLOCK_O, i_tile * BLOCK_I
    acc = gradient_tile(
        dy_ptr, x_ptr, dy_stride_t, dy_stride_o, x_stride_t, x_stride_i, o_start, n_out, i_start,
        n_in, n_tokens, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip

    rows = o_start + tl.arange(0, BLOCK_O)
    is_row = rows < n_out
    at = rows.to(tl.int64) * (n_tiles + 1) + i_tile
    begin = tl.load(starts_ptr + at, mask=is_row, other=0)
    end = tl.load(starts_ptr + at + 1, mask=is_row, other=0)
    for n in tl.range(0, tl.max(end - begin, 0).to(tl.int32), BLOCK_N):
        entries = begin[:, None] + n + tl.arange(0, BLOCK_N)[None, :]
        inside = entries < end[:, None]
        columns = load_columns(columns_ptr, entries, inside)
        found = tl.gather(acc, tl.where(inside, columns - i_start, 0), 1)
        tl.store(products_ptr + entries, found, mask=inside)
