"""Flash attention with per-head-group segments; see README.md beside this file."""

from tilewright.ops.attention.api import flash_attention, flash_decode
from tilewright.ops.attention.append import append_to_cache
from tilewright.ops.attention.problem import ShiftedSegments

__all__ = ["ShiftedSegments", "append_to_cache", "flash_attention", "flash_decode"]
