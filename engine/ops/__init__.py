"""The front desk: every public operator, on one page."""

from tilewright.ops.attention import ShiftedSegments, flash_attention, flash_decode

__all__ = ["ShiftedSegments", "flash_attention", "flash_decode"]
