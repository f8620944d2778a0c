"""What a call of the linear room is about, and its tensors under one roof.

Axes: T tokens, I in, O out, R rank of the low-rank update, G groups of inputs that share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.ops.common.packed import NestedScales, PackedWeight
from tilewright.ops.common.sparse_delta import WeightDelta

DENSE = "dense"


class Operands(NamedTuple):
    """The tensors beside x; None where a call has none. The operators take them in this order.

    weight           (O, I) dense, in x.dtype
    codes ..         the tensors of a PackedWeight
    bias             (O,)
    out_scale        (O,) factor of the base product and bias
    down             (R, I)
    up               (O, R)
    row_adapters     (T,) int32, adapter of a row, -1 for none
    column_adapters  (R,) int32, adapter of a row of down
    column_scales    (R,) float32, instead of the number `scale`
    dropout_seed     (1,) int64
    delta_offsets .. the tensors of a WeightDelta
    """

    weight: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    input_order: torch.Tensor | None = None
    nested_table: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    row_adapters: torch.Tensor | None = None
    column_adapters: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None
    delta_offsets: torch.Tensor | None = None
    delta_columns: torch.Tensor | None = None
    delta_values: torch.Tensor | None = None


OPERANDS = Operands._fields


class Problem(NamedTuple):
    """A call without its tensors: what decides who can run it, and how.

    format            "dense", or a key of FORMATS
    group_size        inputs that share a scale; 0 for dense
    nested_block      scales that share an absmax; 0 without nesting
    activation        "none" or "relu", between the two low-rank products
    int8_activations  x is rounded to 8 bits a row before it meets the packed weight
    needs_grad        whether a gradient will be asked for
    has_delta         whether a sparse delta is added to the weight
    n_deltas          0, or how many the rows choose from by their adapter, one below the other
    """

    device: str
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    rank: int = 0
    format: str = DENSE
    group_size: int = 0
    nested_offset: float = 0.0
    nested_block: int = 0
    scale: float = 1.0
    activation: str = "none"
    dropout_p: float = 0.0
    int8_activations: bool = False
    needs_grad: bool = False
    has_delta: bool = False
    n_deltas: int = 0

    def packed(self, o: Operands) -> PackedWeight:
        """The packed weight again, from its tensors."""
        assert o.codes is not None and o.scales is not None
        nested = None
        if o.nested_table is not None and o.nested_absmax is not None:
            nested = NestedScales(
                o.nested_table, o.nested_absmax, self.nested_offset, self.nested_block
            )
        return PackedWeight(
            self.format, self.out_features, self.in_features, self.group_size, o.codes, o.scales,
            o.offsets, o.input_order, nested, self.dtype,
        )  # fmt: skip

    def delta(self, o: Operands) -> WeightDelta:
        """The delta again, from its tensors; several are (A O, I)."""
        assert o.delta_offsets is not None and o.delta_columns is not None
        assert o.delta_values is not None
        return WeightDelta(
            max(self.n_deltas, 1) * self.out_features, self.in_features, o.delta_offsets,
            o.delta_columns, o.delta_values,
        )  # fmt: skip
