"""The front desk: every public operator, on one page."""

from tilewright.ops.attention import ShiftedSegments, flash_attention, flash_decode
from tilewright.ops.common import PackedWeight
from tilewright.ops.linear import fused_linear, lora_linear, multi_lora_linear, quantized_linear
from tilewright.ops.quant import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    ErrorStatistics,
    Int4,
    Int8,
    dequantize_weight,
    error_statistics,
    quantize_activations,
    quantize_weight,
)

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "ErrorStatistics",
    "Int4",
    "Int8",
    "PackedWeight",
    "ShiftedSegments",
    "dequantize_weight",
    "error_statistics",
    "flash_attention",
    "flash_decode",
    "fused_linear",
    "lora_linear",
    "multi_lora_linear",
    "quantize_activations",
    "quantize_weight",
    "quantized_linear",
]
