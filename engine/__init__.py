"""tilewright: hand-written kernels behind the operators of PyTorch and Hugging Face models."""

if __name__ != "tilewright":
    raise ImportError(
        f"this package is imported as 'tilewright', not as {__name__!r}; "
        "leave the source folder or install it with `pip install -e .`"
    )

# torch first: the kernels' OpenMP regions must bind to the runtime that torch has loaded
import torch  # noqa: F401

from tilewright.adapt import accelerate, restore
from tilewright.choose import explain
from tilewright.generate import generate
from tilewright.ops import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int4,
    Int8,
    PackedWeight,
    ShiftedSegments,
    dequantize_weight,
    error_statistics,
    flash_attention,
    flash_decode,
    fused_linear,
    lora_linear,
    multi_lora_linear,
    quantize_activations,
    quantize_weight,
    quantized_linear,
)
from tilewright.plug_in import register_when_imported
from tilewright.quantized import QuantizedLinear, dequantize, quantize
from tilewright.train import finetune

__version__ = "0.1.0"

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "Int4",
    "Int8",
    "PackedWeight",
    "QuantConfig",
    "QuantizedLinear",
    "ShiftedSegments",
    "__version__",
    "accelerate",
    "dequantize",
    "dequantize_weight",
    "error_statistics",
    "explain",
    "finetune",
    "flash_attention",
    "flash_decode",
    "fused_linear",
    "generate",
    "lora_linear",
    "multi_lora_linear",
    "quantize",
    "quantize_activations",
    "quantize_weight",
    "quantized_linear",
    "restore",
]

register_when_imported()


def __getattr__(name: str):
    if name == "QuantConfig":  # a class of transformers, which is slow to import
        from tilewright.quantizer import QuantConfig

        return QuantConfig
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
