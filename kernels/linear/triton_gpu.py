"""Launchers of the Triton kernels: tensors and the problem record -> kernel arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilewright.ops.common.packed import FORMATS, eight_bit_table, eight_bit_unit
from tilewright.ops.common.triton_launch import (
    Launch,
    capability_of,
    contiguous,
    seed_on,
    why_not_triton,
    words_of,
)
from tilewright.ops.linear import triton_config as config
from tilewright.ops.linear.problem import DENSE, Operands, Problem
from tilewright.ops.linear.triton_backward import linear_dx_kernel
from tilewright.ops.linear.triton_delta_launch import (
    delta_launch,
    sampled_launches,
    transposed_delta,
    turned,
)
from tilewright.ops.linear.triton_forward import (
    linear_forward_finish_kernel,
    linear_forward_kernel,
    linear_quantize_rows_kernel,
)
from tilewright.ops.linear.triton_narrow import (
    COLUMNS_ARE_TOKENS,
    NONE,
    ROWS_ARE_TOKENS,
    linear_column_sums_kernel,
    linear_narrow_kernel,
    linear_sum_splits_kernel,
)

_NONE, _ROWS_ARE_TOKENS, _COLUMNS_ARE_TOKENS = (
    way.value for way in (NONE, ROWS_ARE_TOKENS, COLUMNS_ARE_TOKENS)
)
_GROUP = 8  # tiles of tokens that go together through the tiles of the weight


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    reason = why_not_triton(p.device, p.dtype)
    if reason is not None:
        return reason
    if p.n_deltas:
        return "one sparse delta for all rows, not one for each adapter"
    # the least contraction of a product of 8-bit numbers is 32
    if p.int8_activations and not config.has_one_group(p, 32):
        return (
            "int8_activations needs groups of a multiple of 32 inputs or one a row, "
            f"got group_size {p.group_size}"
        )
    return None


def forward(x, o: Operands, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """y (T, O) and hidden (T, R) in x.dtype, contiguous."""
    y = x.new_empty(p.tokens, p.out_features)
    hidden = x.new_empty(p.tokens, p.rank)
    for launch in forward_launches(x, o, p, y, hidden, capability_of(x)):
        launch.run()
    return y, hidden


def backward(dy, x, hidden, o: Operands, p: Problem, wants):
    """dx, dbias, ddown, dup in their operands' dtypes; those not wanted have shape (0,)."""
    like = (x, o.bias, o.down, o.up)
    found = [
        t.new_empty(t.shape) if wants_it else None for t, wants_it in zip(like, wants, strict=True)
    ]
    for launch in backward_launches(dy, x, hidden, o, p, found, capability_of(x)):
        launch.run()
    return tuple(x.new_empty(0) if t is None else t for t in found)


def sampled_product(dy, x, row_offsets, columns) -> torch.Tensor:
    """(N,) float32"""
    products = torch.empty(columns.shape, dtype=torch.float32, device=x.device)
    for launch in sampled_launches(dy, x, row_offsets, columns, products, capability_of(x)):
        launch.run()
    return products


def forward_launches(x, o: Operands, p: Problem, y, hidden, capability) -> list[Launch]:
    """The launches of one forward pass, in order."""
    if p.tokens == 0:
        return []
    launches = []
    low_rank: dict = dict.fromkeys(("hidden_ptr", "up_ptr", "column_scales_ptr"))
    low_rank |= {"up_stride_o": 0, "up_stride_r": 0}
    if o.down is not None:
        launches += _hidden_launches(x, hidden, o, p, capability)
        up = _narrow(o.up, x.dtype)
        assert up is not None
        low_rank = {
            "hidden_ptr": hidden, "up_ptr": up, "column_scales_ptr": _column_scales(o),
            "up_stride_o": up.stride(0), "up_stride_r": up.stride(1),
        }  # fmt: skip
    delta = None
    if p.has_delta:
        delta = torch.empty(p.tokens, p.out_features, dtype=torch.float32, device=x.device)
        d = p.delta(o)
        launches.append(
            delta_launch(turned(x), d.row_offsets, d.columns, d.values, delta, capability)
        )
    tiles = config.forward_tiles(capability, p)
    operand, row_scales = x, None
    if p.int8_activations:
        operand = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        row_scales = torch.empty(p.tokens, dtype=torch.float32, device=x.device)
        launches.append(quantize_launch(x, operand, row_scales, capability))
    n_tiles = -(-p.out_features // tiles.out) * -(-p.tokens // tiles.tokens)
    n_splits, split_steps = config.split(
        capability, n_tiles, p.in_features, tiles.inputs, p.tokens <= config.FEW_TOKENS
    )
    partial = None
    if n_splits > 1:
        partial = torch.empty(
            n_splits, p.tokens, p.out_features, dtype=torch.float32, device=x.device
        )
    unit, table = _codes(p, by_eight_bits=p.int8_activations)
    last = {
        "delta_ptr": delta, "bias_ptr": contiguous(_narrow(o.bias, torch.float32)),
        "out_scale_ptr": contiguous(_narrow(o.out_scale, torch.float32)),
        **low_rank, "y_ptr": y,
        "n_tokens": p.tokens, "n_out": p.out_features, "rank": p.rank, "n_splits": n_splits,
        "scale": p.scale, "BLOCK_R": config.rank_block(p.rank),
    }  # fmt: skip
    arguments = {
        "x_ptr": operand, "row_scales_ptr": row_scales, "partial_ptr": partial,
        "x_stride_t": operand.stride(0), "x_stride_i": operand.stride(1),
        **_weight_arguments(o, p, tiles.inputs), "unit": unit, "TABLE": table,
        "LATE_SCALES": config.has_late_scales(capability, p, tiles),
        "split_steps": split_steps, **last,
        "BLOCK_O": tiles.out, "BLOCK_T": tiles.tokens, "BLOCK_I": tiles.inputs, "GROUP": _GROUP,
    }  # fmt: skip
    if partial is not None:  # all that comes after the sums is the second pass's
        arguments |= dict.fromkeys(
            (
                "delta_ptr",
                "bias_ptr",
                "out_scale_ptr",
                "hidden_ptr",
                "up_ptr",
                "column_scales_ptr",
                "y_ptr",
            )
        ) | {"up_stride_o": 0, "up_stride_r": 0}
    launches.append(
        Launch(linear_forward_kernel, n_tiles * n_splits, arguments, tiles.num_warps,
               tiles.num_stages, x.device)
    )  # fmt: skip
    if partial is not None:
        tokens = min(tiles.tokens, 32)
        out = 32 if capability is None else 64
        arguments = {**last, "partial_ptr": partial, "BLOCK_O": out, "BLOCK_T": tokens}
        programs = -(-p.out_features // out) * -(-p.tokens // tokens)
        launches.append(
            Launch(linear_forward_finish_kernel, programs, arguments, 4, 2, device=x.device)
        )
    return launches


def backward_launches(
    dy, x, hidden, o: Operands, p: Problem, gradients, capability
) -> list[Launch]:
    """The launches of one backward pass, in order.

    gradients   dx, dbias, ddown, dup; None where not wanted
    """
    dx, dbias, ddown, dup = gradients
    launches = []
    dhidden = None
    if o.down is not None and (dx is not None or ddown is not None):
        dhidden = torch.empty(p.tokens, p.rank, dtype=x.dtype, device=x.device)
        launches += _dhidden_launches(dy, hidden, dhidden, o, p, capability)
    if dx is not None:
        launches += _dx_launches(dy, dhidden, dx, o, p, capability)
    if dup is not None:
        factors = _column_scales(o)
        factor = p.scale if factors is None else 1.0
        launches += _product(
            _Wide(dy.T, rows_by_16=_is_multiple(p.out_features)), hidden, dup, capability,
            factor=factor, column_factors=factors,
        )  # fmt: skip
    if ddown is not None:
        wide = _Wide(
            x.T, _is_multiple(p.in_features), False, _COLUMNS_ARE_TOKENS if p.dropout_p else _NONE
        )
        launches += _product(
            wide, dhidden, ddown.T, capability, factor=1 / (1 - p.dropout_p), **_dropout(o, p, x)
        )
    if dbias is not None:
        launches += _dbias_launches(dy, dbias, o, p, capability)
    return launches


@dataclass(frozen=True)
class _Wide:
    """The wide matrix of a narrow product: (N, K), and what is known of its extents."""

    matrix: torch.Tensor
    rows_by_16: bool = False
    k_by_16: bool = False
    dropout: int = _NONE


def _product(
    wide: _Wide, narrow, out, capability, *, factor=1.0, row_factors=None, column_factors=None,
    gate=None, adapters=(None, None), has_relu=False, seed=None, threshold=0,
) -> list[Launch]:  # fmt: skip
    """out (N, R) = wide (N, K) @ narrow (K, R) and what linear_sum_splits_kernel can add to it."""
    (n_rows, n_k), rank = wide.matrix.shape, narrow.shape[1]
    tiles = config.narrow_tiles(capability, n_rows)
    block_r = config.rank_block(rank)
    n_tiles = -(-n_rows // tiles.rows) * -(-rank // block_r)
    n_splits, split_steps = config.split(capability, n_tiles, n_k, tiles.k, True)
    device = out.device
    partial = torch.empty(n_splits, n_rows, rank, dtype=torch.float32, device=device)
    arguments = {
        "wide_ptr": wide.matrix, "narrow_ptr": _narrow(narrow, wide.matrix.dtype),
        "partial_ptr": partial, "seed_ptr": seed,
        "wide_stride_row": wide.matrix.stride(0), "wide_stride_k": wide.matrix.stride(1),
        "narrow_stride_k": narrow.stride(0), "narrow_stride_r": narrow.stride(1),
        "n_rows": n_rows, "n_k": n_k, "rank": rank, "n_splits": n_splits,
        "split_steps": split_steps, "threshold": threshold,
        "ROWS_BY_16": wide.rows_by_16, "K_BY_16": wide.k_by_16, "DROPOUT": wide.dropout,
        "BLOCK_ROWS": tiles.rows, "BLOCK_K": tiles.k, "BLOCK_R": block_r,
    }  # fmt: skip
    first = Launch(linear_narrow_kernel, n_tiles * n_splits, arguments, tiles.num_warps,
                   tiles.num_stages, device)  # fmt: skip
    second = _sum_splits(
        partial, out, factor=factor, row_factors=row_factors, column_factors=column_factors,
        gate=gate, adapters=adapters, has_relu=has_relu, rows=32, columns=block_r,
    )  # fmt: skip
    return [first, second]


def _sum_splits(
    partial, out, *, rows: int, columns: int, factor=1.0, row_factors=None, column_factors=None,
    gate=None, adapters=(None, None), has_relu=False,
) -> Launch:  # fmt: skip
    n_splits, n_rows, rank = partial.shape
    arguments = {
        "partial_ptr": partial, "out_ptr": out, "row_factors_ptr": row_factors,
        "column_factors_ptr": column_factors, "gate_ptr": gate,
        "row_adapters_ptr": adapters[0], "column_adapters_ptr": adapters[1],
        "out_stride_row": out.stride(0), "out_stride_r": out.stride(1),
        "n_rows": n_rows, "rank": rank, "n_splits": n_splits, "factor": factor,
        "HAS_RELU": has_relu, "BLOCK_ROWS": rows, "BLOCK_R": columns,
    }  # fmt: skip
    programs = -(-n_rows // rows) * -(-rank // columns)
    return Launch(linear_sum_splits_kernel, programs, arguments, device=out.device)


def _hidden_launches(x, hidden, o: Operands, p: Problem, capability) -> list[Launch]:
    assert o.down is not None
    dropout = _ROWS_ARE_TOKENS if p.dropout_p else _NONE
    return _product(
        _Wide(x, False, _is_multiple(p.in_features), dropout), o.down.T, hidden, capability,
        factor=1 / (1 - p.dropout_p), has_relu=p.activation == "relu", adapters=_adapters(o),
        **_dropout(o, p, x),
    )  # fmt: skip


def _dhidden_launches(dy, hidden, dhidden, o: Operands, p: Problem, capability) -> list[Launch]:
    """The gradient of the product before the activation."""
    factors = _column_scales(o)
    return _product(
        _Wide(dy, k_by_16=_is_multiple(p.out_features)), o.up, dhidden, capability,
        factor=p.scale if factors is None else 1.0, column_factors=factors,
        gate=hidden if p.activation == "relu" else None, adapters=_adapters(o),
    )  # fmt: skip


def _dx_launches(dy, dhidden, dx, o: Operands, p: Problem, capability) -> list[Launch]:
    if p.tokens == 0:
        return []
    launches, delta = [], None
    if p.has_delta:
        delta = torch.empty(p.tokens, p.in_features, dtype=torch.float32, device=dx.device)
        launches.append(delta_launch(turned(dy), *transposed_delta(o, p), delta, capability))
    tiles = config.dx_tiles(capability, p, o.input_order is not None)
    down = None if dhidden is None else _narrow(o.down, dx.dtype)
    dropout = _dropout(o, p, dx)
    _, table = _codes(p, by_eight_bits=False)
    arguments = {
        "dy_ptr": dy, "out_scale_ptr": contiguous(_narrow(o.out_scale, torch.float32)),
        "delta_ptr": delta, "dhidden_ptr": dhidden, "down_ptr": down, "dx_ptr": dx,
        "seed_ptr": dropout.get("seed"), "threshold": dropout.get("threshold", 0),
        "keep_scale": 1 / (1 - p.dropout_p),
        "dy_stride_t": dy.stride(0), "dy_stride_o": dy.stride(1),
        "down_stride_r": 0 if down is None else down.stride(0),
        "down_stride_i": 0 if down is None else down.stride(1),
        **_weight_arguments(o, p, tiles.inputs), "TABLE": table,
        "n_tokens": p.tokens, "n_out": p.out_features, "rank": p.rank,
        "BLOCK_O": tiles.out, "BLOCK_T": tiles.tokens, "BLOCK_I": tiles.inputs,
        "BLOCK_R": config.rank_block(p.rank), "GROUP": _GROUP,
    }  # fmt: skip
    programs = -(-p.in_features // tiles.inputs) * -(-p.tokens // tiles.tokens)
    launches.append(
        Launch(linear_dx_kernel, programs, arguments, tiles.num_warps, tiles.num_stages, dx.device)
    )
    return launches


def _dbias_launches(dy, dbias, o: Operands, p: Problem, capability) -> list[Launch]:
    rows, columns = (16, 32) if capability is None else (32, 128)
    n_tiles = -(-p.out_features // columns)
    n_splits, split_steps = config.split(capability, n_tiles, p.tokens, rows, True)
    partial = torch.empty(n_splits, 1, p.out_features, dtype=torch.float32, device=dy.device)
    arguments = {
        "dy_ptr": dy, "partial_ptr": partial, "dy_stride_t": dy.stride(0),
        "dy_stride_o": dy.stride(1), "n_tokens": p.tokens, "n_out": p.out_features,
        "split_steps": split_steps, "n_splits": n_splits, "BLOCK_T": rows, "BLOCK_O": columns,
    }  # fmt: skip
    return [
        Launch(linear_column_sums_kernel, n_tiles * n_splits, arguments, device=dy.device),
        _sum_splits(
            partial, dbias[None], rows=1, columns=128,
            column_factors=contiguous(_narrow(o.out_scale, torch.float32)),
        ),
    ]  # fmt: skip


def quantize_launch(x, codes, row_scales, capability) -> Launch:
    arguments = {
        "x_ptr": x, "codes_ptr": codes, "row_scales_ptr": row_scales,
        "x_stride_t": x.stride(0), "x_stride_i": x.stride(1), "n_in": x.shape[1],
        "BLOCK_I": 64 if capability is None else 2048,
    }  # fmt: skip
    return Launch(linear_quantize_rows_kernel, x.shape[0], arguments, device=x.device)


def _weight_arguments(o: Operands, p: Problem, block_inputs: int) -> dict:
    """What load_weight reads."""
    nested = {"nested_table_ptr": o.nested_table, "absmax_ptr": o.nested_absmax}
    if p.format == DENSE:
        assert o.weight is not None
        weight, n_lines = o.weight, 0
        strides = weight.stride()
    else:
        assert o.codes is not None
        weight, strides = words_of(o.codes), (0, 0)
        n_lines = o.codes.shape[1]
    return {
        "weight_ptr": weight, "weight_stride_o": strides[0], "weight_stride_i": strides[1],
        "scales_ptr": contiguous(o.scales), "offsets_ptr": contiguous(o.offsets),
        "order_ptr": contiguous(o.input_order), **nested,
        "nested_block": p.nested_block, "nested_offset": p.nested_offset,
        "n_groups": config.groups_of(p), "group_size": p.group_size, "n_lines": n_lines,
        "n_in": p.in_features, "FORMAT": p.format,
        "ONE_GROUP": config.has_one_group(p, block_inputs),
    }  # fmt: skip


def _codes(p: Problem, by_eight_bits: bool) -> tuple[float, tuple | None]:
    """(unit, values of the 16 codes in that unit); None where kernels compute the values.

    by_eight_bits   values are whole numbers; else the unit is 1
    """
    if p.format in (DENSE, "int4", "uint4", "int8", "fp8"):
        return 1.0, None
    table = FORMATS[p.format].table
    assert table is not None
    if p.int8_activations:
        if by_eight_bits:
            unit = eight_bit_unit(table)
            return unit, tuple(round(v / unit) for v in table)
        table = eight_bit_table(p.format)
    return 1.0, table


def _narrow(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Kernels read any type but float64, which would meet x in its own type anyway."""
    return t.to(dtype) if t is not None and t.dtype == torch.float64 else t


def _column_scales(o: Operands) -> torch.Tensor | None:
    return None if o.row_adapters is None else contiguous(o.column_scales)


def _adapters(o: Operands) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return contiguous(o.row_adapters), contiguous(o.column_adapters)


def _dropout(o: Operands, p: Problem, like: torch.Tensor) -> dict:
    """The seed, and uniform >= p in units of 2**-24."""
    if not p.dropout_p:
        return {}
    return {
        "seed": seed_on(o.dropout_seed, like.device),
        "threshold": math.ceil(p.dropout_p * 2**24),
    }


def _is_multiple(extent: int) -> bool:
    return extent % 16 == 0
