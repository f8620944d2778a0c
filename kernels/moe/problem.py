"""What a call of moe_mlp is about, and its tensors under one roof.

Axes: T tokens, K slots of a token, E experts, H features of a token, I width of an expert; where
2 I stands, it is I for an expert without a gate. A slot
(t, k) that goes to an expert is a row; rows stand expert by expert, in the order of their slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.ops.common.packed import NestedScales, PackedWeight

DENSE = "dense"
GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "reglu")
ALONE = ("silu", "gelu", "gelu_tanh", "relu")  # without a gate: the I rows of gate_up are all


class Operands(NamedTuple):
    """The weights; None where a call has none. The operators take them in this order.

    gate_up         (E, 2 I, H) dense, (E, H, 2 I) if transposed
    down            (E, H, I) dense, (E, I, H) if transposed
    gate_up_bias    (E, 2 I)
    down_bias       (E, H)
    up_a, up_b      (E, R, H) and (E, 2 I, R), the low-rank update of gate_up, of any strides
    down_a, down_b  (E, R, I) and (E, H, R), that of down
    up_codes ..     the tensors of a packed gate_up of shape (E 2 I, H)
    down_codes ..   the same of a packed down of shape (E H, I)
    """

    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up_a: torch.Tensor | None = None
    up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    up_codes: torch.Tensor | None = None
    up_scales: torch.Tensor | None = None
    up_offsets: torch.Tensor | None = None
    up_nested_table: torch.Tensor | None = None
    up_nested_absmax: torch.Tensor | None = None
    down_codes: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    down_offsets: torch.Tensor | None = None
    down_nested_table: torch.Tensor | None = None
    down_nested_absmax: torch.Tensor | None = None


OPERANDS = Operands._fields


class Packing(NamedTuple):
    """What the tensors of a PackedWeight do not say; the defaults are those of a dense weight."""

    format: str = DENSE
    group_size: int = 0
    nested_offset: float = 0.0
    nested_block: int = 0


class Problem(NamedTuple):
    """A call without its tensors: what decides who can run it, and how.

    activation    one of GATED or ALONE
    alpha, limit  of clamped_swiglu
    interleaved   gate and up alternate in the rows of gate_up, else all gates come first
    transposed    both weights have their axes after E exchanged
    scale_input   a gate multiplies its expert's input instead of its output
    up, down      how the weights are packed
    up_scale      factor of up_b up_a, and down_scale of down_b down_a; None without an update
    """

    device: str
    dtype: torch.dtype
    tokens: int
    slots: int
    experts: int
    features: int
    width: int
    activation: str = "swiglu"
    alpha: float = 0.0
    limit: float = 0.0
    interleaved: bool = False
    transposed: bool = False
    scale_input: bool = False
    up: Packing = Packing()
    down: Packing = Packing()
    up_scale: float | None = None
    down_scale: float | None = None

    @property
    def lines(self) -> int:
        """Rows of an expert's gate_up, 2 I or without a gate I."""
        return self.width if self.activation in ALONE else 2 * self.width

    def packed_gate_up(self, o: Operands) -> PackedWeight:
        """The packed weight again, from its tensors."""
        n_out = self.experts * self.lines
        return _packed(self.up, n_out, self.features, self.dtype, *o[8:13])

    def packed_down(self, o: Operands) -> PackedWeight:
        n_out = self.experts * self.features
        return _packed(self.down, n_out, self.width, self.dtype, *o[13:18])


def _packed(packing, n_out, n_in, dtype, codes, scales, offsets, table, absmax) -> PackedWeight:
    nested = None
    if table is not None:
        nested = NestedScales(table, absmax, packing.nested_offset, packing.nested_block)
    return PackedWeight(
        packing.format, n_out, n_in, packing.group_size, codes, scales, offsets, None, nested, dtype
    )
