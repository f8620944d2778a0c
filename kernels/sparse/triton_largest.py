"""The search for the largest entries of a weight's gradient, a tile at a time.

The size of an entry is the 31 bits of its magnitude in float32, which are in the order of the
numbers; those of NaN are larger than all and never asked for. A pass makes every tile of the
gradient again, and hands over what is large enough or counts ties in each row.
"""

import triton
import triton.language as tl

from tilewright.ops.common.triton_gradient import gradient_tile

INFINITE = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=("n_tokens", "low", "last_row", "room"))
def sparse_tiles_kernel(
    dy_ptr, x_ptr, counts_ptr, places_ptr, sizes_ptr,
    dy_stride_t, dy_stride_o, x_stride_t, x_stride_i, n_tokens, n_out, n_in,
    low, last_row, room,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One pass over G[o, i] = sum_t dy[t, o] x[t, i]; dy (T, O), x (T, I) any strides

    places (room,) int64, sizes (room,) int32 receive entries larger than low, and those as large as
    low in rows up to last_row; counts (1,) int64 is how many there are, which may be more
    Without places: counts (O,) int64, how many entries of each row are as large as low

    Whole numbers are added up with atomics, so that their order changes nothing; what is collected
    stands in any order.
    """
    row_tiles = tl.cdiv(n_out, BLOCK_O)
    o_start = tl.program_id(0) % row_tiles * BLOCK_O
    i_start = tl.program_id(0) // row_tiles * BLOCK_I
    acc = gradient_tile(
        dy_ptr, x_ptr, dy_stride_t, dy_stride_o, x_stride_t, x_stride_i, o_start, n_out, i_start,
        n_in, n_tokens, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip

    rows = o_start + tl.arange(0, BLOCK_O)
    columns = i_start + tl.arange(0, BLOCK_I)
    size = acc.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    is_number = (rows < n_out)[:, None] & (columns < n_in)[None, :] & (size <= INFINITE)
    if places_ptr is None:
        ties = tl.sum((is_number & (size == low)).to(tl.int32), 1)
        tl.atomic_add(counts_ptr + rows, ties.to(tl.int64), mask=rows < n_out, sem="relaxed")
    else:
        is_tie = (size == low) & (rows <= last_row)[:, None]
        wanted = (is_number & ((size > low) | is_tie)).to(tl.int32)
        of_rows = tl.sum(wanted, 1)
        base = tl.atomic_add(counts_ptr, tl.sum(of_rows, 0).to(tl.int64), sem="relaxed")
        first = tl.cumsum(of_rows, 0) - of_rows
        at = base + (first[:, None] + tl.cumsum(wanted, 1) - wanted)
        kept = (wanted > 0) & (at < room)
        place = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
        tl.store(places_ptr + at, place, mask=kept)
        tl.store(sizes_ptr + at, size, mask=kept)
