"""Refuse a packed weight whose tensors are not of the extents it states: kernels trust them."""

from __future__ import annotations

import torch

from tilewright.ops.common.packed import FORMATS, ROWS, PackedWeight, inputs_of_a_line
from tilewright.shapes import expect_device

SCALE_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def expect_whole(op: str, argument: str, w: PackedWeight, beside: torch.Tensor) -> None:
    """Check all tensors of `w`, which must live where `beside` does.

    A weight is looked through once, and remembers it; its fields cannot be set again.
    """
    if "_is_whole" in w.__dict__:
        return
    if w.format not in FORMATS:
        raise ValueError(f"{op}: no format {w.format!r}. Known: {', '.join(FORMATS)}")
    if w.group_size < 1:
        raise ValueError(f"{op}: {argument}'s group_size is {w.group_size}, need at least 1")
    for name, t in w.tensors().items():
        expect_device(op, x=beside, **{f"{argument}'s {name}": t})
    blocks, lines = -(-w.out_features // ROWS), -(-w.in_features // inputs_of_a_line(w.format))
    rows = blocks, w.groups, ROWS
    kinds = SCALE_TYPES if w.nested is None else (torch.uint8,)
    wanted: list[tuple[str, torch.Tensor | None, tuple, tuple]] = [
        ("codes", w.codes, (torch.uint8,), (blocks, lines, 64)),
        ("scales", w.scales, kinds, rows),
        ("offsets", w.offsets, SCALE_TYPES, rows),
        ("input_order", w.input_order, (torch.int32,), (w.in_features,)),
    ]
    if w.nested is not None:
        table, absmax, _, block = w.nested
        if block < 1:
            raise ValueError(f"{op}: {argument}'s nested block is {block}, need at least 1")
        count = -(-w.out_features * w.groups // block)
        wanted += [
            ("nested table", table, SCALE_TYPES, (256,)),
            ("nested absmax", absmax, SCALE_TYPES, (count,)),
        ]
    for part, tensor, dtypes, shape in wanted:
        if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != shape):
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(
                f"{op}: {argument}'s {part} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"need {names} of shape {tuple(shape)}"
            )
    object.__setattr__(w, "_is_whole", True)
