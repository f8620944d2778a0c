"""Packed weights, problems and stock results for the tests of the Hopper kernel."""

import torch

from tilewright.ops.common.packed import (
    FORMATS,
    NestedScales,
    PackedWeight,
    decode,
    pack_codes,
    pack_rows,
)
from tilewright.ops.linear.problem import Operands, Problem

FOUR_BITS = [name for name, format in FORMATS.items() if format.bits == 4]


def random_weight(
    n_out, n_in, format="int4", group_size=64, scale_dtype=torch.float32, has_offsets=False,
    is_reordered=False, is_nested=False,
) -> PackedWeight:  # fmt: skip
    groups = -(-n_in // group_size)
    codes = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8)
    scales = pack_rows((0.5 + torch.rand(n_out, groups)).to(scale_dtype))
    offsets = pack_rows(torch.randn(n_out, groups).to(scale_dtype)) if has_offsets else None
    order = torch.randperm(n_in).int() if is_reordered else None
    nested = None
    if is_nested:
        scales = pack_rows(torch.randint(0, 256, (n_out, groups), dtype=torch.uint8))
        block = 5  # crosses the ends of rows
        absmax = 0.5 + torch.rand(-(-n_out * groups // block))
        nested = NestedScales(torch.linspace(-0.4, 1.0, 256), absmax, 0.7, block)
    return PackedWeight(
        format, n_out, n_in, group_size, pack_codes(codes, format), scales, offsets, order, nested
    )


def problem_of(x, weight, **rest) -> tuple[Operands, Problem]:
    """The operands and the problem of a call, as api.py would make them."""
    names = ("bias", "out_scale", "down", "up", "row_adapters", "column_adapters", "column_scales")
    o = Operands(
        codes=weight.codes, scales=weight.scales, offsets=weight.offsets,
        input_order=weight.input_order, **{name: rest.pop(name, None) for name in names},
    )  # fmt: skip
    if weight.nested is not None:
        nested = weight.nested
        o = o._replace(nested_table=nested.table, nested_absmax=nested.absmax)
        rest |= {"nested_offset": nested.offset, "nested_block": nested.block}
    rank = 0 if o.down is None else o.down.shape[0]
    p = Problem(
        device=x.device.type, dtype=x.dtype, tokens=x.shape[0], in_features=x.shape[1],
        out_features=weight.out_features, rank=rank, format=weight.format,
        group_size=weight.group_size, **rest,
    )  # fmt: skip
    return o, p


def stock(x, weight, o: Operands, p: Problem) -> torch.Tensor:
    """What one would write with torch, in bfloat16."""
    y = torch.nn.functional.linear(x, decode(weight).to(x.dtype), None)
    if o.bias is not None:
        y = y + o.bias.to(x.dtype)
    if o.out_scale is not None:
        y = y * o.out_scale.to(x.dtype)
    if o.down is None:
        return y
    hidden = x @ o.down.to(x.dtype).T
    hidden = hidden.relu() if p.activation == "relu" else hidden
    if o.row_adapters is None:
        return y + p.scale * (hidden @ o.up.to(x.dtype).T)
    hidden = torch.where(o.row_adapters[:, None] == o.column_adapters[None, :], hidden, 0.0)
    return y + (hidden * o.column_scales).to(x.dtype) @ o.up.to(x.dtype).T
