"""Sums over rows: gradients of weights, tokens' outputs, gradients of gates. None needs atomics."""

import triton
import triton.language as tl

from tilewright.ops.moe.triton_tiles import SIZES


@triton.jit
def load_rows(
    ptr, rows, inside, index_ptr, slots, stride_row, column_start, n_columns, stride_column,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(rows, COLUMNS): rows themselves, or those that index[row] // slots names."""
    taken = rows
    if index_ptr is not None:
        taken = tl.load(index_ptr + rows, mask=inside, other=0) // slots
    columns = column_start + tl.arange(0, COLUMNS)
    pointers = (
        ptr
        + taken.to(tl.int64)[:, None] * stride_row
        + columns.to(tl.int64)[None, :] * stride_column
    )
    return tl.load(pointers, mask=inside[:, None] & (columns < n_columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=SIZES)
def moe_outer_kernel(
    left_ptr, left_index_ptr, right_ptr, right_index_ptr, order_ptr, gates_ptr, out_ptr, starts_ptr,
    left_stride_r, left_stride_m, right_stride_r, right_stride_n, out_stride_e,
    n_experts, index_slots, n_left, n_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of g left[r]^T right[r] over an expert's rows; 0 for one without rows

    left (.., M), right (.., N) any strides; row r, or index[r] // index_slots   out (E, M, N),
    contiguous but for out_stride_e   gates (T K,) float32 g of each slot order[r], or None for 1
    """
    kind: tl.constexpr = left_ptr.dtype.element_ty
    across = tl.cdiv(n_right, RIGHT)
    n_tiles = tl.cdiv(n_left, LEFT) * across
    for item in tl.range(tl.program_id(0), n_experts * n_tiles, tl.num_programs(0)):
        expert, tile = item // n_tiles, item % n_tiles
        m, n = tile // across * LEFT, tile % across * RIGHT
        begin = tl.load(starts_ptr + expert).to(tl.int32)
        end = tl.load(starts_ptr + expert + 1).to(tl.int32)

        acc = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
        for r in tl.range(begin, end, DEPTH):
            rows = r + tl.arange(0, DEPTH)
            inside = rows < end
            left = load_rows(
                left_ptr, rows, inside, left_index_ptr, index_slots, left_stride_r, m, n_left,
                left_stride_m, LEFT,
            )  # fmt: skip
            right = load_rows(
                right_ptr, rows, inside, right_index_ptr, index_slots, right_stride_r, n, n_right,
                right_stride_n, RIGHT,
            )  # fmt: skip
            if gates_ptr is not None:
                slot = tl.load(order_ptr + rows, mask=inside, other=0)
                by = tl.load(gates_ptr + slot, mask=inside, other=0.0)
                left = (left.to(tl.float32) * by[:, None]).to(kind)
            acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")

        lines, columns = m + tl.arange(0, LEFT), n + tl.arange(0, RIGHT)
        place = (
            expert.to(tl.int64) * out_stride_e
            + lines.to(tl.int64)[:, None] * n_right
            + columns[None, :]
        )
        kept = (lines < n_left)[:, None] & (columns < n_right)[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=SIZES)
def moe_combine_kernel(
    rows_ptr, row_of_ptr, y_ptr, slots, features, y_stride_t, COLUMNS: tl.constexpr
):
    """y[t] = sum of rows[row_of[t, k]] over k, in that order; those of -1 add nothing

    rows (rows, H), row_of (T, K) contiguous   y (T, H)
    """
    n_panels = tl.cdiv(features, COLUMNS)
    token = (tl.program_id(0) // n_panels).to(tl.int64)
    columns = tl.program_id(0) % n_panels * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.range(0, slots):
        row = tl.load(row_of_ptr + token * slots + k).to(tl.int64)
        some = tl.load(
            rows_ptr + row * features + columns, mask=(columns < features) & (row >= 0), other=0.0
        )
        acc += some.to(tl.float32)
    place = token * y_stride_t + columns
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=columns < features)


@triton.jit(do_not_specialize=SIZES)
def moe_gate_gradient_kernel(
    dots_ptr, order_ptr, dy_ptr, bias_ptr, row_experts_ptr, starts_ptr, dgates_ptr,
    dy_stride_t, dy_stride_h, n_experts, slots, n_panels, n_rows, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgates[order[r]] = sum over panels of dots[panel, r]  +  <dy[t], bias[e]>

    dots (panels, n_rows), bias (E, H) contiguous or None   dy (T, H) any strides   dgates (T K,)
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tl.load(starts_ptr + n_experts).to(tl.int32)
    acc = tl.zeros((ROWS,), dtype=tl.float32)
    dots = dots_ptr + rows
    for _ in tl.range(0, n_panels):
        acc += tl.load(dots, mask=inside, other=0.0)
        dots += n_rows  # of pointers, so that panels * rows may pass 2**31
    slot = tl.load(order_ptr + rows, mask=inside, other=0)
    if bias_ptr is not None:
        expert = tl.load(row_experts_ptr + rows, mask=inside, other=0).to(tl.int64)
        tokens = (slot // slots).to(tl.int64)
        for h in tl.range(0, features, COLUMNS):
            columns = h + tl.arange(0, COLUMNS)
            kept = inside[:, None] & (columns < features)[None, :]
            place = tokens[:, None] * dy_stride_t + columns[None, :] * dy_stride_h
            dy = tl.load(dy_ptr + place, mask=kept, other=0.0).to(tl.float32)
            bias = tl.load(
                bias_ptr + expert[:, None] * features + columns[None, :], mask=kept, other=0.0
            )
            acc += tl.sum(dy * bias.to(tl.float32), 1)
    tl.store(dgates_ptr + slot, acc, mask=inside)
