"""torch tensors -> the CUDA kernel over 4-bit packed weights (csrc/linear/packed_hopper.cu).

Forward only. README.md beside this says how it works, what speed is predicted, and what has never
run.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from tilewright.native import native_cuda, why_not_cuda
from tilewright.ops.common.packed import FORMATS
from tilewright.ops.linear.problem import Operands, Problem

# the same numbers as in csrc/linear/linear_hopper.h and bindings/cuda_linear.cpp
ROWS = 128  # output rows of a block
INPUTS = 64  # inputs of one step
MAX_RANK = 64
MAX_INPUTS = 2**29
MAX_TILES = 65535

SUM_TILES = (16, 32, 64)
WEIGHT_TILES = (32, 128, 256)
STEPS_OF_A_SPLIT = 4  # at least: fewer, and filling the ring takes longer than emptying it
MAX_SPLITS = 16
# the base product is divided by the update's scale before the two are added up in float32
SCALES = (2.0**-16, 2.0**16)


def why_not(p: Problem) -> str | None:
    """None if this can compute `p`, else the reason."""
    if p.device != "cuda":
        return f"tensors are on {p.device}"
    if p.dtype != torch.bfloat16:
        return f"x is {p.dtype}, need torch.bfloat16"
    if p.format not in FORMATS or FORMATS[p.format].bits != 4:
        known = ", ".join(name for name, format in FORMATS.items() if format.bits == 4)
        return f"the weight is {p.format}, need one of {known}"
    if p.needs_grad:
        return "it has no backward"
    if p.has_delta:
        return "no sparse delta yet"
    if p.int8_activations:
        return "it has no int8_activations"
    if p.dropout_p:
        return f"dropout_p is {p.dropout_p}, need 0"
    if p.rank > MAX_RANK:
        return f"R is {p.rank}, need at most {MAX_RANK}"
    if p.rank and not SCALES[0] <= abs(p.scale) <= SCALES[1]:
        return f"scale is {p.scale}, need {SCALES[0]} to {SCALES[1]} in magnitude"
    if not 1 <= p.in_features <= MAX_INPUTS:
        return f"I is {p.in_features}, need 1 to {MAX_INPUTS}"
    if p.tokens > MAX_TILES * WEIGHT_TILES[-1]:
        return f"T is {p.tokens}, need at most {MAX_TILES * WEIGHT_TILES[-1]}"
    return why_not_cuda(torch.cuda.current_device() if _has_device() else 0)


@cache
def _has_device() -> bool:
    return torch.cuda.is_available()


class Plan(NamedTuple):
    """How a call is cut up.

    tile     tokens of a block
    sums     scales multiply the sums of 64 inputs in float32, and not each weight
    splits   blocks that share the inputs of one tile; their sums are added by a second kernel
    """

    tile: int
    sums: bool
    splits: int


def plan(p: Problem, groups: int, has_offsets: bool, may_split: bool, multiprocessors: int) -> Plan:
    """Tiles by tokens, and as many splits as fill the multiprocessors once."""
    of_a_step = groups == 1 or p.group_size % INPUTS == 0
    sums = of_a_step and not has_offsets and p.tokens <= SUM_TILES[-1]
    tiles = SUM_TILES if sums else WEIGHT_TILES
    tile = next((t for t in tiles if p.tokens <= t), tiles[-1])
    steps = -(-p.in_features // INPUTS)
    blocks = -(-p.out_features // ROWS) * -(-p.tokens // tile)
    room = multiprocessors * (2 if tile <= 32 else 1) // blocks
    splits = max(1, min(room, steps // STEPS_OF_A_SPLIT, MAX_SPLITS)) if may_split else 1
    # rounded so that no split is left without a step
    return Plan(tile, sums, -(-steps // -(-steps // splits)))


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _for_copies(t: torch.Tensor) -> torch.Tensor:
    """`t` (rows, columns) as the copy engine can read it: each row contiguous and at a multiple of
    16 bytes, columns padded to a multiple of 8."""
    if t.shape[1] % 8:
        return torch.nn.functional.pad(t, (0, -t.shape[1] % 8))
    strided = t.shape[0] > 1 and (t.stride(0) % 8 or t.stride(0) < t.shape[1])
    if strided or t.stride(1) != 1 or t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t


def _address_and_stride(t: torch.Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0) if t.shape[0] > 1 else t.shape[1]


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` contiguous, at a multiple of 16 bytes."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _real(t: torch.Tensor | None) -> tuple[int, str] | None:
    return None if t is None else (t.data_ptr(), str(t.dtype).removeprefix("torch."))


def _vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """bias or out_scale in a type that the kernel reads."""
    if t is None:
        return None
    return t.float() if t.dtype == torch.float64 else t.contiguous()


def _scales(module, p: Problem, o: Operands, where: dict) -> torch.Tensor:
    """The scales in a floating type; the second level is resolved by a pass of its own."""
    assert o.scales is not None
    if o.nested_table is None or o.nested_absmax is None:
        return _aligned(o.scales)
    codes, table, absmax = (
        t.contiguous() for t in (o.scales, o.nested_table.float(), o.nested_absmax.float())
    )
    resolved = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    module.resolve_nested_scales(
        codes=codes.data_ptr(), table=table.data_ptr(), absmax=absmax.data_ptr(),
        offset=p.nested_offset, block=p.nested_block, out_features=p.out_features,
        groups=codes.shape[1], scales=resolved.data_ptr(), **where,
    )  # fmt: skip
    return resolved


def _low_rank(x: torch.Tensor, p: Problem, o: Operands):
    """hidden (T, R) as the operator returns it, the same as the kernel reads it, and `up`."""
    assert o.down is not None and o.up is not None
    hidden = x @ o.down.to(x.dtype).T
    if p.activation == "relu":
        hidden = hidden.relu()
    scaled = hidden
    if o.row_adapters is not None:
        assert o.column_adapters is not None and o.column_scales is not None
        of_row = o.row_adapters[:, None] == o.column_adapters[None, :]
        hidden = torch.where(of_row, hidden, 0.0)
        scaled = (hidden.float() * o.column_scales).to(x.dtype)
    return hidden, _for_copies(scaled), o.up.to(x.dtype).contiguous()


def forward(x: torch.Tensor, o: Operands, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """y (T, O) and hidden (T, R), on torch's current stream; nothing waits."""
    device = x.device.index
    with torch.cuda.device(x.device):
        where = {"device": device, "stream": torch.cuda.current_stream(device).cuda_stream}
        return run(native_cuda(device), where, _multiprocessors(device), x, o, p)


def run(
    module, where: dict, multiprocessors: int, x: torch.Tensor, o: Operands, p: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` through a module that has packed_linear and resolve_nested_scales.

    where   their arguments `device` and `stream`
    """
    y = x.new_empty(p.tokens, p.out_features)
    hidden, scaled, up = x.new_empty(p.tokens, p.rank), None, None
    if p.rank:
        hidden, scaled, up = _low_rank(x, p, o)
    if y.numel() == 0:
        return y, hidden
    assert o.codes is not None
    base = _for_copies(x if o.input_order is None else x.index_select(1, o.input_order))
    codes, scales = _aligned(o.codes), _scales(module, p, o, where)
    offsets = None if o.offsets is None else _aligned(o.offsets)
    bias, out_scale = _vector(o.bias), _vector(o.out_scale)
    groups = scales.shape[1]
    may_split = out_scale is None or not p.rank
    cut = plan(p, groups, offsets is not None, may_split, multiprocessors)
    partial = None
    if cut.splits > 1:
        rows = -(-p.out_features // ROWS) * ROWS
        partial = torch.empty(cut.splits, p.tokens, rows, dtype=torch.float32, device=x.device)
    module.packed_linear(
        tokens=p.tokens, in_features=base.shape[1], out_features=p.out_features,
        x=_address_and_stride(base), codes=codes.data_ptr(), scales=_real(scales),
        offsets=_real(offsets), group_size=p.group_size, groups=groups,
        values=FORMATS[p.format].table, bias=_real(bias), out_scale=_real(out_scale),
        hidden=(0, 0) if scaled is None else _address_and_stride(scaled),
        up=0 if up is None else up.data_ptr(), rank=p.rank, scale=p.scale, y=y.data_ptr(),
        partial=0 if partial is None else partial.data_ptr(), tile=cut.tile, sums=cut.sums,
        splits=cut.splits, **where,
    )  # fmt: skip
    return y, hidden
