"""What two rooms or more share; knows no room."""

from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.sparse_delta import WeightDelta

__all__ = ["PackedWeight", "WeightDelta"]
