"""The front desk: every public operator, on one page."""

from tilewright.ops.attention import ShiftedSegments, flash_attention, flash_decode
from tilewright.ops.common import PackedWeight
from tilewright.ops.linear import fused_linear, lora_linear, multi_lora_linear, quantized_linear

__all__ = [
    "PackedWeight",
    "ShiftedSegments",
    "flash_attention",
    "flash_decode",
    "fused_linear",
    "lora_linear",
    "multi_lora_linear",
    "quantized_linear",
]
