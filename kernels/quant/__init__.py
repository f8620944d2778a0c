"""Weights in few bits: quantize, pack, read what others have packed; see README.md beside this."""

from tilewright.ops.quant.api import (
    ErrorStatistics,
    dequantize_weight,
    error_statistics,
    quantize_activations,
    quantize_weight,
)
from tilewright.ops.quant.formats import FP4, FP8, MXFP4, NF4, Int4, Int8

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "ErrorStatistics",
    "Int4",
    "Int8",
    "dequantize_weight",
    "error_statistics",
    "quantize_activations",
    "quantize_weight",
]
