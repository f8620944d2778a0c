"""Launchers of the Triton kernels of the norm room: tensors -> kernel arguments."""

from __future__ import annotations

import torch

from tilewright.ops.common.triton_launch import Launch, contiguous, why_not_triton
from tilewright.ops.norm.problem import LAYER, LLAMA, Problem, heads_last, stats_shape, y_dtype
from tilewright.ops.norm.triton_elementwise import (
    embedding_backward_kernel,
    embedding_forward_kernel,
    gated_backward_kernel,
    gated_forward_kernel,
    rope_kernel,
)
from tilewright.ops.norm.triton_norm import (
    norm_add_blocks_kernel,
    norm_dx_kernel,
    norm_forward_kernel,
    norm_sums_kernel,
)

_WHOLE = 16384  # columns: the widest row that is held in registers
_LOOPED = 4096  # columns at a time of a wider one
_TILE = 2048  # elements of a program's tile at least, for narrow rows
_COLUMNS = 1024  # of an elementwise program
_BLOCKS = 128  # of rows, whose sums are taken apart


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    return why_not_triton(p.device, p.dtype)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _row_tile(width: int) -> tuple[int, int, bool, int]:
    """Rows and columns of a tile, whether it holds whole rows, and warps."""
    columns = _power_of_2(width)
    if columns > _WHOLE:
        return 1, _LOOPED, False, 8
    rows = max(1, min(32, _TILE // columns))
    return rows, columns, True, max(4, min(16, rows * columns // 512))


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` as (rows, width) with neighbouring columns; a copy where it is not so."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def norm(x, weight, bias, residual, eps, weight_offset, kind, keeps_stats):
    """y, the sum with residual (or None), and the statistics (or None)."""
    y = x.new_empty(x.shape, dtype=y_dtype(kind, x.dtype, weight))
    total = None if residual is None else x.new_empty(x.shape)
    stats = x.new_empty(stats_shape(kind, x), dtype=torch.float32) if keeps_stats else None
    norm_launch(x, weight, bias, residual, eps, weight_offset, kind, y, total, stats).run()
    return y, total, stats


def norm_launch(x, weight, bias, residual, eps, weight_offset, kind, y, total, stats) -> Launch:
    width = x.shape[-1]
    x = _in_rows(x)
    residual = None if residual is None else _in_rows(residual)
    rows, columns, whole, warps = _row_tile(width)
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "sum_ptr": total, "weight_ptr": contiguous(weight),
        "bias_ptr": contiguous(bias), "y_ptr": y, "rstd_ptr": None if stats is None else stats[0],
        "mean_ptr": stats[1] if stats is not None and kind == LAYER else None,
        "x_stride": x.stride(0), "residual_stride": 0 if residual is None else residual.stride(0),
        "n_rows": x.shape[0], "width": width, "offset": float(weight_offset), "eps": float(eps),
        "CENTRED": kind == LAYER, "EARLY": kind == LLAMA, "WHOLE": whole, "ROWS": rows,
        "COLUMNS": columns,
    }  # fmt: skip
    return Launch(norm_forward_kernel, -(-x.shape[0] // rows), arguments, warps, device=x.device)


def norm_backward(dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants):
    """dx, dweight, dbias; None where not wanted. x is what was normalised."""
    found = [
        t.new_empty(t.shape) if wants_it else None
        for t, wants_it in zip((x, weight, bias), wants, strict=True)
    ]
    if x.numel() == 0:
        for t in found[1:]:
            if t is not None:
                t.zero_()
        return tuple(found)
    for launch in norm_backward_launches(dy, dsum, x, weight, stats, weight_offset, kind, found):
        launch.run()
    return tuple(found)


def norm_backward_launches(dy, dsum, x, weight, stats, weight_offset, kind, found) -> list[Launch]:
    dx, dweight, dbias = found
    width, device = x.shape[-1], x.device
    x, dy = _in_rows(x), _in_rows(dy)
    n_rows = x.shape[0]
    shared = {
        "x_ptr": x, "dy_ptr": dy, "rstd_ptr": stats[0],
        "mean_ptr": stats[1] if kind == LAYER else None, "x_stride": x.stride(0),
        "dy_stride": dy.stride(0), "n_rows": n_rows, "width": width, "CENTRED": kind == LAYER,
    }  # fmt: skip
    launches = []
    if dx is not None:
        dsum = None if dsum is None else _in_rows(dsum)
        rows, columns, whole, warps = _row_tile(width)
        arguments = {
            **shared, "dsum_ptr": dsum, "weight_ptr": contiguous(weight), "dx_ptr": dx,
            "dsum_stride": 0 if dsum is None else dsum.stride(0), "offset": float(weight_offset),
            "WHOLE": whole, "ROWS": rows, "COLUMNS": columns,
        }  # fmt: skip
        launches.append(Launch(norm_dx_kernel, -(-n_rows // rows), arguments, warps, device=device))
    if dweight is None and dbias is None:
        return launches
    n_blocks = min(_BLOCKS, -(-n_rows // 16))
    partials = [
        None if t is None else torch.empty(n_blocks, width, dtype=torch.float32, device=device)
        for t in (dweight, dbias)
    ]
    columns = min(128, max(16, _power_of_2(width)))
    arguments = {
        **shared, "dweight_ptr": partials[0], "dbias_ptr": partials[1],
        "per_block": -(-n_rows // n_blocks), "ROWS": 16, "COLUMNS": columns,
    }  # fmt: skip
    programs = n_blocks * -(-width // columns)
    launches.append(Launch(norm_sums_kernel, programs, arguments, device=device))
    for partial, to in zip(partials, (dweight, dbias), strict=True):
        if partial is not None:
            arguments = {
                "partial_ptr": partial, "to_ptr": to, "n_blocks": n_blocks, "width": width,
                "COLUMNS": 128,
            }  # fmt: skip
            programs = -(-width // 128)
            launches.append(Launch(norm_add_blocks_kernel, programs, arguments, device=device))
    return launches


def rope(x, cos, sin, positions, interleaved, heads_first, inverse, y):
    """Writes y, which may be x itself."""
    if x.numel() == 0:
        return
    if x.stride(-1) != 1 and y is x:
        fresh = x.contiguous()
        rope(fresh, cos, sin, positions, interleaved, heads_first, inverse, fresh)
        x.copy_(fresh)
        return
    rope_launch(x, cos, sin, positions, interleaved, heads_first, inverse, y).run()


def rope_launch(x, cos, sin, positions, interleaved, heads_first, inverse, y) -> Launch:
    view, to = heads_last(x, heads_first), heads_last(y, heads_first)
    if view.stride(3) != 1:
        view = view.contiguous()
    rounded = cos.dtype == x.dtype
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if positions is not None:
        positions = positions.long().contiguous()
    batch, length, n_heads, head_dim = view.shape
    n_angles = cos.shape[-1]
    angles = _power_of_2(n_angles)
    heads = max(1, min(_power_of_2(n_heads), _TILE // angles))
    strides = {
        f"{name}_{axis}": t.stride(i)
        for name, t in (("x", view), ("y", to))
        for i, axis in enumerate(("batch", "token", "head"))
    }
    arguments = {
        "x_ptr": view, "cos_ptr": cos, "sin_ptr": sin, "positions_ptr": positions, "y_ptr": to,
        **strides, "table_batch": cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0,
        "table_row": cos.stride(-2), "length": length, "n_heads": n_heads, "head_dim": head_dim,
        "n_angles": n_angles, "sign": -1.0 if inverse else 1.0, "INTERLEAVED": interleaved,
        "ROUNDED": rounded, "COPIES": 2 * n_angles < head_dim and y is not x, "HEADS": heads,
        "ANGLES": angles, "REST": _power_of_2(max(1, head_dim - 2 * n_angles)),
    }  # fmt: skip
    return Launch(rope_kernel, batch * length * -(-n_heads // heads), arguments, 4, device=x.device)


def _halves(gate, up):
    if up is not None:
        return _in_rows(gate), _in_rows(up)
    both = _in_rows(gate)
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


def gated(gate, up, activation):
    y = gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))
    if y.numel():
        gated_launch(gate, up, activation, y).run()
    return y


def gated_launch(gate, up, activation, y) -> Launch:
    gate, up = _halves(gate, up)
    n_rows, width = gate.shape
    columns = min(_COLUMNS, _power_of_2(width))
    arguments = {
        "gate_ptr": gate, "up_ptr": up, "y_ptr": y, "gate_stride": gate.stride(0),
        "up_stride": up.stride(0), "width": width, "ACTIVATION": activation, "COLUMNS": columns,
    }  # fmt: skip
    programs = n_rows * -(-width // columns)
    return Launch(gated_forward_kernel, programs, arguments, 4, device=y.device)


def gated_backward(dy, gate, up, activation, wants):
    """dgate and dup, None where not wanted; dgate alone, of both, where they are one tensor."""
    dgate = gate.new_empty(gate.shape) if wants[0] else None
    dup = None if up is None or not wants[1] else gate.new_empty(gate.shape)
    if dy.numel() and (dgate is not None or dup is not None):
        gated_backward_launch(dy, gate, up, activation, dgate, dup).run()
    return dgate, dup


def gated_backward_launch(dy, gate, up, activation, dgate, dup) -> Launch:
    dy = _in_rows(dy)
    n_rows, width = dy.shape
    if up is None:
        (to_gate, to_up), d_stride = _halves(dgate, None), 2 * width
    else:
        (to_gate, to_up), d_stride = (dgate, dup), width
    gate, up = _halves(gate, up)
    columns = min(_COLUMNS, _power_of_2(width))
    arguments = {
        "dy_ptr": dy, "gate_ptr": gate, "up_ptr": up, "dgate_ptr": to_gate, "dup_ptr": to_up,
        "dy_stride": dy.stride(0), "gate_stride": gate.stride(0), "up_stride": up.stride(0),
        "d_stride": d_stride,
        "width": width, "ACTIVATION": activation, "COLUMNS": columns,
    }  # fmt: skip
    programs = n_rows * -(-width // columns)
    return Launch(gated_backward_kernel, programs, arguments, 4, device=dy.device)


def embedding(ids, weight):
    y = weight.new_empty(*ids.shape, weight.shape[1])
    embedding_launch(ids, weight, y).run()
    return y


def embedding_launch(ids, weight, y) -> Launch:
    ids, weight = ids.long().contiguous(), _in_rows(weight)
    n_rows, width = weight.shape
    columns = min(_COLUMNS, _power_of_2(width))
    arguments = {
        "ids_ptr": ids, "weight_ptr": weight, "y_ptr": y, "weight_stride": weight.stride(0),
        "n_rows": n_rows, "width": width, "COLUMNS": columns,
    }  # fmt: skip
    programs = ids.numel() * -(-width // columns)
    return Launch(embedding_forward_kernel, programs, arguments, 4, device=y.device)


def embedding_backward(dy, ids, n_rows, padding_row, by_frequency):
    dweight = dy.new_zeros(n_rows, dy.shape[-1])
    if ids.numel():
        embedding_backward_launch(dy, ids, padding_row, by_frequency, dweight).run()
    return dweight


def embedding_backward_launch(dy, ids, padding_row, by_frequency, dweight) -> Launch:
    dy, (n_rows, width) = _in_rows(dy), dweight.shape
    in_order, tokens = torch.sort(ids.reshape(-1).long(), stable=True)
    ends = torch.searchsorted(in_order, in_order, right=True)
    columns = min(256, _power_of_2(width))
    arguments = {
        "sorted_ptr": in_order, "order_ptr": tokens, "ends_ptr": ends, "dy_ptr": dy,
        "dweight_ptr": dweight, "dy_stride": dy.stride(0), "n_rows": n_rows, "width": width,
        "padding_row": padding_row, "BY_FREQUENCY": by_frequency, "COLUMNS": columns,
    }  # fmt: skip
    programs = in_order.numel() * -(-width // columns)
    return Launch(embedding_backward_kernel, programs, arguments, 4, device=dy.device)
