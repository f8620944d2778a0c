"""The forward kernels: a base product whose epilogue adds bias, factors and the low-rank update."""

import triton
import triton.language as tl

from tilewright.ops.common.triton_packed import table_values
from tilewright.ops.linear.triton_tiles import (
    SIZES,
    load_gathered,
    load_tile,
    load_weight,
    tile_of_program,
)


@triton.jit
def store_finished(
    acc, delta_ptr, bias_ptr, out_scale_ptr, hidden_ptr, up_ptr, column_scales_ptr, y_ptr,
    up_stride_o, up_stride_r, o_start, n_out, t_start, n_tokens, rank, scale,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[t, o] = (acc[o, t] + delta[t, o] + bias[o]) out_scale[o]
               + scale sum_r up[o, r] hidden[t, r]

    y, delta (T, O), hidden (T, R) contiguous; column_scales (R,) take the place of scale
    """
    rows = o_start + tl.arange(0, BLOCK_O)
    tokens = t_start + tl.arange(0, BLOCK_T)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < n_out, other=0.0).to(tl.float32)[:, None]
    if out_scale_ptr is not None:
        factors = tl.load(out_scale_ptr + rows, mask=rows < n_out, other=0.0)
        acc *= factors.to(tl.float32)[:, None]
    if hidden_ptr is not None:
        kind: tl.constexpr = hidden_ptr.dtype.element_ty
        update = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
        # one iteration as a rule: stages would only cost registers
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            hidden = load_tile(hidden_ptr, t_start, n_tokens, r, rank, rank, 1, BLOCK_T, BLOCK_R)
            if column_scales_ptr is not None:
                columns = r + tl.arange(0, BLOCK_R)
                factors = tl.load(column_scales_ptr + columns, mask=columns < rank, other=0.0)
                hidden = (hidden.to(tl.float32) * factors[None, :]).to(kind)
            up = load_tile(
                up_ptr, o_start, n_out, r, rank, up_stride_o, up_stride_r, BLOCK_O, BLOCK_R
            )
            update = tl.dot(up.to(kind), tl.trans(hidden), update, input_precision="ieee")
        if column_scales_ptr is not None:
            acc += update
        else:
            acc += scale * update
    y = tl.trans(acc)
    inside = (tokens < n_tokens)[:, None] & (rows < n_out)[None, :]
    place = tokens.to(tl.int64)[:, None] * n_out + rows[None, :]
    if delta_ptr is not None:  # as late as can be: its addresses would not fit beside the update
        delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
        if out_scale_ptr is not None:
            factors = tl.load(out_scale_ptr + rows, mask=rows < n_out, other=0.0)
            delta *= factors.to(tl.float32)[None, :]
        y += delta
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def linear_forward_kernel(
    x_ptr, row_scales_ptr, weight_ptr, scales_ptr, offsets_ptr, order_ptr, nested_table_ptr,
    absmax_ptr, delta_ptr, bias_ptr, out_scale_ptr, hidden_ptr, up_ptr, column_scales_ptr, y_ptr,
    partial_ptr,
    x_stride_t, x_stride_i, weight_stride_o, weight_stride_i, up_stride_o, up_stride_r,
    n_tokens, n_in, n_out, rank, n_groups, group_size, n_lines, nested_block, n_splits,
    split_steps, nested_offset, unit, scale,
    FORMAT: tl.constexpr, TABLE: tl.constexpr, ONE_GROUP: tl.constexpr, LATE_SCALES: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y[t, o] = (sum_i W[o, i] x[t, i] + delta[t, o] + bias[o]) out_scale[o]
               + scale sum_r up[o, r] hidden[t, r]

    delta (T, O)       the sums of linear_delta_kernel, or None
    x (T, I), up (O, R) any strides   W as in load_weight   y (T, O), hidden (T, R) contiguous
    order (I,)         column j of a packed W belongs to input order[j]
    row_scales (T,)    x holds whole numbers (int8), and `unit` is that of the codes
    LATE_SCALES        scales multiply the sums of a tile, which all share one, not its weights
    partial (splits, T, O) float32: if not None, receives the sums over each split_steps tiles of
                       inputs, and y, bias and the rest are left to linear_forward_finish_kernel

    W is the first operand, since only that one can come from registers on Hopper.
    """
    pid = tl.program_id(0)
    split = pid % n_splits
    o_tile, t_tile = tile_of_program(
        pid // n_splits, tl.cdiv(n_out, BLOCK_O), tl.cdiv(n_tokens, BLOCK_T), GROUP
    )
    o_start, t_start = o_tile * BLOCK_O, t_tile * BLOCK_T
    begin = split * split_steps * BLOCK_I
    end = tl.minimum(begin + split_steps * BLOCK_I, n_in)
    by_eight_bits: tl.constexpr = row_scales_ptr is not None
    kind: tl.constexpr = x_ptr.dtype.element_ty
    table = table_values(TABLE, tl.int32 if by_eight_bits else tl.float32)

    acc = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
    for i in tl.range(begin, end, BLOCK_I):
        if order_ptr is None:
            x_tile = load_tile(
                x_ptr, t_start, n_tokens, i, n_in, x_stride_t, x_stride_i, BLOCK_T, BLOCK_I
            )
        else:
            columns = i + tl.arange(0, BLOCK_I)
            inside = columns < n_in
            inputs = tl.load(order_ptr + columns, mask=inside, other=0)
            x_tile = load_gathered(
                x_ptr, t_start, n_tokens, inputs, inside, x_stride_t, x_stride_i, BLOCK_T
            )
        weights, scales, offsets = load_weight(
            weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
            weight_stride_o, weight_stride_i, nested_block, nested_offset, n_groups, group_size,
            n_lines, o_start, n_out, i, n_in,
            FORMAT, ONE_GROUP, not LATE_SCALES, BLOCK_O, BLOCK_I, kind,
        )  # fmt: skip
        if LATE_SCALES:
            sum_kind: tl.constexpr = tl.int32 if by_eight_bits else tl.float32
            sums = tl.dot(weights, tl.trans(x_tile), input_precision="ieee", out_dtype=sum_kind).to(
                tl.float32
            )
            acc += sums * (scales * unit)
            if offsets_ptr is not None:
                acc += offsets * tl.sum(x_tile.to(sum_kind), 1).to(tl.float32)[None, :]
        else:
            acc = tl.dot(weights, tl.trans(x_tile), acc, input_precision="ieee")

    tokens = t_start + tl.arange(0, BLOCK_T)
    if by_eight_bits:
        acc *= tl.load(row_scales_ptr + tokens, mask=tokens < n_tokens, other=0.0)[None, :]
    if partial_ptr is None:
        store_finished(
            acc, delta_ptr, bias_ptr, out_scale_ptr, hidden_ptr, up_ptr, column_scales_ptr, y_ptr,
            up_stride_o, up_stride_r, o_start, n_out, t_start, n_tokens, rank, scale,
            BLOCK_O, BLOCK_T, BLOCK_R,
        )  # fmt: skip
    else:
        rows = o_start + tl.arange(0, BLOCK_O)
        place = (split.to(tl.int64) * n_tokens + tokens) * n_out
        inside = (tokens < n_tokens)[:, None] & (rows < n_out)[None, :]
        tl.store(partial_ptr + place[:, None] + rows[None, :], tl.trans(acc), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def linear_forward_finish_kernel(
    partial_ptr, delta_ptr, bias_ptr, out_scale_ptr, hidden_ptr, up_ptr, column_scales_ptr, y_ptr,
    up_stride_o, up_stride_r, n_tokens, n_out, rank, n_splits, scale,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The splits of linear_forward_kernel added up in their order, and what follows them."""
    n_tiles = tl.cdiv(n_out, BLOCK_O)
    o_start = tl.program_id(0) % n_tiles * BLOCK_O
    t_start = tl.program_id(0) // n_tiles * BLOCK_T
    rows = o_start + tl.arange(0, BLOCK_O)
    tokens = t_start + tl.arange(0, BLOCK_T)
    place = tokens.to(tl.int64)[:, None] * n_out + rows[None, :]
    inside = (tokens < n_tokens)[:, None] & (rows < n_out)[None, :]
    step = n_tokens.to(tl.int64) * n_out
    acc = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for split in tl.range(0, n_splits):
        acc += tl.load(partial_ptr + split * step + place, mask=inside, other=0.0)
    store_finished(
        tl.trans(acc), delta_ptr, bias_ptr, out_scale_ptr, hidden_ptr, up_ptr, column_scales_ptr,
        y_ptr, up_stride_o, up_stride_r, o_start, n_out, t_start, n_tokens, rank, scale,
        BLOCK_O, BLOCK_T, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def linear_quantize_rows_kernel(
    x_ptr, codes_ptr, row_scales_ptr, x_stride_t, x_stride_i, n_in, BLOCK_I: tl.constexpr
):  # fmt: skip
    """codes[t, i] = round(x[t, i] / s[t]), s[t] = max_i |x[t, i]| / 127: one program a row.

    x (T, I) any strides   codes (T, I) int8 contiguous   s (T,) float32, NaN for a row that holds
    an infinity or NaN

    In float32 with divisions rounded as the reference rounds them: x is often exactly half of the
    row's maximum, where the last bit of the scale decides which way 63.5 goes.
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * x_stride_t
    largest = tl.full((), 0.0, dtype=tl.float32)
    is_finite = tl.full((), 1, dtype=tl.int32)
    for i in tl.range(0, n_in, BLOCK_I):
        columns = i + tl.arange(0, BLOCK_I)
        x = tl.load(row_ptr + columns.to(tl.int64) * x_stride_i, mask=columns < n_in, other=0.0)
        magnitude = tl.abs(x.to(tl.float32))
        is_finite = tl.minimum(is_finite, tl.min((magnitude < float("inf")).to(tl.int32), 0))
        largest = tl.maximum(largest, tl.max(magnitude, 0))
    row_scale = tl.div_rn(largest, tl.full((), 127.0, dtype=tl.float32))
    divisor = tl.where(row_scale > 0, row_scale, 1.0)
    for i in tl.range(0, n_in, BLOCK_I):
        columns = i + tl.arange(0, BLOCK_I)
        x = tl.load(row_ptr + columns.to(tl.int64) * x_stride_i, mask=columns < n_in, other=0.0)
        # adding and taking away 1.5 * 2**23 rounds to the nearest whole number, ties to even
        code = (tl.div_rn(x.to(tl.float32), divisor) + 12582912.0) - 12582912.0
        code = tl.where(is_finite == 1, code, 0.0).to(tl.int8)
        tl.store(codes_ptr + token * n_in + columns, code, mask=columns < n_in)
    stored = tl.where(is_finite == 1, row_scale, float("nan"))
    tl.store(row_scales_ptr + token, stored)
