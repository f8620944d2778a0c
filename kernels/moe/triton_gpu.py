"""Launchers of the Triton kernels of the room: tensors and the problem record -> arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.ops.common.packed import FORMATS, PackedWeight
from tilewright.ops.common.triton_launch import (
    Launch,
    capability_of,
    contiguous,
    why_not_triton,
    words_of,
)
from tilewright.ops.moe import triton_config as config
from tilewright.ops.moe.problem import ALONE, DENSE, Operands, Problem
from tilewright.ops.moe.triton_experts import (
    moe_gated_backward_kernel,
    moe_product_kernel,
    moe_up_kernel,
)
from tilewright.ops.moe.triton_sums import (
    moe_combine_kernel,
    moe_gate_gradient_kernel,
    moe_outer_kernel,
)

_GROUP = 8  # tiles of rows that go together through the panels of a weight
_COLUMNS = 1024  # of a token's sum


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    reason = why_not_triton(p.device, p.dtype)
    if reason is not None:
        return reason
    if p.activation in ALONE or p.activation == "reglu":
        return f"its kernels have no {p.activation}"
    for packing, n_in in ((p.up, p.features), (p.down, p.width)):
        if packing.format != DENSE and packing.group_size % 8 and packing.group_size < n_in:
            return f"group_size is {packing.group_size}, the kernel needs a multiple of 8"
    return None


class Rows(NamedTuple):
    """Where an expert's rows stand: order, starts, and the tables of triton_tiles.py."""

    order: torch.Tensor
    starts: torch.Tensor
    tile_experts: torch.Tensor
    tile_ends: torch.Tensor
    tile: int

    def arguments(self) -> dict:
        return {
            "tile_experts_ptr": self.tile_experts, "tile_ends_ptr": self.tile_ends,
            "starts_ptr": self.starts, "n_experts": self.starts.numel() - 1, "ROWS": self.tile,
            "GROUP": _GROUP,
        }  # fmt: skip


def rows_of(order, starts, tile: int) -> Rows:
    """The tables of tiles of so many rows, made where starts is: nothing waits for them."""
    ends = ((starts.diff() + tile - 1) // tile).cumsum(0)
    # as many tiles as any choice can need
    n_tiles = -(-order.numel() // tile) + min(starts.numel() - 1, order.numel())
    tiles = torch.arange(n_tiles, device=starts.device)
    return Rows(order, starts, torch.searchsorted(ends, tiles, right=True).int(), ends.int(), tile)


def forward(x, gates, order, starts, keeps, o: Operands, p: Problem, z_update=None):
    """y (T, H) and z (T K, 2 I), which is empty unless `keeps`; z_update (T K, 2 I), contiguous, is
    added to z before the activation."""
    y = x.new_empty(p.tokens, p.features)
    z = x.new_empty(order.numel() if keeps else 0, 2 * p.width)
    for launch in forward_launches(
        x, gates, order, starts, o, p, y, z if keeps else None, z_update, capability_of(x)
    ):
        launch.run()
    return y, z


def forward_launches(
    x, gates, order, starts, o: Operands, p: Problem, y, z, z_update, capability
) -> list[Launch]:
    """The launches of one forward pass, in order."""
    if order.numel() == 0:
        y.zero_()
        return []
    rows = rows_of(order, starts, config.row_tile(capability, p))
    a = x.new_empty(order.numel(), p.width)
    out = x.new_empty(order.numel(), p.features)
    by = gates.detach().float().contiguous()
    tiles = config.up_tiles(capability, p)
    arguments = {
        "x_ptr": x, "order_ptr": order, "gates_ptr": by if p.scale_input else None,
        "bias_ptr": contiguous(o.gate_up_bias), "update_ptr": z_update,
        "z_ptr": z, "a_ptr": a, "x_stride_t": x.stride(0), "x_stride_h": x.stride(1),
        **_weight(_gate_up(o, p), p.transposed, tiles.depth), "slots": p.slots, "width": p.width,
        "features": p.features, "alpha": p.alpha, "limit": p.limit, "ACTIVATION": p.activation,
        "INTERLEAVED": p.interleaved, "LANES": tiles.lanes, "DEPTH": tiles.depth,
        **rows.arguments(),
    }  # fmt: skip
    up = _launch(moe_up_kernel, _items(rows, p.width, tiles.lanes), arguments, tiles, x)
    down = _product_launch(
        a, None, 1, _down(o, p), p.transposed, o.down_bias, None if p.scale_input else by, out,
        rows, p, capability,
    )  # fmt: skip
    return [up, down, _combine_launch(out, rows, y, p)]


def backward(
    dy, x, gates, z, order, starts, o: Operands, p: Problem, wants, da_update=None, dz=None
):
    """Gradients of x, gates, the weights and their biases; empty where not wanted.

    da_update   (T K, I), contiguous, is added to W2^T dy; dz (T K, 2 I) receives the gradient of z
    """
    like = (x, gates, o.gate_up, o.down, o.gate_up_bias, o.down_bias)
    make = torch.Tensor.new_zeros if order.numel() == 0 else torch.Tensor.new_empty
    found = [
        make(t, t.shape) if wants_it and t is not None else None
        for t, wants_it in zip(like, wants, strict=False)
    ]
    dgates = None
    if wants[1]:
        dgates = torch.zeros(gates.shape, dtype=torch.float32, device=gates.device)
    for launch in backward_launches(
        dy, x, gates, z, order, starts, o, p, [found[0], dgates, *found[2:]], da_update, dz,
        capability_of(x),
    ):  # fmt: skip
        launch.run()
    if dgates is not None:
        found[1] = dgates.to(gates.dtype)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def backward_launches(
    dy, x, gates, z, order, starts, o: Operands, p: Problem, gradients, da_update, dz, capability
) -> list[Launch]:
    """The launches of one backward pass, in order.

    gradients   dx, dgates (float32, zeros), dgate_up, ddown, and those of the biases; None where
                not wanted
    """
    dx, dgates, dup, ddown, dup_bias, ddown_bias = gradients
    if order.numel() == 0:
        return []
    n_rows = order.numel()
    rows = rows_of(order, starts, config.row_tile(capability, p))
    by = gates.detach().float().contiguous()
    at_input, at_output = (by, None) if p.scale_input else (None, by)
    dz = x.new_empty(n_rows, 2 * p.width) if dz is None else dz
    a = None if ddown is None else x.new_empty(n_rows, p.width)
    tiles = config.gated_backward_tiles(capability, p)
    dots = None
    if dgates is not None and not p.scale_input:
        dots = _dots(-(-p.width // tiles.lanes), n_rows, x)
    of_down = _weight(_down(o, p), p.transposed, tiles.lanes)
    of_down["weight_stride_h"] = of_down.pop("weight_stride_o")
    arguments = {
        "dy_ptr": dy, "order_ptr": order, "gates_ptr": at_output, **of_down,
        "update_ptr": da_update, "z_ptr": z, "dz_ptr": dz, "a_ptr": a, "dots_ptr": dots,
        "dy_stride_t": dy.stride(0), "dy_stride_h": dy.stride(1),
        "slots": p.slots, "n_rows": n_rows,
        "width": p.width, "features": p.features, "alpha": p.alpha, "limit": p.limit,
        "ACTIVATION": p.activation, "INTERLEAVED": p.interleaved, "LANES": tiles.lanes,
        "DEPTH": tiles.depth, **rows.arguments(),
    }  # fmt: skip
    items = _items(rows, p.width, tiles.lanes)
    launches = [_launch(moe_gated_backward_kernel, items, arguments, tiles, x)]
    if dx is not None or (dgates is not None and p.scale_input):
        out = x.new_empty(n_rows, p.features)
        launch = _product_launch(
            dz, None, 1, _gate_up(o, p), not p.transposed, None, at_input, out, rows, p, capability
        )
        if dgates is not None and p.scale_input:
            dots = _dots(-(-p.features // launch.arguments["LANES"]), n_rows, x)
            launch.arguments.update(
                dots_ptr=dots, x_ptr=x, x_stride_t=x.stride(0), x_stride_h=x.stride(1)
            )
        launches.append(launch)
        if dx is not None:
            launches.append(_combine_launch(out, rows, dx, p))
    if dgates is not None:
        bias = None if p.scale_input else contiguous(o.down_bias)
        launches.append(_gate_gradient_launch(dots, dy, bias, dgates, rows, p, capability))
    launches += _weight_launches(
        dy, x, dz, a, at_input, at_output, rows, p, (dup, ddown, dup_bias, ddown_bias), capability
    )
    return launches


def _weight_launches(dy, x, dz, a, at_input, at_output, rows, p, gradients, capability):
    """a holds the gates already, dz those at the output."""
    dup, ddown, dup_bias, ddown_bias = gradients
    one = x.new_ones(1, 1).expand(rows.order.numel(), 1)
    gathered = rows.order
    # (left, its index, right, its index, where to, gates); left and right are rows
    products: list[tuple] = []
    if dup is not None and p.transposed:
        products.append((x, gathered, dz, None, dup, at_input))
    elif dup is not None:
        products.append((dz, None, x, gathered, dup, at_input))
    if ddown is not None and p.transposed:
        products.append((a, None, dy, gathered, ddown, None))
    elif ddown is not None:
        products.append((dy, gathered, a, None, ddown, None))
    if dup_bias is not None:
        products.append((dz, None, one, None, dup_bias[:, :, None], None))
    if ddown_bias is not None:
        products.append((dy, gathered, one, None, ddown_bias[:, :, None], at_output))
    return [
        outer_launch(
            left,
            left_index,
            right,
            right_index,
            p.slots,
            out,
            gates,
            rows.order,
            rows.starts,
            p,
            capability,
        )
        for left, left_index, right, right_index, out, gates in products
    ]


def grouped(rows, index, weight, starts) -> torch.Tensor:
    """(R, N): row r, or row index[r], of `rows` times weight[e]^T, weight (E, N, M), for the rows
    of each expert e; what stands in the rows of none is not settled."""
    n_rows = rows.shape[0] if index is None else index.numel()
    out = rows.new_empty(n_rows, weight.shape[1])
    if out.numel() == 0:
        return out
    capability = capability_of(rows)
    p = _plain_problem(rows, n_rows, weight)
    order = torch.empty(n_rows, dtype=torch.int32, device="meta")  # only its size is read
    of_rows = rows_of(order, starts, config.row_tile(capability, p))
    _product_launch(rows, index, 1, weight, False, None, None, out, of_rows, p, capability).run()
    return out


def outer(left, left_index, right, right_index, starts) -> torch.Tensor:
    """(E, M, N): the sum of left^T right over the rows of each expert."""
    out = left.new_empty(starts.numel() - 1, left.shape[1], right.shape[1])
    if out.numel() == 0:
        return out
    n_rows = left.shape[0] if left_index is None else left_index.numel()
    p = _plain_problem(left, n_rows, out)
    outer_launch(
        left, left_index, right, right_index, 1, out, None, None, starts, p, capability_of(left)
    ).run()
    return out


def outer_launch(
    left, left_index, right, right_index, index_slots, out, gates, order, starts, p, capability
) -> Launch:
    n_left, n_right = left.shape[1], right.shape[1]
    n_experts = starts.numel() - 1
    lines, columns, tiles = config.outer_tiles(capability, p, n_left, n_right)
    arguments = {
        "left_ptr": left, "left_index_ptr": left_index, "right_ptr": right,
        "right_index_ptr": right_index, "order_ptr": order, "gates_ptr": gates, "out_ptr": out,
        "starts_ptr": starts, "left_stride_r": left.stride(0), "left_stride_m": left.stride(1),
        "right_stride_r": right.stride(0), "right_stride_n": right.stride(1),
        "out_stride_e": out.stride(0), "n_experts": n_experts, "index_slots": index_slots,
        "n_left": n_left, "n_right": n_right, "LEFT": lines, "RIGHT": columns,
        "DEPTH": tiles.depth,
    }  # fmt: skip
    items = n_experts * -(-n_left // lines) * -(-n_right // columns)
    return _launch(moe_outer_kernel, items, arguments, tiles, left)


def _plain_problem(rows, n_rows: int, weight) -> Problem:
    """What tile sizes are chosen by, of a product that is not a whole call."""
    return Problem(rows.device.type, rows.dtype, n_rows, 1, weight.shape[0], weight.shape[2],
                   weight.shape[1])  # fmt: skip


def _product_launch(
    rows, index, index_slots, weight, transposed, bias, gates, out, of_rows: Rows, p, capability
) -> Launch:
    """out[r] = g (W[e] rows[r] + bias[e]); without the sums that moe_product_kernel can add.

    transposed   the outputs of the product are the last axis of the weight
    """
    n_out = out.shape[1]
    tiles = config.product_tiles(capability, p, n_out)
    by_inputs = isinstance(weight, PackedWeight) and transposed
    strides = _weight(weight, transposed, tiles.lanes if by_inputs else tiles.depth)
    arguments = {
        "rows_ptr": rows, "index_ptr": index,
        "order_ptr": None if of_rows.order.device.type == "meta" else of_rows.order,
        "gates_ptr": gates, "bias_ptr": contiguous(bias), "x_ptr": None,
        "out_ptr": out, "dots_ptr": None, "rows_stride_r": rows.stride(0),
        "rows_stride_i": rows.stride(1), **strides, "x_stride_t": 0, "x_stride_h": 0,
        "slots": p.slots, "index_slots": index_slots, "n_rows": out.shape[0], "n_out": n_out,
        "n_in": rows.shape[1], "LANES_ARE_INPUTS": by_inputs, "LANES": tiles.lanes,
        "DEPTH": tiles.depth, **of_rows.arguments(),
    }  # fmt: skip
    items = _items(of_rows, n_out, tiles.lanes)
    return _launch(moe_product_kernel, items, arguments, tiles, rows)


def _combine_launch(out, rows: Rows, y, p: Problem) -> Launch:
    places = torch.arange(rows.order.numel(), dtype=torch.int32, device=out.device)
    places = torch.where(places < rows.starts[-1], places, -1)
    row_of = torch.empty_like(places).scatter_(0, rows.order.long(), places)
    columns = config.block(p.features, 16, _COLUMNS)
    arguments = {
        "rows_ptr": out, "row_of_ptr": row_of, "y_ptr": y, "slots": p.slots,
        "features": p.features, "y_stride_t": y.stride(0), "COLUMNS": columns,
    }  # fmt: skip
    programs = p.tokens * -(-p.features // columns)
    return Launch(moe_combine_kernel, programs, arguments, 4, 1, y.device)


def _gate_gradient_launch(dots, dy, bias, dgates, rows: Rows, p: Problem, capability) -> Launch:
    experts = None
    n_rows = rows.order.numel()
    if bias is not None:
        places = torch.arange(n_rows, device=dy.device)
        experts = torch.searchsorted(rows.starts[1:], places, right=True).int()
    tile = 16 if bias is not None or capability is None else 128
    arguments = {
        "dots_ptr": dots, "order_ptr": rows.order, "dy_ptr": dy, "bias_ptr": bias,
        "row_experts_ptr": experts, "starts_ptr": rows.starts, "dgates_ptr": dgates,
        "dy_stride_t": dy.stride(0), "dy_stride_h": dy.stride(1),
        "n_experts": rows.starts.numel() - 1, "slots": p.slots, "n_panels": dots.shape[0],
        "n_rows": n_rows, "features": p.features, "ROWS": tile,
        "COLUMNS": 32 if capability is None else 256,
    }  # fmt: skip
    return Launch(moe_gate_gradient_kernel, -(-n_rows // tile), arguments, 4, 1, dy.device)


def _gate_up(o: Operands, p: Problem) -> torch.Tensor | PackedWeight | None:
    return o.gate_up if p.up.format == DENSE else p.packed_gate_up(o)


def _down(o: Operands, p: Problem) -> torch.Tensor | PackedWeight | None:
    return o.down if p.down.format == DENSE else p.packed_down(o)


def _weight(weight, transposed: bool, tile_inputs: int) -> dict:
    """What the kernels read of a weight (E, out, in), (E, in, out) if transposed, or packed.

    tile_inputs   inputs of a packed weight that a tile holds
    """
    none = dict.fromkeys(("scales_ptr", "offsets_ptr", "nested_table_ptr", "absmax_ptr"))
    if not isinstance(weight, PackedWeight):
        e, first, second = weight.stride()
        out, into = (second, first) if transposed else (first, second)
        return {
            "weight_ptr": weight, "weight_stride_e": e, "weight_stride_o": out,
            "weight_stride_i": into, **none, "nested_block": 0, "nested_offset": 0.0,
            "n_groups": 0, "group_size": 0, "n_lines": 0, "FORMAT": DENSE, "TABLE": None,
            "ONE_GROUP": True,
        }  # fmt: skip
    nested, n_in = weight.nested, weight.in_features
    size = weight.group_size or n_in
    n_groups = -(-n_in // size)
    # what computes its values in registers has no table there
    by_table = weight.format not in ("int4", "uint4", "int8", "fp8")
    return {
        "weight_ptr": words_of(weight.codes), "weight_stride_e": 0, "weight_stride_o": 0,
        "weight_stride_i": 0, "scales_ptr": contiguous(weight.scales),
        "offsets_ptr": contiguous(weight.offsets),
        "nested_table_ptr": nested.table if nested else None,
        "absmax_ptr": nested.absmax if nested else None,
        "nested_block": nested.block if nested else 0,
        "nested_offset": float(nested.offset) if nested else 0.0,
        "n_groups": n_groups, "group_size": size, "n_lines": weight.codes.shape[1],
        "FORMAT": weight.format, "TABLE": FORMATS[weight.format].table if by_table else None,
        "ONE_GROUP": n_groups == 1 or size % tile_inputs == 0,
    }  # fmt: skip


def _items(rows: Rows, n_lanes: int, lanes: int) -> int:
    """Tiles of rows times panels, as many as there can be."""
    return rows.tile_experts.numel() * -(-n_lanes // lanes)


def _launch(kernel, items: int, arguments: dict, tiles: config.Tiles, like) -> Launch:
    """A launch of as many programs as run at once: each takes items in turn."""
    processors = config.PROCESSORS
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    programs = min(items, processors * tiles.of_processor)
    return Launch(kernel, programs, arguments, tiles.num_warps, tiles.num_stages, like.device)


def _dots(n_panels: int, n_rows: int, like) -> torch.Tensor:
    return torch.empty(n_panels, n_rows, dtype=torch.float32, device=like.device)
