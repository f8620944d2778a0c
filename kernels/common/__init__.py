"""What two rooms or more share; knows no room."""

from tilewright.ops.common.packed import PackedWeight

__all__ = ["PackedWeight"]
