"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/linear)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.linear.problem import Problem

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(p: Problem) -> str | None:
    if p.device != "cpu":
        return f"tensors are on {p.device}"
    if p.dtype not in NAMES:
        return f"no kernel for {p.dtype}"
    try:
        native()
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
    return None
