"""dy and x -> the C++ kernel that looks through their product (csrc/sparse)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NAMES, why_not_on_cpu


def why_not(p) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    if t.is_conj() or t.is_neg():
        raise ValueError("largest_gradients: a negated view; call .resolve_neg() first")
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def largest_gradients(dy: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    if x.shape[0] == 0:  # all entries are 0
        return torch.arange(k)
    dy, x = _in_rows(dy), _in_rows(x)
    places = torch.empty(k, dtype=torch.int64)
    found = native().sparse_largest(
        NAMES[x.dtype], (x.shape[0], x.shape[1], dy.shape[1]), (dy.data_ptr(), dy.stride(0)),
        (x.data_ptr(), x.stride(0)), k, places.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return places[:found]
