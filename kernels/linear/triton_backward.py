"""The gradient of x: a product with the same weight, contracted over its rows."""

import triton
import triton.language as tl

from tilewright.ops.common.triton_dropout import is_kept, is_kept_at
from tilewright.ops.common.triton_packed import table_values
from tilewright.ops.linear.triton_tiles import (
    SIZES,
    load_gathered,
    load_tile,
    load_weight,
    tile_of_program,
)


@triton.jit(do_not_specialize=SIZES)
def linear_dx_kernel(
    dy_ptr, weight_ptr, scales_ptr, offsets_ptr, order_ptr, nested_table_ptr, absmax_ptr,
    out_scale_ptr, delta_ptr, dhidden_ptr, down_ptr, seed_ptr, dx_ptr,
    dy_stride_t, dy_stride_o, weight_stride_o, weight_stride_i, down_stride_r, down_stride_i,
    n_tokens, n_in, n_out, rank, n_groups, group_size, n_lines, nested_block, threshold,
    nested_offset, keep_scale,
    FORMAT: tl.constexpr, TABLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dx[t, i] = sum_o dy[t, o] out_scale[o] W[o, i] + delta[t, i]
                + kept[t, i] sum_r dhidden[t, r] down[r, i]

    delta (T, I)   the sums of linear_delta_kernel over the transpose of D, or None
    dy (T, O), down (R, I) any strides   W as in load_weight   dhidden (T, R), dx (T, I) contiguous
    kept       1 without dropout, else keep_scale = 1 / (1 - p) or 0
    order (I,) column j of a packed W belongs to input order[j]
    """
    pid = tl.program_id(0)
    i_tile, t_tile = tile_of_program(pid, tl.cdiv(n_in, BLOCK_I), tl.cdiv(n_tokens, BLOCK_T), GROUP)
    i_start, t_start = i_tile * BLOCK_I, t_tile * BLOCK_T
    kind: tl.constexpr = dy_ptr.dtype.element_ty
    table = table_values(TABLE, tl.float32)

    acc = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
    for o in tl.range(0, n_out, BLOCK_O):
        dy = load_tile(dy_ptr, t_start, n_tokens, o, n_out, dy_stride_t, dy_stride_o,
                       BLOCK_T, BLOCK_O)  # fmt: skip
        if out_scale_ptr is not None:
            rows = o + tl.arange(0, BLOCK_O)
            factors = tl.load(out_scale_ptr + rows, mask=rows < n_out, other=0.0)
            dy = (dy.to(tl.float32) * factors.to(tl.float32)[None, :]).to(kind)
        weights, _, _ = load_weight(
            weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
            weight_stride_o, weight_stride_i, nested_block, nested_offset, n_groups, group_size,
            n_lines, o, n_out, i_start, n_in,
            FORMAT, ONE_GROUP, True, BLOCK_O, BLOCK_I, kind,
        )  # fmt: skip
        acc = tl.dot(dy, weights, acc, input_precision="ieee")

    columns = i_start + tl.arange(0, BLOCK_I)
    tokens = t_start + tl.arange(0, BLOCK_T)
    is_column = columns < n_in
    inputs = columns
    if order_ptr is not None:
        inputs = tl.load(order_ptr + columns, mask=is_column, other=0)
    if dhidden_ptr is not None:
        update = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
        # one iteration as a rule: stages would only cost registers
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            dhidden = load_tile(dhidden_ptr, t_start, n_tokens, r, rank, rank, 1, BLOCK_T, BLOCK_R)
            down = load_gathered(
                down_ptr, r, rank, inputs, is_column, down_stride_r, down_stride_i, BLOCK_R
            )
            update = tl.dot(dhidden, down.to(kind), update, input_precision="ieee")
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            if order_ptr is None:
                kept = is_kept(seed, 0, tokens, i_start, threshold, BLOCK_I)
            else:
                kept = is_kept_at(seed, 0, tokens, inputs, threshold)
            update = tl.where(kept, update * keep_scale, 0.0)
        acc += update
    place = tokens.to(tl.int64)[:, None] * n_in + inputs[None, :]
    inside = (tokens < n_tokens)[:, None] & is_column[None, :]
    if delta_ptr is not None:
        acc += tl.load(delta_ptr + place, mask=inside, other=0.0)
    tl.store(dx_ptr + place, acc.to(dx_ptr.dtype.element_ty), mask=inside)
