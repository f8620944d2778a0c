"""torch.library schemas and fakes of the quant room.

What works on PackedWeight is plain torch and needs no operator; blocks of flat tensors do, so that
a compiled graph holds one call and not its forty steps. One body serves every device.
"""

from __future__ import annotations

import math

import torch

from tilewright.direct import may_go_direct
from tilewright.ops.quant import blockwise

library = torch.library.Library("tilewright", "FRAGMENT")
library.define("quantize_blockwise(Tensor values, str format, int block_size) -> (Tensor, Tensor)")
library.define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, str format, int block_size, "
    "SymInt[] shape, ScalarType dtype) -> Tensor"
)


def _quantize(values, format, block_size):
    return blockwise.quantize(values, format, block_size)


def _dequantize(codes, absmax, format, block_size, shape, dtype):
    flat = blockwise.dequantize(codes, absmax, format, block_size, math.prod(shape))
    return flat.to(dtype).view(shape)


for _name, _function in (("quantize_blockwise", _quantize), ("dequantize_blockwise", _dequantize)):
    library.impl(_name, _function, "CPU")
    library.impl(_name, _function, "CUDA")


@torch.library.register_fake("tilewright::quantize_blockwise", lib=library)
def _(values, format, block_size):
    n = values.numel()
    codes = values.new_empty((n + 1) // 2, dtype=torch.uint8)
    return codes, values.new_empty(-(-n // block_size), dtype=torch.float32)


@torch.library.register_fake("tilewright::dequantize_blockwise", lib=library)
def _(codes, absmax, format, block_size, shape, dtype):
    return absmax.new_empty(shape, dtype=dtype)


def quantize_blockwise(values, format, block_size):
    if may_go_direct(values):
        return _quantize(values, format, block_size)
    return torch.ops.tilewright.quantize_blockwise(values, format, block_size)


def dequantize_blockwise(codes, absmax, format, block_size, shape, dtype):
    if may_go_direct(codes, absmax):
        return _dequantize(codes, absmax, format, block_size, shape, dtype)
    return torch.ops.tilewright.dequantize_blockwise(
        codes, absmax, format, block_size, shape, dtype
    )
