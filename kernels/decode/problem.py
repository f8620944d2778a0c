"""What decides who can run a call of the decode room.

Axes: B rows, V tokens of the vocabulary, P prompt and G generated tokens of a row, T experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
# columns of the operators' per-row settings; csrc/decode/decode.h
REALS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
WHOLES = ("top_k", "seed", "step")
LEAST_TEMPERATURE = 1e-30  # above 0: below it the quotients would leave float32
RULES = ("single", "grid", "per_expert")


class Problem(NamedTuple):
    """A call without its tensors."""

    operator: str
    device: str
    dtype: torch.dtype
