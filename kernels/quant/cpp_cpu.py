"""Packed weights -> the C++ kernel that decodes them (csrc/quant)."""

from __future__ import annotations

import torch

from tilewright.native import native, why_not_native
from tilewright.ops.common.cpu import NAMES
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.packed_cpu import native_packed


def why_not(weight: PackedWeight) -> str | None:
    """None if the kernel decodes this weight to the last bit as torch does, else the reason."""
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}"
    if weight.offsets is not None:
        return "an offset is added in the rounding of the product"
    if weight.nested is not None:
        return "scales are nested"
    if weight.input_order is not None:
        return "columns stand in another order"
    if weight.group_size % 8 and weight.group_size < weight.in_features:
        return f"group_size is {weight.group_size}, the kernel needs a multiple of 8"
    return why_not_native()


def decode(weight: PackedWeight, to: torch.Tensor) -> None:
    """Write the weight (O, I) into `to`, contiguous rows of float32, float16 or bfloat16."""
    held = weight.map(torch.Tensor.contiguous)
    native().decode_weight(
        NAMES[to.dtype], native_packed(held), *weight.shape, to.data_ptr(), to.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
