"""What the C++ kernels of all rooms ask of a call, and what they call its dtype."""

from __future__ import annotations

import torch

from tilewright.native import why_not_native

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NUMBERS = {dtype: number for number, dtype in enumerate(NAMES)}  # csrc/common/dtype.h


def why_not_on_cpu(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"tensors are on {device}"
    if dtype not in NAMES:
        return f"no kernel for {dtype}"
    return why_not_native()
