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
