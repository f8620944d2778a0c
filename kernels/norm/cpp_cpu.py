"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/norm)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NUMBERS, why_not_on_cpu
from tilewright.ops.norm.problem import (
    ACTIVATIONS,
    LAYER,
    LLAMA,
    Problem,
    heads_last,
    stats_shape,
    y_dtype,
)

_ACTIVATION = {name: number for number, name in enumerate(ACTIVATIONS)}  # csrc/norm/norm.h


def why_not(p: Problem) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`t` as rows of contiguous elements, and the way between them; a copy where it is not so."""
    if t.is_neg():
        t = t.resolve_neg()
    if t.is_contiguous():
        return t, t.shape[-1]
    if t.dim() == 2 and t.stride(1) == 1:
        return t, t.stride(0)
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        try:
            rows = t.view(-1, t.shape[-1])
        except RuntimeError:  # the rows lie at no one distance
            pass
        else:
            return rows, rows.stride(0)
    return t.contiguous(), t.shape[-1]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _parameter(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if t is None:
        return None
    t = t if t.dtype == dtype else t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()


def _as(t: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _parameter_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype:
    """x's own where all have it, else float32."""
    for t in parameters:
        if t is not None and t.dtype != x.dtype:
            return torch.float32
    return x.dtype


def norm(x, weight, bias, residual, eps, weight_offset, kind, keeps_stats):
    """y, the sum with residual (or None), and the statistics (or None)."""
    width = x.shape[-1]
    of_y = y_dtype(kind, x.dtype, weight)
    of_parameters = _parameter_dtype(x, weight, bias)
    y = x.new_empty(x.shape, dtype=of_y)
    total = None if residual is None else x.new_empty(x.shape)
    stats = x.new_empty(stats_shape(kind, x), dtype=torch.float32) if keeps_stats else None
    if y.numel() == 0:
        return y, total, stats
    x, x_row = _in_rows(x)
    residual_row = 0
    if residual is not None:
        residual, residual_row = _in_rows(residual)
    weight, bias = _parameter(weight, of_parameters), _parameter(bias, of_parameters)
    n_rows = y.numel() // width
    rstd = _address(stats)
    native().norm_forward(
        NUMBERS[x.dtype], of_parameters != x.dtype, of_y != x.dtype, n_rows, width,
        x.data_ptr(), x_row, _address(weight), _address(bias), weight_offset, eps, y.data_ptr(),
        rstd, rstd + 4 * n_rows if rstd and kind == LAYER else 0, kind == LAYER, kind == LLAMA,
        _address(residual), residual_row, _address(total), torch.get_num_threads(),
    )  # fmt: skip
    return y, total, stats


def norm_backward(dy, dsum, x, weight, bias, stats, eps, weight_offset, kind, wants):
    """dx, dweight, dbias; None where not wanted. x is what was normalised."""
    width, shape = x.shape[-1], x.shape
    of_weight, of_bias = (None if t is None else t.dtype for t in (weight, bias))
    of_parameters = _parameter_dtype(x, weight, bias)
    of_y = y_dtype(kind, x.dtype, weight)
    dx = x.new_empty(shape) if wants[0] else None
    new_sum = x.new_empty if x.numel() else x.new_zeros
    sums = [new_sum(width, dtype=torch.float32) if wants_it else None for wants_it in wants[1:]]
    if x.numel():
        x, x_row = _in_rows(x)
        dy, dy_row = _in_rows(dy if dy.dtype == of_y else dy.to(of_y))
        dsum_row = 0
        if dsum is not None:
            dsum, dsum_row = _in_rows(dsum)
        weight = _parameter(weight, of_parameters)
        n_rows = x.numel() // width
        rstd = stats.data_ptr()
        native().norm_backward(
            NUMBERS[x.dtype], of_parameters != x.dtype, of_y != x.dtype, n_rows, width,
            x.data_ptr(), x_row, _address(weight), weight_offset, dy.data_ptr(), dy_row, rstd,
            rstd + 4 * n_rows if kind == LAYER else 0, kind == LAYER, _address(dsum), dsum_row,
            _address(dx), _address(sums[0]), _address(sums[1]), torch.get_num_threads(),
        )  # fmt: skip
    dweight, dbias = sums
    return dx, _as(dweight, of_weight), _as(dbias, of_bias)


def rope(x, cos, sin, positions, interleaved, heads_first, inverse, y):
    """Writes y, which may be x itself."""
    if x.numel() == 0:
        return
    if x.is_neg():
        x = x.resolve_neg()
    view, to = heads_last(x, heads_first), heads_last(y, heads_first)
    if view.stride(3) != 1 and view.shape[3] > 1:
        if y is x:
            fresh = x.new_empty(x.shape)
            rope(x.contiguous(), cos, sin, positions, interleaved, heads_first, inverse, fresh)
            x.copy_(fresh)
            return
        view = view.contiguous()
    wide = cos.dtype != x.dtype
    if wide:
        cos, sin = cos.float(), sin.float()
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    n_positions = cos.shape[-2]
    if positions is not None:
        positions = positions.long().contiguous()
    batch, length, n_heads, head_dim = view.shape
    by_batch = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    native().rope(
        NUMBERS[x.dtype], wide, interleaved, inverse, batch, length, n_heads, head_dim,
        cos.shape[-1], view.data_ptr(), view.stride(0), view.stride(1), view.stride(2),
        to.data_ptr(), to.stride(0), to.stride(1), to.stride(2), cos.data_ptr(), sin.data_ptr(),
        by_batch, cos.stride(-2), _address(positions), n_positions, torch.get_num_threads(),
    )  # fmt: skip


def _halves(gate, up):
    """The addresses and distances of gate and up, what keeps them alive, and a row's width."""
    if up is None:
        gate, row = _in_rows(gate)
        width = gate.shape[-1] // 2
        at = gate.data_ptr()
        return (at, row, at + width * gate.itemsize, row), gate, width
    gate, gate_row = _in_rows(gate)
    up, up_row = _in_rows(up)
    return (gate.data_ptr(), gate_row, up.data_ptr(), up_row), (gate, up), gate.shape[-1]


def gated(gate, up, activation):
    if up is None:
        y = gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2)
    else:
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    n = y.numel()
    if n:
        places, held, width = _halves(gate, up)
        native().gated_forward(
            NUMBERS[gate.dtype], _ACTIVATION[activation], n // width, width, *places, y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        del held
    return y


def gated_backward(dy, gate, up, activation, wants):
    """dgate and dup, None where not wanted; dgate alone, of both, where they are one tensor."""
    dgate = gate.new_empty(gate.shape) if wants[0] else None
    dup = None if up is None or not wants[1] else gate.new_empty(gate.shape)
    if dy.numel():
        places, held, width = _halves(gate, up)
        dy, dy_row = _in_rows(dy)
        to_gate, to_up, row = _address(dgate), _address(dup), width
        if up is None:
            to_up, row = to_gate + width * gate.itemsize, 2 * width
        native().gated_backward(
            NUMBERS[gate.dtype], _ACTIVATION[activation], dy.numel() // width, width,
            *places, dy.data_ptr(), dy_row, to_gate, to_up, row, torch.get_num_threads(),
        )  # fmt: skip
        del held
    return dgate, dup


def embedding(ids, weight):
    ids = ids.long().contiguous()
    weight, row = _in_rows(weight)
    n_rows, width = weight.shape
    y = weight.new_empty(*ids.shape, width)
    if ids.numel():
        native().embedding_forward(
            ids.data_ptr(), ids.numel(), weight.data_ptr(), n_rows, width * weight.itemsize,
            row * weight.itemsize, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return y


def embedding_backward(dy, ids, n_rows, padding_row, by_frequency):
    ids = ids.long().contiguous()
    width = dy.shape[-1]
    dweight = dy.new_empty(n_rows, width)
    dy, row = _in_rows(dy)
    native().embedding_backward(
        NUMBERS[dy.dtype], ids.data_ptr(), ids.numel(), n_rows, width, padding_row, by_frequency,
        dy.data_ptr(), row, dweight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dweight
