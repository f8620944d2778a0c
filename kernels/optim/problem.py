"""What decides who can run a call of the optim room.

Axes: N entries of a parameter that train, B blocks of them, R rows, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STATE_BLOCK = 256  # entries of an 8-bit state that share a scale; csrc/optim/optim.h
MEAN_EXPONENTS, SQUARE_EXPONENTS = 15, 31  # of its codes; csrc/optim/state_codes.h
PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)
NEAREST, STOCHASTIC = "nearest", "stochastic"
ROUNDINGS = (NEAREST, STOCHASTIC)


class Problem(NamedTuple):
    """A call without its tensors."""

    operator: str
    device: str
    dtype: torch.dtype


def rows_and_columns(n_rows: int, n_columns: int, row_offsets, columns):
    """(N,) int64 each: the cells that a call is about, all of them where none are named."""
    if row_offsets is None:
        cells = torch.arange(n_rows * n_columns)
        return cells // max(n_columns, 1), cells % max(n_columns, 1)
    rows = torch.arange(n_rows, device=columns.device)
    rows = torch.repeat_interleave(rows, row_offsets.diff(), output_size=columns.numel())
    wide = columns.long()
    return rows, wide & 0xFFFF if columns.dtype == torch.int16 else wide
