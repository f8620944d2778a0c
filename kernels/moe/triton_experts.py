"""The experts' products: up with its activation, any product of rows with their experts' matrices,
and the gradient of what the activation is applied to.

Weights are the first operand, rows the second: on Hopper a product needs 64 rows of the first at
least, and an expert may have few rows. Every program takes tiles one after the other.
"""

import triton
import triton.language as tl

from tilewright.ops.common.triton_packed import load_packed, table_values
from tilewright.ops.moe.triton_tiles import SIZES, gate_and_slope, rows_of_tile, tile_of_item


@triton.jit
def load_lines(
    ptr, lines, is_line, column_start, n_columns, stride_line, stride_column,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(lines, COLUMNS) of a matrix of any strides, zero outside."""
    columns = column_start + tl.arange(0, COLUMNS)
    # int64 before any product: rows * features passes 2**31
    pointers = (
        ptr
        + lines.to(tl.int64)[:, None] * stride_line
        + columns.to(tl.int64)[None, :] * stride_column
    )
    return tl.load(pointers, mask=is_line[:, None] & (columns < n_columns)[None, :], other=0.0)


@triton.jit
def load_decoded(
    words_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
    nested_block, nested_offset, n_groups, group_size, n_lines, row, row_end, column,
    FORMAT: tl.constexpr, ONE_GROUP: tl.constexpr, LANES_ARE_INPUTS: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(LANES, DEPTH) of a packed weight from (row, column) on, rows up to row_end alone: lanes are
    its rows, or its inputs."""
    if LANES_ARE_INPUTS:
        weights, _, _ = load_packed(
            words_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
            nested_block, nested_offset, n_groups, group_size, n_lines, row, row_end, column,
            FORMAT, ONE_GROUP, True, DEPTH, LANES, KIND,
        )  # fmt: skip
        return tl.trans(weights)
    else:
        weights, _, _ = load_packed(
            words_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
            nested_block, nested_offset, n_groups, group_size, n_lines, row, row_end, column,
            FORMAT, ONE_GROUP, True, LANES, DEPTH, KIND,
        )  # fmt: skip
        return weights


@triton.jit
def load_lanes(ptr, begin, inside, n_columns, columns, is_column):
    """(columns, rows), zero outside: rows from `begin` on of a contiguous matrix."""
    # int32 within a tile: 128 rows of 2**24 columns
    rows = tl.arange(0, inside.shape[0])
    offsets = rows[:, None] * n_columns + columns[None, :]
    kept = inside[:, None] & is_column[None, :]
    values = tl.load(ptr + begin.to(tl.int64) * n_columns + offsets, mask=kept, other=0.0)
    return tl.trans(values)


@triton.jit
def store_lanes(ptr, values, begin, inside, n_columns, columns, is_column):
    """The converse of load_lanes."""
    rows = tl.arange(0, inside.shape[0])
    offsets = rows[:, None] * n_columns + columns[None, :]
    kept = inside[:, None] & is_column[None, :]
    base = ptr + begin.to(tl.int64) * n_columns
    tl.store(base + offsets, tl.trans(values.to(ptr.dtype.element_ty)), mask=kept)


@triton.jit
def apart(joined):
    """(LANES, ROWS) twice from (2 LANES, ROWS): even lines and odd ones."""
    n: tl.constexpr = joined.shape[0] // 2
    return tl.split(joined.reshape(n, 2, joined.shape[1]).permute(0, 2, 1))


@triton.jit
def together(even, odd):
    """The converse of apart."""
    return tl.join(even, odd).permute(0, 2, 1).reshape(2 * even.shape[0], even.shape[1])


@triton.jit(do_not_specialize=SIZES)
def moe_up_kernel(
    x_ptr, order_ptr, gates_ptr, weight_ptr, bias_ptr, update_ptr, z_ptr, a_ptr,
    scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr,
    tile_experts_ptr, tile_ends_ptr, starts_ptr,
    x_stride_t, x_stride_h, weight_stride_e, weight_stride_o, weight_stride_i,
    nested_block, nested_offset, n_groups, group_size, n_lines,
    n_experts, slots, width, features, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, TABLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """z[r] = g W[e] x[t] + bias[e] + update[r],  a[r] = act(gate) up,  (gate, up) = z[r]

    x (T, H), W (E, 2 I, H) any strides, W or packed as (E 2 I, H)
    order (T K,) the slot of each row, t = slot // K
    z, update (rows, 2 I), a (rows, I), bias (E, 2 I) contiguous
    gates (T K,) float32 g of each slot, or None for 1; z None where it is not kept
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    table = table_values(TABLE, tl.float32)
    n_tiles = tl.load(tile_ends_ptr + n_experts - 1)
    n_panels = tl.cdiv(width, LANES)
    for item in tl.range(tl.program_id(0), n_tiles * n_panels, tl.num_programs(0)):
        panel, tile = tile_of_item(item, n_panels, n_tiles, GROUP)
        expert, begin, rows, inside = rows_of_tile(
            tile, tile_experts_ptr, tile_ends_ptr, starts_ptr, ROWS
        )
        slot = tl.load(order_ptr + rows, mask=inside, other=0)
        tokens = slot // slots
        lanes = panel * LANES + tl.arange(0, LANES)
        is_lane = lanes < width
        of_expert = weight_ptr + expert.to(tl.int64) * weight_stride_e
        first_row = expert * (2 * width)

        if INTERLEAVED:  # neighbouring lines of one product, taken apart at its end
            lines = 2 * panel * LANES + tl.arange(0, 2 * LANES)
            is_line = lines < 2 * width
            both = tl.zeros((2 * LANES, ROWS), dtype=tl.float32)
            for h in tl.range(0, features, DEPTH):
                x = load_lines(x_ptr, tokens, inside, h, features, x_stride_t, x_stride_h, DEPTH)
                if FORMAT == "dense":
                    weight = load_lines(
                        of_expert,
                        lines,
                        is_line,
                        h,
                        features,
                        weight_stride_o,
                        weight_stride_i,
                        DEPTH,
                    )
                else:
                    weight = load_decoded(
                        weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                        nested_block, nested_offset, n_groups, group_size, n_lines,
                        first_row + 2 * panel * LANES, first_row + 2 * width, h,
                        FORMAT, ONE_GROUP, False, 2 * LANES, DEPTH, kind,
                    )  # fmt: skip
                both = tl.dot(weight, tl.trans(x), both, input_precision="ieee")
            if gates_ptr is not None:
                both *= tl.load(gates_ptr + slot, mask=inside, other=0.0)[None, :]
            if bias_ptr is not None:
                bias = bias_ptr + expert.to(tl.int64) * (2 * width) + lines
                both += tl.load(bias, mask=is_line, other=0.0).to(tl.float32)[:, None]
            if update_ptr is not None:
                both += load_lanes(update_ptr, begin, inside, 2 * width, lines, is_line)
            if z_ptr is not None:
                store_lanes(z_ptr, both, begin, inside, 2 * width, lines, is_line)
            gate, up = apart(both)
        else:
            gate = tl.zeros((LANES, ROWS), dtype=tl.float32)
            up = tl.zeros((LANES, ROWS), dtype=tl.float32)
            for h in tl.range(0, features, DEPTH):
                x = load_lines(x_ptr, tokens, inside, h, features, x_stride_t, x_stride_h, DEPTH)
                if FORMAT == "dense":
                    first = load_lines(
                        of_expert,
                        lanes,
                        is_lane,
                        h,
                        features,
                        weight_stride_o,
                        weight_stride_i,
                        DEPTH,
                    )
                else:
                    first = load_decoded(
                        weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                        nested_block, nested_offset, n_groups, group_size, n_lines,
                        first_row + panel * LANES, first_row + width, h,
                        FORMAT, ONE_GROUP, False, LANES, DEPTH, kind,
                    )  # fmt: skip
                if FORMAT == "dense":
                    second = load_lines(
                        of_expert, lanes + width, is_lane, h, features, weight_stride_o,
                        weight_stride_i, DEPTH,
                    )  # fmt: skip
                else:
                    second = load_decoded(
                        weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                        nested_block, nested_offset, n_groups, group_size, n_lines,
                        first_row + width + panel * LANES, first_row + 2 * width, h,
                        FORMAT, ONE_GROUP, False, LANES, DEPTH, kind,
                    )  # fmt: skip
                gate = tl.dot(first, tl.trans(x), gate, input_precision="ieee")
                up = tl.dot(second, tl.trans(x), up, input_precision="ieee")
            if gates_ptr is not None:
                by = tl.load(gates_ptr + slot, mask=inside, other=0.0)[None, :]
                gate *= by
                up *= by
            if bias_ptr is not None:
                bias = bias_ptr + expert.to(tl.int64) * (2 * width) + lanes
                gate += tl.load(bias, mask=is_lane, other=0.0).to(tl.float32)[:, None]
                up += tl.load(bias + width, mask=is_lane, other=0.0).to(tl.float32)[:, None]
            if update_ptr is not None:
                gate += load_lanes(update_ptr, begin, inside, 2 * width, lanes, is_lane)
                up += load_lanes(update_ptr + width, begin, inside, 2 * width, lanes, is_lane)
            if z_ptr is not None:
                store_lanes(z_ptr, gate, begin, inside, 2 * width, lanes, is_lane)
                store_lanes(z_ptr + width, up, begin, inside, 2 * width, lanes, is_lane)
        a, _, _ = gate_and_slope(gate, up, alpha, limit, ACTIVATION)
        store_lanes(a_ptr, a, begin, inside, width, lanes, is_lane)


@triton.jit(do_not_specialize=SIZES)
def moe_product_kernel(
    rows_ptr, index_ptr, order_ptr, gates_ptr, weight_ptr, bias_ptr, x_ptr, out_ptr, dots_ptr,
    scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr,
    tile_experts_ptr, tile_ends_ptr, starts_ptr,
    rows_stride_r, rows_stride_i, weight_stride_e, weight_stride_o, weight_stride_i,
    x_stride_t, x_stride_h, nested_block, nested_offset, n_groups, group_size, n_lines,
    n_experts, slots, index_slots, n_rows, n_out, n_in,
    FORMAT: tl.constexpr, TABLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    LANES_ARE_INPUTS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[r] = g (W[e] in[r] + bias[e]);  dots[panel, r] = <W[e] in[r], x[t]> over a panel's lanes

    in[r] is row r of `rows`, or row index[r] // index_slots
    W (E, O, I), rows, x (T, O) any strides; W packed as (E O, I), or, if its lanes are the packed
    weight's inputs, as (E I, O)   out (rows, O), bias (E, O) contiguous
    gates (T K,) float32 g of each slot, or None for 1; dots (panels, n_rows) float32, or None
    """
    kind: tl.constexpr = rows_ptr.dtype.element_ty
    table = table_values(TABLE, tl.float32)
    n_tiles = tl.load(tile_ends_ptr + n_experts - 1)
    n_panels = tl.cdiv(n_out, LANES)
    for item in tl.range(tl.program_id(0), n_tiles * n_panels, tl.num_programs(0)):
        panel, tile = tile_of_item(item, n_panels, n_tiles, GROUP)
        expert, begin, rows, inside = rows_of_tile(
            tile, tile_experts_ptr, tile_ends_ptr, starts_ptr, ROWS
        )
        taken = rows
        if index_ptr is not None:
            taken = tl.load(index_ptr + rows, mask=inside, other=0) // index_slots
        lanes = panel * LANES + tl.arange(0, LANES)
        is_lane = lanes < n_out
        of_expert = weight_ptr + expert.to(tl.int64) * weight_stride_e

        acc = tl.zeros((LANES, ROWS), dtype=tl.float32)
        for i in tl.range(0, n_in, DEPTH):
            some = load_lines(rows_ptr, taken, inside, i, n_in, rows_stride_r, rows_stride_i, DEPTH)
            if FORMAT == "dense":
                weight = load_lines(
                    of_expert, lanes, is_lane, i, n_in, weight_stride_o, weight_stride_i, DEPTH
                )
            elif LANES_ARE_INPUTS:
                weight = load_decoded(
                    weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                    nested_block, nested_offset, n_groups, group_size, n_lines,
                    expert * n_in + i, (expert + 1) * n_in, panel * LANES,
                    FORMAT, ONE_GROUP, True, LANES, DEPTH, kind,
                )  # fmt: skip
            else:
                weight = load_decoded(
                    weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                    nested_block, nested_offset, n_groups, group_size, n_lines,
                    expert * n_out + panel * LANES, (expert + 1) * n_out, i,
                    FORMAT, ONE_GROUP, False, LANES, DEPTH, kind,
                )  # fmt: skip
            acc = tl.dot(weight, tl.trans(some), acc, input_precision="ieee")

        if bias_ptr is not None:
            bias = bias_ptr + expert.to(tl.int64) * n_out + lanes
            acc += tl.load(bias, mask=is_lane, other=0.0).to(tl.float32)[:, None]
        if dots_ptr is not None:
            tokens = tl.load(order_ptr + rows, mask=inside, other=0) // slots
            pointers = (
                x_ptr
                + tokens.to(tl.int64)[:, None] * x_stride_t
                + lanes.to(tl.int64)[None, :] * x_stride_h
            )
            x = tl.load(pointers, mask=inside[:, None] & is_lane[None, :], other=0.0)
            dot = tl.sum(acc * tl.trans(x).to(tl.float32), 0)
            tl.store(dots_ptr + panel.to(tl.int64) * n_rows + rows, dot, mask=inside)
        if gates_ptr is not None:
            slot = tl.load(order_ptr + rows, mask=inside, other=0)
            acc *= tl.load(gates_ptr + slot, mask=inside, other=0.0)[None, :]
        store_lanes(out_ptr, acc, begin, inside, n_out, lanes, is_lane)


@triton.jit(do_not_specialize=SIZES)
def moe_gated_backward_kernel(
    dy_ptr, order_ptr, gates_ptr, weight_ptr, update_ptr, z_ptr, dz_ptr, a_ptr, dots_ptr,
    scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr,
    tile_experts_ptr, tile_ends_ptr, starts_ptr,
    dy_stride_t, dy_stride_h, weight_stride_e, weight_stride_h, weight_stride_i,
    nested_block, nested_offset, n_groups, group_size, n_lines,
    n_experts, slots, n_rows, width, features, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, TABLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """da[r] = W[e]^T dy[t] + update[r],  dz[r] = g da times the derivatives at z[r]

    dots[panel, r] = <da[r], act(gate) up> over a panel's lanes;  a[r] = g act(gate) up
    dy (T, H), W (E, H, I) any strides, W or packed as (E H, I)
    z, dz (rows, 2 I), update, a (rows, I) contiguous
    gates (T K,) float32 g of each slot, or None for 1; a None where it is not wanted
    """
    kind: tl.constexpr = dz_ptr.dtype.element_ty
    table = table_values(TABLE, tl.float32)
    n_tiles = tl.load(tile_ends_ptr + n_experts - 1)
    n_panels = tl.cdiv(width, LANES)
    for item in tl.range(tl.program_id(0), n_tiles * n_panels, tl.num_programs(0)):
        panel, tile = tile_of_item(item, n_panels, n_tiles, GROUP)
        expert, begin, rows, inside = rows_of_tile(
            tile, tile_experts_ptr, tile_ends_ptr, starts_ptr, ROWS
        )
        slot = tl.load(order_ptr + rows, mask=inside, other=0)
        tokens = slot // slots
        lanes = panel * LANES + tl.arange(0, LANES)
        is_lane = lanes < width
        of_expert = weight_ptr + expert.to(tl.int64) * weight_stride_e

        acc = tl.zeros((LANES, ROWS), dtype=tl.float32)
        for h in tl.range(0, features, DEPTH):
            dy = load_lines(dy_ptr, tokens, inside, h, features, dy_stride_t, dy_stride_h, DEPTH)
            if FORMAT == "dense":
                weight = load_lines(
                    of_expert, lanes, is_lane, h, features, weight_stride_i, weight_stride_h, DEPTH
                )
            else:
                weight = load_decoded(
                    weight_ptr, scales_ptr, offsets_ptr, nested_table_ptr, absmax_ptr, table,
                    nested_block, nested_offset, n_groups, group_size, n_lines,
                    expert * features + h, (expert + 1) * features, panel * LANES,
                    FORMAT, ONE_GROUP, True, LANES, DEPTH, kind,
                )  # fmt: skip
            acc = tl.dot(weight, tl.trans(dy), acc, input_precision="ieee")

        if update_ptr is not None:
            acc += load_lanes(update_ptr, begin, inside, width, lanes, is_lane)
        lines = 2 * panel * LANES + tl.arange(0, 2 * LANES)
        if INTERLEAVED:
            # turned and taken apart while narrow: float32 would take twice the registers
            gate, up = apart(load_lanes(z_ptr, begin, inside, 2 * width, lines, lines < 2 * width))
        else:
            gate = load_lanes(z_ptr, begin, inside, 2 * width, lanes, is_lane)
            up = load_lanes(z_ptr + width, begin, inside, 2 * width, lanes, is_lane)
        a, by_gate, by_up = gate_and_slope(
            gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION
        )
        if dots_ptr is not None:
            place = panel.to(tl.int64) * n_rows + rows
            tl.store(dots_ptr + place, tl.sum(acc * a, 0), mask=inside)
        if gates_ptr is not None:
            by = tl.load(gates_ptr + slot, mask=inside, other=0.0)[None, :]
            acc *= by
            a *= by
        by_gate, by_up = acc * by_gate, acc * by_up
        if INTERLEAVED:
            both = together(by_gate.to(kind), by_up.to(kind))
            store_lanes(dz_ptr, both, begin, inside, 2 * width, lines, lines < 2 * width)
        else:
            store_lanes(dz_ptr, by_gate, begin, inside, 2 * width, lanes, is_lane)
            store_lanes(dz_ptr + width, by_up, begin, inside, 2 * width, lanes, is_lane)
        if a_ptr is not None:
            store_lanes(a_ptr, a, begin, inside, width, lanes, is_lane)
