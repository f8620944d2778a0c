"""A packed weight as the bindings take it: names, pointers and sizes (bindings/packed.h)."""

from __future__ import annotations

import torch

from tilewright.ops.common.packed import FORMATS, PackedWeight, eight_bit_table

SCALE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",  # nested
}
_TABLES = {name: list(format.table or ()) for name, format in FORMATS.items()}
_EIGHT_BIT_TABLES = {name: list(eight_bit_table(name) or ()) for name in FORMATS}


def native_packed(weight: PackedWeight, int8_activations: bool = False) -> tuple:
    """The tuple; its pointers are good while the weight's tensors, all contiguous, live."""
    table = (_EIGHT_BIT_TABLES if int8_activations else _TABLES)[weight.format]
    nested = weight.nested
    second = (0, 0, 0, 0, 0.0)
    if nested is not None:
        second = (
            nested.table.data_ptr(), nested.absmax.data_ptr(), nested.block, nested.absmax.numel(),
            float(nested.offset),
        )  # fmt: skip
    return (
        "table" if table else weight.format, table, weight.codes.data_ptr(), weight.codes.shape[1],
        SCALE_NAMES[weight.scales.dtype], weight.scales.data_ptr(),
        0 if weight.offsets is None else weight.offsets.data_ptr(), weight.scales.shape[1],
        weight.group_size, *second,
    )  # fmt: skip
