"""What the readers of foreign checkpoints share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def take(op: str, tensors: Mapping[str, torch.Tensor], name: str, part: str) -> torch.Tensor:
    """A tensor of a layer. ValueError: it is not there."""
    at = key(name, part)
    if at not in tensors:
        prefix = f"{name}." if name else ""
        there = sorted(k for k in tensors if k.startswith(prefix))
        shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
        raise ValueError(f"{op}: {at} is missing; of this layer there are: {shown or 'none'}")
    return tensors[at]


def words(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., W) int32 -> (..., W * 32 / bits) int32, the lowest bits of a word first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=tensor.device)
    return (tensor[..., None] >> shifts & (2**bits - 1)).flatten(-2)
