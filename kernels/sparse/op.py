"""torch.library schema and fake of the sparse room's one kernel.

What works on deltas is plain torch on a few tensors between steps, and needs no operator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.sparse import reference

library = torch.library.Library("tilewright", "FRAGMENT")
library.define("largest_gradients(Tensor dy, Tensor x, SymInt k, str impl) -> Tensor")


class Problem(NamedTuple):
    """A call without its tensors."""

    device: str
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    k: int


def problem_of(dy: torch.Tensor, x: torch.Tensor, k: int) -> Problem:
    return Problem(x.device.type, x.dtype, x.shape[0], x.shape[1], dy.shape[1], k)


def _largest(dy, x, k, impl):
    name = choose.choose("largest_gradients", impl, problem_of(dy, x, k))
    if name == "cpp_cpu":
        from tilewright.ops.sparse import cpp_cpu

        places = cpp_cpu.largest_gradients(dy, x, k)
    elif name == "triton_gpu":
        from tilewright.ops.sparse import triton_gpu

        places = triton_gpu.largest_gradients(dy, x, k)
    else:
        places = reference.largest_gradients(dy, x, k)
    if len(places) < k:
        raise ValueError(
            f"largest_gradients: only {len(places)} entries of dy^T x are numbers, need k = {k}; "
            "dy or x holds NaN or infinity"
        )
    return places


library.impl("largest_gradients", _largest, "CPU")
library.impl("largest_gradients", _largest, "CUDA")


@torch.library.register_fake("tilewright::largest_gradients", lib=library)
def _(dy, x, k, impl):
    return x.new_empty(k, dtype=torch.int64)


def largest_gradients(dy, x, k, impl):
    if may_go_direct(dy, x):
        return _largest(dy, x, k, impl)
    return torch.ops.tilewright.largest_gradients(dy, x, k, impl)
