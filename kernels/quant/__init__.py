"""Weights in few bits: quantize, pack, read what others have packed; see README.md beside this."""

from tilewright.ops.quant.api import (
    ErrorStatistics,
    dequantize_weight,
    error_statistics,
    quantize_activations,
    quantize_weight,
)
from tilewright.ops.quant.bitsandbytes import (
    dequantize_blockwise,
    quantize_blockwise,
    read_bitsandbytes,
    to_bitsandbytes,
)
from tilewright.ops.quant.checkpoints import read_awq, read_compressed_tensors, read_gptq
from tilewright.ops.quant.formats import FP4, FP8, MXFP4, NF4, Int4, Int8
from tilewright.ops.quant.gguf import read_gguf
from tilewright.ops.quant.saved import SavedWeights, load_packed, save_packed

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "ErrorStatistics",
    "Int4",
    "Int8",
    "SavedWeights",
    "dequantize_blockwise",
    "dequantize_weight",
    "error_statistics",
    "load_packed",
    "quantize_activations",
    "quantize_blockwise",
    "quantize_weight",
    "read_awq",
    "read_bitsandbytes",
    "read_compressed_tensors",
    "read_gguf",
    "read_gptq",
    "save_packed",
    "to_bitsandbytes",
]
