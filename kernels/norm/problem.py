"""What decides who can run a call of the norm room, and what its results look like.

Axes: T tokens, N the width of a row, B batch, L length, H heads, D head width, C angles of a head,
F features of a gated layer, V rows of an embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LLAMA, GEMMA, LAYER = "llama", "gemma", "layer"  # the kinds of norm, as the operator names them
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Problem(NamedTuple):
    """A call without its tensors."""

    operator: str
    device: str
    dtype: torch.dtype


def y_dtype(kind: str, dtype: torch.dtype, weight: torch.Tensor | None) -> torch.dtype:
    """Llama multiplies what it has rounded by the weight, as torch does: the wider dtype wins."""
    if kind != LLAMA or weight is None:
        return dtype
    return torch.promote_types(dtype, weight.dtype)


def stats_shape(kind: str, x: torch.Tensor) -> tuple[int, int]:
    """A row of 1 / sqrt(..), and with LAYER one of means; a column for each row of x."""
    n_rows = 1
    for n in x.shape[:-1]:
        n_rows *= n
    return (2 if kind == LAYER else 1), n_rows


def heads_last(x: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """(B, L, H, D) from what the caller gave."""
    return x.transpose(1, 2) if heads_first else x
