"""Flat blocks as bitsandbytes has them, and the state dicts of its 4-bit layers, both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tilewright.ops.common.packed import (
    FORMATS,
    NestedScales,
    PackedWeight,
    pack_codes,
    pack_rows,
    unpack_codes,
    unpack_rows,
)
from tilewright.ops.quant import blockwise, op
from tilewright.ops.quant.foreign import FLOATS, key, take
from tilewright.shapes import expect_dtype

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = ("nf4", "fp4")


def quantize_blockwise(
    values: torch.Tensor, *, format: str = "nf4", block_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks along a flattened tensor, bit for bit as bitsandbytes does on a CPU.

        code[n] = nearest level of values[n] / absmax[n // block_size]

    values       (N,)   or any shape, flattened row by row; float32, float16 or bfloat16
    format              "nf4" or "fp4"
    block_size          32, 64, 128, 256, 512, 1024, 2048 or 4096; the last block may be short

    Returns codes (ceil(N / 2),) uint8, two a byte with the earlier one in the high half, and
    absmax (ceil(N / block_size),) float32.
    ValueError: another dtype, format or block size.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
    """
    _check_blocks("quantize_blockwise", format, block_size)
    expect_dtype("quantize_blockwise", FLOATS, values=values)
    return op.quantize_blockwise(values.detach(), format, block_size)


def dequantize_blockwise(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    *,
    format: str = "nf4",
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The inverse of `quantize_blockwise`, bit for bit as bitsandbytes has it.

        values[n] = level(code[n]) * absmax[n // block_size]

    codes        (B,)   uint8, B = ceil(N / 2); any shape of as many
    absmax       (G,)   float32, G = ceil(N / block_size)
    shape               of the result; N is its product
    format              "nf4" or "fp4"
    block_size          as it was quantized
    dtype               of the result: float32, float16 or bfloat16; the product is float32

    ValueError: another dtype, format or block size, or too many or few codes or absmax for shape.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
    """
    name = "dequantize_blockwise"
    _check_blocks(name, format, block_size)
    expect_dtype(name, (torch.uint8,), codes=codes)
    expect_dtype(name, (torch.float32,), absmax=absmax)
    if dtype not in FLOATS:
        raise ValueError(f"{name}: dtype is {dtype}, need one of float32, float16, bfloat16")
    n = math.prod(shape)
    _check_count(name, "codes", codes, (n + 1) // 2, tuple(shape))
    _check_count(name, "absmax", absmax, -(-n // block_size), tuple(shape))
    return op.dequantize_blockwise(
        codes.flatten(), absmax.flatten(), format, block_size, list(shape), dtype
    )


def _check_blocks(name: str, format: str, block_size: int) -> None:
    if format not in CODES:
        raise ValueError(f"{name}: format is {format!r}, need one of {', '.join(CODES)}")
    if block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"{name}: block_size is {block_size!r}, need one of {known}")


def _check_count(name: str, what: str, tensor: torch.Tensor, n: int, shape: tuple) -> None:
    if tensor.numel() != n:
        raise ValueError(f"{name}: {what} has {tensor.numel()} entries, need {n} for shape {shape}")


def read_bitsandbytes(tensors: Mapping[str, torch.Tensor], name: str = "") -> PackedWeight:
    """A 4-bit weight out of a state dict that bitsandbytes wrote; no value changes.

    tensors   by the names bitsandbytes gives them: weight (ceil(O I / 2), 1), weight.absmax,
              weight.quant_map, weight.quant_state.bitsandbytes__nf4 or __fp4 and, nested,
              weight.nested_absmax and weight.nested_quant_map; a weight is (O, I)
    name      of the layer, such as "model.layers.0.mlp.up_proj"; "" if the names start with weight

    Nested scales stay nested. Where blocks cross rows, the group is their greatest common divisor
    and scales are repeated.
    ValueError: a tensor is missing, misshapen or of another format; blocks cross rows and their
    common divisor is no multiple of 8.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314; the layout is bitsandbytes 0.50's.
    """
    op = "read_bitsandbytes"
    weight = take(op, tensors, name, "weight").view(torch.uint8)  # may be stored as another type
    state, code = _state(op, tensors, name)
    shape = state["shape"]
    if len(shape) != 2:
        raise ValueError(f"{op}: {key(name, 'weight')} has shape {tuple(shape)}, need (O, I)")
    n_out, n_in = shape
    block, n = state["blocksize"], n_out * n_in
    _check_blocks(f"{op}: {name or 'weight'}", code, block)
    _check_count(op, key(name, "weight"), weight, (n + 1) // 2, (n_out, n_in))
    _check_map(op, name, take(op, tensors, name, "weight.quant_map"), code)
    group_size = _group_size(op, name, n_in, block)

    absmax = take(op, tensors, name, "weight.absmax").flatten()
    _check_count(op, key(name, "weight.absmax"), absmax, -(-n // block), (n_out, n_in))
    repeats = block // group_size
    groups = n_in // group_size if n_in else 0
    scales = absmax.repeat_interleave(repeats)[: n_out * groups].view(n_out, groups)
    nested = None
    if "nested_blocksize" in state:
        expect_dtype(op, (torch.uint8,), **{"absmax": absmax})
        nested = NestedScales(
            take(op, tensors, name, "weight.nested_quant_map").float(),
            take(op, tensors, name, "weight.nested_absmax").float(),
            float(state["nested_offset"]),
            state["nested_blocksize"] * repeats,
        )
    codes = blockwise.unpack(weight.flatten(), n).view(n_out, n_in)
    return PackedWeight(
        code, n_out, n_in, group_size, pack_codes(codes, code),
        pack_rows(scales if nested else scales.float()), nested=nested,
        dtype=getattr(torch, state["dtype"]),
    )  # fmt: skip


def to_bitsandbytes(packed: PackedWeight, name: str = "") -> dict[str, torch.Tensor]:
    """The state dict that bitsandbytes would have written for this weight; no value changes.

    packed   an NF4 or FP4 weight (O, I) whose groups fill each row, of a size bitsandbytes knows
    name     of the layer; "" for names that start with weight

    Returns its tensors by name: those that `read_bitsandbytes` lists.
    ValueError: another format, a group size other than 32, 64, ... 4096 or one that does not
    divide I, float16 scales, or reordered inputs.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314; the layout is bitsandbytes 0.50's.
    """
    op = "to_bitsandbytes"
    n_out, n_in = packed.shape
    if packed.format not in CODES or packed.offsets is not None:
        raise ValueError(f"{op}: packed has format {packed.format!r}, need one of nf4, fp4")
    if packed.group_size not in BLOCK_SIZES or n_in % packed.group_size:
        raise ValueError(
            f"{op}: packed has groups of {packed.group_size} in rows of {n_in}, need one of "
            f"{', '.join(map(str, BLOCK_SIZES))} that divides the row"
        )
    if packed.input_order is not None:
        raise ValueError(f"{op}: packed has an input_order, which bitsandbytes cannot store")
    scales = unpack_rows(packed.scales, n_out).flatten().contiguous()
    if packed.nested is None:
        expect_dtype(op, (torch.float32,), scales=scales)
    codes = unpack_codes(packed.codes, packed.format, n_out, n_in).flatten()
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    table = torch.tensor(FORMATS[packed.format].table, dtype=torch.float32, device=codes.device)
    state: dict[str, Any] = {
        "quant_type": packed.format,
        "blocksize": packed.group_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": [n_out, n_in],
    }
    found = {
        "weight": (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
        "weight.absmax": scales,
        "weight.quant_map": table + 0.0,  # its second zero is not a negative one
    }
    if packed.nested is not None:
        state["nested_blocksize"] = packed.nested.block
        state["nested_dtype"] = "float32"
        state["nested_offset"] = packed.nested.offset
        found["weight.nested_absmax"] = packed.nested.absmax
        found["weight.nested_quant_map"] = packed.nested.table
    text = json.dumps(state).encode()
    found[f"weight.quant_state.bitsandbytes__{packed.format}"] = torch.tensor(
        list(text), dtype=torch.uint8, device=codes.device
    )
    return {key(name, part): tensor for part, tensor in found.items()}


def _state(op: str, tensors: Mapping[str, torch.Tensor], name: str) -> tuple[dict[str, Any], str]:
    """The record of shape, dtype and block sizes, stored as JSON in a tensor of bytes."""
    found = [code for code in CODES if _state_key(name, code) in tensors]
    if len(found) != 1:
        raise ValueError(
            f"{op}: {len(found)} of {' and '.join(_state_key(name, code) for code in CODES)} are "
            "there, need exactly one"
        )
    at = _state_key(name, found[0])
    try:
        state = json.loads(bytes(tensors[at].flatten().tolist()))
        state = {
            "shape": [int(n) for n in state["shape"]],
            "blocksize": int(state["blocksize"]),
            "dtype": str(state["dtype"]),
            **{k: state[k] for k in state if k.startswith("nested_")},
        }
        if "nested_blocksize" in state:
            state["nested_blocksize"] = int(state["nested_blocksize"])
            state["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{op}: {at} holds no quant state ({error!r})") from error
    if getattr(torch, state["dtype"], None) not in FLOATS:
        raise ValueError(f"{op}: {at} has dtype {state['dtype']}, need a floating-point one")
    if state.get("nested_dtype", "float32") != "float32":
        raise ValueError(f"{op}: {at} has nested_dtype {state['nested_dtype']}, need float32")
    return state, found[0]


def _state_key(name: str, code: str) -> str:
    return key(name, f"weight.quant_state.bitsandbytes__{code}")


def _check_map(op: str, name: str, table: torch.Tensor, code: str) -> None:
    known = torch.tensor(FORMATS[code].table, dtype=torch.float32)
    if table.numel() != 16 or not torch.equal(table.float().cpu().flatten() + 0.0, known + 0.0):
        raise ValueError(
            f"{op}: {key(name, 'weight.quant_map')} is {table.flatten().tolist()}, need the "
            f"16 levels of {code}"
        )


def _group_size(op: str, name: str, n_in: int, block: int) -> int:
    if n_in == 0 or n_in % block == 0:
        return block
    common = math.gcd(n_in, block)
    if common % 8:
        raise ValueError(
            f"{op}: {key(name, 'weight')} has rows of {n_in}, which blocks of {block} cross with "
            f"{common} in common, need a multiple of 8; dequantize it with bitsandbytes and use "
            "quantize_weight, whose groups end with the row"
        )
    return common
