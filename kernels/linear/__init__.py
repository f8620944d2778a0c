"""Linear layers over dense or packed weights, with low-rank updates; see README.md beside this."""

from tilewright.ops.linear.api import (
    fused_linear,
    lora_linear,
    multi_lora_linear,
    quantized_linear,
)

__all__ = ["fused_linear", "lora_linear", "multi_lora_linear", "quantized_linear"]
