"""Launches of the kernels of a sparse delta."""

from __future__ import annotations

import torch

from tilewright.ops.common.sparse_delta import rows_of, wide_columns
from tilewright.ops.common.triton_launch import Launch, contiguous
from tilewright.ops.linear import triton_config as config
from tilewright.ops.linear.problem import Operands, Problem
from tilewright.ops.linear.triton_delta import (
    linear_delta_kernel,
    linear_sampled_entries_kernel,
    linear_sampled_tiles_kernel,
    linear_tile_starts_kernel,
)

_GROUP = 8


def turned(x: torch.Tensor) -> torch.Tensor:
    """(features, tokens) of (tokens, features), each line filled up with zeros to whole loads."""
    n_tokens, n = x.shape
    pad = config.turned_pad(n_tokens)
    wide = -(-n_tokens // pad) * pad
    make = x.new_empty if wide == n_tokens else x.new_zeros
    lines = make(n, wide)
    lines[:, :n_tokens] = x.T
    return lines


def transposed_delta(o: Operands, p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row_offsets, columns, values) of the transpose of D, each value times out_scale.

    The sort is stable, so that a row's entries are in order; nothing waits for the device.
    """
    d = p.delta(o)
    columns, order = wide_columns(d.columns).int().sort(stable=True)
    rows = rows_of(d.row_offsets, d.nnz)[order]
    values = d.values.float()[order]
    if o.out_scale is not None:
        values = values * o.out_scale.float()[rows]
    ends = torch.arange(p.in_features + 1, dtype=torch.int32, device=columns.device)
    return torch.searchsorted(columns, ends), rows.int(), values


def delta_launch(lines, row_offsets, columns, values, sums, capability) -> Launch:
    """sums (T, O) float32 = the tokens of `lines` times the rows of D."""
    n_tokens, n_rows = sums.shape
    tiles = config.delta_tiles(capability, n_tokens)
    arguments = {
        "turned_ptr": lines, "offsets_ptr": contiguous(row_offsets),
        "columns_ptr": contiguous(columns), "values_ptr": contiguous(values.detach()),
        "sums_ptr": sums, "n_tokens": n_tokens, "n_rows": n_rows,
        "turned_stride": lines.stride(0), "BLOCK_O": tiles.rows, "BLOCK_N": tiles.entries,
        "BLOCK_T": tiles.tokens, "PAD": config.turned_pad(n_tokens),
    }  # fmt: skip
    programs = -(-n_rows // tiles.rows) * -(-n_tokens // tiles.tokens)
    return Launch(linear_delta_kernel, programs, arguments, 4, 1, sums.device)


def sampled_launches(dy, x, row_offsets, columns, products, capability) -> list[Launch]:
    """products (N,) float32 at the places of D."""
    n = columns.shape[0]
    if n == 0:
        return []
    columns, row_offsets = contiguous(columns), contiguous(row_offsets)
    if config.samples_tiles(capability, x.dtype, n, x.shape[0], dy.shape[1] * x.shape[1]):
        return _by_tiles(dy, x, row_offsets, columns, products, capability)
    pad = config.turned_pad(x.shape[0])
    lines_dy, lines_x = turned(dy), turned(x)
    entries, tokens = config.entry_tiles(capability, x.shape[0])
    arguments = {
        "dy_turned_ptr": lines_dy, "x_turned_ptr": lines_x,
        "rows_ptr": rows_of(row_offsets, n).int(), "columns_ptr": columns,
        "products_ptr": products, "n_tokens": x.shape[0], "n_entries": n,
        "turned_stride": lines_x.stride(0), "BLOCK_N": entries, "BLOCK_T": tokens, "PAD": pad,
    }  # fmt: skip
    return [
        Launch(linear_sampled_entries_kernel, -(-n // entries), arguments, 4, 1, products.device)
    ]


def _by_tiles(dy, x, row_offsets, columns, products, capability) -> list[Launch]:
    n_out, n_in = dy.shape[1], x.shape[1]
    tiles = config.sampled_tiles(capability, x.dtype)
    n_tiles = -(-n_in // tiles.inputs)
    n_starts = n_out * (n_tiles + 1)
    starts = torch.empty(n_starts, dtype=torch.int64, device=x.device)
    block = 128 if capability is None else 256
    find = {
        "offsets_ptr": row_offsets, "columns_ptr": columns, "starts_ptr": starts,
        "n_starts": n_starts, "n_tiles": n_tiles, "n_steps": n_in.bit_length() + 1,
        "BLOCK_I": tiles.inputs, "BLOCK": block,
    }  # fmt: skip
    arguments = {
        "dy_ptr": dy, "x_ptr": x, "starts_ptr": starts, "columns_ptr": columns,
        "products_ptr": products, "dy_stride_t": dy.stride(0), "dy_stride_o": dy.stride(1),
        "x_stride_t": x.stride(0), "x_stride_i": x.stride(1),
        "n_tokens": x.shape[0], "n_out": n_out, "n_in": n_in, "n_tiles": n_tiles,
        "BLOCK_O": tiles.out, "BLOCK_I": tiles.inputs, "BLOCK_T": tiles.tokens, "BLOCK_N": 8,
        "GROUP": _GROUP,
    }  # fmt: skip
    return [
        Launch(linear_tile_starts_kernel, -(-n_starts // block), find, device=x.device),
        Launch(linear_sampled_tiles_kernel, -(-n_out // tiles.out) * n_tiles, arguments,
               tiles.num_warps, tiles.num_stages, x.device),
    ]  # fmt: skip
